"""A job's images are read before its trainer starts: its progress, and what ends it."""

import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from service.contract import BackbonesRanked, Progressed, RankSpec
from service.domain import Base, JobState
from service.errors import Reason
from service.ingest import index as indexes
from service.ingest.index import Index
from service.ingest.reader import OnProgress, ReadRequest, untold
from service.jobs import specs
from tests.fake_launcher import Script
from tests.keys import BIRDS
from tests.unit.ingest.packing import FILES, tar_gz_of
from tests.unit.jobs.conftest import Queue, to_rank
from tests.unit.jobs.house import FOUND, GUARD_S, SUMMARY, MakeHouse, class_folders, good
from tests.unit.storage.conftest import TENANT, FakeReader
from tests.unit.storage.test_datasets import IMAGES, upload

POLL_S = 0.01


class Endless:
    """Reads until it is told to give up."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.gave_up = threading.Event()

    def read(
        self,
        _reader: FakeReader,
        _request: ReadRequest,
        go_on: Callable[[], None],
        on_progress: OnProgress = untold,
    ) -> Index:
        on_progress(0, 10)
        self.started.set()
        pause = threading.Event()
        try:
            while not pause.wait(POLL_S):
                go_on()
        finally:
            self.gave_up.set()
        raise AssertionError("nobody sets the pause")


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Endless:
    made = Endless()

    def read(
        reader: FakeReader,
        request: ReadRequest,
        go_on: Callable[[], None],
        on_progress: OnProgress = untold,
    ) -> Index:
        return made.read(reader, request, go_on, on_progress)

    monkeypatch.setattr(FakeReader, "read", read)
    return made


async def test_a_job_that_is_cancelled_while_its_images_are_read_gives_up(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    endless: Endless,
    caplog: pytest.LogCaptureFixture,
) -> None:
    house = make_house(good())
    job = queue(server_path=folder)
    await house.supervisor.start()
    assert await asyncio.to_thread(endless.started.wait, GUARD_S)
    under_way = house.jobs.get(job.job_id, TENANT)
    assert under_way.progress == Progressed("reading", 0.0, "images", 0, 10)
    await asyncio.to_thread(house.jobs.request_cancel, job.job_id, TENANT)
    house.supervisor.wake()
    record = await house.ended(job.job_id)
    assert (record.state, record.crashes) == (JobState.CANCELLED, 0)
    assert endless.gave_up.is_set()
    await house.supervisor.close(GUARD_S)
    assert list(house.settings.work_dir.iterdir()) == []
    assert house.launcher.trainers == []
    # Nor does asyncio log what the reading raised then.
    gc.collect()
    assert [told for told in caplog.records if told.levelname == "ERROR"] == []


async def test_a_service_that_stops_while_images_are_read_puts_the_job_back(
    make_house: MakeHouse, queue: Queue, folder: str, endless: Endless
) -> None:
    house = make_house(good())
    job = queue(server_path=folder)
    await house.supervisor.start()
    assert await asyncio.to_thread(endless.started.wait, GUARD_S)
    await house.supervisor.close(GUARD_S)
    assert endless.gave_up.is_set()
    record = house.jobs.get(job.job_id, TENANT)
    assert (record.state, record.crashes) == (JobState.QUEUED, 0)


async def test_images_that_are_read_for_too_long_end_the_job(
    make_house: MakeHouse, queue: Queue, folder: str, endless: Endless
) -> None:
    house = make_house(good(), max_job_s=0.1)
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert record.error_reason is Reason.TIME_BUDGET_EXCEEDED
    assert endless.gave_up.is_set()
    assert house.launcher.trainers == []


@pytest.mark.parametrize("part", ["data", "base"])
async def test_a_folder_that_cannot_be_used_fails_the_job_without_a_trainer(
    make_house: MakeHouse, queue: Queue, folder: str, tmp_path: Path, part: str
) -> None:
    house = make_house(good())
    broken = class_folders(tmp_path / "broken")
    asked: dict[str, object] = {"server_path": str(broken)}
    await house.supervisor.start()
    if part == "base":
        first = await asyncio.to_thread(queue, **asked)
        await house.ended(first.job_id)
        sources = house.models.sources(BIRDS, 1)
        asked = {"server_path": folder, "base": Base("birds", 1), "base_sources": sources}
    (broken / "empty").mkdir()
    job = await asyncio.to_thread(queue, **asked)
    record = await house.ended(job.job_id)
    assert (record.state, record.error_reason) == (JobState.FAILED, Reason.DATASET_UNUSABLE)
    assert "'empty'" in record.error_message
    assert len(house.launcher.trainers) == (part == "base")


@pytest.mark.parametrize("is_archive", [False, True])
async def test_class_names_may_differ_in_case_alone_where_the_job_says_so(
    make_house: MakeHouse, queue: Queue, tmp_path: Path, is_archive: bool
) -> None:
    path = tmp_path / "pets"
    if is_archive:
        path.write_bytes(tar_gz_of({"Cat/1.png": b"PIC1", "cat/2.png": b"PIC2"}))
    else:
        (class_folders(path) / "dog").rename(path / "Cat")
    house = make_house(good())
    jobs = [queue(server_path=str(path), case_sensitive_labels=value) for value in (False, True)]
    await house.supervisor.start()
    refused, taken = [await house.ended(job.job_id) for job in jobs]
    assert refused.error_reason is Reason.DATASET_UNUSABLE
    assert "case_sensitive_labels" in refused.error_message
    assert taken.state is JobState.SUCCEEDED
    assert house.launcher.trainers[0].spec.case_sensitive_labels


async def test_what_became_of_the_files_is_kept_with_the_job(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(good(FOUND))
    job = queue(server_path=folder)
    assert job.summary is None
    await house.supervisor.start()
    await house.ended(job.job_id)
    assert house.jobs.get(job.job_id, TENANT).summary == SUMMARY


@pytest.mark.parametrize("kind", ["folder", "archive", "dataset"])
async def test_a_ranking_is_told_of_a_sample_of_a_folder_and_of_all_of_a_dataset(
    make_house: MakeHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(specs, "MOST_RANKED_IMAGES", 2)
    seen: list[Index] = []

    def look(spec: RankSpec) -> None:
        data = spec.data
        seen.append(indexes.load(Path(data.index_file or spec.files[data.index])))
        for image in seen[0].images:
            if image.pack:
                assert Path(spec.files[image.pack]).is_file()
            else:
                assert (Path(data.folder) / image.path).is_file()

    house = make_house(Script(records=[BackbonesRanked([], "", 1)], before_last=look))
    asked = {"server_path": str(tmp_path / "pets")}
    if kind == "folder":
        root = class_folders(tmp_path / "pets")
        for n in range(5):
            (root / "cat" / f"more{n}.png").write_bytes(f"PIC{n}".encode())
    elif kind == "archive":
        (tmp_path / "pets").write_bytes(tar_gz_of(FILES))
    else:
        asked = {"server_path": "", "dataset_id": upload(house.datasets, IMAGES).dataset_id}
    job, _ = house.jobs.create(to_rank(**asked), "", b"")
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED
    (read,) = seen
    labels = [image.label for image in read.images]
    assert labels == (["cat", "dog"] if kind == "folder" else ["cat", "cat", "dog"])
    await house.supervisor.close(GUARD_S)
    assert list(house.settings.work_dir.iterdir()) == []
