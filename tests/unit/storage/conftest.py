import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from service.contract import DEFAULT_BACKBONE, Gate
from service.domain import DEFAULT_TENANT, Manifest, ModelKey, Parity, ReadSummary
from service.engine.preprocess import ImageFacts
from service.errors import InvalidInput, Reason
from service.ingest import reader
from service.ingest.archives import Limits
from service.ingest.reader import Inspect, OnProgress, Read, ReadRequest
from service.jobs.store import JobStore
from service.storage import backbone_rows, dataset_rows, version_rows
from service.storage.blob_cache import InPlace
from service.storage.blobs import BlobFolder, Blobs
from service.storage.changes import Changes
from service.storage.database import Database
from service.storage.dataset_keeping import DatasetKeeper
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from service.storage.quotas import Quotas
from service.storage.version_rows import NewVersion
from tests.figures import figure
from tests.unit.storage.transactions import no_files_in_transactions

__all__ = ["no_files_in_transactions"]

GUARD_S = 60.0
"""Ends a test that hangs."""

TENANT = DEFAULT_TENANT
"""Whose all is in tests that are not about tenants."""


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
    ) -> Read:
        """Reads as the readers' processes do."""
        return reader.read(
            request, self.inspect, self.threads, go_on=go_on, on_progress=on_progress
        )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "data")
    yield database
    database.close()


QUOTAS = Quotas(
    [
        backbone_rows.stored_bytes,
        dataset_rows.stored_bytes,
        JobStore.stored_bytes,
        version_rows.stored_bytes,
    ]
)


@pytest.fixture
def store(tmp_path: Path) -> BlobFolder:
    """The objects, in the data folder of `database`."""
    return BlobFolder(tmp_path / "data" / "blobs")


@pytest.fixture
def blobs(database: Database, store: BlobFolder) -> Blobs:
    return Blobs(database, store, InPlace(store))


@pytest.fixture
def change_log(database: Database) -> Changes:
    return Changes(database)


@pytest.fixture
def models(database: Database, blobs: Blobs, change_log: Changes) -> ModelStore:
    return ModelStore(database, blobs, change_log, QUOTAS)


def object_of(store: BlobFolder, digest: str) -> Path:
    """The file of a blob; one that does not exist where there is none."""
    (name,) = [name for name in store.names() if name.startswith(digest)] or [f"{digest}-none"]
    return store.path(name)


LIMITS = Limits(max_upload_bytes=1_000_000, max_unpacked_bytes=1_000_000, max_files=100)


MakeDatasets = Callable[..., DatasetStore]


def make_blobs(database: Database, data: Path) -> Blobs:
    store = BlobFolder(data / "blobs")
    return Blobs(database, store, InPlace(store))


@pytest.fixture
def keeper(database: Database, blobs: Blobs, tmp_path: Path) -> DatasetKeeper:
    return DatasetKeeper(database, blobs, QUOTAS, tmp_path / "data" / "uploads")


@pytest.fixture
def make_datasets(database: Database, keeper: DatasetKeeper) -> MakeDatasets:
    def make(limits: Limits = LIMITS, reader: FakeReader | None = None) -> DatasetStore:
        return DatasetStore(database, keeper, reader or FakeReader(), limits, QUOTAS)

    return make


@pytest.fixture
def datasets(make_datasets: MakeDatasets) -> DatasetStore:
    return make_datasets()


Publish = Callable[..., int]


@pytest.fixture
def publish(database: Database, models: ModelStore, tmp_path: Path) -> Publish:
    """Publishes a version of a model as a job would, and answers with its number."""

    def publish(
        model: ModelKey,
        job_id: str,
        alias: str = "",
        not_worse_than: str = "",
        **changes: object,
    ) -> int:
        gate = Gate(alias=alias, not_worse_than=not_worse_than)
        out = write_result(tmp_path / "out" / job_id, job_id, model.name, **changes)  # type: ignore[arg-type]
        new = NewVersion(model=model, job_id=job_id, stored=models.put_result(out), gate=gate)
        with database.transaction() as connection:
            return models.publish(connection, new).version

    return publish
