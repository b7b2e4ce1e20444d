"""Statuses of calls and failed jobs, with their details.

Every status carries `google.rpc.ErrorInfo` (domain "graft", a reason of
`graft.v1.ErrorReason`), and where they apply `BadRequest`, `QuotaFailure` and `RetryInfo`.
The codes are those of `service.errors.KINDS`. An error that is not a `GraftError` leaves as
INTERNAL with a fixed text and an id; what happened goes to the log alone.
"""

import logging
import secrets

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from service.errors import KINDS, GraftError, OverQuota, Reason

DOMAIN = "graft"
DETAILS_KEY = "grpc-status-details-bin"

_MAX_MESSAGE_BYTES = 1300
"""Limit on a text, in UTF-8. gRPC's clients take a status of 8 KiB by default and put an error of
their own in the place of a larger one; a text is in it once as three bytes for each that is not
ASCII, and up to twice as base64."""

log = logging.getLogger(__name__)


def from_error(error: BaseException) -> status_pb2.Status:
    """Makes the status with which a call that raised this error ends."""
    if isinstance(error, GraftError):
        quota = error.subject if isinstance(error, OverQuota) else ""
        message = _shortened(error.message)
        return of_reason(error.reason, message, error.field, error.retry_after_s, quota)
    incident = secrets.token_hex(6)
    log.error("unexpected error %s", incident, exc_info=error)
    message = f"an unexpected error happened; the service's log holds it under {incident}"
    return of_reason(Reason.INTERNAL, message)


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """Returns the status's code as grpc names it."""
    return _BY_NUMBER[status.code]


def of_reason(
    reason: Reason,
    message: str,
    field: str = "",
    retry_after_s: float | None = None,
    quota: str = "",
) -> status_pb2.Status:
    """Makes the status of a reason, as of a failed job."""
    details = [error_details_pb2.ErrorInfo(reason=reason.value, domain=DOMAIN)]
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if quota:
        exceeded = error_details_pb2.QuotaFailure.Violation(subject=quota, description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[exceeded]))
    if retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(int(retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    code = code_pb2.Code.Value(KINDS[reason].code)
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _shortened(message: str) -> str:
    encoded = message.encode()
    if len(encoded) <= _MAX_MESSAGE_BYTES:
        return message
    return encoded[: _MAX_MESSAGE_BYTES - 3].decode(errors="ignore") + "..."


_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
