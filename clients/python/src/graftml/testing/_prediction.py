"""PredictionService, answered by a function."""

# ruff: noqa: ARG002, N802 - a servicer has gRPC's names and takes what gRPC gives

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftml_stubs.v1 import decision_pb2, prediction_pb2_grpc
from graftml_stubs.v1 import prediction_pb2 as pb

from graftml.errors import GraftError, InvalidArgument, Reason
from graftml.testing._models import Models
from graftml.testing._refusals import refuse, to_status

MAX_IMAGES = 256
FEATURES = 4
"""How many the fake backbone gives."""


@dataclass(frozen=True)
class SentImage:
    """An image as it arrived: a file's bytes, or pixels with their shape and type."""

    data: bytes
    shape: tuple[int, ...] = ()
    """`(height, width, 3)` for pixels; empty for a file."""
    dtype: str = ""
    """"uint8" or "float32" for pixels; empty for a file."""


@dataclass(frozen=True)
class Answer:
    """What is said of an image: probabilities by class, and how unlike the training it is."""

    probabilities: Mapping[str, float]
    out_of_distribution_score: float | None = None
    """Above 1 means out of distribution."""


Predict = Callable[[str, SentImage], Mapping[str, float] | Answer]
"""From a model's name and an image to probabilities by class, or an `Answer`; a GraftError that
it raises becomes the image's own error."""


class Predictions(prediction_pb2_grpc.PredictionServiceServicer):
    """Answers with what `predict` says; without one, a class that follows from the bytes."""

    def __init__(self, models: Models, predict: Predict | None) -> None:
        self._models = models
        self.predict = predict

    def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
        if not request.models:
            raise refuse(
                InvalidArgument, Reason.INVALID_FIELD, "the request names no model", "models"
            )
        versions = [self._models.resolve(spec) for spec in request.models]
        if not 1 <= len(request.images) * len(versions) <= MAX_IMAGES:
            raise refuse(
                InvalidArgument,
                Reason.INVALID_FIELD,
                f"the request holds {len(request.images)} images for {len(versions)} models; it "
                f"may hold 1 to {MAX_IMAGES // len(versions)}",
                "images",
            )
        return pb.PredictResponse(
            answers=[
                self._of_model(request, version, spec, f"models[{at}].decision")
                for at, (version, spec) in enumerate(zip(versions, request.models, strict=True))
            ]
        )

    def _of_model(
        self, request: pb.PredictRequest, version: Any, spec: pb.ModelSpec, field: str
    ) -> pb.ModelAnswer:
        classes = list(version.classes)
        decision = spec.decision if spec.HasField("decision") else version.decision
        strange = sorted(set(decision.thresholds.classes) - set(classes))
        if strange:
            raise refuse(
                InvalidArgument,
                Reason.INVALID_FIELD,
                f"there are thresholds of classes that the model does not have: {strange}",
                f"{field}.thresholds.classes",
            )
        return pb.ModelAnswer(
            model=version.model,
            version=version.version,
            results=[
                self._result(request, version.model, decision, classes, image)
                for image in request.images
            ],
            calibrated=version.calibrated,
        )

    def PredictStream(
        self, request_iterator: Iterator[pb.PredictStreamRequest], context: Any
    ) -> Iterator[pb.PredictStreamResponse]:
        """Answers in pairs, the second first: the order is not promised."""
        held: pb.PredictStreamRequest | None = None
        for item in request_iterator:
            if held is None:
                held = item
                continue
            yield self._answer(item, context)
            yield self._answer(held, context)
            held = None
        if held is not None:
            yield self._answer(held, context)

    def _answer(self, item: pb.PredictStreamRequest, context: Any) -> pb.PredictStreamResponse:
        try:
            response = self.Predict(item.request, context)
        except GraftError as error:
            return pb.PredictStreamResponse(id=item.id, error=to_status(error))
        return pb.PredictStreamResponse(id=item.id, response=response)

    def _result(
        self,
        request: pb.PredictRequest,
        model: str,
        decision: decision_pb2.Decision,
        classes: list[str],
        image: pb.Image,
    ) -> pb.ImageResult:
        sent = _sent(image)
        try:
            answer = self._answered(model, classes, sent)
        except GraftError as error:
            return pb.ImageResult(error=to_status(error))
        shares, score = answer.probabilities, answer.out_of_distribution_score
        ranked = sorted(shares.items(), key=lambda item: -item[1])

        def scored(label: str) -> pb.ClassScore:
            return pb.ClassScore(
                label=label, probability=shares[label], class_index=classes.index(label)
            )

        decided = _decided(decision.thresholds, ranked)
        features = [float(byte) for byte in sent.data[:FEATURES].ljust(FEATURES, b"\0")]
        return pb.ImageResult(
            classification=pb.Classification(
                scores=[scored(label) for label, _ in ranked[: request.top_k or 1]],
                answer=scored(decided) if decided else None,
                features=features if request.include_features else None,
                out_of_distribution_score=score,
                is_out_of_distribution=score is not None and score > 1,
            )
        )

    def _answered(self, model: str, classes: list[str], sent: SentImage) -> Answer:
        if self.predict is not None:
            said = self.predict(model, sent)
            return said if isinstance(said, Answer) else Answer(said)
        if not sent.data:
            raise refuse(InvalidArgument, Reason.IMAGE_UNREADABLE, "the image is empty")
        best = zlib.crc32(sent.data) % len(classes)
        rest = 0.1 / max(1, len(classes) - 1)
        return Answer({label: 0.9 if i == best else rest for i, label in enumerate(classes)}, 0.5)


def _decided(least: decision_pb2.Thresholds, ranked: list[tuple[str, float]]) -> str:
    """The class of the answer, "" for none; `balanced` takes classes as equally frequent."""
    reached = (label for label, p in ranked if p >= least.classes.get(label, least.others))
    return next(reached, "")


def _sent(image: pb.Image) -> SentImage:
    if image.WhichOneof("content") == "encoded":
        return SentImage(image.encoded)
    tensor = image.tensor
    dtype = "uint8" if tensor.data_type == pb.DATA_TYPE_UINT8 else "float32"
    return SentImage(tensor.data, tuple(tensor.shape), dtype)
