"""The contract's calls, as the stubs' descriptors have them, and the check of a server's health."""

from typing import Final

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message
from graftml_stubs.v1 import backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2

METHODS: Final[dict[str, MethodDescriptor]] = {
    method.input_type.full_name: method
    for file in (backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every call by the full name of its request, which no two share."""

# As grpc.health.v1 has it. Its two messages are one field each: a package for them would be the
# client's largest.
HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
WHOLE_SERVER: Final = b""
"""A request: the name of no service."""
SERVING: Final = b"\x08\x01"
NOT_SERVING: Final = b"\x08\x02"
"""Answers: field 1, a varint."""


def is_safe(request: Message) -> bool:
    """Tells whether sending a request again, after its answer got lost, changes nothing.

    The contract says so of its method, or the request has an id by which a repeat is known.
    """
    options = METHODS[request.DESCRIPTOR.full_name].GetOptions()
    is_said = options.idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN
    return is_said or bool(getattr(request, "request_id", ""))
