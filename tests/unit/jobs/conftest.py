from collections.abc import Callable

import pytest

from service.jobs.request import JobRequest
from service.jobs.store import JobRecord, JobStore
from service.storage.database import Database
from tests.unit.jobs.house import folder, make_house
from tests.unit.storage.conftest import artifacts, database, datasets, make_datasets, models

__all__ = [
    "artifacts",
    "database",
    "datasets",
    "folder",
    "make_datasets",
    "make_house",
    "models",
]


def request(model: str = "birds", **changes: object) -> JobRequest:
    values = {"server_path": "/data/birds", **changes}
    return JobRequest(model=model, **values)  # type: ignore[arg-type]


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database, max_queued=100)


Queue = Callable[..., JobRecord]


@pytest.fixture
def queue(jobs: JobStore) -> Queue:
    """Queues one job."""

    def queue(model: str = "birds", **changes: object) -> JobRecord:
        return jobs.create(request(model, **changes), "", b"")[0]

    return queue
