"""Two tenants in one queue: the same ids, their own jobs, folders and bounds."""

from pathlib import Path

import pytest

from service.contract import JobSpec
from service.domain import DEFAULT_TENANT, Base, JobKind, JobState, ModelKey
from service.errors import AlreadyExists, Exhausted, NotFound, OverQuota, Reason, WrongState
from service.ingest.archives import FILE_BYTES
from service.jobs.claims import Claims
from service.jobs.lineage import Lineage
from service.jobs.records import Published
from service.jobs.request import JobRequest
from service.jobs.store import JobStore
from service.storage.database import Database
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from tests.fake_launcher import Script
from tests.keys import BIRDS
from tests.unit.ingest.packing import tar_of
from tests.unit.jobs.conftest import Claim, Queue, request
from tests.unit.jobs.house import FINISHED, MakeHouse, class_folders, good
from tests.unit.storage.conftest import write_result
from tests.unit.storage.test_datasets import IMAGES
from tests.unit.storage.test_tenants import ACME, ACMES, BETA, BETAS, upload


def test_a_job_is_its_models_tenants(jobs: JobStore, queue: Queue) -> None:
    ours, theirs, other = queue(ACMES), queue(BETAS), queue(BIRDS)
    assert [job.tenant for job in (ours, theirs, other)] == [ACME, BETA, DEFAULT_TENANT]
    assert jobs.get(ours.job_id, ACME) == ours
    assert [job.job_id for job in jobs.list(0, "", (), "", ACME)[0]] == [ours.job_id]
    assert [job.job_id for job in jobs.list(0, "", (), "birds", ACME)[0]] == [ours.job_id]
    assert [job.job_id for job in jobs.list(0, "", (), "", DEFAULT_TENANT)[0]] == [other.job_id]
    assert [job.job_id for job in jobs.list(0, "", (), "birds", BETA)[0]] == [theirs.job_id]


def test_request_ids_are_each_tenants_own(jobs: JobStore) -> None:
    made = {key: jobs.create(request(key), "one", b"f") for key in (ACMES, BETAS, BIRDS)}
    assert all(is_new for _, is_new in made.values())
    for key, (job, _) in made.items():
        assert jobs.create(request(key), "one", b"f") == (job, False)
        with pytest.raises(AlreadyExists, match=job.job_id):
            jobs.create(request(key), "one", b"g")
    assert jobs.is_known("one", ACME)
    jobs.create(request(ACMES), "two", b"f")
    assert not jobs.is_known("two", DEFAULT_TENANT)
    assert not jobs.is_known("", ACME)


def test_a_tenant_has_so_many_open_jobs_at_once(
    jobs: JobStore, claims: Claims, claim: Claim
) -> None:
    first, _ = jobs.create(request(ACMES), "one", b"f", max_open_jobs=2)
    jobs.create(request(ACMES), "", b"", max_open_jobs=2)
    running = claim()
    assert running is not None
    with pytest.raises(OverQuota) as caught:
        jobs.create(request(ACMES), "", b"", max_open_jobs=2)
    assert (caught.value.subject, caught.value.reason) == (
        "concurrent_jobs",
        Reason.QUOTA_EXCEEDED,
    )
    assert caught.value.retry_after_s
    # What was accepted is answered, others have bounds of their own.
    assert jobs.create(request(ACMES), "one", b"f", max_open_jobs=2)[0].job_id == first.job_id
    jobs.create(request(BETAS), "", b"", max_open_jobs=2)
    claims.fail(running, Reason.INTERNAL, "")
    jobs.create(request(ACMES), "", b"", max_open_jobs=2)


def claimed(claim: Claim) -> ModelKey:
    """Claims a job; answers with its model's key."""
    job = claim()
    assert job is not None
    assert isinstance(job.request, JobRequest)
    return job.request.key


def test_tenants_take_turns_whoever_queued_first(
    claims: Claims, queue: Queue, claim: Claim
) -> None:
    acmes = [queue(ACMES) for _ in range(4)]
    betas = [queue(BETAS) for _ in range(2)]
    started = []
    for _ in range(6):
        job = claim()
        assert job is not None
        started.append(job.job_id)
        claims.fail(job, Reason.INTERNAL, "")
    first, *others = (job.job_id for job in acmes)
    second, third = (job.job_id for job in betas)
    assert started == [first, second, others[0], third, *others[1:]]


def test_who_has_fewer_running_jobs_comes_first(queue: Queue, claim: Claim) -> None:
    for key in (ACMES, ACMES, ACMES, BETAS):
        queue(key)
    assert [claimed(claim) for _ in range(3)] == [ACMES, BETAS, ACMES]
    # Beta's ran out of jobs and got one the longest ago, but has one running still.
    queue(BETAS)
    queue(BIRDS)
    assert [claimed(claim) for _ in range(3)] == [BIRDS, BETAS, ACMES]


def test_a_start_in_the_future_keeps_no_tenant_waiting(
    claims: Claims, queue: Queue, claim: Claim, database: Database
) -> None:
    queue(ACMES)
    job = claim()
    assert job is not None
    claims.fail(job, Reason.INTERNAL, "")
    with database.transaction() as connection:
        connection.execute("UPDATE jobs SET start_time_s = 1e12")
    queue(ACMES)
    queue(BETAS)
    assert claimed(claim) == ACMES


def test_where_there_are_several_tenants_one_has_half_of_the_queue(
    database: Database, claim: Claim
) -> None:
    is_shared = [True]
    shared = JobStore(database, max_queued=5, is_shared=lambda: is_shared[0])

    def queue(key: ModelKey) -> None:
        shared.create(request(key), "", "")

    for _ in range(3):
        queue(ACMES)
    for refused in (lambda: queue(ACMES), lambda: shared.check_open(ACME, JobKind.FINE_TUNE)):
        with pytest.raises(Exhausted, match="3 of your jobs wait") as caught:
            refused()
        assert (caught.value.reason, caught.value.retry_after_s) == (Reason.QUEUE_FULL, 30)
    queue(BETAS)
    # A place is free again once a job runs.
    claim()
    queue(ACMES)
    queue(BETAS)
    with pytest.raises(Exhausted, match="5 jobs wait"):
        queue(BIRDS)
    is_shared[0] = False
    claim()
    queue(ACMES)


def test_a_job_works_on_its_tenants_datasets_alone(
    queue: Queue, claims: Claims, claim: Claim, datasets: DatasetStore
) -> None:
    theirs, ours = upload(datasets, BETA), upload(datasets, ACME)
    for fields in (
        {"dataset_id": theirs},
        {"dataset_id": ours, "target_dataset_id": theirs},
    ):
        with pytest.raises(NotFound) as caught:
            queue(ACMES, server_path="", **fields)
        assert caught.value.reason is Reason.DATASET_NOT_FOUND
    job = queue(ACMES, server_path="", dataset_id=ours, target_dataset_id=ours)
    running = claim()
    assert running is not None
    for is_target in (False, True):
        with pytest.raises(NotFound):
            claims.hold(running, theirs, is_target=is_target)
    with pytest.raises(WrongState, match=job.job_id):
        datasets.delete(ours, ACME)
    datasets.delete(theirs, BETA)


async def test_the_trainer_is_told_plain_names_and_whose_features_it_may_find(
    make_house: MakeHouse, queue: Queue, folder: str, jobs: JobStore
) -> None:
    house = make_house(good())
    await house.supervisor.start()
    await house.ended(queue(ACMES, server_path=folder).job_id, ACME)
    base = {"base": Base("birds", 1), "base_sources": house.models.sources(ACMES, 1)}
    second = await house.ended(queue(ACMES, server_path=folder, **base).job_id, ACME)
    assert (second.state, second.version) == (JobState.SUCCEEDED, 2)
    specs = [trainer.spec for trainer in house.launcher.trainers]
    assert [(s.model, s.feature_cache_owner) for s in specs] == [("birds", ACME)] * 2
    assert specs[1].base == Base("birds", 1)
    assert [m.key for m in house.models.list_models(0, "", ACME)[0]] == [ACMES]
    version = house.models.get_version(ACMES, 2, None)
    assert house.models.manifest(version).model == "birds"
    (published,) = [
        e.payload for e in jobs.events(second.job_id, ACME, 0) if isinstance(e.payload, Published)
    ]
    assert (published.model, published.version) == ("birds", 2)
    await house.ended(queue(BIRDS, server_path=folder).job_id)
    assert house.launcher.trainers[-1].spec.feature_cache_owner == ""


async def test_a_job_reads_its_tenants_folders_alone(
    make_house: MakeHouse, queue: Queue, folder: str, tmp_path: Path
) -> None:
    dirs = {ACME: (tmp_path,)}
    house = make_house(good(), allowed_dirs_of=lambda tenant: dirs.get(tenant, ()))
    await house.supervisor.start()
    theirs = await house.ended(queue(BETAS, server_path=folder).job_id, BETA)
    assert (theirs.state, theirs.error_reason) == (JobState.FAILED, Reason.PATH_NOT_ALLOWED)
    ours = await house.ended(queue(ACMES, server_path=folder).job_id, ACME)
    assert ours.state is JobState.SUCCEEDED


async def test_an_archive_that_a_job_unpacks_is_its_tenants_and_counts(
    make_house: MakeHouse, queue: Queue, tmp_path: Path, datasets: DatasetStore
) -> None:
    archive = tmp_path / "pets.tar"
    content = {f"{label}/{n}.png": data for n, (label, data, _) in enumerate(IMAGES)}
    archive.write_bytes(tar_of(content))
    queued = {key: queue(key, server_path=str(archive)) for key in (ACMES, BETAS)}
    bounds = {ACME: 100_000, BETA: datasets.stored_bytes(BETA) + 3 * FILE_BYTES + 11}
    house = make_house(good(), max_stored_bytes_of=bounds.get)
    await house.supervisor.start()
    ours = await house.ended(queued[ACMES].job_id, ACME)
    assert ours.state is JobState.SUCCEEDED
    assert [each.size_bytes for each in datasets.list(0, "", ACME)[0]] == [12]
    theirs = await house.ended(queued[BETAS].job_id, BETA)
    assert (theirs.state, theirs.error_reason) == (JobState.FAILED, Reason.QUOTA_EXCEEDED)
    assert datasets.list(0, "", BETA) == ([], "")


async def test_a_version_that_its_tenant_has_no_room_for_is_not_published(
    make_house: MakeHouse, queue: Queue, folder: str, datasets: DatasetStore, models: ModelStore
) -> None:
    jobs = [queue(ACMES, server_path=folder) for _ in range(2)]
    bounds = {ACME: datasets.stored_bytes(ACME) + 70_000}

    def trained(spec: JobSpec) -> None:
        head, weights = b"h" * 50_000, {"backbone": b"b" * 1000, "weights": "random:1"}
        write_result(Path(spec.out_dir), spec.job_id, spec.model, head=head, **weights)  # type: ignore[arg-type]

    house = make_house(
        Script(records=[FINISHED], before_last=trained), max_stored_bytes_of=bounds.get
    )
    await house.supervisor.start()
    first, second = [await house.ended(job.job_id, job.tenant) for job in jobs]
    assert (first.state, first.version) == (JobState.SUCCEEDED, 1)
    assert (second.state, second.error_reason) == (JobState.FAILED, Reason.QUOTA_EXCEEDED)
    assert "delete datasets, versions or jobs" in second.error_message
    assert "fine-tune again" in second.error_message
    assert models.get_model(ACMES).version_count == 1
    assert datasets.stored_bytes(ACME) <= bounds[ACME]
    models.delete_model(ACMES)
    again = await house.ended(queue(ACMES, server_path=folder).job_id, ACME)
    assert again.state is JobState.SUCCEEDED


def test_what_jobs_leave_in_the_database_counts(
    jobs: JobStore, queue: Queue, datasets: DatasetStore
) -> None:
    sizes = []
    for labels in ({}, {"note": "x" * 250}, {"note": "\u00fc" * 125}):
        before = datasets.stored_bytes(ACME)
        queue(ACMES, labels=labels)
        sizes.append(datasets.stored_bytes(ACME) - before)
    assert sizes[0] > 1000
    assert sizes[1] == sizes[2] > sizes[0] + 250
    assert datasets.stored_bytes(BETA) == 0
    known, _ = jobs.create(request(BETAS), "one", b"f")
    counted = datasets.stored_bytes(BETA)
    assert jobs.create(request(BETAS), "one", b"f") == (known, False)
    assert datasets.stored_bytes(BETA) == counted


async def test_a_base_grows_from_what_its_tenant_may_read_still(
    make_house: MakeHouse, queue: Queue, models: ModelStore, datasets: DatasetStore, tmp_path: Path,
) -> None:  # fmt: skip
    images = class_folders(tmp_path / "acme" / "pets")
    dirs = {ACME: (tmp_path / "acme",)}
    house = make_house(good(), allowed_dirs_of=lambda tenant: dirs.get(tenant, ()))
    await house.supervisor.start()
    await house.ended(queue(ACMES, server_path=str(images)).job_id, ACME)
    lineage = Lineage(models, datasets, house.settings.allowed_dirs_of)
    grown = lineage.grow(request(ACMES), "", None, None)
    assert grown.base == Base("birds", 1)
    assert [lineage.place(grown, source) for source in grown.base_sources] == [images]
    for key in (BETAS, BIRDS):
        with pytest.raises(NotFound) as caught:
            lineage.grow(request(key), "", None, None)
        assert caught.value.field == "base"
    dirs[ACME] = ()
    with pytest.raises(WrongState, match="version 1 of birds") as gone:
        lineage.check_sources(grown)
    assert gone.value.reason is Reason.BASE_DATA_GONE


def test_whether_a_job_may_be_made_is_known_before_it_is(jobs: JobStore, queue: Queue) -> None:
    for _ in range(2):
        queue(ACMES)
    jobs.check_open(ACME, JobKind.FINE_TUNE)
    jobs.check_open(ACME, JobKind.FINE_TUNE, 3)
    jobs.check_open(BETA, JobKind.FINE_TUNE, 1)
    with pytest.raises(OverQuota) as caught:
        jobs.check_open(ACME, JobKind.FINE_TUNE, 2)
    assert caught.value.subject == "concurrent_jobs"
