"""BackboneService, in memory: files are taken as they come, none is checked or run."""

# ruff: noqa: ARG002, N802 - a servicer has gRPC's names and takes what gRPC gives

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

from graftml_stubs.v1 import backbone_pb2 as pb
from graftml_stubs.v1 import backbone_pb2_grpc

from graftml.errors import FailedPrecondition, InvalidArgument, NotFound, Reason
from graftml.testing._models import now
from graftml.testing._refusals import page, refuse

_PREFIX = "onnx/"
_WIDTH = 512
_SHIPPED = pb.Backbone(
    name="efficientnet_lite0",
    source=pb.BACKBONE_SOURCE_PACKAGE,
    size=224,
    feature_dim=1280,
    licence="Apache-2.0",
    weights="fake",
)


class Backbones(backbone_pb2_grpc.BackboneServiceServicer):
    """Registered backbones by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._backbones: dict[str, pb.Backbone] = {}
        self.files: dict[str, bytes] = {}
        """What was uploaded, by name."""

    def RegisterBackbone(
        self, request_iterator: Iterator[pb.RegisterBackboneRequest], context: Any
    ) -> pb.RegisterBackboneResponse:
        description, file, is_whole = pb.BackboneDescription(), bytearray(), False
        for index, message in enumerate(request_iterator):
            part = message.WhichOneof("part")
            if (part == "description") != (index == 0):
                raise _invalid("the stream must begin with the description, and hold it once")
            if part == "description":
                description = message.description
            elif part == "chunk":
                file += message.chunk
            elif part == "end":
                is_whole = message.end.message_count == index - 1
        if not is_whole:
            raise _invalid("the upload was cut off: it ended without the `end` that fits")
        name = _PREFIX + description.name.removeprefix(_PREFIX)
        digest = hashlib.sha256(file).hexdigest()
        if description.sha256 not in ("", digest):
            raise _invalid(f"the file's sha256 is {digest}", "description.sha256")
        backbone = pb.Backbone(
            name=name,
            source=pb.BACKBONE_SOURCE_REGISTERED,
            size=description.size,
            feature_dim=_WIDTH,
            licence=description.licence,
            digest=digest,
            weights=f"sha256:{digest[:16]}",
            source_digest=digest,
            size_bytes=len(file),
            create_time=now(),
        )
        with self._lock:
            known = self._backbones.setdefault(name, backbone)
            if known.source_digest != digest:
                raise refuse(
                    FailedPrecondition,
                    Reason.BACKBONE_IN_USE,
                    f"{name} is registered already, from another file",
                    "description.name",
                )
            self.files[name] = bytes(file)
            return pb.RegisterBackboneResponse(backbone=known)

    def ListBackbones(
        self, request: pb.ListBackbonesRequest, context: Any
    ) -> pb.ListBackbonesResponse:
        with self._lock:
            found = sorted([_SHIPPED, *self._backbones.values()], key=lambda each: each.name)
        items, token = page(found, request.page_size, request.page_token)
        return pb.ListBackbonesResponse(backbones=items, next_page_token=token)

    def DeleteBackbone(
        self, request: pb.DeleteBackboneRequest, context: Any
    ) -> pb.DeleteBackboneResponse:
        name = _PREFIX + request.name.removeprefix(_PREFIX)
        with self._lock:
            if name not in self._backbones:
                raise refuse(
                    NotFound,
                    Reason.BACKBONE_NOT_FOUND,
                    f"no backbone is registered as {name!r}",
                    "name",
                )
            del self._backbones[name], self.files[name]
        return pb.DeleteBackboneResponse()


def _invalid(message: str, field: str = "part") -> Exception:
    return refuse(InvalidArgument, Reason.INVALID_FIELD, message, field)
