"""A dataset grows, is put right and loses an image for good, through real processes."""

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import graftml
import pytest

from tests.e2e.conftest import GUARD_S, Connect, StartService, register_small
from tests.e2e.faults.house import wait_until

pytestmark = pytest.mark.e2e


def holding(folder: Path, content: bytes) -> Callable[[], list[Path]]:
    """Finds the files below a folder that have some bytes in them."""

    def find() -> list[Path]:
        found = []
        for path in folder.rglob("*"):
            try:
                if path.is_file() and content in path.read_bytes():
                    found.append(path)
            except FileNotFoundError:
                continue  # deleted meanwhile
        return found

    return find


def features_of(data_dir: Path, digest: str) -> int:
    with closing(sqlite3.connect(data_dir / "features.sqlite")) as connection:
        (count,) = connection.execute(
            "SELECT COUNT(*) FROM rows WHERE image LIKE ?", (f"{digest}%",)
        ).fetchone()
        return int(count)


def test_images_are_added_and_relabelled_and_one_is_erased_for_good(
    start_service: StartService, connect: Connect, digits: Path, tmp_path: Path
) -> None:
    client = connect(start_service("--collect-grace-s=0.2", "--warm-trainers=0"))
    backbone = register_small(client, tmp_path)
    data_dir = tmp_path / "data"
    pairs = [(file.parent.name, file) for file in sorted(digits.rglob("*.png"))]
    first = [pair for pair in pairs if pair[0] in "01"]
    # The first of the others comes in the wrong class.
    (_, wrong), *others = [pair for pair in pairs if pair[0] in "23"]
    wrong_digest = hashlib.sha256(wrong.read_bytes()).hexdigest()
    dataset = client.upload_dataset(first)
    grown = client.add_images(dataset, [("3", wrong), *others])
    assert (dataset.image_count, grown.image_count) == (40, 80)
    right = client.relabel_images(grown, {wrong_digest: "2"})
    assert {count.label: count.train for count in right.classes} == dict.fromkeys("0123", 20)
    version = client.fine_tune(right, name="digits", backbone=backbone).wait(GUARD_S)
    assert version.manifest["train_count"] == 80
    assert features_of(data_dir, wrong_digest)
    assert holding(data_dir / "blobs", wrong.read_bytes())()

    erased = client.erase_image(wrong_digest)
    assert set(erased.dataset_ids) == {grown.dataset_id, right.dataset_id}
    assert [(each.model, each.version) for each in erased.versions] == [("digits", 1)]
    assert not features_of(data_dir, wrong_digest)
    wait_until(lambda: not holding(data_dir, wrong.read_bytes())())

    assert client.get_version("digits", version=1).erased_image_count == 1
    assert client.predict(wrong, model="digits")[0].label == "2"
    told: list[graftml.JobEvent] = []
    job = client.fine_tune(right, name="digits", backbone=backbone)
    again = job.wait(GUARD_S, on_event=told.append)
    assert (again.manifest["train_count"], again.erased_image_count) == (79, 0)
    notes = [event.payload.text for event in told if isinstance(event.payload, graftml.Note)]
    assert any("1 image was erased" in text for text in notes), notes
    assert client.get_dataset(dataset.dataset_id).image_count == 40
    assert not features_of(data_dir, wrong_digest)
