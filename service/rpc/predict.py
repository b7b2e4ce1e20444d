"""PredictionService: classifies images."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from graft.v1 import prediction_pb2 as pb
from graft.v1 import prediction_pb2_grpc
from grpc import aio

from service.auth import principal
from service.domain import ImageDecoding, ModelFiles, ModelKey
from service.engine import preprocess
from service.engine.engine import Decode, Engine
from service.engine.preprocess import Pixels
from service.errors import InvalidInput, Reason
from service.rpc import bounded_pipeline, status
from service.rpc.codec import decisions, predictions
from service.storage.models import ModelStore

_MAX_ID_CHARS = 128


class PredictionServicer(prediction_pb2_grpc.PredictionServiceServicer):
    """Classifies images."""

    def __init__(
        self, engine: Engine, models: ModelStore, *, max_images: int, timeout_s: float
    ) -> None:
        self._engine = engine
        self._models = models
        self._max_images = max_images
        self._timeout_s = timeout_s

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
        async with aclosing(bounded_pipeline.answers(request_iterator, self._answer)) as responses:
            async for response in responses:
                yield response

    async def _answer(self, item: pb.PredictStreamRequest) -> pb.PredictStreamResponse:
        try:
            if len(item.id) > _MAX_ID_CHARS:
                raise _bad("id", f"the id has more than {_MAX_ID_CHARS} characters")
            response = await self._predict(item.request, self._timeout_s)
            return pb.PredictStreamResponse(id=item.id, response=response)
        except Exception as error:
            return pb.PredictStreamResponse(
                id=item.id[:_MAX_ID_CHARS], error=status.from_error(error)
            )

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
        decision = decisions.read(request.decision) if request.HasField("decision") else None
        which = request.WhichOneof("which")
        images = [_decode(image, index) for index, image in enumerate(request.images)]
        begun = time.monotonic()
        files = await resolve(
            self._models,
            principal.current().key(request.model),
            request.version if which == "version" else None,
            request.alias if which == "alias" else None,
        )
        return await self._engine.classify(
            files,
            images,
            timeout_s - (time.monotonic() - begun),
            decision,
            finish=partial(
                predictions.response,
                request.model,
                files.version,
                top_k=request.top_k or 1,
                with_features=request.include_features,
            ),
        )


async def resolve(
    models: ModelStore, model: ModelKey, version: int | None, alias: str | None
) -> ModelFiles:
    """Returns what a version is answered by: by number, by alias, or by neither (`latest`).

    Raises NotFound as `ModelStore.resolve`.
    """
    known = models.remembered(model, version, alias)
    if known is not None:
        return known
    return await asyncio.to_thread(models.resolve, model, version, alias)


def _decode(image: pb.Image, index: int) -> Decode:
    """Returns the function that decodes an image; its bytes are copied in the worker's thread."""
    kind = image.WhichOneof("content")
    if kind == "encoded":
        return preprocess.Encoded(lambda: image.encoded)
    if kind == "tensor":
        if image.tensor.data_type not in (pb.DATA_TYPE_UINT8, pb.DATA_TYPE_FLOAT32):
            raise _bad(
                f"images[{index}].tensor.data_type",
                f"images[{index}].tensor.data_type must be DATA_TYPE_UINT8 or DATA_TYPE_FLOAT32",
            )
        return partial(_from_tensor, image.tensor)
    raise _bad(f"images[{index}]", f"images[{index}] holds neither `encoded` nor `tensor`")


def _from_tensor(tensor: pb.Tensor, decoding: ImageDecoding) -> Pixels:
    is_float = tensor.data_type == pb.DATA_TYPE_FLOAT32
    return preprocess.from_tensor(tensor.data, list(tensor.shape), decoding, is_float=is_float)


def _bad(field: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_FIELD, message, field=field)
