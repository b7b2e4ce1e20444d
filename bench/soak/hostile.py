"""The part of the soak that does what it should not, and what nobody waits for.

Broken images, wrong names, wrong tokens, too much at once; calls, streams and
uploads that are given up in the middle. Every one has an answer that is right.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from graftml import Client
from graftml_stubs.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    fine_tuning_pb2,
    fine_tuning_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    prediction_pb2,
    prediction_pb2_grpc,
)

from bench.soak.book import OK, REFUSALS, Book
from bench.soak.served import Door, Tenant, bearer
from bench.soak.tuning import STABLE

_OVERSIZE_BYTES = 65 * 2**20
_OVERSIZE_EVERY = 100
"""Rounds: it costs some memory and time here, too."""
GIVEN_UP = {OK, "CANCELLED"}
_BEGUN_S = 60.0


class Hostile:
    """Bad input of one tenant; `other` is whose things it must not see."""

    def __init__(
        self, door: Door, book: Book, tenant: Tenant, other: Tenant | None, photo: Path, seed: int
    ) -> None:
        self._book = book
        self._tenant = tenant
        self._other = other
        self._photo = photo.read_bytes()
        self._random = random.Random(seed)
        self._channel = door.channel()
        self._round = 0
        self._attacks: list[Callable[[], object]] = [
            self._broken_images, self._no_images, self._too_many, self._unknown_model,
            self._bad_name, self._bad_alias, self._unknown_version, self._unknown_job,
            self._garbage, self._unknown_method, self._no_data, self._forbidden_path,
            self._bad_page, self._bad_upload, self._reserved_alias,
        ]  # fmt: skip
        if tenant.token:
            self._attacks += [self._wrong_token, self._no_token, self._missing_role]
        if other is not None:
            self._attacks.append(self._others_job)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def step(self) -> None:
        """One attack."""
        self._round += 1
        if self._round % _OVERSIZE_EVERY == 0:
            self._oversize()
        else:
            self._random.choice(self._attacks)()

    def _send(
        self, kind: str, may: set[str] | str, service: Any, method: str, request: Any,
        token: str | None = None,
    ) -> Any:  # fmt: skip
        metadata = bearer(self._tenant.token if token is None else token)
        stub = getattr(service(self._channel), method)
        return self._book.call(kind, may, stub, request, timeout=60, metadata=metadata)

    def _predict(self, kind: str, may: set[str] | str, **fields: Any) -> Any:
        given = {"models": [_named(STABLE)], "images": [_image(self._photo)], **fields}
        return self._send(kind, may, prediction_pb2_grpc.PredictionServiceStub, "Predict",
                          prediction_pb2.PredictRequest(**given))  # fmt: skip

    def _broken_images(self) -> None:
        cut = self._random.randrange(1, len(self._photo) // 2)
        broken = bytearray(self._photo[:5000])
        broken[2 : self._random.randrange(10, 400)] = b"\xff"
        images = [b"", b"no image", self._photo[:cut], bytes(broken), self._photo]
        answer = self._predict(
            "Predict broken images", {OK, *REFUSALS}, images=[_image(p) for p in images]
        )
        if answer is not None:
            kinds = [result.WhichOneof("outcome") for result in answer.answers[0].results]
            right = kinds[:2] == ["error", "error"] and kinds[4:] == ["classification"]
            labels = [
                score.label
                for each in answer.answers[0].results
                for score in each.classification.scores
            ]
            right = right and self._tenant.owns(labels)
            self._book.expect("broken images answered wrongly", right, f"{kinds}, {labels}")

    def _no_images(self) -> None:
        self._predict("Predict no images", "INVALID_FIELD", images=[])

    def _too_many(self) -> None:
        self._predict("Predict too many", "INVALID_FIELD", images=[_image(b"x")] * 300)

    def _unknown_model(self) -> None:
        name = f"none-{self._random.randrange(10**6)}"
        self._predict("Predict an unknown model", "MODEL_NOT_FOUND", models=[_named(name)])

    def _bad_name(self) -> None:
        name = self._random.choice(["../../etc", "a/b", "A B", "x" * 5000, "\u202e"])
        self._predict(
            "Predict by a bad name", {"MODEL_NOT_FOUND", "INVALID_FIELD"}, models=[_named(name)]
        )

    def _bad_alias(self) -> None:
        models = [_named(STABLE, alias="none")]
        self._predict("Predict an unknown alias", "ALIAS_NOT_FOUND", models=models)

    def _unknown_version(self) -> None:
        models = [_named(STABLE, version=10**9)]
        self._predict("Predict an unknown version", "VERSION_NOT_FOUND", models=models)

    def _unknown_job(self) -> None:
        self._send("GetJob of none", "JOB_NOT_FOUND", fine_tuning_pb2_grpc.FineTuningServiceStub,
                   "GetJob", fine_tuning_pb2.GetJobRequest(job_id="job-none"))  # fmt: skip

    def _garbage(self) -> None:
        send = self._channel.unary_unary("/graft.v1.PredictionService/Predict")
        self._book.call(
            "Predict with garbage", {"INTERNAL", "INVALID_ARGUMENT", "INVALID_FIELD"}, send,
            b"\xff" * self._random.randrange(1, 2000), timeout=60,
            metadata=bearer(self._tenant.token),
        )  # fmt: skip

    def _unknown_method(self) -> None:
        send = self._channel.unary_unary("/graft.v1.PredictionService/Guess")
        self._book.call("An unknown method", {"UNIMPLEMENTED", "ROLE_MISSING"}, send, b"",
                        timeout=60, metadata=bearer(self._tenant.token))  # fmt: skip

    def _no_data(self) -> None:
        self._tune("FineTune without data", "INVALID_FIELD")

    def _forbidden_path(self) -> None:
        path = fine_tuning_pb2.ServerPath(path=self._random.choice(["/", "/etc", "../..", "x"]))
        self._tune("FineTune on a forbidden path", {"PATH_NOT_ALLOWED", "INVALID_FIELD"},
                   server_path=path)  # fmt: skip

    def _tune(self, kind: str, may: set[str] | str, **fields: Any) -> None:
        request = fine_tuning_pb2.FineTuneRequest(model="hostile", **fields)
        self._send(kind, may, fine_tuning_pb2_grpc.FineTuningServiceStub, "FineTune", request)

    def _bad_page(self) -> None:
        self._send("ListModels by a bad page", "INVALID_FIELD", model_pb2_grpc.ModelServiceStub,
                   "ListModels", model_pb2.ListModelsRequest(page_token="none"))  # fmt: skip

    def _bad_upload(self) -> None:
        parts = [
            dataset_pb2.UploadDatasetRequest(
                header=dataset_pb2.UploadDatasetHeader(
                    format=dataset_pb2.ArchiveFormat.ARCHIVE_FORMAT_ZIP
                )
            ),
            dataset_pb2.UploadDatasetRequest(archive_chunk=self._random.randbytes(20_000)),
            dataset_pb2.UploadDatasetRequest(end=dataset_pb2.UploadDatasetEnd(message_count=1)),
        ]
        self._send("UploadDataset of garbage", "ARCHIVE_UNREADABLE",
                   dataset_pb2_grpc.DatasetServiceStub, "UploadDataset", iter(parts))  # fmt: skip

    def _reserved_alias(self) -> None:
        request = model_pb2.SetAliasRequest(model=STABLE, alias="latest", version=1)
        self._send("SetAlias latest", "ALIAS_RESERVED", model_pb2_grpc.ModelServiceStub,
                   "SetAlias", request)  # fmt: skip

    def _oversize(self) -> None:
        self._predict("Predict an oversize message", "RESOURCE_EXHAUSTED",
                      images=[_image(bytes(_OVERSIZE_BYTES))])  # fmt: skip

    def _wrong_token(self) -> None:
        token = self._random.choice(["no token", "graft_x_" + "y" * 40, self._tenant.token[:-1]])
        self._send("A wrong token", "TOKEN_UNKNOWN", model_pb2_grpc.ModelServiceStub, "ListModels",
                   model_pb2.ListModelsRequest(), token)  # fmt: skip

    def _no_token(self) -> None:
        self._send("No token", "TOKEN_MISSING", model_pb2_grpc.ModelServiceStub, "ListModels",
                   model_pb2.ListModelsRequest(), "")  # fmt: skip

    def _missing_role(self) -> None:
        self._send("A missing role", "ROLE_MISSING", model_pb2_grpc.ModelServiceStub, "DeleteModel",
                   model_pb2.DeleteModelRequest(model=STABLE), self._tenant.reader)  # fmt: skip

    def _others_job(self) -> None:
        theirs = [id_ for id_, job in list(self._book.jobs.items())
                  if self._other is not None and job.tenant == self._other.name]  # fmt: skip
        if theirs:
            request = fine_tuning_pb2.GetJobRequest(job_id=self._random.choice(theirs))
            self._send("GetJob of another tenant's", "JOB_NOT_FOUND",
                       fine_tuning_pb2_grpc.FineTuningServiceStub, "GetJob", request)  # fmt: skip


class Abandoning:
    """Calls that are given up, before they are answered, meanwhile or after."""

    def __init__(self, door: Door, book: Book, tenant: Tenant, photo: Path, seed: int) -> None:
        self._book = book
        self._metadata = bearer(tenant.token)
        self._photo = photo.read_bytes()
        self._random = random.Random(seed)
        self._channel = door.channel()
        self._ways = [self._predict, self._late, self._watch, self._export, self._upload,
                      self._stream]  # fmt: skip

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def step(self) -> None:
        """One call."""
        self._random.choice(self._ways)()

    def _request(self) -> prediction_pb2.PredictRequest:
        return prediction_pb2.PredictRequest(models=[_named(STABLE)], images=[_image(self._photo)])

    def _predict(self) -> None:
        stub = prediction_pb2_grpc.PredictionServiceStub(self._channel)

        def cancelled() -> None:
            call = stub.Predict.future(self._request(), timeout=30, metadata=self._metadata)
            time.sleep(self._random.uniform(0, 0.03))
            call.cancel()
            try:
                call.result()
            except grpc.FutureCancelledError:
                raise _Cancelled from None

        self._book.call("Predict, cancelled", GIVEN_UP | REFUSALS, cancelled)

    def _late(self) -> None:
        stub = prediction_pb2_grpc.PredictionServiceStub(self._channel)
        self._book.call(
            "Predict, out of time", {OK, *REFUSALS}, stub.Predict, self._request(),
            timeout=self._random.uniform(0.0005, 0.02), metadata=self._metadata,
        )  # fmt: skip

    def _watch(self) -> None:
        ids = list(self._book.jobs)
        if not ids:
            return
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(self._channel)
        request = fine_tuning_pb2.WatchJobRequest(job_id=self._random.choice(ids))
        # It may be another tenant's.
        may = GIVEN_UP | ({"JOB_NOT_FOUND"} if self._metadata else set())
        self._give_up("WatchJob, cancelled", may, stub.WatchJob, lambda: request)

    def _export(self) -> None:
        stub = model_pb2_grpc.ModelServiceStub(self._channel)
        request = model_pb2.ExportModelRequest(model=STABLE)
        self._give_up("ExportModel, cancelled", GIVEN_UP, stub.ExportModel, lambda: request)

    def _stream(self) -> None:
        stub = prediction_pb2_grpc.PredictionServiceStub(self._channel)

        def requests() -> Iterator[prediction_pb2.PredictStreamRequest]:
            for number in range(20):
                yield prediction_pb2.PredictStreamRequest(id=str(number), request=self._request())

        self._give_up("PredictStream, cancelled", GIVEN_UP, stub.PredictStream, requests)

    def _upload(self) -> None:
        stub = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        parts = self._random.randrange(1, 5)

        def messages() -> Iterator[dataset_pb2.UploadDatasetRequest]:
            yield dataset_pb2.UploadDatasetRequest(header=dataset_pb2.UploadDatasetHeader())
            for number in range(parts):
                yield dataset_pb2.UploadDatasetRequest(
                    image=dataset_pb2.LabelledImage(label=f"l{number % 2}", content=self._photo)
                )
            time.sleep(self._random.uniform(0, 0.05))
            # gRPC's thread, which reads this, may be faster than the one that began the call.
            has_call.wait(_BEGUN_S)
            call.cancel()

        def cancelled() -> None:
            nonlocal call
            call = stub.UploadDataset.future(messages(), timeout=60, metadata=self._metadata)
            has_call.set()
            try:
                call.result()
            except grpc.FutureCancelledError:
                raise _Cancelled from None

        call: Any = None
        has_call = threading.Event()
        self._book.call("UploadDataset, cancelled", "CANCELLED", cancelled)

    def _give_up(self, kind: str, may: set[str], stub: Any, requests: Callable[[], object]) -> None:
        most = self._random.randrange(0, 4)

        def part() -> None:
            call = stub(requests(), timeout=60, metadata=self._metadata)
            try:
                for number, _ in enumerate(call):
                    if number == most:
                        break
            finally:
                call.cancel()

        self._book.call(kind, may, part)


class _Cancelled(grpc.RpcError):
    """What gRPC's futures say in another way."""

    def code(self) -> grpc.StatusCode:
        """CANCELLED."""
        return grpc.StatusCode.CANCELLED

    def details(self) -> str:
        """Nothing more."""
        return ""

    def trailing_metadata(self) -> tuple[()]:
        """None."""
        return ()


def _named(model: str, **which: Any) -> prediction_pb2.ModelSpec:
    return prediction_pb2.ModelSpec(model=model, **which)


def _image(data: bytes) -> prediction_pb2.Image:
    return prediction_pb2.Image(encoded=data)


def seen(client: Client, book: Book) -> None:
    """A look at everything that there is, which pages through lists."""
    for kind, pages in (
        ("ListModels", client.list_models),
        ("ListDatasets", client.list_datasets),
        ("ListJobs", lambda: _first(client.list_jobs(), 50)),
    ):
        book.call(kind, OK, lambda pages=pages: list(pages()))  # type: ignore[misc]


def _first(found: Iterator[Any], most: int) -> list[Any]:
    return [each for each, _ in zip(found, range(most), strict=False)]
