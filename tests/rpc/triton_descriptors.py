"""Prints Triton's own messages and calls as JSON; run with a Python that has tritonclient[grpc].

A program of its own, since two copies of package `inference` cannot share a process.
"""

import json
from collections.abc import Iterable
from typing import Any

from google.protobuf import descriptor_pb2


def described(files: Iterable[Any]) -> dict[str, list[Any]]:
    """What is on the wire: by name, each field's number, type and cardinality, and each call."""
    found: dict[str, list[Any]] = {}

    def message(prefix: str, proto: descriptor_pb2.DescriptorProto) -> None:
        name = f"{prefix}.{proto.name}"
        found[name] = []
        for field in proto.field:
            found[f"{name}.{field.name}"] = [
                field.number,
                field.type,
                field.label,
                field.type_name,
                proto.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else "",
            ]
        for nested in proto.nested_type:
            message(name, nested)

    for file in files:
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        for top in proto.message_type:
            message(proto.package, top)
        for enum in proto.enum_type:
            for value in enum.value:
                found[f"{proto.package}.{enum.name}.{value.name}"] = [value.number]
        for service in proto.service:
            for method in service.method:
                found[f"{proto.package}.{service.name}/{method.name}"] = [
                    method.input_type,
                    method.output_type,
                    method.client_streaming,
                    method.server_streaming,
                ]
    return found


if __name__ == "__main__":
    from tritonclient.grpc import model_config_pb2, service_pb2

    print(json.dumps(described([model_config_pb2.DESCRIPTOR, service_pb2.DESCRIPTOR])))
