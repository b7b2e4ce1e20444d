"""What workers write, under the fence of their claims."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.contract import DataFound, Note, Progressed
from service.domain import JobKind, JobState, ReadSummary
from service.errors import (
    Reason,
    WrongState,
)
from service.jobs.claims import Claims, LeaseLost
from service.jobs.records import Published, StateChanged
from service.jobs.store import JobRecord, JobStore
from service.storage.database import Connection
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from service.storage.version_rows import NewVersion, Publication
from tests.figures import figure
from tests.keys import BIRDS
from tests.unit.jobs.conftest import Claim, Queue, to_rank
from tests.unit.jobs.test_store import RANKED, version_one
from tests.unit.storage.conftest import TENANT, write_result
from tests.unit.storage.test_datasets import IMAGES, upload


def states(jobs: JobStore, job_id: str) -> list[JobState]:
    return [
        e.payload.state
        for e in jobs.events(job_id, TENANT, 0)
        if isinstance(e.payload, StateChanged)
    ]


def delay_s(_waited_s: float) -> float:
    return 5.0


def test_a_dataset_that_a_running_job_took_up_stays(
    claims: Claims, running: JobRecord, datasets: DatasetStore
) -> None:
    dataset_id = upload(datasets, IMAGES).dataset_id
    claims.hold(running, dataset_id)
    with pytest.raises(WrongState, match=running.job_id):
        datasets.delete(dataset_id, TENANT)
    claims.fail(running, Reason.TRAINING_FAILED, "x")
    datasets.delete(dataset_id, TENANT)


def test_claims_take_the_oldest_first_and_only_for_devices_that_are_free(
    jobs: JobStore, queue: Queue, claim: Claim
) -> None:
    cuda, cpu, auto = (queue(device=d).job_id for d in ("cuda", "cpu", "auto"))
    ranking, _ = jobs.create(to_rank(), "", b"")
    first = claim(["cpu", "auto"])
    assert first is not None
    assert (first.job_id, first.state, first.attempts) == (cpu, JobState.RUNNING, 1)
    assert first.start_time_s is not None
    assert [job and job.job_id for job in (claim(), claim(), claim())] == [cuda, auto, None]
    assert states(jobs, cpu) == [JobState.QUEUED, JobState.RUNNING]
    found = claim(kind=JobKind.RANKING)
    assert found is not None
    assert (found.job_id, found.request) == (ranking.job_id, to_rank())


def test_claims_from_many_threads_never_give_one_job_twice(queue: Queue, claim: Claim) -> None:
    made = [queue().job_id for _ in range(30)]
    start = threading.Barrier(6)

    def claim_all(_: int) -> list[str]:
        start.wait(60)
        claimed = []
        while (job := claim()) is not None:
            claimed.append(job.job_id)
        return claimed

    with ThreadPoolExecutor(6) as pool:
        claimed = [job_id for ids in pool.map(claim_all, range(6)) for job_id in ids]
    assert sorted(claimed) == made


def test_progress_shows_while_the_job_runs_and_the_summary_for_ever(
    jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    claims.append(running, Progressed("training", 0.5))
    claims.append(running, DataFound([], ReadSummary(seen=3, used=3), "d"))
    assert jobs.get(running.job_id, TENANT).progress == Progressed("training", 0.5)
    claims.fail(running, Reason.TRAINING_FAILED, "no")
    record = jobs.get(running.job_id, TENANT)
    assert (record.progress, record.summary) == (None, ReadSummary(seen=3, used=3))


def test_success_publishes_and_ends_in_one_step(
    jobs: JobStore,
    claims: Claims,
    running: JobRecord,
    models: ModelStore,
    tmp_path: Path,
) -> None:
    job_id = running.job_id
    stored = models.put_result(write_result(tmp_path / "out", job_id))

    def publish(connection: Connection) -> Publication:
        return models.publish(connection, NewVersion(model=BIRDS, job_id=job_id, stored=stored))

    def publish_and_fail(connection: Connection) -> Publication:
        publish(connection)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        claims.succeed(running, publish_and_fail)
    assert jobs.get(job_id, TENANT).state is JobState.RUNNING
    assert models.list_models(0, "", TENANT) == ([], "")

    record = claims.succeed(running, publish)
    assert (record.state, record.version) == (JobState.SUCCEEDED, 1)
    assert record.end_time_s is not None
    last_two = [e.payload for e in jobs.events(job_id, TENANT, 0)][-2:]
    out = Published("birds", 1, figure(0.5, 2), calibrated=True)
    assert last_two == [out, StateChanged(JobState.SUCCEEDED)]
    assert models.get_model(BIRDS).version_count == 1


def test_a_ranking_ends_with_its_result(jobs: JobStore, claims: Claims, claim: Claim) -> None:
    jobs.create(to_rank(), "", b"")
    job = claim(kind=JobKind.RANKING)
    assert job is not None
    record = claims.succeed_ranking(job, RANKED)
    assert (record.state, record.version, record.ranking) == (JobState.SUCCEEDED, 0, RANKED)


def test_a_failed_job_says_why(jobs: JobStore, claims: Claims, running: JobRecord) -> None:
    record = claims.fail(running, Reason.OUT_OF_MEMORY, "too big")
    assert (record.state, record.error_reason, record.error_message) == (
        JobState.FAILED, Reason.OUT_OF_MEMORY, "too big",
    )  # fmt: skip
    assert jobs.events(running.job_id, TENANT, 0)[-1].payload == StateChanged(
        JobState.FAILED, Reason.OUT_OF_MEMORY, "too big"
    )


def test_a_running_job_is_cancelled_when_its_trainer_stopped(
    jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    assert claims.to_cancel(running.owner) == set()
    record = jobs.request_cancel(running.job_id, TENANT)
    assert (record.state, record.cancel_requested) == (JobState.RUNNING, True)
    assert jobs.request_cancel(running.job_id, TENANT) == record
    assert claims.to_cancel(running.owner) == {running.job_id}
    assert claims.to_cancel("another") == set()
    record = claims.cancelled(running)
    assert (record.state, record.cancel_requested) == (JobState.CANCELLED, False)
    assert claims.to_cancel(running.owner) == set()


def test_a_success_beats_a_cancel_that_was_not_done_yet(
    jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    jobs.request_cancel(running.job_id, TENANT)
    record = claims.succeed(running, version_one)
    assert (record.state, record.cancel_requested) == (JobState.SUCCEEDED, False)


LOST: list[Callable[[Claims, JobRecord], object]] = [
    lambda claims, job: claims.append(job, Note("info", "late")),
    lambda claims, job: claims.hold(job, "ds-1"),
    lambda claims, job: claims.succeed(job, version_one),
    lambda claims, job: claims.succeed_ranking(job, RANKED),
    lambda claims, job: claims.fail(job, Reason.INTERNAL, ""),
    lambda claims, job: claims.cancelled(job),
    lambda claims, job: claims.requeue(job, ""),
    lambda claims, job: claims.crash(job, Reason.INTERNAL, "", 1),
    lambda claims, job: claims.defer(job, Reason.INTERNAL, "", delay_s, 0),
]


@pytest.mark.parametrize("late", LOST)
def test_nothing_is_written_to_a_job_that_has_ended_or_was_claimed_anew(
    jobs: JobStore,
    claims: Claims,
    claim: Claim,
    running: JobRecord,
    late: Callable[[Claims, JobRecord], object],
) -> None:
    claims.requeue(running, "")
    again = claim()
    assert again is not None
    assert (again.job_id, again.owner) == (running.job_id, running.owner)
    before = jobs.events(running.job_id, TENANT, 0)
    with pytest.raises(LeaseLost):
        late(claims, running)
    claims.fail(again, Reason.TRAINING_FAILED, "no")
    with pytest.raises(LeaseLost):
        late(claims, again)
    assert jobs.events(running.job_id, TENANT, 0)[:-1] == before


def test_a_crash_that_is_the_last_fails_the_job_and_other_ends_count_for_nothing(
    jobs: JobStore, claims: Claims, claim: Claim, running: JobRecord
) -> None:
    job: JobRecord | None = running
    for _ in range(5):
        assert job is not None
        claims.requeue(job, "the service stops")
        job = claim()
    assert job is not None
    record = claims.crash(job, Reason.TRAINER_CRASHED, "it crashed", 2)
    assert (record.state, record.attempts, record.crashes) == (JobState.QUEUED, 6, 1)
    job = claim()
    assert job is not None
    record = claims.crash(job, Reason.OUT_OF_MEMORY, "it crashed", 2)
    assert (record.state, record.error_reason) == (JobState.FAILED, Reason.OUT_OF_MEMORY)
    assert "attempt 2 of 2" in record.error_message


def test_a_deferred_job_is_claimed_when_it_is_due_and_fails_when_it_has_waited_long(
    claims: Claims, claim: Claim, running: JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, now = time.time(), [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    record = claims.defer(running, Reason.STORAGE_FULL, "no room", delay_s, 60)
    assert (record.state, record.crashes) == (JobState.QUEUED, 0)
    assert claim() is None
    assert claims.due_s() == pytest.approx(5)
    now[0] = began + 6
    assert claims.due_s() is None
    again = claim()
    assert again is not None and again.waiting_since_s == pytest.approx(began)
    now[0] = began + 61
    record = claims.defer(again, Reason.STORAGE_FULL, "no room", delay_s, 60)
    assert (record.state, record.error_reason) == (JobState.FAILED, Reason.STORAGE_FULL)


@pytest.mark.parametrize("back", ["requeue", "crash", "defer"])
def test_a_job_that_was_to_be_cancelled_does_not_start_again(
    jobs: JobStore, claims: Claims, running: JobRecord, back: str
) -> None:
    jobs.request_cancel(running.job_id, TENANT)
    record = {
        "requeue": lambda: claims.requeue(running, ""),
        "crash": lambda: claims.crash(running, Reason.TRAINER_CRASHED, "", 1),
        "defer": lambda: claims.defer(running, Reason.STORAGE_FULL, "", delay_s, -1),
    }[back]()
    assert record.state is JobState.CANCELLED
