"""PredictionService: from messages to the engine and back."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

import numpy as np
from graft.v1 import prediction_pb2 as pb
from graft.v1 import prediction_pb2_grpc
from grpc import aio

from service.auth.principal import caller
from service.engine import preprocess
from service.engine.engine import Classified, Decode
from service.engine.head import NONE
from service.errors import GraftError, InvalidInput, Reason
from service.rpc import convert_decisions, status, streams
from service.rpc.limits import MAX_SCORES
from service.rpc.serving import Serving

_QUICK_SCORES = 2000
"""Limit on the scores and features that are composed on the event loop, not in a thread."""


class PredictionServicer(prediction_pb2_grpc.PredictionServiceServicer):
    """Classifies images."""

    def __init__(self, serving: Serving, *, max_images: int, timeout_s: float) -> None:
        self._serving = serving
        self._max_images = max_images
        self._timeout_s = timeout_s
        # Not the stores' threads, which uploads may hold.
        self._composers = ThreadPoolExecutor(2, thread_name_prefix="compose")

    async def Predict(  # noqa: N802
        self, request: pb.PredictRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.PredictResponse:
        """See prediction.proto."""
        remaining = context.time_remaining()
        timeout_s = self._timeout_s if remaining is None else min(self._timeout_s, remaining)
        return await self._predict(request, timeout_s)

    async def PredictStream(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.PredictStreamRequest],
        context: aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.PredictStreamResponse]:
        """See prediction.proto. A slow reader slows the reading of its requests."""
        async with aclosing(streams.answers(request_iterator, self._answer)) as responses:
            async for response in responses:
                yield response

    async def _answer(self, item: pb.PredictStreamRequest) -> pb.PredictStreamResponse:
        try:
            if len(item.id) > 128:
                raise _bad("id", "the id has more than 128 characters")
            response = await self._predict(item.request, self._timeout_s)
            return pb.PredictStreamResponse(id=item.id, response=response)
        except Exception as error:
            return pb.PredictStreamResponse(id=item.id[:128], error=status.from_error(error))

    async def _predict(self, request: pb.PredictRequest, timeout_s: float) -> pb.PredictResponse:
        if not request.images:
            raise _bad("images", "the request holds no images: send at least one")
        if len(request.images) > self._max_images:
            raise _bad(
                "images",
                f"the request holds {len(request.images)} images, more than the "
                f"{self._max_images} that one call may bring: send them in several calls",
            )
        if request.top_k < 0:
            raise _bad("top_k", f"top_k is {request.top_k}: it must be 0 (for 1) or more")
        decision = None
        if request.HasField("decision"):
            decision = convert_decisions.decision(request.decision)
        which = request.WhichOneof("which")
        version, outcomes = await self._serving.classify(
            caller().key(request.model),
            request.version if which == "version" else None,
            request.alias if which == "alias" else None,
            [_decode(image, index) for index, image in enumerate(request.images)],
            timeout_s,
            decision,
        )
        top_k = request.top_k or 1
        scores, features = _sizes(outcomes, top_k, request.include_features)
        if scores > MAX_SCORES:
            raise _bad(
                "top_k",
                f"{len(request.images)} images with the {top_k} best classes each are {scores} "
                f"scores, more than the {MAX_SCORES} of one answer: send fewer images, or ask "
                "for fewer classes",
            )
        compose = partial(_response, request.model, version, outcomes, top_k, features > 0)
        if scores + features <= _QUICK_SCORES:
            return compose()
        return await asyncio.get_running_loop().run_in_executor(self._composers, compose)


def _decode(image: pb.Image, index: int) -> Decode:
    kind = image.WhichOneof("content")
    if kind == "encoded":
        return preprocess.Encoded(image.encoded)
    if kind == "tensor":
        tensor = image.tensor
        if tensor.data_type not in (pb.DATA_TYPE_UINT8, pb.DATA_TYPE_FLOAT32):
            raise _bad(
                f"images[{index}].tensor.data_type",
                f"images[{index}].tensor.data_type must be DATA_TYPE_UINT8 or DATA_TYPE_FLOAT32",
            )
        is_float = tensor.data_type == pb.DATA_TYPE_FLOAT32
        data, shape = tensor.data, list(tensor.shape)
        return lambda decoding: preprocess.from_tensor(data, shape, decoding, is_float=is_float)
    raise _bad(f"images[{index}]", f"images[{index}] holds neither `encoded` nor `tensor`")


def _sizes(
    outcomes: Sequence[Classified | GraftError], top_k: int, with_features: bool
) -> tuple[int, int]:
    """Counts the scores and the features of an answer."""
    classified = [outcome for outcome in outcomes if isinstance(outcome, Classified)]
    scores = sum(min(top_k, len(outcome.classes)) for outcome in classified)
    features = sum(outcome.features.size for outcome in classified) if with_features else 0
    return scores, features


def _response(
    model: str,
    version: int,
    outcomes: Sequence[Classified | GraftError],
    top_k: int,
    with_features: bool,
) -> pb.PredictResponse:
    return pb.PredictResponse(
        model=model,
        version=version,
        results=[_result(outcome, top_k, with_features) for outcome in outcomes],
        calibrated=any(isinstance(o, Classified) and o.is_calibrated for o in outcomes),
    )


def _result(outcome: Classified | GraftError, top_k: int, with_features: bool) -> pb.ImageResult:
    if isinstance(outcome, GraftError):
        return pb.ImageResult(error=status.from_error(outcome))
    probabilities = outcome.probabilities
    # Stable, so that ties keep the order of the classes.
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    return pb.ImageResult(
        classification=pb.Classification(
            scores=[_score(outcome, i) for i in best.tolist()],
            answer=None if outcome.answer == NONE else _score(outcome, outcome.answer),
            features=outcome.features.tolist() if with_features else None,
            out_of_distribution_score=outcome.outlier_score,
            is_out_of_distribution=(outcome.outlier_score or 0.0) > 1,
        )
    )


def _score(outcome: Classified, index: int) -> pb.ClassScore:
    return pb.ClassScore(
        label=outcome.classes[index],
        probability=outcome.probabilities[index],
        class_index=index,
    )


def _bad(field: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_FIELD, message, field=field)
