"""The power is cut: what was never flushed is gone, and everything that was answered is there.

The server is killed at a point, and then all is undone that a disk need not have kept:
contents that no fsync followed, and names whose folder was not flushed after. That
SQLite flushes its own files (WAL, synchronous=FULL) is taken for granted.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import graftml
import pytest

from service import fsck
from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import HERE, House, until_death

pytestmark = pytest.mark.e2e


class Cut(House):
    """A data folder whose server writes down what it does to files."""

    def __init__(self, folder: Path, parts: Path, *, forgets: bool = False) -> None:
        super().__init__(folder, parts)
        self._journal = folder / "journal"
        self._forgets = forgets

    def _environment(self) -> dict[str, str]:
        own = super()._environment()
        return {
            **own,
            "PYTHONPATH": f"{HERE / 'power_cut'}:{own['PYTHONPATH']}",
            "POWER_CUT_JOURNAL": str(self._journal),
            "POWER_CUT_ROOT": str(self.data_dir),
            "POWER_CUT_FORGETS": "yes" if self._forgets else "",
        }

    def cut(self) -> int:
        """Undoes what was not flushed; answers with how much that was."""
        entries = [json.loads(line) for line in self._journal.read_text().splitlines()]
        self._journal.unlink()
        return _contents(self.data_dir, entries) + _names(entries)


def _kept(entry: dict[str, Any], later: list[dict[str, Any]]) -> bool:
    folder = str(Path(entry.get("target") or entry["path"]).parent)
    return any(
        after["what"] == "syncfs" or (after["what"] == "fsync" and after["path"] == folder)
        for after in later
    )


def _names(entries: list[dict[str, Any]]) -> int:
    undone = 0
    for place in reversed(range(len(entries))):
        entry = entries[place]
        if entry["what"] not in ("made", "renamed") or _kept(entry, entries[place:]):
            continue
        if entry["what"] == "renamed":
            # Gone since, or in the place of something.
            with suppress(OSError):
                Path(entry["target"]).rename(entry["source"])
                undone += 1
            continue
        path = Path(entry["path"])
        undone += path.exists()
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return undone


def _contents(folder: Path, entries: list[dict[str, Any]]) -> int:
    loose: set[int] = set()
    for entry in entries:
        if entry["what"] == "written":
            loose.add(entry["inode"])
        elif entry["what"] == "fsync":
            loose.discard(entry["inode"])
        elif entry["what"] == "syncfs":
            loose.clear()
    lost = 0
    for path in (path for part in ("blobs",) for path in (folder / part).rglob("*")):
        if path.is_file() and path.stat().st_ino in loose:
            os.truncate(path, 0)
            lost += 1
    return lost


POINTS = {
    "dataset.kept": 0,
    "blob.stored#8": 0,
    "version.inserted": 0,
    "job.settled": 1,
}
"""And how many versions are published there."""


def day(client: graftml.Client, images: Path, told: dict[str, str]) -> None:
    told["dataset"] = client.upload_dataset(images).dataset_id
    job = client.fine_tune(told["dataset"], "ants", request_id="once")
    told["job"] = job.job_id
    told["version"] = str(job.wait(GUARD_S).version)
    client.set_alias("ants", "live", 1)
    told["alias"] = "live"


@pytest.mark.parametrize("point", POINTS)
def test_a_power_cut_loses_nothing_that_was_answered(
    tmp_path: Path, parts: Path, images: Path, point: str
) -> None:
    house = Cut(tmp_path, parts)
    told: dict[str, str] = {}
    try:
        client = house.start(f"kill@{point}")
        with until_death():
            day(client, images, told)
        house.died()
        house.cut()
        assert fsck.problems(house.data_dir) == []
        client = house.start()
        if "dataset" in told:
            assert client.get_dataset(told["dataset"]).image_count == 4
        if "job" in told:
            assert client.job(told["job"]).wait(GUARD_S).version == 1
        if POINTS[point]:
            assert client.predict(next(images.glob("red/*")), model="ants")[0].label == "red"
        day(client, images, {})
        assert client.predict(next(images.glob("red/*")), model="ants", alias="live")[0].version
        house.is_sound()
    finally:
        house.close()


def test_a_power_cut_shows_what_is_never_flushed(tmp_path: Path, parts: Path, images: Path) -> None:
    house = Cut(tmp_path, parts, forgets=True)
    try:
        day(house.start(), images, {})
        house.kill()
        assert house.cut() > 0
        assert fsck.problems(house.data_dir)
    finally:
        house.close()
