"""The part of the soak that uses the rest: datasets, exports, reports, Open Inference calls."""

import io
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graftml import Client
from graftml.types import Dataset
from PIL import Image

from bench.soak.book import OK, REFUSALS, Book
from bench.soak.served import Door, Tenant, bearer
from bench.soak.tuning import STABLE, Pairs, done
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

RANKED = "efficientnet_lite0"
_RANKING_S = 60.0


class Datasets:
    """Uploads images that were never there, has a look at them, deletes them."""

    def __init__(self, client: Client, book: Book, pairs: Pairs, seed: int) -> None:
        self._client = client
        self._book = book
        self._pairs = pairs
        self._random = np.random.default_rng(seed)

    def step(self) -> None:
        """One dataset's life."""
        client, book = self._client, self._book
        labels = sorted({label for label, _ in self._pairs})
        images = [
            *self._pairs[:3],
            *self._pairs[-3:],
            *((label, self._new()) for label in labels),
        ]
        dataset = book.call("UploadDataset", OK, client.upload_dataset, images)
        if dataset is None:
            return
        self._look(dataset, images)
        if self._random.random() < 0.3:
            again = book.call("UploadDataset again", OK, client.upload_dataset, images)
            same = again is not None and again.dataset_id == dataset.dataset_id
            book.expect("the same images are another dataset", same, f"{again}, {dataset}")
        book.call("DeleteDataset", OK, done(client.delete_dataset), dataset.dataset_id)
        book.call("GetDataset of a deleted one", "DATASET_NOT_FOUND", client.get_dataset,
                  dataset.dataset_id)  # fmt: skip

    def _look(self, dataset: Dataset, images: list[Any]) -> None:
        found = self._book.call("GetDataset", OK, self._client.get_dataset, dataset.dataset_id)
        right = found == dataset and dataset.image_count == len(images)
        self._book.expect("a dataset is not what was sent", right, f"{found}, {dataset}")

    def _new(self) -> bytes:
        file = io.BytesIO()
        pixels = self._random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


class Exports:
    """Takes the stable model away as one file, and its report."""

    def __init__(self, client: Client, book: Book, tenant: Tenant, pairs: Pairs) -> None:
        self._client = client
        self._book = book
        self._tenant = tenant
        self._pairs = pairs

    def step(self) -> None:
        """One export, one report in each form, one stream of images."""
        client, book = self._client, self._book
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stable.onnx"
            if book.call("ExportModel", OK, client.export_model, STABLE, path) is not None:
                exported = onnx.load(path)
                inputs = [each.name for each in exported.graph.input]
                book.expect("an export is no model", bool(inputs), f"it has no input: {inputs}")
        version = book.call("GetVersion", OK, client.get_version, STABLE)
        if version is not None:
            own = self._tenant.owns(version.classes)
            book.expect("a version's classes are another's", own, f"{version.classes}")
        report = book.call("GetReport", OK, client.get_report, STABLE)
        book.expect("a report is empty", report is not None, "GetReport gave nothing")
        book.call("GetReport as HTML", OK, client.get_report_html, STABLE)
        images = [photo for _, photo in self._pairs[:8]]
        streamed = book.call(
            "PredictStream", {OK, *REFUSALS}, lambda: list(client.predict_stream(images, STABLE))
        )
        if streamed is not None:
            book.expect("a stream lost answers", len(streamed) == len(images), f"{streamed}")
            own = self._tenant.owns(answer.label for answer in streamed)
            book.expect("a stream answered wrongly", own, f"{streamed}")


class Rankings:
    """Asks which backbone to start from; takes a trainer and its time."""

    def __init__(self, client: Client, book: Book, pairs: Pairs) -> None:
        self._client = client
        self._book = book
        self._pairs = pairs

    def step(self) -> None:
        """One ranking of the default backbone alone."""
        found = self._book.call(
            "RankBackbones", OK, self._client.rank_backbones, self._pairs,
            backbones=[RANKED], time_budget_s=_RANKING_S,
        )  # fmt: skip
        if found is not None:
            right = [each.backbone for each in found.backbones] == [RANKED]
            self._book.expect("a ranking is of others", right, f"{found}")


class OpenInference:
    """Triton's and KServe's callers."""

    def __init__(self, door: Door, book: Book, tenant: Tenant, photo: Path, seed: int) -> None:
        self._book = book
        self._tenant = tenant
        self._metadata = bearer(tenant.token)
        self._photo = photo.read_bytes()
        self._random = random.Random(seed)
        self._channel = door.channel()
        self._stub = GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def step(self) -> None:
        """What such a client asks, and one image."""
        if not self._is("ServerLive", pb.ServerLiveRequest(), lambda answer: answer.live):
            return
        self._is("ServerReady", pb.ServerReadyRequest(), lambda answer: answer.ready)
        self._is("ModelReady", pb.ModelReadyRequest(name=STABLE), lambda answer: answer.ready)
        self._is("ModelReady", pb.ModelReadyRequest(name="none"), lambda answer: not answer.ready)
        self._is("ModelMetadata", pb.ModelMetadataRequest(name=STABLE), lambda a: a.name == STABLE)
        self._is("RepositoryIndex", pb.RepositoryIndexRequest(), lambda a: len(a.models) > 0)
        count = self._random.randint(1, 3)
        element = struct.pack("<I", len(self._photo)) + self._photo
        request = pb.ModelInferRequest(
            model_name=STABLE,
            inputs=[
                pb.ModelInferRequest.InferInputTensor(
                    name="images", datatype="BYTES", shape=[count]
                )
            ],
            raw_input_contents=[element * count],
        )
        request.outputs.add(name="labels")
        self._is("ModelInfer", request, lambda answer: self._owns(answer, count), REFUSALS)

    def _owns(self, answer: Any, count: int) -> bool:
        # Each is told after its length, 4 bytes.
        raw, labels = answer.raw_output_contents[0], []
        while raw:
            (length,) = struct.unpack_from("<I", raw)
            labels.append(raw[4 : 4 + length].decode())
            raw = raw[4 + length :]
        return len(labels) == count and self._tenant.owns(labels)

    def _is(
        self, method: str, request: Any, holds: Callable[[Any], bool],
        beside: frozenset[str] = frozenset(),
    ) -> bool:  # fmt: skip
        stub = getattr(self._stub, method)
        answer = self._book.call(f"Open Inference {method}", {OK, *beside}, stub, request,
                                 timeout=60, metadata=self._metadata)  # fmt: skip
        if answer is None:
            return False
        self._book.expect(f"{method} answered wrongly", holds(answer), str(answer)[:300])
        return True
