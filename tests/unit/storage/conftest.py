import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from service.contract import DEFAULT_BACKBONE, Gate
from service.domain import DEFAULT_TENANT, Manifest, Parity, ReadSummary
from service.engine.preprocess import ImageFacts
from service.errors import InvalidInput, Reason
from service.ingest import reader
from service.ingest.archives import Limits
from service.ingest.index import Index
from service.ingest.reader import Inspect, OnProgress, ReadRequest
from service.storage.artifacts import Artifacts
from service.storage.database import Database
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from tests.figures import figure

GUARD_S = 60.0
"""Ends a test that hangs."""

TENANT = DEFAULT_TENANT
"""Whose all is in tests that are not about tenants; their models' keys are plain names."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(job_id: str, model: str = "birds", **changes: object) -> Manifest:
    whole = Manifest(
        model=model,
        job_id=job_id,
        method="feature_based",
        backbone=DEFAULT_BACKBONE,
        weights="IMAGENET1K_V1",
        backbone_digest=digest(b"backbone"),
        feature_dim=3,
        classes=["cat", "dog"],
        temperature=1.0,
        train_count=8,
        train_groups=8,
        figures=[figure(0.5, 2)],
        calibrated=True,
        dataset_digest="d" * 64,
        reading=ReadSummary(seen=10, used=10),
        seed=0,
        hyperparameters={},
        preprocess={},
        parity=Parity(0.0, 1.0, 2),
        opset=17,
        device="cpu",
        precision="fp32",
        provider="cpu",
        versions={},
        started_at="2024-01-01T00:00:00Z",
        duration_s=1.0,
    )
    return msgspec.structs.replace(whole, **changes)


def write_result(
    out_dir: Path,
    job_id: str,
    model: str = "birds",
    *,
    head: bytes | None = None,
    backbone: bytes | None = b"backbone",
    **changes: object,
) -> Path:
    """A trainer's result; with `backbone` None it relies on one that is stored."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if backbone is not None:
        (out_dir / "backbone.onnx").write_bytes(backbone)
        changes = {"backbone_digest": digest(backbone), **changes}
    (out_dir / "head.safetensors").write_bytes(head or f"head of {job_id}".encode())
    (out_dir / "answers.safetensors").write_bytes(f"answers of {job_id}".encode())
    made = manifest(job_id, model, **changes)
    (out_dir / "manifest.json").write_bytes(msgspec.json.encode(made))
    (out_dir / "report.json").write_text(json.dumps({"job": job_id}))
    (out_dir / "report.html").write_text(f"<p>{job_id}</p>")
    return out_dir


def inspect(data: bytes, _name: str) -> ImageFacts:
    """Takes for an image what begins with PIC."""
    if not data.startswith(b"PIC"):
        raise InvalidInput(Reason.IMAGE_UNREADABLE, "no image")
    return ImageFacts(pixels=1, bits=0)


class FakeReader:
    """Reads datasets in this process, of images that `inspect` knows."""

    def __init__(self, inspect: Inspect = inspect, threads: int = 2) -> None:
        self.inspect = inspect
        self.threads = threads

    def read(
        self,
        request: ReadRequest,
        go_on: Callable[[], None] = lambda: None,
        on_progress: OnProgress = reader.untold,
    ) -> Index:
        """Reads as the readers' processes do, and returns as they do: without the images."""
        index = reader.read(
            request, self.inspect, self.threads, go_on=go_on, on_progress=on_progress
        )
        return msgspec.structs.replace(index, images=[])


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "data")
    yield database
    database.close()


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "data" / "artifacts")


@pytest.fixture
def models(database: Database, artifacts: Artifacts) -> ModelStore:
    return ModelStore(database, artifacts)


LIMITS = Limits(max_upload_bytes=1_000_000, max_unpacked_bytes=1_000_000, max_files=100)


MakeDatasets = Callable[..., DatasetStore]


@pytest.fixture
def make_datasets(database: Database, tmp_path: Path) -> MakeDatasets:
    def make(limits: Limits = LIMITS) -> DatasetStore:
        return DatasetStore(database, tmp_path / "data" / "datasets", FakeReader(), limits)

    return make


@pytest.fixture
def datasets(make_datasets: MakeDatasets) -> DatasetStore:
    return make_datasets()


Publish = Callable[..., int]


@pytest.fixture
def publish(
    database: Database, artifacts: Artifacts, models: ModelStore, tmp_path: Path
) -> Publish:
    """Publishes a version of a model as a job would, and answers with its number."""

    def publish(
        model: str, job_id: str, alias: str = "", not_worse_than: str = "", **changes: object
    ) -> int:
        gate = Gate(alias=alias, not_worse_than=not_worse_than)
        stored = artifacts.put(write_result(tmp_path / "out" / job_id, job_id, model, **changes))  # type: ignore[arg-type]
        with database.transaction() as connection:
            return models.publish(connection, model, job_id, stored, gate).version

    return publish
