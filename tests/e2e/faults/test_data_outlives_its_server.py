"""The server is killed while datasets, models and aliases change: all of a change, or nothing."""

import hashlib
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import graftml
import pytest
from PIL import Image

from service import fsck
from service.storage.blobs import BlobFolder
from service.storage.collector import Collector
from service.storage.database import Database
from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House, until_death, wait_until

pytestmark = pytest.mark.e2e


def test_an_upload_whose_server_is_killed_can_be_sent_again_and_is_stored_once(
    house: House, images: Path
) -> None:
    def upload(client: graftml.Client, point: str) -> graftml.Dataset:
        if point == "dataset.image_written":
            return client.upload_dataset((file.parent.name, file) for file in files)
        return client.upload_dataset(images)

    files = sorted(images.rglob("*.png"))
    for point in (
        "dataset.image_written",
        "dataset.chunk_written",
        "dataset.read",
        "dataset.files_put",
        "dataset.kept",
    ):
        client = house.start(f"kill@{point}")
        assert not list(client.list_datasets())
        # What an upload before was sent is not in the way.
        assert not list((house.data_dir / "uploads").iterdir())
        with until_death():
            upload(client, point)
            raise AssertionError("it was answered")
        house.died()
    client = house.start()
    [kept] = client.list_datasets()
    for point in ("dataset.kept", "dataset.image_written"):
        assert upload(client, point).dataset_id == kept.dataset_id
    assert [dataset.image_count for dataset in client.list_datasets()] == [4]
    assert client.fine_tune(kept, "ants").wait(GUARD_S).version == 1
    house.is_sound()


def test_an_upload_whose_reader_dies_is_refused_and_the_server_goes_on(
    house: House, images: Path
) -> None:
    # Each is a process of its own, which finds what the last one did done.
    client = house.start("kill@dataset.decoding;memory@dataset.decoding")
    for _ in range(2):
        with pytest.raises(graftml.errors.ResourceExhausted) as refused:
            client.upload_dataset(images)
        assert refused.value.reason == "OUT_OF_MEMORY"
        assert not list(client.list_datasets())
    assert client.upload_dataset(images).image_count == 4
    house.is_sound()


def test_a_reader_that_hangs_ends_with_its_server(
    house: House, images: Path, tmp_path: Path
) -> None:
    hangs = tmp_path / "hangs"
    client = house.start(f"hang@dataset.decoding!{hangs}")

    def upload() -> None:
        with until_death():
            client.upload_dataset(images)

    uploading = threading.Thread(target=upload)
    uploading.start()
    wait_until(hangs.exists)
    assert len(house.trainers()) == 1
    house.kill()
    uploading.join(GUARD_S)
    client = house.start()
    assert not list(client.list_datasets())
    house.is_sound()


def aliases(client: graftml.Client) -> dict[str, int]:
    return dict(client.get_model("ants").aliases)


def versions(client: graftml.Client) -> list[int]:
    return [version.version for version in client.list_versions("ants")]


def models(client: graftml.Client) -> list[str]:
    return [model.name for model in client.list_models()]


def dataset_ids(client: graftml.Client) -> list[str]:
    return [dataset.dataset_id for dataset in client.list_datasets()]


def an_image(client: graftml.Client) -> str:
    return next(iter(client.list_images(dataset_ids(client)[-1]))).digest


@dataclass(frozen=True)
class Change:
    """A call, what shows its outcome, and the points before and after which it counts."""

    make: Callable[[graftml.Client], object]
    look: Callable[[graftml.Client], object]
    before: tuple[str, ...]
    after: tuple[str, ...]


CHANGES = (
    Change(lambda c: c.set_alias("ants", "live", 2), aliases, ("alias.moved",), ("model.changed",)),
    Change(
        lambda c: c.rollback_alias("ants", "live"), aliases, ("alias.moved",), ("model.changed",)
    ),
    Change(lambda c: c.delete_alias("ants", "live"), aliases, (), ("model.changed",)),
    Change(lambda c: c.delete_version("ants", 2), versions, ("alias.moved",), ("model.changed",)),
    Change(lambda c: c.delete_model("ants", force=True), models, (), ("model.changed",)),
    Change(
        lambda c: c.remove_images(dataset_ids(c)[-1], [an_image(c)]),
        dataset_ids,
        ("dataset.files_put",),
        ("dataset.kept",),
    ),
    Change(lambda c: c.delete_dataset(dataset_ids(c)[0]), dataset_ids, (), ("dataset.deleted",)),
)
"""In an order in which each has something to do."""


def test_a_change_whose_server_is_killed_is_whole_or_never_was(home: House, images: Path) -> None:
    deaths = [(change, point) for change in CHANGES for point in change.before + change.after]
    next_points = [point for _, point in deaths[1:]]
    client = home.start(f"kill@{deaths[0][1]}")
    for (change, point), next_point in zip(deaths, [*next_points, ""], strict=True):
        before = change.look(client)
        with until_death():
            change.make(client)
            raise AssertionError("it was answered")
        home.died()
        client = home.start(f"kill@{next_point}" if next_point else "")
        # One that never was is made again by the next death.
        assert (change.look(client) == before) == (point in change.before)
        if "ants" in models(client):
            [answer] = client.predict(next(images.glob("green/*")), model="ants")
            assert answer.label == "green"
    # What was deleted can be had again.
    dataset = client.upload_dataset(images)
    assert client.fine_tune(dataset, "ants").wait(GUARD_S).version == 1
    home.is_sound()


SOON = "--collect-grace-s=0.2"


def blobs_with(house: House, content: bytes) -> int:
    """How many stored files hold these bytes."""
    count = 0
    for file in (house.data_dir / "blobs").glob("??/*"):
        # Collected meanwhile.
        with suppress(FileNotFoundError):
            count += content in file.read_bytes()
    return count


def test_an_image_whose_erasure_is_killed_is_gone_in_the_end(home: House, images: Path) -> None:
    [file, *_] = sorted(images.glob("green/*"))
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()

    def erased(client: graftml.Client) -> bool:
        [dataset_id] = dataset_ids(client)
        [found] = [image for image in client.list_images(dataset_id) if image.digest == digest]
        [version, *_] = client.list_versions("ants")
        assert version.erased_image_count == found.is_erased
        return found.is_erased

    for point in ("dataset.files_put", "dataset.erased"):
        client = home.start(f"kill@{point}")
        assert not erased(client)
        with until_death():
            client.erase_image(digest)
            raise AssertionError("it was answered")
        home.died()
    client = home.start()
    assert erased(client)
    assert client.erase_image(digest).dataset_ids == tuple(dataset_ids(client))
    home.kill()
    # The collector dies between the row and the file.
    home.start_unready("kill@collector.swept", SOON)
    home.died()
    assert blobs_with(home, content)
    client = home.start("", SOON)
    wait_until(lambda: blobs_with(home, content) == 0)
    wait_until(lambda: not any(fsck.orphans(home.data_dir).values()))
    assert erased(client)
    [answer] = client.predict(file, model="ants")
    assert answer.label == "green"
    home.is_sound()


def test_what_deaths_left_is_collected_and_all_that_is_needed_is_served(
    home: House, images: Path
) -> None:
    def others(number: int) -> list[tuple[str, Image.Image]]:
        colours = {"blue": (20, 30, 200 + number), "grey": (99, 99, 99 + number)}
        return [(label, Image.new("RGB", (32, 32), colour)) for label, colour in colours.items()]

    points = ("blob.intended", "blob.copied", "blob.stored", "dataset.files_put", "dataset.deleted")
    for number, point in enumerate(points):
        client = home.start(f"kill@{point}")
        with until_death():
            client.delete_dataset(client.upload_dataset(others(number)).dataset_id)
        home.died()
    assert any(fsck.orphans(home.data_dir).values())
    with closing(Database(home.data_dir)) as database:
        Collector(database, BlobFolder(home.data_dir / "blobs"), grace_s=0.0).run()
    assert not any(fsck.orphans(home.data_dir).values())
    assert fsck.problems(home.data_dir) == []
    client = home.start()
    for version in (1, 2):
        [answer] = client.predict(next(images.glob("red/*")), model="ants", version=version)
        assert answer.label == "red"
        client.get_report("ants", version=version)
    [dataset_id] = dataset_ids(client)
    assert client.fine_tune(dataset_id, "ants").wait(GUARD_S).version == 3
    home.is_sound()


def test_a_first_start_that_is_killed_once_it_has_migrated_is_finished_by_the_next(
    house: House, images: Path
) -> None:
    house.dies_at_start("kill@database.migrated")
    client = house.start()
    assert client.fine_tune(images, "ants").wait(GUARD_S).version == 1
    house.is_sound()
