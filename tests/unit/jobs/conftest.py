from collections.abc import Callable, Collection

import pytest

from service.domain import JobKind, ModelKey
from service.jobs.claims import Claims
from service.jobs.replicas import Replicas
from service.jobs.request import JobRequest, RankRequest
from service.jobs.store import JobRecord, JobStore
from service.storage.database import Database
from tests.keys import BIRDS
from tests.unit.jobs.house import folder, make_house
from tests.unit.storage.conftest import (
    blobs,
    change_log,
    database,
    datasets,
    keeper,
    make_datasets,
    models,
    no_files_in_transactions,
    store,
)

__all__ = [
    "blobs",
    "change_log",
    "database",
    "datasets",
    "folder",
    "keeper",
    "make_datasets",
    "make_house",
    "models",
    "no_files_in_transactions",
    "store",
]


def request(model: ModelKey = BIRDS, **changes: object) -> JobRequest:
    values = {"server_path": "/data/birds", **changes}
    return JobRequest(tenant=model.tenant, model=model.name, **values)  # type: ignore[arg-type]


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database, max_queued=100)


@pytest.fixture
def claims(jobs: JobStore) -> Claims:
    return Claims(jobs)


@pytest.fixture
def replicas(jobs: JobStore) -> Replicas:
    return Replicas(jobs)


ALL = ("auto", "cpu", "cuda")

Claim = Callable[..., JobRecord | None]


@pytest.fixture
def claim(claims: Claims, replicas: Replicas) -> Claim:
    """Claims a job as a replica that lives does."""
    owner = replicas.register()

    def claim(
        devices: Collection[str] = ALL, kind: JobKind = JobKind.FINE_TUNE
    ) -> JobRecord | None:
        return claims.claim(owner, kind, devices)

    return claim


def to_rank(**changes: object) -> RankRequest:
    values = {"tenant": BIRDS.tenant, "server_path": "/data/birds", **changes}
    return RankRequest(**values)  # type: ignore[arg-type]


Queue = Callable[..., JobRecord]


@pytest.fixture
def queue(jobs: JobStore) -> Queue:
    """Queues one job."""

    def queue(model: ModelKey = BIRDS, **changes: object) -> JobRecord:
        return jobs.create(request(model, **changes), "", b"")[0]

    return queue


@pytest.fixture
def running(queue: Queue, claim: Claim) -> JobRecord:
    """A job that was claimed."""
    queue()
    job = claim()
    assert job is not None
    return job
