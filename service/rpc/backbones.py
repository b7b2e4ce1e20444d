"""BackboneService: registers, lists and deletes backbones of tenants, and lists Graft's own."""

from collections.abc import AsyncIterator
from pathlib import Path

from graftml_stubs.v1 import backbone_pb2 as pb
from graftml_stubs.v1 import backbone_pb2_grpc

from service import backbones as registry
from service.auth import principal
from service.backbones import ONNX, Backbone
from service.errors import bad_field
from service.jobs.weights import available
from service.rpc import uploads
from service.rpc.codec.models import timestamp
from service.rpc.handlers import Context, in_store_thread
from service.storage import pagination
from service.storage.backbone_rows import RegisteredBackbone
from service.storage.registered import BackboneStore, BackboneUpload, Description


class BackboneServicer(backbone_pb2_grpc.BackboneServiceServicer):
    """Stores feature extractors, as backbone.proto says."""

    def __init__(self, backbones: BackboneStore, weights_dir: Path, idle_timeout_s: float) -> None:
        self._backbones = backbones
        self._weights_dir = weights_dir
        self._idle_timeout_s = idle_timeout_s

    async def RegisterBackbone(
        self, request_iterator: AsyncIterator[pb.RegisterBackboneRequest], context: Context
    ) -> pb.RegisterBackboneResponse:
        record = await uploads.received(
            request_iterator, "description", self._begin, _take, self._idle_timeout_s
        )
        return pb.RegisterBackboneResponse(backbone=_registered(record))

    def _begin(self, description: pb.BackboneDescription) -> BackboneUpload:
        if description.layout not in pb.ImageLayout.values():
            raise bad_field(
                "description.layout",
                f"description.layout {description.layout} is none: use a value of ImageLayout",
            )
        return self._backbones.begin(
            Description(
                name=description.name,
                size=description.size,
                mean=tuple(description.mean),
                std=tuple(description.std),
                is_channels_last=description.layout == pb.IMAGE_LAYOUT_NHWC,
                output=description.output,
                licence=description.licence,
                sha256=description.sha256,
            ),
            tenant=principal.current().tenant,
            max_stored_bytes=principal.current().quota.stored_bytes,
        )

    @in_store_thread
    def ListBackbones(
        self, request: pb.ListBackbonesRequest, context: Context
    ) -> pb.ListBackbonesResponse:
        tenant = principal.current().tenant
        size = pagination.size(request.page_size)
        after = str((pagination.key("backbones", tenant, request.page_token, str) or ("",))[0])
        found = [_registered(record) for record in self._backbones.page(after, size + 1, tenant)]
        for each in available(self._weights_dir, lambda _: []):
            row = registry.find(each.backbone)
            if row is not None and row.name > after:
                found.append(self._shipped(row, tenant))
        found.sort(key=lambda backbone: backbone.name)
        token = ""  # nosec B105 # no password
        if len(found) > size:
            token = pagination.token("backbones", tenant, found[size - 1].name)
        return pb.ListBackbonesResponse(backbones=found[:size], next_page_token=token)

    def _shipped(self, row: Backbone, tenant: str) -> pb.Backbone:
        weights = row.weights_name("")
        return pb.Backbone(
            name=row.name,
            source=f"BACKBONE_SOURCE_{row.source.upper()}",
            size=row.size,
            feature_dim=row.width,
            licence=row.licence,
            digest=self._backbones.exported_digest(row.name, weights, tenant),
            weights=weights,
        )

    @in_store_thread
    def DeleteBackbone(
        self, request: pb.DeleteBackboneRequest, context: Context
    ) -> pb.DeleteBackboneResponse:
        name = ONNX + request.name.removeprefix(ONNX)
        if not registry.is_registered(name) or request.name in registry.BACKBONES:
            raise bad_field(
                "name", f"{request.name[:80]!r} is not a registered backbone's name: onnx/NAME is"
            )
        self._backbones.delete(name, principal.current().tenant)
        return pb.DeleteBackboneResponse()


def _take(upload: BackboneUpload, message: pb.RegisterBackboneRequest) -> None:
    if message.WhichOneof("part") != "chunk":
        raise bad_field("part", "a message holds no `chunk`")
    upload.write(message.chunk)


def _registered(record: RegisteredBackbone) -> pb.Backbone:
    return pb.Backbone(
        name=record.name,
        source=pb.BACKBONE_SOURCE_REGISTERED,
        size=record.asked.size,
        feature_dim=record.width,
        licence=record.licence,
        digest=record.digest,
        weights=record.weights,
        source_digest=record.source_digest,
        size_bytes=record.size_bytes,
        create_time=timestamp(record.create_time_s),
    )
