"""Requests of the services: from wire bytes, or field by field, to what is kept or computed."""

import base64
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from google.protobuf.message import DecodeError
from graftml_stubs.v1 import dataset_pb2, decision_pb2, fine_tuning_pb2, prediction_pb2

from service.auth.principal import EVERYBODY, enter
from service.domain import (
    DEFAULT_DECODING,
    ModelFiles,
    ModelKey,
    check_alias,
    check_name,
)
from service.engine.engine import AskedModel, Classified, Decode, Outcome
from service.errors import GraftError, InvalidInput
from service.ingest import labels
from service.ingest.names import file_name
from service.jobs.request import JobRequest, allowed_path, check_request_id
from service.rpc.codec import datasets, jobs, requests
from service.rpc.predict import PredictionServicer
from service.storage import pagination
from tests.fuzz.messages import made
from tests.fuzz.promise import Broken, Target

KINDS = (
    fine_tuning_pb2.FineTuneRequest,
    fine_tuning_pb2.RankBackbonesRequest,
    prediction_pb2.PredictRequest,
    fine_tuning_pb2.ListJobsRequest,
    dataset_pb2.UploadDatasetRequest,
)

TENANT = "acme"
_THRESHOLDS = decision_pb2.Decision(
    thresholds=decision_pb2.Thresholds(classes={"cat": 0.5}, others=0.1)
)


@cache
def _allowed() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def run(data: bytes) -> None:
    """One request: refused, or understood and told again as it was meant."""
    try:
        request = made(KINDS, data)
    except DecodeError:
        return
    enter(EVERYBODY)
    _HANDLERS[type(request)](request)


def _fine_tune(message: fine_tuning_pb2.FineTuneRequest) -> None:
    check_name(message.model, "model")
    check_request_id(message.request_id)
    target = message.domain_adaptation
    message.DiscardUnknownFields()
    requests.check_size(message)
    request = requests.job(
        message,
        TENANT,
        server_path=_path(message.server_path.path, message.WhichOneof("data") == "server_path"),
        dataset_id=message.dataset_id or "ds-1",
        target_path=_path(target.target_path.path, target.WhichOneof("target") == "target_path"),
        target_dataset_id=target.target_dataset_id,
    )
    request.check()
    kept = msgspec.json.decode(msgspec.json.encode(request), type=JobRequest)
    if kept != request:
        raise Broken(f"kept as {kept}, asked as {request}")
    stored = message.SerializeToString(deterministic=True)
    if fine_tuning_pb2.FineTuneRequest.FromString(stored).SerializeToString() != stored:
        raise Broken("it is stored as another message")


def _path(path: str, is_set: bool) -> str:
    return str(allowed_path(path, (_allowed(),))) if is_set else ""


def _rank(message: fine_tuning_pb2.RankBackbonesRequest) -> None:
    server_path = _path(message.server_path.path, message.WhichOneof("data") == "server_path")
    requests.ranking(message, TENANT, server_path=server_path, dataset_id="ds-1").check()


def _predict(message: prediction_pb2.PredictRequest) -> None:
    classifier: Any = Classifier()
    servicer: Any = PredictionServicer(classifier, classifier, max_images=8, timeout_s=1.0)
    finished(servicer._predict(message, 1.0)).SerializeToString()


def _list(message: fine_tuning_pb2.ListJobsRequest) -> None:
    for number in message.states:
        jobs.state(number)
    pagination.size(message.page_size)
    for kind, shape in (("jobs", (str,)), ("versions", (int,)), ("datasets", (float, str))):
        try:
            key = pagination.key(kind, TENANT, message.page_token, *shape)
        except InvalidInput:
            continue
        if key is not None:
            # The store binds them: whole numbers of 64 bits, texts of UTF-8.
            for part in key:
                if isinstance(part, int) and not -(2**63) <= part < 2**63:
                    raise Broken(f"the key {part} fits into no column")
                str(part).encode()
    if message.model:
        check_name(message.model, "model")
        check_alias(message.model, "alias")


def _upload(message: dataset_pb2.UploadDatasetRequest) -> None:
    datasets.archive_format(message.header.format)
    name = file_name(message.image.filename, 1)
    # Below its number, as in a folder.
    own = name.removeprefix("000001/")
    if "/" in own or "\0" in name or len(own) > 200:
        raise Broken(f"{name!r} is no name for people")
    msgspec.json.encode(name)
    for is_labelled in (True, False):
        with suppress(InvalidInput):
            labels.check_given(message.image.label, is_labelled=is_labelled)
            label = labels.canonical(message.image.label)
            if "/" in label or label != labels.canonical(label):
                raise Broken(f"{label!r} is not a class name")
            labels.check_alike([(label, ""), ("cat", "")], case_sensitive=is_labelled)


class Classifier:
    """Knows every model; decodes, and gives every image the same classes."""

    def remembered(self, model: ModelKey, version: int | None, alias: str | None) -> ModelFiles:
        """Returns the files of whatever is asked for."""
        return ModelFiles(model, version or 1, "b" * 64, "a" * 64)

    async def classify_with(
        self,
        models: Sequence[AskedModel],
        images: Sequence[Decode],
        timeout_s: float,
        *,
        finish: Callable[[list[list[Outcome]]], Any],
        spent_s: float = 0.0,
    ) -> Any:
        """Finishes each image's answers, or its error."""
        return finish([[self._answer(decode) for decode in images] for _ in models])

    def _answer(self, decode: Decode) -> Outcome:
        try:
            decode(DEFAULT_DECODING)
        except GraftError as error:
            return error
        probabilities = np.array([0.25, 0.5, 0.25], np.float32)
        return Classified(
            classes=("a", "b", "c"),
            probabilities=probabilities,
            features=np.zeros(2, np.float32),
            answer=1,
            outlier_score=0.5,
        )


def finished(work: Coroutine[Any, Any, Any]) -> Any:
    """The outcome of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    work.close()
    raise Broken("it waits for something")


_HANDLERS: dict[type, Any] = {
    fine_tuning_pb2.FineTuneRequest: _fine_tune,
    fine_tuning_pb2.RankBackbonesRequest: _rank,
    prediction_pb2.PredictRequest: _predict,
    fine_tuning_pb2.ListJobsRequest: _list,
    dataset_pb2.UploadDatasetRequest: _upload,
}


def _nested_token() -> str:
    return base64.urlsafe_b64encode(b'["jobs",' + b"[" * 1500).decode().rstrip("=")


def seeds() -> list[bytes]:
    """A valid request of every kind and method, on the wire; and choices that reach far."""
    pb = fine_tuning_pb2
    asked = [
        pb.FineTuneRequest(model="cats", dataset_id="ds-1", labels={"team": "pets"}),
        pb.FineTuneRequest(
            model="cats",
            server_path=pb.ServerPath(path=str(_allowed())),
            model_based=pb.ModelBased(epochs=3, learning_rate=0.01, train_from_stage="layer4"),
            gate=pb.Gate(
                min_accuracy=0.9,
                class_recalls={"cat": 0.5},
                not_worse_than="latest",
                max_regression=0.1,
                when_uncertain=2,
                alias="prod",
            ),
            grouping=pb.Grouping(name_pattern="{group}_*"),
            augmentation=pb.Augmentation(mirror=False, min_scale=0.5, colour=0.2),
            baselines=[1, 2],
            decision=_THRESHOLDS,
            request_id="retry-1",
            seed=7,
        ),
        pb.FineTuneRequest(
            model="cats",
            dataset_id="ds-1",
            domain_adaptation=pb.DomainAdaptation(target_dataset_id="ds-2", technique=5, epochs=2),
        ),
        pb.RankBackbonesRequest(
            dataset_id="ds-1", backbones=[pb.PretrainedBackbone(backbone="resnet18")]
        ),
        prediction_pb2.PredictRequest(
            models=[
                prediction_pb2.ModelSpec(model="cats", version=2, decision=_THRESHOLDS),
                prediction_pb2.ModelSpec(model="dogs", alias="prod"),
            ],
            images=[
                prediction_pb2.Image(
                    tensor=prediction_pb2.Tensor(data_type=1, shape=[1, 1, 3], data=b"abc")
                ),
                prediction_pb2.Image(encoded=b"\xff\xd8"),
            ],
            top_k=2,
        ),
        pb.ListJobsRequest(
            page_size=3, page_token=pagination.token("jobs", TENANT, "job-1"), states=[1, 2]
        ),
        pb.ListJobsRequest(page_token=pagination.token("versions", TENANT, 3)),
        pb.ListJobsRequest(page_token=pagination.token("datasets", TENANT, 1.5, "ds-1")),
        pb.ListJobsRequest(page_token=pagination.token("versions", TENANT, 2**63)),
        pb.ListJobsRequest(page_token=_nested_token()),
        dataset_pb2.UploadDatasetRequest(
            image=dataset_pb2.LabelledImage(label="cat", filename="a.png", content=b"x", group="a")
        ),
    ]
    return [
        *(bytes([KINDS.index(type(m)), 1]) + m.SerializeToString() for m in asked),
        *(bytes([kind, 0]) + bytes(range(1, 250)) for kind in range(len(KINDS))),
    ]


TARGET = Target("requests", run, seeds, modules=("service", "tests.fuzz.messages"))
