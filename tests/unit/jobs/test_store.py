import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.contract import Note, Progressed
from service.domain import Base, JobState
from service.errors import AlreadyExists, Exhausted, InvalidInput, NotFound, Reason, WrongState
from service.jobs.events import JobEvent, Published, StateChanged
from service.jobs.store import JobStore
from service.storage.artifacts import Artifacts
from service.storage.database import Connection, Database
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from service.storage.records import Publication
from tests.figures import figure
from tests.unit.jobs.conftest import Queue, request
from tests.unit.storage.conftest import TENANT, manifest, write_result
from tests.unit.storage.test_datasets import IMAGES, upload

ALL = ("auto", "cpu", "cuda")


def states(jobs: JobStore, job_id: str) -> list[JobState]:
    return [
        e.payload.state
        for e in jobs.events(job_id, TENANT, 0)
        if isinstance(e.payload, StateChanged)
    ]


def version_one(_: Connection) -> Publication:
    return Publication(1, manifest("job-1"))


def test_a_new_job_waits_with_its_first_event(jobs: JobStore) -> None:
    record, created = jobs.create(request(labels={"a": "b"}), "", b"")
    assert created
    assert record == jobs.get(record.job_id, TENANT)
    assert (record.state, record.attempts, record.last_sequence) == (JobState.QUEUED, 0, 1)
    assert record.request == request(labels={"a": "b"})
    assert jobs.events(record.job_id, TENANT, 0)[0].payload == StateChanged(JobState.QUEUED)


def test_the_same_request_id_gives_the_first_job(jobs: JobStore) -> None:
    first, _ = jobs.create(request(), "retry-1", b"f")
    again, created = jobs.create(request(), "retry-1", b"f")
    assert not created
    assert again == first
    with pytest.raises(AlreadyExists, match=first.job_id) as caught:
        jobs.create(request("bears"), "retry-1", b"g")
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert jobs.create(request(), "", b"f")[1]
    assert jobs.create(request(), "", b"f")[1]


def test_a_repeated_request_is_answered_though_the_queue_is_full(database: Database) -> None:
    jobs = JobStore(database, max_queued=1)
    first, _ = jobs.create(request(), "retry-1", b"f")
    assert jobs.create(request(), "retry-1", b"f") == (first, False)
    with pytest.raises(Exhausted) as caught:
        jobs.create(request(), "", b"")
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_s
    jobs.claim(ALL)
    assert jobs.create(request(), "", b"")[1]


def test_a_job_on_a_dataset_that_is_gone_is_refused(jobs: JobStore, datasets: DatasetStore) -> None:
    dataset_id = upload(datasets, IMAGES).dataset_id
    job, _ = jobs.create(request(server_path="", dataset_id=dataset_id), "", b"")
    with pytest.raises(WrongState):
        datasets.delete(dataset_id, TENANT)
    jobs.request_cancel(job.job_id, TENANT)
    datasets.delete(dataset_id, TENANT)
    with pytest.raises(NotFound) as caught:
        jobs.create(request(server_path="", dataset_id=dataset_id), "", b"")
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_a_dataset_of_one_class_is_enough_beside_a_base_alone(
    jobs: JobStore, datasets: DatasetStore
) -> None:
    dataset_id = upload(datasets, IMAGES[:2]).dataset_id
    asked = request(server_path="", dataset_id=dataset_id)
    for refuse in (
        lambda: jobs.create(asked, "", b""),
        lambda: jobs.check_dataset(dataset_id, TENANT, is_alone=True),
    ):
        with pytest.raises(InvalidInput, match=r"1 class \('cat'\)") as caught:
            refuse()
        assert (caught.value.reason, caught.value.field) == (Reason.DATASET_UNUSABLE, "dataset_id")
    grown = msgspec.structs.replace(asked, base=Base("birds", 1))
    assert jobs.create(grown, "", b"")[1]


def test_a_dataset_that_a_running_job_took_up_stays(
    jobs: JobStore, queue: Queue, datasets: DatasetStore
) -> None:
    dataset_id = upload(datasets, IMAGES).dataset_id
    job_id = queue().job_id
    jobs.claim(ALL)
    jobs.use_dataset(job_id, dataset_id)
    with pytest.raises(WrongState, match=job_id):
        datasets.delete(dataset_id, TENANT)
    jobs.fail(job_id, Reason.TRAINING_FAILED, "x")
    datasets.delete(dataset_id, TENANT)
    with pytest.raises(NotFound):
        jobs.use_dataset(job_id, dataset_id)


def test_claims_take_the_oldest_first_and_only_for_devices_that_are_free(
    jobs: JobStore, queue: Queue
) -> None:
    cuda, cpu, auto = (queue(device=d).job_id for d in ("cuda", "cpu", "auto"))
    first = jobs.claim(["cpu", "auto"])
    assert first is not None
    assert (first.job_id, first.state, first.attempts) == (cpu, JobState.RUNNING, 1)
    assert first.start_time_s is not None
    assert [job and job.job_id for job in (jobs.claim(ALL), jobs.claim(ALL), jobs.claim(ALL))] == [
        cuda, auto, None,
    ]  # fmt: skip
    assert states(jobs, cpu) == [JobState.QUEUED, JobState.RUNNING]


def test_claims_from_many_threads_never_give_one_job_twice(jobs: JobStore, queue: Queue) -> None:
    made = [queue().job_id for _ in range(30)]
    start = threading.Barrier(6)

    def claim_all(_: int) -> list[str]:
        start.wait(60)
        claimed = []
        while (job := jobs.claim(ALL)) is not None:
            claimed.append(job.job_id)
        return claimed

    with ThreadPoolExecutor(6) as pool:
        claimed = [job_id for ids in pool.map(claim_all, range(6)) for job_id in ids]
    assert sorted(claimed) == made


def test_job_ids_sort_by_age_and_are_not_guessable(jobs: JobStore, queue: Queue) -> None:
    made = [queue().job_id for _ in range(50)]
    assert made == sorted(made)
    assert len({job_id[-16:] for job_id in made}) == 50


def test_events_are_numbered_without_gaps_and_read_after_any_of_them(
    jobs: JobStore, queue: Queue
) -> None:
    job_id = queue().job_id
    jobs.claim(ALL)
    for n in range(5):
        event = jobs.append_event(job_id, Note("info", str(n)))
        assert event == jobs.events(job_id, TENANT, event.sequence - 1)[0]
    assert [e.sequence for e in jobs.events(job_id, TENANT, 0)] == list(range(1, 8))
    assert [e.sequence for e in jobs.events(job_id, TENANT, 3, limit=2)] == [4, 5]
    assert jobs.events(job_id, TENANT, 99) == []
    with pytest.raises(InvalidInput):
        jobs.events(job_id, TENANT, -1)
    with pytest.raises(NotFound):
        jobs.events("job-x", TENANT, 0)


def test_progress_shows_while_the_job_runs(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    jobs.claim(ALL)
    jobs.append_event(job_id, Progressed("training", 0.5))
    assert jobs.get(job_id, TENANT).progress == Progressed("training", 0.5)
    jobs.fail(job_id, Reason.TRAINING_FAILED, "no")
    assert jobs.get(job_id, TENANT).progress is None


def test_success_publishes_and_ends_in_one_step(
    jobs: JobStore,
    queue: Queue,
    models: ModelStore,
    artifacts: Artifacts,
    tmp_path: Path,
) -> None:
    job_id = queue().job_id
    jobs.claim(ALL)
    stored = artifacts.put(write_result(tmp_path / "out", job_id))

    def publish(connection: Connection) -> Publication:
        return models.publish(connection, "birds", job_id, stored)

    def publish_and_fail(connection: Connection) -> Publication:
        publish(connection)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        jobs.succeed(job_id, publish_and_fail)
    assert jobs.get(job_id, TENANT).state is JobState.RUNNING
    assert models.list_models(0, "", TENANT) == ([], "")

    record = jobs.succeed(job_id, publish)
    assert (record.state, record.version) == (JobState.SUCCEEDED, 1)
    assert record.end_time_s is not None
    last_two = [e.payload for e in jobs.events(job_id, TENANT, 0)][-2:]
    out = Published("birds", 1, figure(0.5, 2), calibrated=True)
    assert last_two == [out, StateChanged(JobState.SUCCEEDED)]
    assert jobs.succeed(job_id, publish) == record
    assert models.get_model("birds").version_count == 1


def test_a_failed_job_says_why(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    jobs.claim(ALL)
    record = jobs.fail(job_id, Reason.OUT_OF_MEMORY, "too big")
    assert (record.state, record.error_reason, record.error_message) == (
        JobState.FAILED, Reason.OUT_OF_MEMORY, "too big",
    )  # fmt: skip
    assert jobs.events(job_id, TENANT, 0)[-1].payload == StateChanged(
        JobState.FAILED, Reason.OUT_OF_MEMORY, "too big"
    )


def test_a_queued_job_is_cancelled_at_once(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    assert jobs.request_cancel(job_id, TENANT).state is JobState.CANCELLED
    assert jobs.claim(ALL) is None
    with pytest.raises(WrongState) as caught:
        jobs.request_cancel(job_id, TENANT)
    assert caught.value.reason is Reason.JOB_FINISHED


def test_a_running_job_is_cancelled_when_its_trainer_stopped(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    jobs.claim(ALL)
    assert jobs.to_cancel() == set()
    record = jobs.request_cancel(job_id, TENANT)
    assert (record.state, record.cancel_requested) == (JobState.RUNNING, True)
    assert jobs.request_cancel(job_id, TENANT) == record
    assert jobs.to_cancel() == {job_id}
    record = jobs.cancelled(job_id)
    assert (record.state, record.cancel_requested) == (JobState.CANCELLED, False)
    assert jobs.to_cancel() == set()


def test_a_success_beats_a_cancel_that_was_not_done_yet(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    jobs.claim(ALL)
    jobs.request_cancel(job_id, TENANT)
    record = jobs.succeed(job_id, version_one)
    assert (record.state, record.cancel_requested) == (JobState.SUCCEEDED, False)


def test_nothing_happens_to_a_job_after_its_end(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    jobs.claim(ALL)
    jobs.fail(job_id, Reason.TRAINING_FAILED, "no")
    before = jobs.events(job_id, TENANT, 0)
    for change in (
        lambda: jobs.append_event(job_id, Note("info", "late")),
        lambda: jobs.succeed(job_id, version_one),
        lambda: jobs.fail(job_id, Reason.INTERNAL, ""),
        lambda: jobs.cancelled(job_id),
        lambda: jobs.requeue(job_id, ""),
    ):
        with pytest.raises(WrongState) as caught:
            change()
        assert caught.value.reason is Reason.JOB_FINISHED
    assert jobs.events(job_id, TENANT, 0) == before


def test_after_a_restart_running_jobs_wait_again_before_younger_ones(
    jobs: JobStore, queue: Queue, database: Database
) -> None:
    old, young = queue().job_id, queue().job_id
    jobs.claim(ALL)
    again = JobStore(database, max_queued=100)
    (record,) = again.requeue_running(max_crashes=2)
    assert (record.job_id, record.state, record.crashes) == (old, JobState.QUEUED, 1)
    claimed = again.claim(ALL)
    assert claimed is not None
    assert (claimed.job_id, claimed.attempts) == (old, 2)
    assert states(again, old) == [
        JobState.QUEUED, JobState.RUNNING, JobState.QUEUED, JobState.RUNNING,
    ]  # fmt: skip
    assert again.get(young, TENANT).last_sequence == 1


def test_a_job_that_was_running_at_too_many_crashes_fails(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    for _ in range(2):
        jobs.claim(ALL)
        jobs.requeue_running(max_crashes=2)
    record = jobs.get(job_id, TENANT)
    assert (record.state, record.error_reason) == (JobState.FAILED, Reason.TRAINER_CRASHED)
    assert "attempt 2 of 2" in record.error_message


def test_a_requeue_that_is_no_crash_does_not_count_as_one(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    for _ in range(5):
        jobs.claim(ALL)
        jobs.requeue(job_id, "the service stops")
    assert jobs.get(job_id, TENANT).state is JobState.QUEUED
    jobs.claim(ALL)
    record = jobs.requeue(job_id, "it crashed", Reason.TRAINER_CRASHED, max_crashes=2)
    assert (record.state, record.attempts, record.crashes) == (JobState.QUEUED, 6, 1)


def test_a_job_that_was_to_be_cancelled_does_not_start_again(jobs: JobStore, queue: Queue) -> None:
    job_id = queue().job_id
    jobs.claim(ALL)
    jobs.request_cancel(job_id, TENANT)
    (record,) = jobs.requeue_running(max_crashes=2)
    assert record.state is JobState.CANCELLED


def test_jobs_are_listed_newest_first_by_state_and_model(jobs: JobStore, queue: Queue) -> None:
    made = [queue(model).job_id for model in ("birds", "bears", "birds", "birds")]
    jobs.claim(ALL)

    def ids(*asked: object) -> list[str]:
        found, token = [], ""
        while True:
            page, token = jobs.list(1, token, *asked, TENANT)  # type: ignore[arg-type]
            found += [record.job_id for record in page]
            if not token:
                return found

    assert ids((), "") == made[::-1]
    assert ids((), "birds") == [made[3], made[2], made[0]]
    assert ids([JobState.RUNNING], "") == [made[0]]
    assert ids([JobState.QUEUED, JobState.FAILED], "birds") == [made[3], made[2]]
    assert ids([JobState.RUNNING], "bears") == []
    assert jobs.counts_by_state() == {
        "QUEUED": 3, "RUNNING": 1, "SUCCEEDED": 0, "FAILED": 0, "CANCELLED": 0,
    }  # fmt: skip


def test_listeners_hear_of_every_event_after_it_is_kept(jobs: JobStore) -> None:
    heard: list[tuple[str, JobEvent | None]] = []

    def listen(job_id: str, event: JobEvent | None) -> None:
        if event is not None:
            assert jobs.events(job_id, TENANT, event.sequence - 1) == [event]
        heard.append((job_id, event))

    jobs.listen(listen)
    job_id = jobs.create(request(), "", b"")[0].job_id
    jobs.claim(ALL)
    jobs.request_cancel(job_id, TENANT)
    jobs.cancelled(job_id)
    assert [event and event.sequence for _, event in heard] == [1, 2, None, 3]


class AnyOrder(RuleBasedStateMachine):
    """Whatever is done to jobs, in whatever order, they stay consistent."""

    new_folder: Callable[[], Path]

    def __init__(self) -> None:
        super().__init__()
        self.database = Database(type(self).new_folder())
        self.jobs = JobStore(self.database, max_queued=5)
        self.pick = random.Random(0)

    def teardown(self) -> None:
        self.database.close()

    def any_id(self) -> str:
        records, _ = self.jobs.list(0, "", (), "", TENANT)
        return self.pick.choice([r.job_id for r in records]) if records else "job-none"

    @rule(device=st.sampled_from(ALL), request_id=st.sampled_from(["", "a", "b"]))
    def create(self, device: str, request_id: str) -> None:
        try:
            self.jobs.create(request(device=device), request_id, b"f")
        except Exhausted:
            # More when jobs that ran were put back into a full queue: they were accepted.
            assert self.jobs.counts_by_state()["QUEUED"] >= 5

    @rule(devices=st.lists(st.sampled_from(ALL), min_size=1, unique=True))
    def claim(self, devices: list[str]) -> None:
        job = self.jobs.claim(devices)
        assert job is None or job.request.device in devices

    @rule(
        what=st.sampled_from(
            ["append", "succeed", "fail", "request_cancel", "cancelled", "requeue", "crash"]
        )
    )
    def change(self, what: str) -> None:
        job_id = self.any_id()
        changes = {
            "append": lambda: self.jobs.append_event(job_id, Progressed("training", 0.1)),
            "succeed": lambda: self.jobs.succeed(job_id, version_one),
            "fail": lambda: self.jobs.fail(job_id, Reason.TRAINING_FAILED, "x"),
            "request_cancel": lambda: self.jobs.request_cancel(job_id, TENANT),
            "cancelled": lambda: self.jobs.cancelled(job_id),
            "requeue": lambda: self.jobs.requeue(job_id, "x"),
            "crash": lambda: self.jobs.requeue(job_id, "x", Reason.TRAINER_CRASHED, 2),
        }
        with suppress(WrongState, NotFound):
            changes[what]()

    @rule()
    def restart(self) -> None:
        self.jobs.requeue_running(max_crashes=2)
        assert self.jobs.counts_by_state()["RUNNING"] == 0

    @invariant()
    def events_tell_the_state(self) -> None:
        for record in self.jobs.list(0, "", (), "", TENANT)[0]:
            events = self.jobs.events(record.job_id, TENANT, 0)
            assert [e.sequence for e in events] == list(range(1, record.last_sequence + 1))
            changes = [e for e in events if isinstance(e.payload, StateChanged)]
            assert changes[-1].payload.state is record.state  # type: ignore[union-attr]
            assert [e.is_last for e in events] == [
                record.state.is_final and e is events[-1] for e in events
            ]
            assert record.crashes <= 2


def test_whatever_is_done_in_whatever_order_jobs_stay_consistent(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    AnyOrder.new_folder = staticmethod(lambda: tmp_path_factory.mktemp("any"))
    machine = AnyOrder.TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
    machine("runTest").runTest()


def test_what_happens_to_a_job_is_in_order_though_the_clock_goes_back(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1_000_000.0]

    def earlier() -> float:
        clock[0] -= 3600
        return clock[0]

    monkeypatch.setattr(time, "time", earlier)
    record, _ = jobs.create(request(), "", b"")
    assert jobs.claim(["auto"]) is not None
    jobs.append_event(record.job_id, Progressed("training", 0.5))
    ended = jobs.fail(record.job_id, Reason.TRAINING_FAILED, "no")
    assert ended.start_time_s is not None and ended.end_time_s is not None
    assert ended.create_time_s <= ended.start_time_s <= ended.end_time_s
    times = [event.time_s for event in jobs.events(record.job_id, TENANT, 0)]
    assert times == sorted(times)
