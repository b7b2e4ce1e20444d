import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.contract import BackbonesRanked, Note, Progressed
from service.domain import Base, JobKind, JobState, VersionSource
from service.errors import (
    AlreadyExists,
    Exhausted,
    InvalidInput,
    NotFound,
    OverQuota,
    Reason,
    WrongState,
)
from service.jobs import records, store
from service.jobs.claims import Claims, LeaseLost
from service.jobs.records import StateChanged
from service.jobs.replicas import Replicas
from service.jobs.store import JobRecord, JobStore
from service.storage.database import Connection, Database
from service.storage.datasets import DatasetStore
from service.storage.version_rows import Publication
from tests.keys import BIRDS, key
from tests.unit.jobs.conftest import ALL, Claim, Queue, request, to_rank
from tests.unit.storage.conftest import TENANT, manifest
from tests.unit.storage.test_datasets import IMAGES, upload

RANKED = BackbonesRanked([], "the first", 7)


def version_one(_: Connection) -> Publication:
    return Publication(1, manifest("job-1"))


def test_a_new_job_waits_with_its_first_event(jobs: JobStore) -> None:
    record, created = jobs.create(request(labels={"a": "b"}), "", b"")
    assert created
    assert record == jobs.get(record.job_id, TENANT)
    assert (record.state, record.attempts, record.last_sequence) == (JobState.QUEUED, 0, 1)
    assert record.request == request(labels={"a": "b"})
    assert jobs.events(record.job_id, TENANT, 0)[0].payload == StateChanged(JobState.QUEUED)


def test_the_same_request_id_gives_the_first_job_while_that_is_there(
    jobs: JobStore,
) -> None:
    first, _ = jobs.create(request(), "retry-1", b"f")
    assert jobs.create(request(), "retry-1", b"f") == (first, False)
    with pytest.raises(AlreadyExists, match=first.job_id) as caught:
        jobs.create(request(key("bears")), "retry-1", b"g")
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert jobs.create(request(), "", b"f")[1]
    assert jobs.create(request(), "", b"f")[1]
    jobs.request_cancel(first.job_id, TENANT)
    jobs.delete(first.job_id, TENANT)
    assert jobs.create(request(), "retry-1", b"g")[1]


def test_a_repeated_request_is_answered_though_the_queue_is_full(
    database: Database, claim: Claim
) -> None:
    jobs = JobStore(database, max_queued=1)
    first, _ = jobs.create(request(), "retry-1", b"f")
    assert jobs.create(request(), "retry-1", b"f") == (first, False)
    with pytest.raises(Exhausted) as caught:
        jobs.create(request(), "", b"")
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_s
    claim()
    assert jobs.create(request(), "", b"")[1]


def test_rankings_and_fine_tunings_have_quotas_of_their_own(jobs: JobStore) -> None:
    jobs.create(request(), "", b"", 1)
    jobs.create(to_rank(), "", b"", 1)
    for again, subject in ((request(), "concurrent_jobs"), (to_rank(), "rankings")):
        with pytest.raises(OverQuota) as caught:
            jobs.create(again, "", b"", 1)
        assert caught.value.subject == subject


def test_a_job_on_a_dataset_that_is_gone_is_refused(jobs: JobStore, datasets: DatasetStore) -> None:
    dataset_id = upload(datasets, IMAGES).dataset_id
    for asked in (
        request(server_path="", dataset_id=dataset_id),
        to_rank(server_path="", dataset_id=dataset_id),
        request(base=Base("birds", 1), base_sources=[VersionSource("source", dataset_id)]),
    ):
        job, _ = jobs.create(asked, "", b"")
        with pytest.raises(WrongState, match=job.job_id):
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
        lambda: jobs.create(to_rank(server_path="", dataset_id=dataset_id), "", b""),
        lambda: datasets.check_usable(dataset_id, TENANT, is_alone=True),
    ):
        with pytest.raises(InvalidInput, match=r"1 class \('cat'\)") as caught:
            refuse()
        assert (caught.value.reason, caught.value.field) == (Reason.DATASET_UNUSABLE, "dataset_id")
    grown = msgspec.structs.replace(asked, base=Base("birds", 1))
    assert jobs.create(grown, "", b"")[1]


def test_job_ids_sort_by_age_and_are_not_guessable(queue: Queue) -> None:
    made = [queue().job_id for _ in range(50)]
    assert made == sorted(made)
    assert len({job_id[-16:] for job_id in made}) == 50


def test_events_are_numbered_without_gaps_and_read_after_any_of_them(
    jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    job_id = running.job_id
    for n in range(5):
        event = claims.append(running, Note("info", str(n)))
        assert event == jobs.events(job_id, TENANT, event.sequence - 1)[0]
    assert [e.sequence for e in jobs.events(job_id, TENANT, 0)] == list(range(1, 8))
    assert [e.sequence for e in jobs.events(job_id, TENANT, 3, limit=2)] == [4, 5]
    assert jobs.events(job_id, TENANT, 99) == []
    with pytest.raises(InvalidInput):
        jobs.events(job_id, TENANT, -1)
    with pytest.raises(NotFound):
        jobs.events("job-x", TENANT, 0)


def test_jobs_are_listed_newest_first_by_state_model_and_kind(
    jobs: JobStore, queue: Queue, claim: Claim
) -> None:
    made = [queue(model).job_id for model in (BIRDS, key("bears"), BIRDS, BIRDS)]
    ranking = jobs.create(to_rank(), "", b"")[0].job_id
    claim()

    def ids(*asked: object) -> list[str]:
        states, model, *kind = asked
        found, token = [], ""
        while True:
            page, token = jobs.list(1, token, states, model, TENANT, *kind)  # type: ignore[arg-type]
            found += [record.job_id for record in page]
            if not token:
                return found

    assert ids((), "") == [ranking, *made[::-1]]
    assert ids((), "", JobKind.RANKING) == [ranking]
    assert ids((), "", JobKind.FINE_TUNE) == made[::-1]
    assert ids((), "birds") == [made[3], made[2], made[0]]
    assert ids([JobState.RUNNING], "") == [made[0]]
    assert ids([JobState.QUEUED, JobState.FAILED], "birds") == [made[3], made[2]]
    assert ids([JobState.RUNNING], "bears") == []
    assert jobs.counts_by_state() == {
        "QUEUED": 4, "RUNNING": 1, "SUCCEEDED": 0, "FAILED": 0, "CANCELLED": 0,
    }  # fmt: skip


def test_jobs_are_listed_by_all_the_labels_that_are_named(jobs: JobStore, queue: Queue) -> None:
    blue = queue(labels={"team": "blue", "site": "1"}).job_id
    other = queue(labels={"team": "blue"}).job_id
    queue(labels={"team": "red", "blue": "team"})
    queue()

    def ids(model: str = "", **labels: str) -> list[str]:
        return [job.job_id for job in jobs.list(0, "", (), model, TENANT, None, labels)[0]]

    assert ids(team="blue") == [other, blue]
    assert ids(team="blue", site="1") == [blue]
    assert ids("birds", site="1") == [blue]
    assert ids("bears", site="1") == []
    assert ids(team="") == []


def test_listeners_hear_of_every_change_after_it_is_kept(
    jobs: JobStore, claims: Claims, claim: Claim
) -> None:
    heard: list[tuple[str, int]] = []
    jobs.listen(lambda job_id: heard.append((job_id, jobs.get(job_id, TENANT).last_sequence)))
    job_id = jobs.create(request(), "", b"")[0].job_id
    job = claim()
    assert job is not None
    jobs.request_cancel(job_id, TENANT)
    claims.cancelled(job)
    assert heard == [(job_id, 1), (job_id, 2), (job_id, 2), (job_id, 3)]


def test_a_job_is_deleted_once_it_has_ended_and_frees_what_it_took(
    jobs: JobStore, claims: Claims, running: JobRecord, datasets: DatasetStore
) -> None:
    with pytest.raises(WrongState) as caught:
        jobs.delete(running.job_id, TENANT)
    assert caught.value.reason is Reason.JOB_NOT_FINISHED
    note = Note("info", "n" * 100_000)
    claims.append(running, note)
    before = datasets.stored_bytes(TENANT)
    claims.fail(running, Reason.TRAINING_FAILED, "no")
    assert 100_000 < datasets.stored_bytes(TENANT) - before < 101_000
    with pytest.raises(NotFound):
        jobs.delete(running.job_id, "another")
    jobs.delete(running.job_id, TENANT)
    assert datasets.stored_bytes(TENANT) == 0
    for gone in (
        lambda: jobs.delete(running.job_id, TENANT),
        lambda: jobs.get(running.job_id, TENANT),
        lambda: jobs.events(running.job_id, TENANT, 0),
    ):
        with pytest.raises(NotFound):
            gone()


def test_old_events_and_then_old_jobs_are_deleted(
    jobs: JobStore,
    claims: Claims,
    queue: Queue,
    claim: Claim,
    datasets: DatasetStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "MAX_DELETED", 2)
    ended = [queue().job_id for _ in range(5)]
    for _ in ended:
        job = claim()
        assert job is not None
        claims.append(job, Note("info", "x"))
        claims.fail(job, Reason.TRAINING_FAILED, "no")
    queue()
    job = claim()
    assert job is not None
    assert jobs.delete_old_events(60) == jobs.delete_old(60) == 0

    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + 100)
    assert jobs.delete_old_events(60) == 15
    last = StateChanged(JobState.FAILED, Reason.TRAINING_FAILED, "no")
    assert [[e.payload for e in jobs.events(job_id, TENANT, 0)] for job_id in ended] == 5 * [[last]]
    assert len(jobs.events(job.job_id, TENANT, 0)) == 2
    with jobs.database.read() as connection:
        (wrong,) = connection.execute(
            "SELECT COUNT(*) FROM jobs WHERE end_time_s IS NOT NULL AND size_bytes <> ?"
            f" + LENGTH(request_json) + LENGTH(message) + {records.EVENT_BYTES}",
            (records.BESIDE_REQUEST_BYTES,),
        ).fetchone()
    assert wrong == 0
    assert jobs.delete_old(60) == 5
    assert [record.job_id for record in jobs.list(0, "", (), "", TENANT)[0]] == [job.job_id]


class AnyOrder(RuleBasedStateMachine):
    """Whatever is done to jobs, in whatever order, they stay consistent."""

    new_folder: Callable[[], Path]

    def __init__(self) -> None:
        super().__init__()
        self.database = Database(type(self).new_folder())
        self.jobs = JobStore(self.database, max_queued=5)
        self.claims, self.replicas = Claims(self.jobs), Replicas(self.jobs)
        self.owners = [self.replicas.register() for _ in range(2)]
        self.claimed: list[JobRecord] = []
        self.pick = random.Random(0)

    def teardown(self) -> None:
        self.database.close()

    @rule(device=st.sampled_from(ALL), request_id=st.sampled_from(["", "a", "b"]))
    def create(self, device: str, request_id: str) -> None:
        try:
            self.jobs.create(request(device=device), request_id, b"f")
        except Exhausted:
            # More when jobs that ran were put back into a full queue: they were accepted.
            assert self.jobs.counts_by_state()["QUEUED"] >= 5

    @rule(devices=st.lists(st.sampled_from(ALL), min_size=1, unique=True))
    def claim(self, devices: list[str]) -> None:
        job = self.claims.claim(self.pick.choice(self.owners), JobKind.FINE_TUNE, devices)
        if job is not None:
            assert job.request.device in devices
            self.claimed.append(job)

    @rule(what=st.sampled_from(["append", "succeed", "fail", "cancelled", "requeue", "crash"]))
    def write(self, what: str) -> None:
        if not self.claimed:
            return
        job = self.pick.choice(self.claimed)
        changes: dict[str, Callable[[], object]] = {
            "append": lambda: self.claims.append(job, Progressed("training", 0.1)),
            "succeed": lambda: self.claims.succeed(job, version_one),
            "fail": lambda: self.claims.fail(job, Reason.TRAINING_FAILED, "x"),
            "cancelled": lambda: self.claims.cancelled(job),
            "requeue": lambda: self.claims.requeue(job, "x"),
            "crash": lambda: self.claims.crash(job, Reason.TRAINER_CRASHED, "x", 2),
        }
        with suppress(LeaseLost):
            changes[what]()

    @rule(what=st.sampled_from(["request_cancel", "delete"]))
    def ask(self, what: str) -> None:
        records, _ = self.jobs.list(0, "", (), "", TENANT)
        job_id = self.pick.choice([r.job_id for r in records]) if records else "job-none"
        with suppress(WrongState, NotFound):
            getattr(self.jobs, what)(job_id, TENANT)

    @rule()
    def restart(self) -> None:
        self.replicas = Replicas(self.jobs)
        self.owners = [self.replicas.register()]
        self.replicas.reap(max_crashes=2)
        assert self.jobs.counts_by_state()["RUNNING"] == 0
        self.owners.append(self.replicas.register())

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
    jobs: JobStore, claims: Claims, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1_000_000.0]

    def earlier() -> float:
        clock[0] -= 3600
        return clock[0]

    owner = replicas.register()
    monkeypatch.setattr(time, "time", earlier)
    record, _ = jobs.create(request(), "", b"")
    job = claims.claim(owner, JobKind.FINE_TUNE, ALL)
    assert job is not None
    claims.append(job, Progressed("training", 0.5))
    ended = claims.fail(job, Reason.TRAINING_FAILED, "no")
    assert ended.start_time_s is not None and ended.end_time_s is not None
    assert ended.create_time_s <= ended.start_time_s <= ended.end_time_s
    times = [event.time_s for event in jobs.events(record.job_id, TENANT, 0)]
    assert times == sorted(times)
