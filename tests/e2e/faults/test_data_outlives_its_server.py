"""The server is killed while datasets, models and aliases change: all of a change, or nothing."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import graft
import pytest

from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House, until_death, wait_until

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    "point",
    [
        "dataset.chunk_written",
        "dataset.read",
        "dataset.renamed",
        "dataset.kept",
        "dataset.image_written",
    ],
)
def test_an_upload_whose_server_is_killed_can_be_sent_again_and_is_stored_once(
    house: House, images: Path, point: str
) -> None:
    def upload(client: graft.Client) -> graft.Dataset:
        if point == "dataset.image_written":
            return client.upload_dataset((file.parent.name, file) for file in files)
        return client.upload_dataset(images)

    files = sorted(images.rglob("*.png"))
    client = house.start(f"kill@{point}")
    with until_death():
        upload(client)
        raise AssertionError("it was answered")
    house.died()

    client = house.start()
    kept = [dataset.dataset_id for dataset in client.list_datasets()]
    assert len(kept) == (point == "dataset.kept")
    again = upload(client)
    assert again.image_count == 4
    assert [dataset.dataset_id for dataset in client.list_datasets()] == [again.dataset_id]
    assert kept in ([], [again.dataset_id])
    house.is_sound()


@pytest.mark.parametrize("action", ["kill", "memory"])
def test_an_upload_whose_reader_dies_is_refused_and_the_server_goes_on(
    house: House, images: Path, action: str
) -> None:
    client = house.start(f"{action}@dataset.decoding")
    with pytest.raises(graft.errors.ResourceExhausted) as refused:
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


def named(client: graft.Client) -> dict[str, int]:
    return dict(client.get_model("ants").aliases)


def versions(client: graft.Client) -> list[int]:
    return [version.version for version in client.list_versions("ants")]


def dataset_ids(client: graft.Client) -> list[str]:
    return [dataset.dataset_id for dataset in client.list_datasets()]


@dataclass(frozen=True)
class Change:
    """A call, what shows its outcome, and the points before and after which it counts."""

    make: Callable[[graft.Client], object]
    look: Callable[[graft.Client], object]
    before: tuple[str, ...]
    after: tuple[str, ...]


CHANGES = {
    "set_alias": Change(
        lambda c: c.set_alias("ants", "live", 2), named, ("alias.moved",), ("model.changed",)
    ),
    "rollback_alias": Change(
        lambda c: c.rollback_alias("ants"), named, ("alias.moved",), ("model.changed",)
    ),
    "delete_alias": Change(lambda c: c.delete_alias("ants", "live"), named, (), ("model.changed",)),
    "delete_version": Change(
        lambda c: c.delete_version("ants", 2),
        versions,
        ("alias.moved",),
        ("model.changed", "artifacts.moved_away"),
    ),
    "delete_model": Change(
        lambda c: c.delete_model("ants", force=True),
        lambda c: [model.name for model in c.list_models()],
        (),
        ("model.changed", "artifacts.moved_away"),
    ),
    "delete_dataset": Change(
        lambda c: c.delete_dataset(dataset_ids(c)[0]),
        dataset_ids,
        (),
        ("dataset.deleted", "dataset.moved_away"),
    ),
}


@pytest.mark.parametrize(
    ("call", "point"),
    [
        (call, point)
        for call, change in CHANGES.items()
        for point in (*change.before, *change.after)
    ],
)
def test_a_change_whose_server_is_killed_is_whole_or_never_was(
    home: House, images: Path, call: str, point: str
) -> None:
    change = CHANGES[call]
    client = home.start(f"kill@{point}")
    before = change.look(client)
    with until_death():
        change.make(client)
        raise AssertionError("it was answered")
    home.died()

    client = home.start()
    assert (change.look(client) == before) == (point in change.before)
    if point in change.before:
        change.make(client)
    assert change.look(client) != before
    if call != "delete_model":
        [answer] = client.predict(next(images.glob("green/*")), model="ants")
        assert answer.label == "green"
    # What was deleted can be had again.
    dataset = client.upload_dataset(images)
    number = 1 if call == "delete_model" else 3
    assert client.fine_tune(dataset, "ants").wait(GUARD_S).version == number
    home.is_sound()


def test_a_first_start_that_is_killed_between_migrations_is_finished_by_the_next(
    house: House, images: Path
) -> None:
    house.dies_at_start("kill@database.migrated#2")
    client = house.start()
    assert client.fine_tune(images, "ants").wait(GUARD_S).version == 1
    house.is_sound()
