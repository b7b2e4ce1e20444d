"""PredictionService: classifies images."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

from graftml_stubs.v1 import prediction_pb2 as pb
from graftml_stubs.v1 import prediction_pb2_grpc

from service.auth import principal
from service.domain import Decision, ModelFiles, ModelKey
from service.engine import preprocess
from service.engine.engine import AskedModel, Decode, Engine
from service.errors import NotFound, bad_field
from service.rpc import bounded_pipeline, status
from service.rpc.codec import decisions, predictions
from service.rpc.handlers import Context
from service.storage.models import ModelStore

MAX_MODELS = 32
"""Models in one call. Several on one backbone cost little; but each may be on another, and the
worker that took an image makes all runs on it, for which other calls wait."""
_MAX_ID_CHARS = 128


class PredictionServicer(prediction_pb2_grpc.PredictionServiceServicer):
    """Classifies images, as prediction.proto says."""

    def __init__(
        self, engine: Engine, models: ModelStore, *, max_images: int, timeout_s: float
    ) -> None:
        self._engine = engine
        self._models = models
        self._max_images = max_images
        self._timeout_s = timeout_s

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        remaining = context.time_remaining()
        timeout_s = self._timeout_s if remaining is None else min(self._timeout_s, remaining)
        return await self._predict(request, timeout_s)

    async def PredictStream(
        self, request_iterator: AsyncIterator[pb.PredictStreamRequest], context: Context
    ) -> AsyncIterator[pb.PredictStreamResponse]:
        async with aclosing(bounded_pipeline.answers(request_iterator, self._answer)) as responses:
            async for response in responses:
                yield response

    async def _answer(self, item: pb.PredictStreamRequest) -> pb.PredictStreamResponse:
        try:
            if len(item.id) > _MAX_ID_CHARS:
                raise bad_field("id", f"the id has more than {_MAX_ID_CHARS} characters")
            response = await self._predict(item.request, self._timeout_s)
            return pb.PredictStreamResponse(id=item.id, response=response)
        except Exception as error:
            return pb.PredictStreamResponse(
                id=item.id[:_MAX_ID_CHARS], error=status.from_error(error)
            )

    async def _predict(self, request: pb.PredictRequest, timeout_s: float) -> pb.PredictResponse:
        self._check(request)
        decided = [_decision(spec, at) for at, spec in enumerate(request.models)]
        images = [_decode(image, index) for index, image in enumerate(request.images)]
        begun = time.monotonic()
        asked = [
            AskedModel(await self._files(spec, at), decision, _decision_field(at))
            for at, (spec, decision) in enumerate(zip(request.models, decided, strict=True))
        ]
        return await self._engine.classify_with(
            asked,
            images,
            timeout_s,
            spent_s=time.monotonic() - begun,
            finish=partial(
                predictions.response,
                [each.files for each in asked],
                top_k=request.top_k or 1,
                with_features=request.include_features,
            ),
        )

    def _check(self, request: pb.PredictRequest) -> None:
        models, images = len(request.models), len(request.images)
        if not models:
            raise bad_field("models", "the request names no model: name at least one")
        if models > MAX_MODELS:
            raise bad_field(
                "models",
                f"the request names {models} models, more than the {MAX_MODELS} that one call may "
                "ask: ask them in several calls",
            )
        if not images:
            raise bad_field("images", "the request holds no images: send at least one")
        if images * models > self._max_images:
            asked = f" for {models} models, {images * models} answers" if models > 1 else ""
            raise bad_field(
                "images",
                f"the request holds {images} images{asked}, more than the {self._max_images} that "
                "one call may bring: send them in several calls",
            )
        if request.top_k < 0:
            raise bad_field("top_k", f"top_k is {request.top_k}: it must be 0 (for 1) or more")

    async def _files(self, spec: pb.ModelSpec, at: int) -> ModelFiles:
        which = spec.WhichOneof("which")
        try:
            return await resolve(
                self._models,
                principal.current().key(spec.model),
                spec.version if which == "version" else None,
                spec.alias if which == "alias" else None,
            )
        except NotFound as error:
            error.field = f"models[{at}]"
            raise


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


def _decision_field(at: int) -> str:
    return f"models[{at}].decision"


def _decision(spec: pb.ModelSpec, at: int) -> Decision | None:
    return decisions.read(spec.decision, _decision_field(at)) if spec.HasField("decision") else None


def _decode(image: pb.Image, index: int) -> Decode:
    """Returns what decodes an image; its bytes are copied in the worker's thread."""
    kind = image.WhichOneof("content")
    if kind == "encoded":
        return preprocess.Encoded(lambda: image.encoded)
    if kind == "tensor":
        if image.tensor.data_type not in (pb.DATA_TYPE_UINT8, pb.DATA_TYPE_FLOAT32):
            raise bad_field(
                f"images[{index}].tensor.data_type",
                f"images[{index}].tensor.data_type must be DATA_TYPE_UINT8 or DATA_TYPE_FLOAT32",
            )
        tensor = image.tensor
        is_float = tensor.data_type == pb.DATA_TYPE_FLOAT32
        return preprocess.Tensor(lambda: tensor.data, tensor.shape, is_float=is_float)
    raise bad_field(f"images[{index}]", f"images[{index}] holds neither `encoded` nor `tensor`")
