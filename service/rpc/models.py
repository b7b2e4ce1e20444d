"""ModelService: published models, their aliases, reports and exports."""

import asyncio
from collections.abc import AsyncIterator

from graftml_stubs.v1 import model_pb2 as pb
from graftml_stubs.v1 import model_pb2_grpc

from service.auth import principal
from service.domain import LATEST, Manifest
from service.engine.export import Exporter
from service.errors import bad_field
from service.rpc.codec import models as codec
from service.rpc.handlers import Context, in_store_thread
from service.rpc.pins import ChangeFollower
from service.storage.models import ModelStore
from service.storage.version_rows import VersionRecord

_CHUNK_BYTES = 2**20

_Which = pb.GetVersionRequest | pb.GetReportRequest | pb.ExportModelRequest


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Manages published models, as model.proto says."""

    def __init__(self, models: ModelStore, exporter: Exporter, follower: ChangeFollower) -> None:
        self._models = models
        self._exporter = exporter
        self._follower = follower

    @in_store_thread
    def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        model = principal.current().key(request.model)
        return pb.GetModelResponse(model=codec.model(self._models.get_model(model)))

    @in_store_thread
    def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        tenant = principal.current().tenant
        records, token = self._models.list_models(
            request.page_size, request.page_token, tenant, request.name_prefix, request.labels
        )
        return pb.ListModelsResponse(models=map(codec.model, records), next_page_token=token)

    async def DeleteModel(
        self, request: pb.DeleteModelRequest, context: Context
    ) -> pb.DeleteModelResponse:
        model = principal.current().key(request.model)
        await asyncio.to_thread(self._models.delete_model, model, force=request.force)
        # Before the answer: a new model of this name must not begin with the old one's counts.
        await self._follower.look_again(model)
        return pb.DeleteModelResponse()

    @in_store_thread
    def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.GetVersionResponse:
        return pb.GetVersionResponse(version=self._encoded(self._version(request)))

    @in_store_thread
    def ListVersions(
        self, request: pb.ListVersionsRequest, context: Context
    ) -> pb.ListVersionsResponse:
        model = principal.current().key(request.model)
        records, token = self._models.list_versions(model, request.page_size, request.page_token)
        return pb.ListVersionsResponse(versions=map(self._encoded, records), next_page_token=token)

    async def DeleteVersion(
        self, request: pb.DeleteVersionRequest, context: Context
    ) -> pb.DeleteVersionResponse:
        model = principal.current().key(request.model)
        await asyncio.to_thread(self._models.delete_version, model, request.version)
        await self._follower.look_again(model)
        return pb.DeleteVersionResponse()

    @in_store_thread
    def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        model = principal.current().key(request.model)
        record = self._models.set_alias(model, request.alias, request.version)
        return pb.SetAliasResponse(model=codec.model(record))

    @in_store_thread
    def DeleteAlias(
        self, request: pb.DeleteAliasRequest, context: Context
    ) -> pb.DeleteAliasResponse:
        model = principal.current().key(request.model)
        return pb.DeleteAliasResponse(
            model=codec.model(self._models.delete_alias(model, request.alias))
        )

    @in_store_thread
    def RollbackAlias(
        self, request: pb.RollbackAliasRequest, context: Context
    ) -> pb.RollbackAliasResponse:
        model = principal.current().key(request.model)
        done = self._models.roll_back_alias(model, request.alias or LATEST)
        return pb.RollbackAliasResponse(
            model=codec.model(done.model),
            from_version=done.from_version,
            to_version=done.to_version,
        )

    @in_store_thread
    def PromoteVersion(
        self, request: pb.PromoteVersionRequest, context: Context
    ) -> pb.PromoteVersionResponse:
        model = principal.current().key(request.model)
        record = self._models.promote_version(model, request.version)
        return pb.PromoteVersionResponse(model=codec.model(record))

    @in_store_thread
    def GetReport(self, request: pb.GetReportRequest, context: Context) -> pb.GetReportResponse:
        if request.format not in pb.ReportFormat.values():
            raise bad_field(
                "format",
                f"format {request.format} is none: use REPORT_FORMAT_JSON or REPORT_FORMAT_HTML",
            )
        html = request.format == pb.REPORT_FORMAT_HTML
        return pb.GetReportResponse(
            content=self._models.report(self._version(request), html=html),
            media_type="text/html" if html else "application/json",
        )

    async def ExportModel(
        self, request: pb.ExportModelRequest, context: Context
    ) -> AsyncIterator[pb.ExportModelResponse]:
        def read() -> tuple[VersionRecord, Manifest]:
            record = self._version(request)
            return record, self._models.manifest(record)

        record, manifest = await asyncio.to_thread(read)
        metadata = {
            "model": record.model.name,
            "version": str(record.version),
            "dataset_digest": manifest.dataset_digest,
        }
        file = await self._exporter.export(record.files, metadata)
        for start in range(0, len(file), _CHUNK_BYTES):
            yield pb.ExportModelResponse(chunk=file[start : start + _CHUNK_BYTES])

    def _version(self, request: _Which) -> VersionRecord:
        which = request.WhichOneof("which")
        return self._models.get_version(
            principal.current().key(request.model),
            request.version if which == "version" else None,
            request.alias if which == "alias" else None,
        )

    def _encoded(self, record: VersionRecord) -> pb.Version:
        return codec.version(record, self._models.manifest(record))
