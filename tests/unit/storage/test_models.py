import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.domain import VersionSource
from service.errors import (
    Damaged,
    GraftError,
    Internal,
    InvalidInput,
    NotFound,
    Reason,
)
from service.storage import version_rows
from service.storage.blobs import BlobFolder, BlobGone
from service.storage.changes import Changes
from service.storage.collector import Collector
from service.storage.database import Connection, Database
from service.storage.models import ModelStore
from service.storage.version_rows import NewVersion
from tests.keys import BIRDS, key
from tests.unit.storage.conftest import (
    GUARD_S,
    TENANT,
    Publish,
    digest,
    object_of,
    write_result,
)


def reason_of(error: pytest.ExceptionInfo[GraftError]) -> Reason:
    return error.value.reason


def test_publishing_numbers_versions_and_moves_latest(models: ModelStore, publish: Publish) -> None:
    assert [publish(BIRDS, f"job-{n}") for n in (1, 2, 3)] == [1, 2, 3]
    record = models.get_model(BIRDS)
    assert record.aliases == {"latest": 3}
    assert record.version_count == 3
    assert record.create_time_s <= record.update_time_s
    version = models.get_version(BIRDS, None, None)
    assert (version.version, version.job_id, version.aliases) == (3, "job-3", ("latest",))
    assert version.files == models.resolve(BIRDS, None, None)
    assert version.files.head_digest == digest(b"head of job-3")
    assert models.manifest(version).classes == ["cat", "dog"]


def test_publishing_for_a_job_twice_makes_one_version(models: ModelStore, publish: Publish) -> None:
    assert publish(BIRDS, "job-1") == 1
    assert publish(BIRDS, "job-1") == 1
    assert models.get_model(BIRDS).version_count == 1


def test_a_number_is_never_given_twice(models: ModelStore, publish: Publish) -> None:
    publish(BIRDS, "job-1")
    publish(BIRDS, "job-2")
    models.delete_version(BIRDS, 2)
    assert publish(BIRDS, "job-3") == 3


@pytest.mark.parametrize("alias", ["", "Prod", "7", "-x", "a" * 64])
def test_a_bad_alias_is_refused(models: ModelStore, publish: Publish, alias: str) -> None:
    publish(BIRDS, "job-1")
    with pytest.raises(InvalidInput) as caught:
        models.set_alias(BIRDS, alias, 1)
    assert caught.value.field == "alias"


def test_what_is_not_there_is_told_with_what_is(models: ModelStore, publish: Publish) -> None:
    with pytest.raises(NotFound, match="there are no models yet"):
        models.get_model(BIRDS)
    publish(BIRDS, "job-1")
    publish(BIRDS, "job-2")
    with pytest.raises(NotFound, match="did you mean birds") as caught:
        models.resolve(key("bird"), None, None)
    assert reason_of(caught) is Reason.MODEL_NOT_FOUND
    with pytest.raises(NotFound, match="its versions are 1, 2") as caught:
        models.resolve(BIRDS, 9, None)
    assert reason_of(caught) is Reason.VERSION_NOT_FOUND
    for missing in (lambda: models.set_alias(BIRDS, "x", 9),
                    lambda: models.delete_version(BIRDS, 9)):  # fmt: skip
        with pytest.raises(NotFound):
            missing()
    with pytest.raises(NotFound):
        models.list_versions(key("bears"), 0, "")
    with pytest.raises(InvalidInput):
        models.get_model(key(""))


@pytest.mark.parametrize(
    "changes", [{"method": "model_based"}, {"weights": "random:3"}], ids=["tuned", "random"]
)
def test_a_backbone_that_is_not_pretrained_is_not_offered_again(
    models: ModelStore, publish: Publish, changes: dict[str, str]
) -> None:
    publish(BIRDS, "job-1", **changes)
    assert models.exported_backbones("efficientnet_lite0", TENANT) == []


def test_models_and_versions_are_listed_in_pages_without_gaps(
    models: ModelStore, publish: Publish
) -> None:
    for n in range(5):
        publish(key(f"m{n}"), f"job-m{n}")
        publish(BIRDS, f"job-b{n}")
    names: list[str] = []
    token = ""
    while True:
        page, token = models.list_models(2, token, TENANT)
        names += [model.key.name for model in page]
        if not token:
            break
    assert names == ["birds", "m0", "m1", "m2", "m3", "m4"]
    first, token = models.list_versions(BIRDS, 3, "")
    models.delete_version(BIRDS, 3)
    rest, last = models.list_versions(BIRDS, 3, token)
    assert [v.version for v in first + rest] == [5, 4, 3, 2, 1]
    assert last == ""


def test_models_are_listed_by_the_beginning_of_their_name_and_by_labels_of_one_version(
    models: ModelStore, publish: Publish
) -> None:
    publish(key("m_1"), "job-1", labels={"team": "blue"})
    publish(key("m_1"), "job-2", labels={"site": "1"})
    publish(key("m-2"), "job-3", labels={"team": "blue", "site": "1"})
    publish(key("birds"), "job-4")

    def names(prefix: str = "", **labels: str) -> list[str]:
        return [m.key.name for m in models.list_models(0, "", TENANT, prefix, labels)[0]]

    assert names("m") == ["m-2", "m_1"]
    assert names("m_") == ["m_1"]
    assert names("M") == []
    assert names(team="blue") == ["m-2", "m_1"]
    assert names(team="blue", site="1") == ["m-2"]
    assert names("m_", team="blue") == ["m_1"]
    models.delete_version(key("m_1"), 1)
    assert names("m_", team="blue") == []


def test_counts_say_what_there_is(models: ModelStore, publish: Publish) -> None:
    publish(BIRDS, "job-1")
    publish(key("bears"), "job-2")
    models.set_alias(key("bears"), "prod", 1)
    assert models.counts() == {"models": 2, "versions": 2, "aliases": 3, "backbones": 1}


def test_a_rolled_back_publish_is_as_if_it_never_was(
    database: Database, models: ModelStore, publish: Publish, tmp_path: Path
) -> None:
    publish(BIRDS, "job-1")
    before = models.get_version(BIRDS, None, None)
    stored = models.put_result(write_result(tmp_path / "b", "job-2"))

    def fail() -> None:
        with database.transaction() as connection:
            models.publish(connection, NewVersion(model=BIRDS, job_id="job-2", stored=stored))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert models.get_version(BIRDS, None, None) == before
    assert models.resolve(BIRDS, None, None) == before.files


def test_a_job_does_not_publish_another_result_than_it_has(
    database: Database, models: ModelStore, publish: Publish, tmp_path: Path
) -> None:
    publish(BIRDS, "job-1")
    stored = models.put_result(write_result(tmp_path / "b", "job-1", train_count=9))
    with database.transaction() as connection, pytest.raises(Internal, match="another result"):
        models.publish(connection, NewVersion(model=BIRDS, job_id="job-1", stored=stored))


def test_a_result_that_was_collected_is_put_again(
    database: Database, store: BlobFolder, models: ModelStore, tmp_path: Path
) -> None:
    out_dir = write_result(tmp_path / "b", "job-1")
    collector = Collector(database, store, grace_s=0)

    def publish() -> None:
        with database.transaction() as connection:
            models.publish(connection, NewVersion(model=BIRDS, job_id="job-1", stored=stored))

    stored = models.put_result(out_dir)
    assert collector.run().deleted == 6
    with pytest.raises(BlobGone):
        publish()
    stored = models.put_result(out_dir)
    publish()
    assert models.manifest(models.get_version(BIRDS, 1, None)).job_id == "job-1"


def test_what_no_version_needs_is_collected_and_nothing_else(
    database: Database, store: BlobFolder, models: ModelStore, publish: Publish
) -> None:
    for job_id, model, backbone in (
        ("job-1", BIRDS, b"tuned"),
        ("job-2", BIRDS, b"shared"),
        ("job-3", key("bears"), b"shared"),
    ):
        publish(model, job_id, backbone=backbone, method="model_based")
    collector = Collector(database, store, grace_s=0)
    assert collector.run().deleted == 0
    models.delete_version(BIRDS, 1)
    assert collector.run().deleted == 6
    assert not object_of(store, digest(b"tuned")).exists()
    models.delete_model(BIRDS)
    assert collector.run().deleted == 5
    assert object_of(store, digest(b"shared")).exists()
    assert models.manifest(models.get_version(key("bears"), None, None)).job_id == "job-3"


def test_an_exported_backbone_stays_known_without_versions(
    database: Database, store: BlobFolder, models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1", backbone=b"pretrained")
    models.delete_model(BIRDS)
    Collector(database, store, grace_s=0).run()
    (exported,) = models.exported_backbones("efficientnet_lite0", TENANT)
    assert (exported.weights, exported.digest) == ("IMAGENET1K_V1", digest(b"pretrained"))
    assert publish(BIRDS, "job-2", backbone=None, backbone_digest=exported.digest) == 1
    # One that is missing is exported again, and put in its place.
    object_of(store, exported.digest).unlink()
    assert models.exported_backbones("efficientnet_lite0", TENANT) == []
    assert publish(BIRDS, "job-3", backbone=b"pretrained") == 2
    assert models.exported_backbones("efficientnet_lite0", TENANT) == [exported]


def test_a_version_knows_what_it_was_trained_on(
    database: Database, models: ModelStore, tmp_path: Path
) -> None:
    sources = [
        VersionSource("source", "ds-1", ""),
        VersionSource("source", "", "/images"),
        VersionSource("target", "ds-2", ""),
    ]
    stored = models.put_result(write_result(tmp_path / "b", "job-1"))
    new = NewVersion(model=BIRDS, job_id="job-1", stored=stored, sources=sources)
    with database.transaction() as connection:
        models.publish(connection, new)
    assert models.sources(BIRDS, 1) == sources
    assert models.sources(BIRDS, 2) == []
    models.delete_model(BIRDS)
    assert models.sources(BIRDS, 1) == []


def test_a_manifest_that_is_damaged_is_named_and_its_version_can_be_deleted(
    models: ModelStore, store: BlobFolder, publish: Publish
) -> None:
    for n in (1, 2):
        publish(BIRDS, f"job-{n}")
    record = models.get_version(BIRDS, 1, None)
    object_of(store, record.manifest_digest).write_bytes(b"rot")
    for _ in range(2):
        with pytest.raises(Damaged, match="manifest of version 1 of birds") as caught:
            models.manifest(record)
        assert reason_of(caught) is Reason.MODEL_UNLOADABLE
    models.delete_version(BIRDS, 1)
    assert [version.version for version in models.list_versions(BIRDS, 0, "")[0]] == [2]


def test_a_manifest_is_read_once(models: ModelStore, store: BlobFolder, publish: Publish) -> None:
    publish(BIRDS, "job-1")
    record = models.get_version(BIRDS, 1, None)
    first = models.manifest(record)
    object_of(store, record.manifest_digest).unlink()
    assert models.manifest(record) == first


def _reads(models: ModelStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry whenever the database is read."""
    reads: list[int] = []
    database = models._database
    original = database.read
    monkeypatch.setattr(database, "read", lambda: reads.append(1) or original())  # type: ignore[func-returns-value]
    return reads


def test_a_look_up_that_was_asked_before_reads_no_database(
    models: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(BIRDS, "job-1")
    reads = _reads(models, monkeypatch)
    first = models.resolve(BIRDS, None, None)
    assert reads
    reads.clear()
    assert models.resolve(BIRDS, None, None) is models.remembered(BIRDS, None, None) is first
    assert reads == []
    # What is not there may come at any time, and is looked for again.
    for _ in range(2):
        reads.clear()
        with pytest.raises(NotFound):
            models.resolve(BIRDS, 2, None)
        assert reads


def test_a_look_up_is_forgotten_with_a_change_of_another_replica(
    database: Database, models: ModelStore, change_log: Changes, publish: Publish
) -> None:
    publish(BIRDS, "job-1")
    first = models.resolve(BIRDS, None, None)
    other = Changes(database)
    with database.transaction() as connection:
        connection.execute("UPDATE versions SET head_digest = manifest_digest")
        other.note(connection, "model", *BIRDS)
    assert models.resolve(BIRDS, None, None) is first
    change_log.poll()
    assert models.resolve(BIRDS, None, None) != first


def test_the_look_ups_used_last_are_kept(
    models: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.storage.models._MAX_RESOLVED", 2)
    for n in range(3):
        publish(key(f"m{n}"), f"job-{n}")
    models.resolve(key("m0"), None, None)
    models.resolve(key("m1"), None, None)
    models.remembered(key("m0"), None, None)
    models.resolve(key("m2"), None, None)
    assert [models.remembered(key(f"m{n}"), None, None) is None for n in range(3)] == [
        False, True, False,
    ]  # fmt: skip


def test_a_look_up_that_a_publish_overtakes_is_not_remembered(
    models: ModelStore, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(BIRDS, "job-1")
    read, go_on = threading.Event(), threading.Event()
    original = version_rows.get

    def slow(connection: Connection, *asked: object) -> object:
        row = original(connection, *asked)  # type: ignore[arg-type]
        read.set()
        assert go_on.wait(GUARD_S)
        return row

    with ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(version_rows, "get", slow)
            stale = pool.submit(models.resolve, BIRDS, None, None)
            assert read.wait(GUARD_S)
        publish(BIRDS, "job-2")
        go_on.set()
        assert stale.result(GUARD_S).version == 1
        assert models.resolve(BIRDS, None, None).version == 2


def test_a_pin_is_of_one_version_and_goes_with_it(models: ModelStore, publish: Publish) -> None:
    for n in (1, 2):
        publish(BIRDS, f"job-{n}")
    assert models.pinned() == []
    for number in (1, 2):
        models.pin(BIRDS, number)
        assert models.pinned() == [models.resolve(BIRDS, number, None)]
    models.unpin(BIRDS)
    models.unpin(BIRDS)
    assert models.pinned() == []
    with pytest.raises(NotFound):
        models.pin(BIRDS, 3)
    with pytest.raises(NotFound):
        models.unpin(key("bears"))
    models.pin(BIRDS, 1)
    models.delete_version(BIRDS, 1)
    assert models.pinned() == []


def test_what_other_replicas_must_know_is_written_with_every_change(
    models: ModelStore, change_log: Changes, publish: Publish
) -> None:
    heard: list[tuple[str, str, str]] = []
    change_log.listen("model", lambda *who: heard.append(("model", *who)))
    change_log.listen("pins", lambda *who: heard.append(("pins", *who)))
    publish(BIRDS, "job-1")
    publish(BIRDS, "job-2")
    models.set_alias(BIRDS, "prod", 2)
    models.roll_back_alias(BIRDS, "latest")
    models.delete_alias(BIRDS, "prod")
    models.pin(BIRDS, 2)
    models.unpin(BIRDS)
    models.delete_version(BIRDS, 2)
    models.delete_model(BIRDS)
    kinds = [*["model"] * 5, "pins", "pins", "model", "model"]
    assert heard == [(kind, *BIRDS) for kind in kinds]
