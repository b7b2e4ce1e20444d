"""ModelService: published models, their aliases, reports and exports."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from graft.v1 import model_pb2 as pb
from graft.v1 import model_pb2_grpc
from grpc import aio

from service.auth.principal import caller
from service.domain import LATEST
from service.errors import InvalidInput, Reason
from service.rpc import convert
from service.storage.models import ModelStore, VersionRecord

Export = Callable[[VersionRecord], Awaitable[bytes]]
"""Composes one self-contained ONNX file."""

_CHUNK_BYTES = 2**20

Context = aio.ServicerContext[Any, Any]


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Looks after published models."""

    def __init__(
        self,
        models: ModelStore,
        export: Export,
        damage_of: Callable[[VersionRecord], str],
    ) -> None:
        self._models = models
        self._damage_of = damage_of
        self._export = export

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        """See model.proto."""
        record = await asyncio.to_thread(self._models.get_model, caller().key(request.model))
        return pb.GetModelResponse(model=convert.model(record))

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """See model.proto."""
        records, token = await asyncio.to_thread(
            self._models.list_models, request.page_size, request.page_token, caller().tenant
        )
        return pb.ListModelsResponse(
            models=[convert.model(record) for record in records], next_page_token=token
        )

    async def DeleteModel(  # noqa: N802
        self, request: pb.DeleteModelRequest, context: Context
    ) -> pb.DeleteModelResponse:
        """See model.proto."""
        await asyncio.to_thread(
            self._models.delete_model, caller().key(request.model), force=request.force
        )
        return pb.DeleteModelResponse()

    async def GetVersion(  # noqa: N802
        self, request: pb.GetVersionRequest, context: Context
    ) -> pb.GetVersionResponse:
        """See model.proto."""
        record = await self._version(request)
        return pb.GetVersionResponse(version=convert.version(record, self._damage_of(record)))

    async def ListVersions(  # noqa: N802
        self, request: pb.ListVersionsRequest, context: Context
    ) -> pb.ListVersionsResponse:
        """See model.proto."""
        records, token = await asyncio.to_thread(
            self._models.list_versions,
            caller().key(request.model),
            request.page_size,
            request.page_token,
        )
        return pb.ListVersionsResponse(
            versions=[convert.version(record, self._damage_of(record)) for record in records],
            next_page_token=token,
        )

    async def DeleteVersion(  # noqa: N802
        self, request: pb.DeleteVersionRequest, context: Context
    ) -> pb.DeleteVersionResponse:
        """See model.proto."""
        await asyncio.to_thread(
            self._models.delete_version, caller().key(request.model), request.version
        )
        return pb.DeleteVersionResponse()

    async def SetAlias(  # noqa: N802
        self, request: pb.SetAliasRequest, context: Context
    ) -> pb.SetAliasResponse:
        """See model.proto."""
        record = await asyncio.to_thread(
            self._models.set_alias,
            caller().key(request.model),
            request.alias,
            request.version,
            falls_back=request.falls_back,
        )
        return pb.SetAliasResponse(model=convert.model(record))

    async def DeleteAlias(  # noqa: N802
        self, request: pb.DeleteAliasRequest, context: Context
    ) -> pb.DeleteAliasResponse:
        """See model.proto."""
        record = await asyncio.to_thread(
            self._models.delete_alias, caller().key(request.model), request.alias
        )
        return pb.DeleteAliasResponse(model=convert.model(record))

    async def RollbackAlias(  # noqa: N802
        self, request: pb.RollbackAliasRequest, context: Context
    ) -> pb.RollbackAliasResponse:
        """See model.proto."""
        done = await asyncio.to_thread(
            self._models.roll_back_alias, caller().key(request.model), request.alias or LATEST
        )
        return pb.RollbackAliasResponse(
            model=convert.model(done.model),
            from_version=done.from_version,
            to_version=done.to_version,
        )

    async def PromoteVersion(  # noqa: N802
        self, request: pb.PromoteVersionRequest, context: Context
    ) -> pb.PromoteVersionResponse:
        """See model.proto."""
        record = await asyncio.to_thread(
            self._models.promote_version, caller().key(request.model), request.version
        )
        return pb.PromoteVersionResponse(model=convert.model(record))

    async def GetReport(  # noqa: N802
        self, request: pb.GetReportRequest, context: Context
    ) -> pb.GetReportResponse:
        """See model.proto."""
        if request.format not in pb.ReportFormat.values():
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"format {request.format} is none: use REPORT_FORMAT_JSON or REPORT_FORMAT_HTML",
                field="format",
            )
        html = request.format == pb.REPORT_FORMAT_HTML
        record = await self._version(request)
        return pb.GetReportResponse(
            content=await asyncio.to_thread(self._models.report, record, html=html),
            media_type="text/html" if html else "application/json",
        )

    async def ExportModel(  # noqa: N802
        self, request: pb.ExportModelRequest, context: Context
    ) -> AsyncIterator[pb.ExportModelResponse]:
        """See model.proto."""
        file = await self._export(await self._version(request))
        for start in range(0, len(file), _CHUNK_BYTES):
            yield pb.ExportModelResponse(chunk=file[start : start + _CHUNK_BYTES])

    async def _version(
        self, request: pb.GetVersionRequest | pb.GetReportRequest | pb.ExportModelRequest
    ) -> VersionRecord:
        which = request.WhichOneof("which")
        return await asyncio.to_thread(
            self._models.get_version,
            caller().key(request.model),
            request.version if which == "version" else None,
            request.alias if which == "alias" else None,
        )
