"""GRPCInferenceService: the Open Inference Protocol on Graft's engine and models."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial

from service.auth import principal
from service.domain import ARGMAX, Decision, Manifest, ModelKey
from service.engine.engine import AskedModel, Engine
from service.errors import NotFound, Reason, bad_field
from service.rpc import bounded_pipeline, status
from service.rpc.handlers import Context, in_store_thread
from service.rpc.open_inference import answers, described, tensors
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceServicer
from service.rpc.pins import Pins
from service.rpc.predict import resolve
from service.storage import pagination
from service.storage.models import ModelStore

_RULES = {"argmax": ARGMAX, "balanced": Decision(rule="balanced")}
"""Decisions that a parameter can name; thresholds are a version's own, or Predict's."""


class OpenInferenceServicer(GRPCInferenceServiceServicer):
    """Answers Triton's and KServe's clients, as grpc_predict_v2.proto says."""

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
        self._pins = pins
        self._version = version
        self._is_ready = is_ready
        self._max_images = max_images
        self._timeout_s = timeout_s

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        model = principal.current().key(request.name)
        try:
            await resolve(self._models, model, *_which(request.version))
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="graft", version=self._version, extensions=described.EXTENSIONS
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        model = principal.current().key(request.name)
        manifest = await self._manifest(model, request.version)
        versions = await self._meant(model, request.version)
        return described.metadata(model, manifest, versions)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        model = principal.current().key(request.name)
        manifest = await self._manifest(model, request.version)
        return pb.ModelConfigResponse(config=described.config(model, manifest, self._max_images))

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        remaining = context.time_remaining()
        timeout_s = self._timeout_s if remaining is None else min(self._timeout_s, remaining)
        return await self._infer(request, timeout_s)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        async with aclosing(bounded_pipeline.answers(request_iterator, self._answer)) as responses:
            async for response in responses:
                yield response

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        counted = self._engine.ledger
        if request.name:
            model = principal.current().key(request.name)
            versions = await self._meant(model, request.version)
            counts = {(model, version): counted.of(model, version) for version in versions}
        else:
            counts = counted.all()
        # There may be thousands of them.
        return await asyncio.to_thread(described.statistics, counts, principal.current().tenant)

    @in_store_thread
    def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        _check_repository(request.repository_name)
        response = pb.RepositoryIndexResponse()
        tenant, token = principal.current().tenant, ""
        while True:
            records, token = self._models.list_models(pagination.MAX_SIZE, token, tenant)
            for record in records:
                try:
                    latest = self._models.resolve(record.key, None, None)
                except NotFound:
                    continue  # deleted since, or candidates alone
                is_loaded = self._engine.is_loaded(latest)
                response.models.add(
                    name=latest.model.name,
                    version=str(latest.version),
                    state="READY",
                    reason="in memory" if is_loaded else "loads on demand",
                )
            if not token:
                return response

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        _check_repository(request.repository_name)
        if any(name == "config" or name.startswith("file:") for name in request.parameters):
            raise bad_field(
                "parameters",
                "a published version has no other configuration or files: fine-tune to make a new "
                "one",
            )
        await self._pins.load(principal.current().key(request.model_name))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        _check_repository(request.repository_name)
        await self._pins.unload(principal.current().key(request.model_name))
        return pb.RepositoryModelUnloadResponse()

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
            timeout_s,
            spent_s=time.monotonic() - begun,
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


def _check_repository(name: str) -> None:
    if name:
        raise bad_field("repository_name", "there is one repository: leave repository_name empty")


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
