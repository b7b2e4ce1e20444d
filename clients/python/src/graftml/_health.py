"""The question whether a server serves, as grpc.health.v1 has it.

Its two messages are one field each: a package for them would be the client's largest.
"""

from typing import Final

PATH: Final = "/grpc.health.v1.Health/Check"
WHOLE_SERVER: Final = b""
"""A request: the name of no service."""
SERVING: Final = b"\x08\x01"
NOT_SERVING: Final = b"\x08\x02"
"""Answers: field 1, a varint."""
