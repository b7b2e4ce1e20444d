"""ModelService: published models, their aliases, reports and exports."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from graftml_stubs.v1 import model_pb2 as pb
from graftml_stubs.v1 import model_pb2_grpc
from grpc import aio

from service.auth import principal
from service.domain import LATEST, Manifest, ModelKey
from service.engine.exporter import Exporter
from service.errors import bad_field
from service.rpc.codec import models as codec
from service.storage.models import ModelStore
from service.storage.version_rows import ModelRecord, VersionRecord

_CHUNK_BYTES = 2**20

Context = aio.ServicerContext[Any, Any]
_Which = pb.GetVersionRequest | pb.GetReportRequest | pb.ExportModelRequest


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Manages published models. Answers are built in the thread that reads the store."""

    def __init__(self, models: ModelStore, exporter: Exporter) -> None:
        self._models = models
        self._exporter = exporter

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        """See model.proto."""
        model = principal.current().key(request.model)
        return pb.GetModelResponse(model=await _model(self._models.get_model, model))

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """See model.proto."""

        def listed(tenant: str) -> pb.ListModelsResponse:
            records, token = self._models.list_models(
                request.page_size, request.page_token, tenant, request.name_prefix, request.labels
            )
            return pb.ListModelsResponse(
                models=[codec.model(record) for record in records], next_page_token=token
            )

        return await asyncio.to_thread(listed, principal.current().tenant)

    async def DeleteModel(  # noqa: N802
        self, request: pb.DeleteModelRequest, context: Context
    ) -> pb.DeleteModelResponse:
        """See model.proto."""
        model = principal.current().key(request.model)
        await asyncio.to_thread(self._models.delete_model, model, force=request.force)
        return pb.DeleteModelResponse()

    async def GetVersion(  # noqa: N802
        self, request: pb.GetVersionRequest, context: Context
    ) -> pb.GetVersionResponse:
        """See model.proto."""

        def got(model: ModelKey) -> pb.GetVersionResponse:
            return pb.GetVersionResponse(version=self._encoded(self._version(request, model)))

        return await asyncio.to_thread(got, principal.current().key(request.model))

    async def ListVersions(  # noqa: N802
        self, request: pb.ListVersionsRequest, context: Context
    ) -> pb.ListVersionsResponse:
        """See model.proto."""

        def listed(model: ModelKey) -> pb.ListVersionsResponse:
            records, token = self._models.list_versions(
                model, request.page_size, request.page_token
            )
            return pb.ListVersionsResponse(
                versions=[self._encoded(record) for record in records], next_page_token=token
            )

        return await asyncio.to_thread(listed, principal.current().key(request.model))

    async def DeleteVersion(  # noqa: N802
        self, request: pb.DeleteVersionRequest, context: Context
    ) -> pb.DeleteVersionResponse:
        """See model.proto."""
        model = principal.current().key(request.model)
        await asyncio.to_thread(self._models.delete_version, model, request.version)
        return pb.DeleteVersionResponse()

    async def SetAlias(  # noqa: N802
        self, request: pb.SetAliasRequest, context: Context
    ) -> pb.SetAliasResponse:
        """See model.proto."""
        model = principal.current().key(request.model)
        return pb.SetAliasResponse(
            model=await _model(self._models.set_alias, model, request.alias, request.version)
        )

    async def DeleteAlias(  # noqa: N802
        self, request: pb.DeleteAliasRequest, context: Context
    ) -> pb.DeleteAliasResponse:
        """See model.proto."""
        model = principal.current().key(request.model)
        return pb.DeleteAliasResponse(
            model=await _model(self._models.delete_alias, model, request.alias)
        )

    async def RollbackAlias(  # noqa: N802
        self, request: pb.RollbackAliasRequest, context: Context
    ) -> pb.RollbackAliasResponse:
        """See model.proto."""

        def rolled_back(model: ModelKey) -> pb.RollbackAliasResponse:
            done = self._models.roll_back_alias(model, request.alias or LATEST)
            return pb.RollbackAliasResponse(
                model=codec.model(done.model),
                from_version=done.from_version,
                to_version=done.to_version,
            )

        return await asyncio.to_thread(rolled_back, principal.current().key(request.model))

    async def PromoteVersion(  # noqa: N802
        self, request: pb.PromoteVersionRequest, context: Context
    ) -> pb.PromoteVersionResponse:
        """See model.proto."""
        model = principal.current().key(request.model)
        return pb.PromoteVersionResponse(
            model=await _model(self._models.promote_version, model, request.version)
        )

    async def GetReport(  # noqa: N802
        self, request: pb.GetReportRequest, context: Context
    ) -> pb.GetReportResponse:
        """See model.proto."""
        if request.format not in pb.ReportFormat.values():
            raise bad_field(
                "format",
                f"format {request.format} is none: use REPORT_FORMAT_JSON or REPORT_FORMAT_HTML",
            )
        html = request.format == pb.REPORT_FORMAT_HTML

        def report(model: ModelKey) -> pb.GetReportResponse:
            return pb.GetReportResponse(
                content=self._models.report(self._version(request, model), html=html),
                media_type="text/html" if html else "application/json",
            )

        return await asyncio.to_thread(report, principal.current().key(request.model))

    async def ExportModel(  # noqa: N802
        self, request: pb.ExportModelRequest, context: Context
    ) -> AsyncIterator[pb.ExportModelResponse]:
        """See model.proto."""

        def read(model: ModelKey) -> tuple[VersionRecord, Manifest]:
            record = self._version(request, model)
            return record, self._models.manifest(record)

        record, manifest = await asyncio.to_thread(read, principal.current().key(request.model))
        metadata = {
            "model": record.model.name,
            "version": str(record.version),
            "dataset_digest": manifest.dataset_digest,
        }
        file = await self._exporter.export(record.files, metadata)
        for start in range(0, len(file), _CHUNK_BYTES):
            yield pb.ExportModelResponse(chunk=file[start : start + _CHUNK_BYTES])

    def _version(self, request: _Which, model: ModelKey) -> VersionRecord:
        which = request.WhichOneof("which")
        return self._models.get_version(
            model,
            request.version if which == "version" else None,
            request.alias if which == "alias" else None,
        )

    def _encoded(self, record: VersionRecord) -> pb.Version:
        return codec.version(record, self._models.manifest(record))


async def _model(change: Callable[..., ModelRecord], *args: Any) -> pb.Model:
    """Calls the store in a thread; returns its model as a message."""
    return await asyncio.to_thread(lambda: codec.model(change(*args)))
