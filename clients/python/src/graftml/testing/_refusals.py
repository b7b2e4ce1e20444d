"""From a client's error back to the status that it came from: the inverse of `graftml.errors`."""

import typing
from typing import TypeVar

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from graftml import errors
from graftml.errors import GraftError, Violation

T = TypeVar("T")

_CODES = {kind: code for code, kind in reversed(errors.KINDS.items())}
"""Maps each class to the first of its codes."""


def code_of(error: GraftError) -> grpc.StatusCode:
    """The error's own code, or that of its class where it has none."""
    if error.code is not grpc.StatusCode.UNKNOWN:
        return error.code
    return _CODES.get(type(error), grpc.StatusCode.UNKNOWN)


def to_status(error: GraftError) -> status_pb2.Status:
    """The status with the details that the service would send."""
    details: list[Message] = []
    if error.reason:
        details.append(error_details_pb2.ErrorInfo(reason=error.reason, domain=errors.DOMAIN))
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(field=violation.field, description=violation.description)
        details.append(bad)
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_of(error).value[0], message=error.message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def refuse(kind: type[GraftError], reason: str, message: str, field: str = "") -> GraftError:
    """An error as the service would make it."""
    violations = (Violation(field, message),) if field else ()
    return kind(message, reason=reason, code=_CODES[kind], violations=violations)


def page(items: list[T], request: typing.Any) -> tuple[list[T], str]:
    """Returns the page of a list that is asked for, and the token of the next.

    A token is the number of items before.
    """
    start = int(request.page_token or 0)
    end = start + (request.page_size or 50)
    return items[start:end], str(end) if end < len(items) else ""
