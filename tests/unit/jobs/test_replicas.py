"""Leases: whose jobs are taken, what becomes of them, and who is taken for dead."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from service.domain import JobKind, JobState
from service.errors import Reason, Unavailable
from service.jobs.claims import Claims, LeaseLost
from service.jobs.records import StateChanged
from service.jobs.replicas import LEASE_S, Replicas
from service.jobs.store import JobRecord, JobStore
from service.storage import storage_errors
from service.storage.database import Database
from service.storage.datasets import DatasetStore
from tests.unit.jobs.conftest import ALL, request
from tests.unit.storage.conftest import TENANT
from tests.unit.storage.test_datasets import IMAGES, upload


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[JobStore]:
    """Jobs on a database that several replicas have."""
    database = Database(tmp_path / "shared", is_exclusive=False)
    yield JobStore(database, max_queued=100)
    database.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The database's clock, which stands still."""
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def claimed(jobs: JobStore, owner: str, **changes: object) -> JobRecord:
    jobs.create(request(**changes), "", b"")
    job = Claims(jobs).claim(owner, JobKind.FINE_TUNE, ALL)
    assert job is not None
    return job


def test_jobs_are_taken_from_a_replica_whose_lease_has_ended_and_from_no_other(
    shared: JobStore, clock: list[float]
) -> None:
    replicas = Replicas(shared)
    dead, living = replicas.register(), replicas.register()
    lost, kept = claimed(shared, dead), claimed(shared, living)
    clock[0] += LEASE_S - 1
    assert replicas.beat(living)
    assert replicas.reap(3) == []
    clock[0] += 2
    (taken,) = replicas.reap(3)
    assert (taken.job_id, taken.state, taken.crashes, taken.owner) == (
        lost.job_id, JobState.QUEUED, 1, "",
    )  # fmt: skip
    assert shared.get(kept.job_id, TENANT).state is JobState.RUNNING
    last = shared.events(lost.job_id, TENANT, 0)[-1].payload
    assert isinstance(last, StateChanged)
    assert (last.state, last.reason) == (JobState.QUEUED, Reason.TRAINER_CRASHED)
    # It was forgotten, so it learns that it was taken for dead, and gets no job.
    assert not replicas.beat(dead)
    assert Claims(shared).claim(dead, JobKind.FINE_TUNE, ALL) is None
    with pytest.raises(LeaseLost):
        Claims(shared).fail(lost, Reason.INTERNAL, "late")


def test_a_replica_that_was_only_late_goes_on(shared: JobStore, clock: list[float]) -> None:
    replicas = Replicas(shared)
    late = replicas.register()
    job = claimed(shared, late)
    clock[0] += 10 * LEASE_S
    assert replicas.beat(late)
    assert replicas.reap(3) == []
    assert Claims(shared).requeue(job, "").state is JobState.QUEUED


def test_a_replica_without_a_lease_gets_no_job(shared: JobStore, clock: list[float]) -> None:
    owner = Replicas(shared).register()
    shared.create(request(), "", b"")
    clock[0] += LEASE_S + 1
    assert Claims(shared).claim(owner, JobKind.FINE_TUNE, ALL) is None


def test_what_a_draining_replica_could_not_put_back_has_not_crashed(
    shared: JobStore, clock: list[float]
) -> None:
    replicas = Replicas(shared)
    owner = replicas.register()
    job = claimed(shared, owner)
    replicas.drain(owner)
    replicas.leave(owner)
    clock[0] += LEASE_S + 1
    (taken,) = replicas.reap(max_crashes=1)
    assert (taken.job_id, taken.state, taken.crashes) == (job.job_id, JobState.QUEUED, 0)
    last = shared.events(job.job_id, TENANT, 0)[-1].payload
    assert isinstance(last, StateChanged) and last.reason is None


def test_a_stop_that_the_database_cannot_take_is_noted_beside_it(
    jobs: JobStore, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = Replicas(jobs, folder=notes)
    owner = replicas.register()
    job = claimed(jobs, owner)

    def held(scope: str = "") -> NoReturn:
        raise storage_errors.busy(1.0)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(jobs.database, "transaction", held)
        with pytest.raises(Unavailable):
            replicas.drain(owner)
    # The database is free again before all is over, and a job is its owner's still.
    replicas.leave(owner)
    assert len(list(notes.iterdir())) == 1
    (notes / "drained-another").touch()
    again = Replicas(jobs, folder=notes)
    again.register()
    assert list(notes.iterdir()) == []
    (taken,) = again.reap(max_crashes=1)
    assert (taken.job_id, taken.state, taken.crashes) == (job.job_id, JobState.QUEUED, 0)


def test_a_stop_that_left_nothing_behind_leaves_no_note(jobs: JobStore, notes: Path) -> None:
    replicas = Replicas(jobs, folder=notes)
    owner = replicas.register()
    replicas.drain(owner)
    assert len(list(notes.iterdir())) == 1
    replicas.leave(owner)
    assert list(notes.iterdir()) == []


def test_a_replica_that_left_is_forgotten(shared: JobStore) -> None:
    replicas = Replicas(shared)
    owner = replicas.register()
    replicas.leave(owner)
    assert not replicas.beat(owner)


def test_a_job_fails_when_so_many_replicas_died_of_it_and_holds_nothing_then(
    jobs: JobStore, datasets: DatasetStore
) -> None:
    dataset_id = upload(datasets, IMAGES).dataset_id
    job = claimed(jobs, Replicas(jobs).register(), server_path="", dataset_id=dataset_id)
    for crashes in (1, 2):
        # Nobody else lives on a database that one process has to itself.
        replicas = Replicas(jobs)
        owner = replicas.register()
        (taken,) = replicas.reap(max_crashes=3)
        assert (taken.state, taken.crashes) == (JobState.QUEUED, crashes)
        assert Claims(jobs).claim(owner, JobKind.FINE_TUNE, ALL) is not None
    replicas = Replicas(jobs)
    replicas.register()
    (taken,) = replicas.reap(max_crashes=3)
    assert (taken.job_id, taken.state) == (job.job_id, JobState.FAILED)
    assert taken.error_reason is Reason.TRAINER_CRASHED
    assert "attempt 3 of 3" in taken.error_message
    datasets.delete(dataset_id, TENANT)


def test_a_job_that_was_to_be_cancelled_is(jobs: JobStore) -> None:
    job = claimed(jobs, Replicas(jobs).register())
    jobs.request_cancel(job.job_id, TENANT)
    replicas = Replicas(jobs)
    replicas.register()
    (taken,) = replicas.reap(max_crashes=1)
    assert (taken.state, taken.crashes) == (JobState.CANCELLED, 1)
    assert [
        event.payload.state
        for event in jobs.events(job.job_id, TENANT, 0)
        if isinstance(event.payload, StateChanged)
    ] == [JobState.QUEUED, JobState.RUNNING, JobState.CANCELLED]
