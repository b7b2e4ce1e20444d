"""Lists the services and describes their messages, as `grpc.reflection.v1` and `v1alpha`.

The library has `v1alpha` alone. `v1` is the same under another name, byte for byte; newer
clients ask for nothing else.
"""

from typing import Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc import aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

_OLD: Final = "v1alpha"
SERVICES: Final = (reflection.SERVICE_NAME, reflection.SERVICE_NAME.replace(_OLD, "v1"))


def register(names: tuple[str, ...], server: aio.Server) -> None:
    """Answers for the services of these names, and for reflection itself, by both its names."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*names, *SERVICES))
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": method}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(name, methods) for name in SERVICES]
    )


def _describe_v1() -> None:
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file).replace(_OLD, "v1")
    described = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(described.SerializeToString())
