"""Models put straight into a data folder, without a job: copies of a head, and a near-empty model.

For measurements alone, while no service runs on the folder. Knows the service's
storage, and no socket.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.contract import (
    ANSWERS_FILE,
    BACKBONE_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    REPORT_HTML_FILE,
    REPORT_JSON_FILE,
)
from service.domain import DEFAULT_DECODING, DEFAULT_TENANT, Manifest, ModelKey, Parity
from service.engine import head as heads
from service.engine import preprocess
from service.engine.head import Head
from service.storage.blob_cache import InPlace
from service.storage.blobs import BlobFolder, Blobs
from service.storage.changes import Changes
from service.storage.database import Database
from service.storage.models import ModelStore
from service.storage.quotas import Quotas
from service.storage.version_rows import NewVersion

NEAR_EMPTY = "near_empty"
_FEATURES = 8


def publish(
    data_dir: Path,
    named: Iterable[tuple[str, Head]],
    manifest: Manifest,
    backbone: bytes | None = None,
) -> None:
    """Publishes each head as version 1 of its name; `backbone` where the folder has it not yet."""
    with opened(data_dir) as (database, _, models), tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        for name, head in named:
            own = msgspec.structs.replace(manifest, model=name, job_id=f"published-{name}")
            write(out, head, own, backbone)
            new = NewVersion(
                model=ModelKey(DEFAULT_TENANT, name),
                job_id=own.job_id,
                stored=models.put_result(out),
            )
            (out / BACKBONE_FILE).unlink(missing_ok=True)
            backbone = None
            with database.transaction() as connection:
                models.publish(connection, new)


def write(out: Path, head: Head, manifest: Manifest, backbone: bytes | None) -> None:
    """Writes a job's result, as its trainer does; without a backbone on one that is known."""
    if backbone is not None:
        (out / BACKBONE_FILE).write_bytes(backbone)
    heads.save(head, out / HEAD_FILE)
    (out / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
    (out / ANSWERS_FILE).write_bytes(b"")
    (out / REPORT_JSON_FILE).write_text("{}")
    (out / REPORT_HTML_FILE).write_text("<!doctype html><title>none</title>")


@contextmanager
def opened(data_dir: Path) -> Iterator[tuple[Database, Blobs, ModelStore]]:
    """Yields the stores of a data folder that no service uses."""
    database = Database(data_dir)
    try:
        store = BlobFolder(data_dir / "blobs")
        blobs = Blobs(database, store, InPlace(store))
        yield database, blobs, ModelStore(database, blobs, Changes(database), Quotas([]))
    finally:
        database.close()


def read(data_dir: Path, model: str) -> tuple[Head, bytes, Manifest]:
    """Returns the head, the backbone's file and the manifest of a model's latest version."""
    with opened(data_dir) as (_, blobs, models):
        record = models.get_version(ModelKey(DEFAULT_TENANT, model), None, None)
        head = heads.load(blobs.read(record.head_digest, "head"))
        backbone = blobs.read(record.backbone_digest, "backbone")
        return head, backbone, models.manifest(record)


def publish_copies(data_dir: Path, model: str, names: list[str]) -> None:
    """Copies a model's head, each with a bias of its own: no two heads are the same file."""
    head, _, manifest = read(data_dir, model)
    copies = (
        (name, dataclasses.replace(head, bias=head.bias + np.float32(number * 1e-6)))
        for number, name in enumerate(names)
    )
    publish(data_dir, copies, manifest)


def publish_near_empty(data_dir: Path, name: str) -> None:
    """A model that costs next to nothing: what is left to measure is the server."""
    backbone = near_empty_backbone()
    head = near_empty_head(0)
    publish(data_dir, [(name, head)], near_empty_manifest(backbone, head), backbone)


def near_empty_head(seed: int, classes: tuple[str, ...] = ("one", "other")) -> Head:
    """Random weights for the features of the near-empty backbone."""
    random = np.random.default_rng(seed)
    return Head(
        random.normal(size=(len(classes), _FEATURES)).astype(np.float32),
        np.zeros(len(classes), dtype=np.float32),
        classes,
    )


def near_empty_manifest(backbone: bytes, head: Head, model: str = "", job_id: str = "") -> Manifest:
    """Says of a near-empty model what training says of others."""
    return Manifest(
        model=model,
        job_id=job_id,
        method="feature_based",
        backbone=NEAR_EMPTY,
        weights="random:0",
        backbone_digest=hashlib.sha256(backbone).hexdigest(),
        feature_dim=_FEATURES,
        classes=list(head.classes),
        temperature=1.0,
        train_count=0,
        train_groups=0,
        figures=[],
        calibrated=False,
        dataset_digest="",
        seed=0,
        hyperparameters={},
        preprocess=preprocess.describe(),
        parity=Parity(max_difference=0.0, top1_agreement=1.0, images=0),
        opset=17,
        device="cpu",
        precision="fp32",
        provider="cpu",
        versions={},
        started_at="1970-01-01T00:00:00Z",
        duration_s=0.0,
    )


def near_empty_backbone() -> bytes:
    """uint8 [n, 224, 224, 3] to features float32 [n, 8]: means of 8 columns of one row."""
    row = [[0, 0], [1, _FEATURES], [1, 2]]  # the first row's first 8 pixels
    slices = [
        numpy_helper.from_array(np.array(values, dtype=np.int64), name)
        for name, values in zip(("starts", "ends", "axes"), row, strict=True)
    ]
    nodes = [
        helper.make_node("Slice", ["images", "starts", "ends", "axes"], ["corner"]),
        helper.make_node("Cast", ["corner"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["features"], axes=[1, 3], keepdims=0),
    ]
    size = DEFAULT_DECODING.size
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", size, size, 3])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", _FEATURES])
    graph = helper.make_graph(nodes, NEAR_EMPTY, [images], [features], slices)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized
