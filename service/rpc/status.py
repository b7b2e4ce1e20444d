"""From an error to a gRPC status: the one table.

Every status carries `google.rpc.ErrorInfo` (domain "graft", a reason of
`graft.v1.ErrorReason`), and where they apply `BadRequest` and `RetryInfo`. An
error that is not a `GraftError` leaves as INTERNAL with a fixed text and an id;
what happened goes to the log alone.
"""

import logging
import secrets

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from service import errors
from service.errors import GraftError, Reason

DOMAIN = "graft"
DETAILS_KEY = "grpc-status-details-bin"

log = logging.getLogger(__name__)

_CODES: dict[type[GraftError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.WrongState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OverQuota: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Damaged: grpc.StatusCode.DATA_LOSS,
}

# A failed job has no call to answer: its reason alone says what kind it was.
_JOB_CODES: dict[Reason, int] = {
    Reason.DATASET_UNUSABLE: code_pb2.INVALID_ARGUMENT,
    Reason.INVALID_FIELD: code_pb2.INVALID_ARGUMENT,
    Reason.ARCHIVE_UNSAFE: code_pb2.INVALID_ARGUMENT,
    Reason.ARCHIVE_TOO_LARGE: code_pb2.INVALID_ARGUMENT,
    Reason.ARCHIVE_UNREADABLE: code_pb2.INVALID_ARGUMENT,
    Reason.DATASET_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.BACKBONE_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.PATH_NOT_FOUND: code_pb2.NOT_FOUND,
    Reason.BASE_DATA_GONE: code_pb2.FAILED_PRECONDITION,
    Reason.WEIGHTS_UNAVAILABLE: code_pb2.UNAVAILABLE,
    Reason.DEVICE_UNAVAILABLE: code_pb2.FAILED_PRECONDITION,
    Reason.TIME_BUDGET_EXCEEDED: code_pb2.DEADLINE_EXCEEDED,
    Reason.OUT_OF_MEMORY: code_pb2.RESOURCE_EXHAUSTED,
    Reason.STORAGE_FULL: code_pb2.RESOURCE_EXHAUSTED,
    Reason.QUOTA_EXCEEDED: code_pb2.RESOURCE_EXHAUSTED,
    Reason.TRAINING_FAILED: code_pb2.ABORTED,
    Reason.TRAINER_CRASHED: code_pb2.INTERNAL,
    Reason.PARITY_FAILED: code_pb2.INTERNAL,
}


def from_error(error: BaseException) -> status_pb2.Status:
    """The status that an error leaves with."""
    if isinstance(error, GraftError):
        # By the nearest kind that has a code: some kinds exist inside the service alone.
        kind = next(kind for kind in type(error).__mro__ if kind in _CODES)
        code: int = _CODES[kind].value[0]
        quota = error.subject if isinstance(error, errors.OverQuota) else ""
        return _status(code, error.reason, error.message, error.field, error.retry_after_s, quota)
    incident = secrets.token_hex(6)
    log.error("unexpected error %s", incident, exc_info=error)
    message = f"an unexpected error happened; the service's log holds it under {incident}"
    return _status(code_pb2.INTERNAL, Reason.INTERNAL, message)


def of_job(reason: Reason, message: str) -> status_pb2.Status:
    """The status of a failed job."""
    return _status(_JOB_CODES.get(reason, code_pb2.UNKNOWN), reason, message)


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """The status's code as grpc names it."""
    return _BY_NUMBER[status.code]


def _status(
    code: int,
    reason: Reason,
    message: str,
    field: str = "",
    retry_after_s: float | None = None,
    quota: str = "",
) -> status_pb2.Status:
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
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
