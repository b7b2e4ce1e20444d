"""Predictions, answered by a function."""

# ruff: noqa: N802 - a method is named as the call that it answers

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from threading import Condition

from graftml_stubs.v1 import prediction_pb2 as pb

from graftml.errors import GraftError, InvalidArgument, Reason
from graftml.testing._records import Records
from graftml.testing._refusals import refuse, to_status

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
    label: str | None = None
    """The class that is answered, as a decision chose it; "" for none, None for the most
    probable."""


Predict = Callable[[str, SentImage], Mapping[str, float] | Answer]
"""From a model's name and an image to probabilities by class, or an `Answer`; a GraftError that
it raises becomes the image's own error."""


class Predictions:
    """Answers with what `predict` says; without one, a class that follows from the bytes."""

    def __init__(self, records: Records, lock: Condition, predict: Predict | None) -> None:
        self._records, self._lock, self._predict = records, lock, predict

    def Predict(self, request: pb.PredictRequest) -> pb.PredictResponse:
        with self._lock:
            versions = [
                self._records.find(spec, f"models[{at}]") for at, spec in enumerate(request.models)
            ]
        return pb.PredictResponse(
            answers=[
                pb.ModelAnswer(
                    model=version.model,
                    version=version.version,
                    results=[
                        self._result(request, version.model, list(version.classes), image)
                        for image in request.images
                    ],
                    calibrated=version.calibrated,
                )
                for version in versions
            ]
        )

    def PredictStream(
        self, requests: Iterator[pb.PredictStreamRequest]
    ) -> Iterator[pb.PredictStreamResponse]:
        """Answers in pairs, the second first: the order is not promised."""
        for first in requests:
            second = next(requests, None)
            if second is not None:
                yield self._streamed(second)
            yield self._streamed(first)

    def _streamed(self, item: pb.PredictStreamRequest) -> pb.PredictStreamResponse:
        try:
            return pb.PredictStreamResponse(id=item.id, response=self.Predict(item.request))
        except GraftError as error:
            return pb.PredictStreamResponse(id=item.id, error=to_status(error))

    def _result(
        self, request: pb.PredictRequest, model: str, classes: list[str], image: pb.Image
    ) -> pb.ImageResult:
        sent = _sent(image)
        try:
            answer = self._answered(model, classes, sent)
        except GraftError as error:
            return pb.ImageResult(error=to_status(error))
        shares, score = answer.probabilities, answer.out_of_distribution_score
        ranked = sorted(shares, key=lambda label: -shares[label])
        label = ranked[0] if answer.label is None else answer.label

        def scored(label: str) -> pb.ClassScore:
            return pb.ClassScore(
                label=label, probability=shares[label], class_index=classes.index(label)
            )

        features = [float(byte) for byte in sent.data[:FEATURES].ljust(FEATURES, b"\0")]
        return pb.ImageResult(
            classification=pb.Classification(
                scores=[scored(label) for label in ranked[: request.top_k or 1]],
                answer=scored(label) if label else None,
                features=features if request.include_features else None,
                out_of_distribution_score=score,
                is_out_of_distribution=score is not None and score > 1,
            )
        )

    def _answered(self, model: str, classes: list[str], sent: SentImage) -> Answer:
        if self._predict is not None:
            said = self._predict(model, sent)
            return said if isinstance(said, Answer) else Answer(said)
        if not sent.data:
            raise refuse(InvalidArgument, Reason.IMAGE_UNREADABLE, "the image is empty")
        best = zlib.crc32(sent.data) % len(classes)
        rest = 0.1 / max(1, len(classes) - 1)
        return Answer({label: 0.9 if i == best else rest for i, label in enumerate(classes)}, 0.5)


def _sent(image: pb.Image) -> SentImage:
    if image.WhichOneof("content") == "encoded":
        return SentImage(image.encoded)
    tensor = image.tensor
    dtype = "uint8" if tensor.data_type == pb.DATA_TYPE_UINT8 else "float32"
    return SentImage(tensor.data, tuple(tensor.shape), dtype)
