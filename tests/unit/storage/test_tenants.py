"""Two tenants in one store: the same names, the same images, bounds of their own."""

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.auth.principal import Principal
from service.domain import DEFAULT_TENANT, Manifest, ModelKey
from service.errors import (
    GraftError,
    InvalidInput,
    NotFound,
    OverQuota,
    Reason,
)
from service.ingest.archives import FILE_BYTES
from service.storage.blobs import Blobs
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from tests.keys import BIRDS, key
from tests.unit.ingest.packing import tar_of
from tests.unit.storage.conftest import GUARD_S, Publish, digest, manifest
from tests.unit.storage.test_datasets import IMAGES, Images, leftovers

ACME, BETA = "acme", "beta"
ACMES, BETAS = key("birds", ACME), key("birds", BETA)


def upload(datasets: DatasetStore, tenant: str, images: Images = IMAGES, **bounds: object) -> str:
    """Uploads images; answers with the dataset's id."""
    sending = datasets.begin_upload("pets", "", tenant=tenant, **bounds)  # type: ignore[arg-type]
    try:
        for label, content, split in images:
            sending.add_image(label, content, "", split)
        return sending.finish().dataset_id
    finally:
        sending.abort()


def images(count: int, size: int) -> Images:
    return [(f"c{n % 2}", b"PIC%02d" % n + b"." * (size - 5), "") for n in range(count)]


@given(st.sampled_from([ACME, BETA, DEFAULT_TENANT]), st.text(max_size=20) | st.just("acme/ants"))
def test_whatever_is_taken_for_a_name_its_key_is_ones_own(tenant: str, name: str) -> None:
    principal = Principal("token", tenant, frozenset())
    assert principal.key(name) == ModelKey(tenant, name)


def test_people_see_the_tenant_of_a_key_unless_it_is_the_default() -> None:
    assert str(key("ants")) == "ants"
    assert f"{key('ants', ACME)}" == "acme/ants"


def test_what_is_close_is_looked_for_among_ones_own(models: ModelStore, publish: Publish) -> None:
    publish(ACMES, "job-1")
    for model in (key("bird", BETA), key("bird"), key("default/x")):
        with pytest.raises(NotFound) as caught:
            models.get_model(model)
        assert caught.value.message.endswith("there are no models yet; fine-tune one")
    with pytest.raises(NotFound) as caught:
        models.get_model(key("bird", ACME))
    assert caught.value.message == "no model is called 'bird': did you mean birds?"
    with pytest.raises(InvalidInput, match="empty"):
        models.get_model(key("", ACME))


def test_messages_show_what_the_tenant_calls_its_model(
    models: ModelStore, publish: Publish
) -> None:
    publish(ACMES, "job-1")
    models.set_alias(ACMES, "prod", 1)
    calls = [
        lambda: models.get_version(ACMES, 7, None),
        lambda: models.get_version(ACMES, None, "other"),
        lambda: models.delete_version(ACMES, 1),
        lambda: models.promote_version(ACMES, 1),
        lambda: models.roll_back_alias(ACMES, "latest"),
        lambda: models.set_alias(ACMES, "other", 7),
        lambda: models.delete_alias(ACMES, "other"),
    ]
    for call in calls:
        with pytest.raises(GraftError, match="birds") as caught:
            call()  # type: ignore[no-untyped-call]
        assert ACME not in caught.value.message


def test_a_tenant_stores_its_datasets_and_its_versions(
    models: ModelStore, blobs: Blobs, datasets: DatasetStore, publish: Publish
) -> None:
    upload(datasets, ACME, images(4, 100))
    taken = datasets.stored_bytes(ACME)
    assert 4 * 100 < taken < 4 * (100 + 2 * FILE_BYTES)
    # What two tenants have is each one's.
    upload(datasets, BETA, images(4, 100))
    assert datasets.stored_bytes(BETA) == taken
    publish(ACMES, "job-1", head=b"h" * 50)
    version = models.get_version(ACMES, None, None)
    own_files = [
        version.manifest_digest,
        version.head_digest,
        version.answers_digest,
        version.report_json_digest,
        version.report_html_digest,
    ]
    own = sum(len(blobs.read(each, "file")) for each in own_files)
    # The backbone is a pretrained one, which stays for all.
    assert datasets.stored_bytes(ACME) == taken + own
    assert (datasets.stored_bytes(BETA), datasets.stored_bytes(DEFAULT_TENANT)) == (taken, 0)
    models.delete_model(ACMES)
    assert datasets.stored_bytes(ACME) == taken


def test_a_backbone_of_its_own_counts_once_for_each_tenant(
    models: ModelStore, datasets: DatasetStore, publish: Publish
) -> None:
    trained = {"method": "model_based", "backbone": b"b" * 10_000}
    sizes = []
    for number, model in enumerate((ACMES, ACMES, BETAS)):
        publish(model, f"job-{number}", **trained)
        sizes.append(datasets.stored_bytes(model.tenant))
    assert 10_000 < sizes[0] < 12_000
    assert sizes[1] - sizes[0] < 2_000
    # Whether another has the same file cannot be told from what is left.
    assert abs(sizes[2] - sizes[0]) < 100
    # It counts for as long as a version is on it, whichever came first.
    models.delete_version(ACMES, 1)
    assert datasets.stored_bytes(ACME) == sizes[1] - sizes[0] + 10_000
    models.delete_model(ACMES)
    assert datasets.stored_bytes(ACME) == 0


def test_a_quantised_backbone_is_everybodys_as_no_tenants_images_are_in_it(
    models: ModelStore, publish: Publish
) -> None:
    whole: Manifest = manifest("job-0")
    publish(ACMES, "job-1", backbone=b"float")
    publish(ACMES, "job-2", backbone=b"int8", serving_precision="int8")
    publish(BIRDS, "job-3", backbone=b"int8 again", serving_precision="int8")

    def known(tenant: str) -> list[tuple[str, str]]:
        return [(e.weights, e.digest) for e in models.exported_backbones(whole.backbone, tenant)]

    forms = [
        (whole.weights, digest(b"float")),
        (f"{whole.weights}:int8", digest(b"int8")),  # the first
    ]
    assert known(ACME) == known(BETA) == known(DEFAULT_TENANT) == forms


def test_an_upload_ends_as_soon_as_there_is_no_room(datasets: DatasetStore, tmp_path: Path) -> None:
    upload(datasets, ACME, images(4, 100))
    stored = datasets.stored_bytes(ACME)
    most = stored + 2 * FILE_BYTES + 250
    sending = datasets.begin_upload("", "", tenant=ACME, max_stored_bytes=most)
    for label, content, split in images(2, 101):
        sending.add_image(label, content, "", split)
    with pytest.raises(OverQuota) as caught:
        sending.add_image("c0", b"PIC99" + b"." * 95, "", "")
    assert (caught.value.subject, caught.value.reason) == ("stored_bytes", Reason.QUOTA_EXCEEDED)
    sending.abort()
    sending = datasets.begin_upload("", "", tenant=ACME, max_stored_bytes=most)
    with pytest.raises(OverQuota, match=r"take 0\.0\S* MB of the 0\.0\S* MB .* delete"):
        sending.write(b"x" * (most - stored + 1))
    sending.abort()
    with pytest.raises(OverQuota):
        datasets.begin_upload("", "", tenant=ACME, max_stored_bytes=stored)
    # Others have bounds of their own, and what fits is taken.
    upload(datasets, BETA, images(4, 100), max_stored_bytes=stored)
    upload(datasets, ACME, images(2, 125), max_stored_bytes=stored + 4 * FILE_BYTES)
    assert leftovers(tmp_path) == []


def test_two_uploads_at_once_do_not_share_the_room_that_one_leaves(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    upload(datasets, BETA, images(2, 100))
    one = datasets.stored_bytes(BETA)
    most = one + 2 * FILE_BYTES
    both = [datasets.begin_upload("", "", tenant=ACME, max_stored_bytes=most) for _ in range(2)]
    for number, sending in enumerate(both):
        for label, content, split in images(2, 100 + number):
            sending.add_image(label, content, "", split)
    start = threading.Barrier(2)
    ended: list[object] = []

    def finish(number: int) -> None:
        start.wait(GUARD_S)
        try:
            ended.append(both[number].finish())
        except OverQuota as error:
            ended.append(error.subject)

    threads = [threading.Thread(target=finish, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    assert sorted(type(end).__name__ for end in ended) == ["DatasetRecord", "str"]
    assert abs(datasets.stored_bytes(ACME) - one) < 100
    assert leftovers(tmp_path) == []


def test_tiny_images_count_what_they_take_on_disk(datasets: DatasetStore, tmp_path: Path) -> None:
    archive = tmp_path / "tiny.tar"
    tiny = images(90, 10)
    archive.write_bytes(tar_of({f"{i[0]}/{n}.png": i[1] for n, i in enumerate(tiny)}))
    room = 90 * FILE_BYTES // 2
    with pytest.raises(OverQuota):
        datasets.import_archive(archive, tenant=ACME, max_stored_bytes=room)
    with pytest.raises(OverQuota):
        upload(datasets, ACME, tiny, max_stored_bytes=room)
    upload(datasets, ACME, tiny)
    files = [path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]
    assert datasets.stored_bytes(ACME) == sum(file.stat().st_size for file in files)


def test_images_that_are_stored_already_need_no_room(datasets: DatasetStore) -> None:
    known = upload(datasets, ACME, images(4, 100))
    bounds = {"max_stored_bytes": datasets.stored_bytes(ACME), "may_be_stored": True}
    assert upload(datasets, ACME, images(4, 100), **bounds) == known
    with pytest.raises(OverQuota):
        upload(datasets, ACME, images(4, 101), **bounds)


def test_an_archive_is_unpacked_as_far_as_there_is_room(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    archive = tmp_path / "pets.tar"
    archive.write_bytes(
        tar_of({f"{label}/{n}.png": content for n, (label, content, _) in
                enumerate(images(4, 10_000))})
    )  # fmt: skip
    record = datasets.import_archive(archive, tenant=BETA)
    most = datasets.stored_bytes(BETA)
    for bound in (1_000, most - 1):
        with pytest.raises(OverQuota):
            datasets.import_archive(archive, tenant=ACME, max_stored_bytes=bound)
        assert leftovers(tmp_path) == []
    record = datasets.import_archive(archive, tenant=ACME, max_stored_bytes=most)
    assert (record.tenant, record.size_bytes) == (ACME, 40_000)
    with pytest.raises(OverQuota):
        datasets.check_room(ACME, most)
    datasets.delete(record.dataset_id, ACME)
    datasets.check_room(ACME, most)
