"""Classified images as messages; runs in the engine's threads."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from graftml_stubs.v1 import prediction_pb2 as pb

from service.domain import ModelFiles
from service.engine.engine import Classified, Outcome
from service.engine.head import NONE, Floats
from service.errors import GraftError, InvalidInput, Reason
from service.rpc import status

MAX_SCORES = 100_000
"""Limit on the scores of one answer, over all its images."""


def best(probabilities: Floats, k: int) -> npt.NDArray[np.intp]:
    """Returns the indices of the k highest of probabilities [classes], the highest first.

    Of equals the first class comes first.
    """
    count = len(probabilities)
    if k == 1 and count:
        # What most calls ask for, in a quarter of the time or less; NaN would be the highest.
        highest = probabilities.argmax()
        if not np.isnan(probabilities[highest]):
            return np.array([highest])
    if k >= count:
        return np.argsort(-probabilities, kind="stable")
    negative = -probabilities
    # All that reach the k-th highest, so that of equals the first are kept; NaN is the lowest.
    reach = np.flatnonzero(~(negative > np.partition(negative, k - 1)[k - 1]))
    return reach[np.argsort(negative[reach], kind="stable")][:k]


def check_scores(classes: Sequence[int], k: int, field: str) -> None:
    """Raises InvalidInput where the k best of so many classes an answer are too many scores."""
    scores = sum(min(k, count) for count in classes)
    if scores > MAX_SCORES:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{len(classes)} images with the {k} best classes each are {scores} scores, more than "
            f"the {MAX_SCORES} of one answer: send fewer images, or ask for fewer classes",
            field=field,
        )


def response(
    models: Sequence[ModelFiles],
    outcomes: Sequence[Sequence[Outcome]],
    *,
    top_k: int,
    with_features: bool,
) -> pb.PredictResponse:
    """Converts the outcomes of a call, for each model one for each image.

    Raises InvalidInput for more scores than one answer has.
    """
    classes = [
        len(outcome.classes)
        for of_one in outcomes
        for outcome in of_one
        if isinstance(outcome, Classified)
    ]
    check_scores(classes, top_k, "top_k")
    return pb.PredictResponse(
        answers=[
            pb.ModelAnswer(
                model=files.model.name,
                version=files.version,
                results=[_result(outcome, top_k, with_features=with_features) for outcome in own],
                calibrated=any(
                    isinstance(outcome, Classified) and outcome.is_calibrated for outcome in own
                ),
            )
            for files, own in zip(models, outcomes, strict=True)
        ]
    )


def _result(outcome: Outcome, top_k: int, *, with_features: bool) -> pb.ImageResult:
    if isinstance(outcome, GraftError):
        return pb.ImageResult(error=status.from_error(outcome))
    return pb.ImageResult(
        classification=pb.Classification(
            scores=_scores(outcome, best(outcome.probabilities, top_k)),
            answer=_answer(outcome),
            features=outcome.features.tolist() if with_features else None,
            out_of_distribution_score=outcome.outlier_score,
            is_out_of_distribution=(outcome.outlier_score or 0.0) > 1,
        )
    )


def _answer(outcome: Classified) -> pb.ClassScore | None:
    at = outcome.answer
    if at == NONE:
        return None
    return pb.ClassScore(
        label=outcome.classes[at], probability=outcome.probabilities[at], class_index=at
    )


def _scores(outcome: Classified, indices: npt.NDArray[np.intp]) -> list[pb.ClassScore]:
    probabilities = outcome.probabilities[indices].tolist()
    return [
        pb.ClassScore(label=outcome.classes[index], probability=probability, class_index=index)
        for index, probability in zip(indices.tolist(), probabilities, strict=True)
    ]
