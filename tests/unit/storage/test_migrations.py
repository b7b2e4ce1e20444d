"""Databases that earlier releases wrote."""

from importlib import resources
from pathlib import Path

import msgspec
import pytest

from service.domain import DEFAULT_TENANT
from service.errors import WrongState
from service.ingest.archives import FILE_BYTES
from service.jobs.store import JobStore
from service.storage.artifacts import Artifacts
from service.storage.database import Database
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from tests.unit.storage.conftest import LIMITS, FakeReader, write_result

FIRST = (resources.files("service.storage") / "migrations" / "0001_first.sql").read_text("utf-8")


def test_a_database_of_the_first_format_keeps_all_and_can_be_rolled_back(tmp_path: Path) -> None:
    """Three versions, `prod` on the first, and a running job on a dataset."""
    data = tmp_path / "data"
    artifacts = Artifacts(data / "artifacts")
    old = Database(data, [FIRST])
    stored = [artifacts.put(write_result(tmp_path / f"out{n}", f"job-{n}")) for n in (1, 2, 3)]
    with old.transaction() as connection:
        connection.execute("INSERT INTO models VALUES ('birds', 1.0, 3)")
        for number, one in enumerate(stored, 1):
            connection.execute(
                "INSERT INTO versions VALUES ('birds', ?, ?, 1.0, ?, ?, ?, ?)",
                (
                    number,
                    one.manifest.job_id,
                    msgspec.json.encode(one.manifest).decode(),
                    one.head_digest,
                    one.backbone_digest,
                    one.artifact_digest,
                ),
            )
        connection.execute(
            "INSERT INTO aliases VALUES ('birds', 'latest', 3), ('birds', 'prod', 1)"
        )
        connection.execute(
            "INSERT INTO datasets VALUES ('ds-1', 'pets', 'd', 1.0, 3, '[]', 1, '{}', 0)"
        )
        connection.execute(
            "INSERT INTO jobs (job_id, message, model, dataset_id, device, request_json,"
            " state, create_time_s) VALUES ('job-9', x'', 'birds', 'ds-1', 'cpu',"
            " '{\"model\":\"birds\"}', 'QUEUED', 0)"
        )
    old.close()

    database = Database(data)
    models = ModelStore(database, artifacts)
    versions, _ = models.list_versions("birds", 0, "")
    assert [(v.version, v.is_candidate) for v in versions] == [(3, False), (2, False), (1, False)]
    assert models.roll_back_alias("birds", "latest").to_version == 2
    with pytest.raises(WrongState):
        models.roll_back_alias("birds", "prod")
    datasets = DatasetStore(database, data / "datasets", FakeReader(), LIMITS)
    kept = datasets.get("ds-1", DEFAULT_TENANT)
    assert (kept.is_unlabelled, kept.case_sensitive, kept.image_count) == (False, False, 1)
    # All of it belongs to the tenant that needs no name.
    jobs = JobStore(database, max_queued=10)
    assert [m.name for m in models.list_models(0, "", DEFAULT_TENANT)[0]] == ["birds"]
    assert [d.dataset_id for d in datasets.list(0, "", DEFAULT_TENANT)[0]] == ["ds-1"]
    assert [job.job_id for job in jobs.list(0, "", (), "", DEFAULT_TENANT)[0]] == ["job-9"]
    assert jobs.get("job-9", DEFAULT_TENANT).tenant == DEFAULT_TENANT
    for listed in (models.list_models(0, "", "acme"), datasets.list(0, "", "acme"),
                   jobs.list(0, "", (), "", "acme")):  # fmt: skip
        assert listed == ([], "")
    assert datasets.stored_bytes("acme") == 0
    sizes = [artifacts.version_bytes(one.artifact_digest) for one in stored]
    of_jobs, of_datasets = 1024 + len('{"model":"birds"}'), 3 + FILE_BYTES
    assert datasets.stored_bytes(DEFAULT_TENANT) == of_datasets + sum(sizes) + of_jobs
    with pytest.raises(WrongState, match="job-9"):
        datasets.delete("ds-1", DEFAULT_TENANT)
    database.close()
