"""GRPCInferenceService: the Open Inference Protocol on Graft's engine and models."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from grpc import aio

from service.auth import principal
from service.domain import ARGMAX, Decision, Manifest, ModelKey
from service.engine.engine import AskedModel, Engine
from service.errors import NotFound, Reason, bad_field
from service.rpc import bounded_pipeline, status
from service.rpc.open_inference import answers, described, tensors
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceServicer
from service.rpc.open_inference.repository import Repository
from service.rpc.pins import Pins
from service.rpc.predict import resolve
from service.storage.models import ModelStore

_RULES = {"argmax": ARGMAX, "balanced": Decision(rule="balanced")}
"""Decisions that a parameter can name; thresholds are a version's own, or Predict's."""

Context = aio.ServicerContext[Any, Any]


class OpenInferenceServicer(GRPCInferenceServiceServicer):
    """Answers Triton's and KServe's clients."""

    def __init__(
        self,
        engine: Engine,
        models: ModelStore,
        pins: Pins,
        *,
        version: str,
        is_ready: Callable[[], bool],
        max_images: int,
        timeout_s: float,
    ) -> None:
        self._engine = engine
        self._models = models
        self._repository = Repository(engine, models, pins)
        self._version = version
        self._is_ready = is_ready
        self._max_images = max_images
        self._timeout_s = timeout_s

    async def ServerLive(  # noqa: N802
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """See grpc_predict_v2.proto."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """See grpc_predict_v2.proto."""
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """See grpc_predict_v2.proto."""
        model = principal.current().key(request.name)
        try:
            await resolve(self._models, model, *_which(request.version))
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """See grpc_predict_v2.proto."""
        return pb.ServerMetadataResponse(
            name="graft", version=self._version, extensions=described.EXTENSIONS
        )

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """See grpc_predict_v2.proto."""
        model = principal.current().key(request.name)
        manifest = await self._manifest(model, request.version)
        versions = await self._meant(model, request.version)
        return described.metadata(model, manifest, versions)

    async def ModelConfig(  # noqa: N802
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """See grpc_predict_v2.proto."""
        model = principal.current().key(request.name)
        manifest = await self._manifest(model, request.version)
        return pb.ModelConfigResponse(config=described.config(model, manifest, self._max_images))

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """See grpc_predict_v2.proto."""
        remaining = context.time_remaining()
        timeout_s = self._timeout_s if remaining is None else min(self._timeout_s, remaining)
        return await self._infer(request, timeout_s)

    async def ModelStreamInfer(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """See grpc_predict_v2.proto."""
        async with aclosing(bounded_pipeline.answers(request_iterator, self._answer)) as responses:
            async for response in responses:
                yield response

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        """See grpc_predict_v2.proto."""
        counted = self._engine.ledger
        if request.name:
            model = principal.current().key(request.name)
            versions = await self._meant(model, request.version)
            counts = {(model, version): counted.of(model, version) for version in versions}
        else:
            counts = counted.all()
        # There may be thousands of them.
        return await asyncio.to_thread(described.statistics, counts, principal.current().tenant)

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        """See grpc_predict_v2.proto."""
        return await self._repository.index(request)

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """See grpc_predict_v2.proto."""
        return await self._repository.load(request)

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """See grpc_predict_v2.proto."""
        return await self._repository.unload(request)

    async def _manifest(self, model: ModelKey, version: str) -> Manifest:
        def read() -> Manifest:
            return self._models.manifest(self._models.get_version(model, *_which(version)))

        return await asyncio.to_thread(read)

    async def _meant(self, model: ModelKey, version: str) -> list[int]:
        """Returns the version that is named, or all of them, newest first."""
        if version:
            return [(await resolve(self._models, model, *_which(version))).version]
        return await asyncio.to_thread(self._models.numbers, model)

    async def _infer(
        self, request: pb.ModelInferRequest, timeout_s: float
    ) -> pb.ModelInferResponse:
        asked = answers.outputs(request)
        timeout_s, decision = _shortened(request, timeout_s), _decision(request)
        images = tensors.decodes(request, self._max_images)
        begun = time.monotonic()
        model = principal.current().key(request.model_name)
        files = await resolve(self._models, model, *_which(request.model_version))
        return await self._engine.classify_with(
            [AskedModel(files, decision)],
            images,
            timeout_s - (time.monotonic() - begun),
            finish=partial(answers.answer, request, asked, files.version),
        )

    async def _answer(self, request: pb.ModelInferRequest) -> pb.ModelStreamInferResponse:
        try:
            response = await self._infer(request, self._timeout_s)
        except Exception as error:
            # The id says whose error it is; streams are answered in any order.
            named = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            message = status.from_error(error).message
            return pb.ModelStreamInferResponse(error_message=message, infer_response=named)
        response.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=response)


def _which(version: str) -> tuple[int | None, str | None]:
    """Reads a version as a number or an alias; neither is the latest."""
    if version.isascii() and version.isdigit():
        if len(version) > 18:  # more than the store's 64 bits hold
            raise NotFound(Reason.VERSION_NOT_FOUND, f"there is no version {version[:40]}")
        return int(version), None
    return None, version or None


def _shortened(request: pb.ModelInferRequest, timeout_s: float) -> float:
    if "timeout" not in request.parameters:
        return timeout_s
    timeout_us = request.parameters["timeout"].int64_param
    if timeout_us < 0:
        raise bad_field(
            "parameters",
            f"timeout is {timeout_us} microseconds: it must be 1 or more, or 0 for none",
        )
    return min(timeout_s, timeout_us / 1e6) if timeout_us else timeout_s


def _decision(request: pb.ModelInferRequest) -> Decision | None:
    if "decision" not in request.parameters:
        return None
    rule = request.parameters["decision"].string_param
    if rule not in _RULES:
        raise bad_field(
            "parameters", f"decision is {rule[:80]!r}: it must be {' or '.join(_RULES)}"
        )
    return _RULES[rule]
