"""The part of the soak that sends bad input, and gives calls up: each has an answer that is right.

Raw calls on a channel of its own, since the client would send none of these.
"""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from graftml_stubs.v1 import dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2

from bench.soak.book import OK, REFUSALS, Book
from bench.soak.models import STABLE
from bench.soak.server import Tenant

_OVERSIZE_BYTES = 65 * 2**20
_OVERSIZE_EVERY = 100
"""Rounds: it costs some memory and time here, too."""
_GIVEN_UP = {OK, "CANCELLED"}
_TIMEOUT_S = 60.0
_PREDICT = "PredictionService/Predict"
_UPLOAD = "DatasetService/UploadDataset"
_LIST = "ModelService/ListModels"
_TUNE = "FineTuningService/FineTune"


class Hostile:
    """Sends what one tenant should not."""

    def __init__(self, address: str, book: Book, tenant: Tenant, photo: Path) -> None:
        self._book = book
        self._tenant = tenant
        self._photo = photo.read_bytes()
        self._random = random.Random()
        self._round = 0
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", 2 * _OVERSIZE_BYTES),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def attack(self) -> None:
        """Sends bad input of one kind."""
        draw, predict, mine = self._random, self._predict, self._tenant.token
        bad_name = draw.choice(["../../etc", "a/b", "A B", "x" * 5000, "\u202e"])
        path = fine_tuning_pb2.ServerPath(path=draw.choice(["/", "/etc", "../..", "x"]))
        tune, job = fine_tuning_pb2.FineTuneRequest, fine_tuning_pb2.GetJobRequest
        models = model_pb2.ListModelsRequest
        alias = model_pb2.SetAliasRequest(model=STABLE, alias="latest", version=1)
        delete = model_pb2.DeleteModelRequest(model=STABLE)
        theirs = [
            id_ for id_, seen in list(self._book.jobs.items()) if seen.tenant != self._tenant.name
        ]
        garbage = {"INTERNAL", "INVALID_ARGUMENT", "INVALID_FIELD"}
        attacks: list[tuple[str, set[str] | str, str, Any, str]] = [
            ("no images", "INVALID_FIELD", _PREDICT, predict(images=[]), mine),
            ("too many images", "INVALID_FIELD", _PREDICT, predict(images=[b"x"] * 300), mine),
            ("an unknown model", "MODEL_NOT_FOUND", _PREDICT, predict("none"), mine),
            ("a bad name", {"MODEL_NOT_FOUND", "INVALID_FIELD"}, _PREDICT, predict(bad_name), mine),
            ("an unknown alias", "ALIAS_NOT_FOUND", _PREDICT, predict(alias="none"), mine),
            ("an unknown version", "VERSION_NOT_FOUND", _PREDICT, predict(version=10**9), mine),
            ("garbage", garbage, _PREDICT, b"\xff" * draw.randrange(1, 2000), mine),
            ("an unknown method", "UNIMPLEMENTED", "PredictionService/Guess", b"", mine),
            ("no data", "INVALID_FIELD", _TUNE, tune(model="hostile"), mine),
            ("a forbidden path", {"PATH_NOT_ALLOWED", "INVALID_FIELD"}, _TUNE,
             tune(model="hostile", server_path=path), mine),
            ("a bad page", "INVALID_FIELD", _LIST, models(page_token="none"), mine),
            ("a reserved alias", "ALIAS_RESERVED", "ModelService/SetAlias", alias, mine),
            ("a wrong token", "TOKEN_UNKNOWN", _LIST, models(), mine[:-1]),
            ("no token", "TOKEN_MISSING", _LIST, models(), ""),
            ("a missing role", "ROLE_MISSING", "ModelService/DeleteModel", delete,
             self._tenant.reader),
            *(("none's or another's job", "JOB_NOT_FOUND", "FineTuningService/GetJob",
               job(job_id=id_), mine) for id_ in ("job-none", *theirs[-1:])),
        ]  # fmt: skip
        self._round += 1
        if self._round % _OVERSIZE_EVERY == 0:
            request = predict(images=[bytes(_OVERSIZE_BYTES)])
            attacks = [("an oversize message", "RESOURCE_EXHAUSTED", _PREDICT, request, mine)]
        elif self._round % len(attacks) == 0:
            self._broken_images()
            self._broken_upload()
        kind, may, method, request, token = draw.choice(attacks)
        self._send(f"Bad input: {kind}", may, "unary_unary", method, request, token)

    def _broken_images(self) -> None:
        broken = bytearray(self._photo[:5000])
        broken[2 : self._random.randrange(10, 400)] = b"\xff"
        cut = self._photo[: self._random.randrange(1, len(self._photo) // 2)]
        request = self._predict(images=[b"", b"no image", cut, bytes(broken), self._photo])
        data = self._send("Bad input: broken images", {OK, *REFUSALS}, "unary_unary", _PREDICT,
                          request)  # fmt: skip
        if data is not None:
            results = prediction_pb2.PredictResponse.FromString(data).answers[0].results
            kinds = [result.WhichOneof("outcome") for result in results]
            right = kinds[:2] == ["error", "error"] and kinds[4:] == ["classification"]
            owns = self._tenant.owns(s.label for r in results for s in r.classification.scores)
            self._book.expect("broken images answered wrongly", right and owns, results)

    def _broken_upload(self) -> None:
        part = dataset_pb2.UploadDatasetRequest
        zipped = dataset_pb2.ArchiveFormat.ARCHIVE_FORMAT_ZIP
        parts = [
            part(header=dataset_pb2.UploadDatasetHeader(format=zipped)),
            part(archive_chunk=self._random.randbytes(20_000)),
            part(end=dataset_pb2.UploadDatasetEnd(message_count=1)),
        ]
        self._send("Bad input: a broken archive", "ARCHIVE_UNREADABLE", "stream_unary", _UPLOAD,
                   iter(parts))  # fmt: skip

    def _send(
        self, kind: str, may: set[str] | str, shape: str, method: str, request: Any,
        token: str | None = None, timeout_s: float = _TIMEOUT_S,
    ) -> Any:  # fmt: skip
        call, metadata = self._method(shape, method, token)
        return self._book.call(kind, may, call, request, timeout=timeout_s, metadata=metadata)

    def _method(self, shape: str, method: str, token: str | None = None) -> tuple[Any, Any]:
        token = self._tenant.token if token is None else token
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        return getattr(self._channel, shape)(f"/graft.v1.{method}", _bytes), metadata

    def abandon(self) -> None:
        """Gives up one call, before it is answered, meanwhile or after."""
        draw, is_over = self._random, threading.Event()
        job_id = draw.choice([*self._book.jobs, "none"])
        stream = iter([prediction_pb2.PredictStreamRequest(request=self._predict())] * 20)
        # The job may be another tenant's.
        watched = _GIVEN_UP | {"JOB_NOT_FOUND"}
        ways: list[tuple[set[str], str, str, Any]] = [
            (_GIVEN_UP | REFUSALS, "unary_unary", _PREDICT, self._predict()),
            ({"CANCELLED"}, "stream_unary", _UPLOAD, self._unended_upload(is_over)),
            (watched, "unary_stream", "FineTuningService/WatchJob",
             fine_tuning_pb2.WatchJobRequest(job_id=job_id)),
            (_GIVEN_UP, "unary_stream", "ModelService/ExportModel",
             model_pb2.ExportModelRequest(model=STABLE)),
            (_GIVEN_UP, "stream_stream", "PredictionService/PredictStream", stream),
        ]  # fmt: skip
        may, shape, method, request = draw.choice(ways)
        self._book.call(f"Given up: {method}", may, self._give_up, shape, method, request)
        is_over.set()
        self._send("Out of time: Predict", {OK, *REFUSALS}, "unary_unary", _PREDICT,
                   self._predict(), timeout_s=draw.uniform(0.0005, 0.02))  # fmt: skip

    def _give_up(self, shape: str, method: str, request: Any) -> None:
        call, metadata = self._method(shape, method)
        if shape.endswith("unary"):
            under_way = call.future(request, timeout=_TIMEOUT_S, metadata=metadata)
            time.sleep(self._random.uniform(0, 0.05))
            under_way.cancel()
            under_way.result()
            return
        under_way = call(request, timeout=_TIMEOUT_S, metadata=metadata)
        try:
            for _ in zip(range(self._random.randrange(1, 5)), under_way, strict=False):
                pass
        finally:
            under_way.cancel()

    def _unended_upload(
        self, is_over: threading.Event
    ) -> Iterator[dataset_pb2.UploadDatasetRequest]:
        yield dataset_pb2.UploadDatasetRequest(header=dataset_pb2.UploadDatasetHeader())
        for label in ("one", "two"):
            image = dataset_pb2.LabelledImage(label=label, content=self._photo)
            yield dataset_pb2.UploadDatasetRequest(image=image)
        # Without an end it cannot succeed before it is cancelled.
        is_over.wait(_TIMEOUT_S)

    def _predict(
        self, model: str = STABLE, images: list[bytes] | None = None, **which: Any
    ) -> prediction_pb2.PredictRequest:
        encoded = [self._photo] if images is None else images
        return prediction_pb2.PredictRequest(
            models=[prediction_pb2.ModelSpec(model=model, **which)],
            images=[prediction_pb2.Image(encoded=each) for each in encoded],
        )


def _bytes(request: Any) -> bytes:
    found: bytes = request if isinstance(request, bytes) else request.SerializeToString()
    return found
