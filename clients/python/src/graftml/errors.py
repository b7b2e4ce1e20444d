"""What can go wrong, as exceptions: one class a kind, a reason for programs, a message for people.

The kind follows from the gRPC status code; the reason is one of `Reason` (or a
name that a newer service knows), empty where the service did not say.
`from_rpc` and `from_status` are the only places that read error details.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "graft"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"


class Reason(StrEnum):
    """The names of `graft.v1.ErrorReason`, without the prefix; documented there."""

    INTERNAL = "INTERNAL"
    INVALID_FIELD = "INVALID_FIELD"
    IMAGE_UNREADABLE = "IMAGE_UNREADABLE"
    IMAGE_TOO_LARGE = "IMAGE_TOO_LARGE"
    TENSOR_INVALID = "TENSOR_INVALID"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    VERSION_NOT_FOUND = "VERSION_NOT_FOUND"
    ALIAS_NOT_FOUND = "ALIAS_NOT_FOUND"
    JOB_NOT_FOUND = "JOB_NOT_FOUND"
    DATASET_NOT_FOUND = "DATASET_NOT_FOUND"
    BACKBONE_NOT_FOUND = "BACKBONE_NOT_FOUND"
    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    JOB_FINISHED = "JOB_FINISHED"
    JOB_NOT_FINISHED = "JOB_NOT_FINISHED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    DATASET_IN_USE = "DATASET_IN_USE"
    ALIAS_IN_USE = "ALIAS_IN_USE"
    ALIAS_RESERVED = "ALIAS_RESERVED"
    NO_EARLIER_VERSION = "NO_EARLIER_VERSION"
    NOT_A_CANDIDATE = "NOT_A_CANDIDATE"
    BASE_DATA_GONE = "BASE_DATA_GONE"
    MODEL_IN_USE = "MODEL_IN_USE"
    BACKBONE_IN_USE = "BACKBONE_IN_USE"
    PATH_NOT_ALLOWED = "PATH_NOT_ALLOWED"
    PATH_NOT_FOUND = "PATH_NOT_FOUND"
    ARCHIVE_UNSAFE = "ARCHIVE_UNSAFE"
    ARCHIVE_TOO_LARGE = "ARCHIVE_TOO_LARGE"
    ARCHIVE_UNREADABLE = "ARCHIVE_UNREADABLE"
    DATASET_UNUSABLE = "DATASET_UNUSABLE"
    BACKBONE_UNUSABLE = "BACKBONE_UNUSABLE"
    QUEUE_FULL = "QUEUE_FULL"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    MODEL_UNLOADABLE = "MODEL_UNLOADABLE"
    STORAGE_FULL = "STORAGE_FULL"
    STORAGE_BUSY = "STORAGE_BUSY"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    STORAGE_DAMAGED = "STORAGE_DAMAGED"
    WEIGHTS_UNAVAILABLE = "WEIGHTS_UNAVAILABLE"
    TRAINING_FAILED = "TRAINING_FAILED"
    TRAINER_CRASHED = "TRAINER_CRASHED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    TIME_BUDGET_EXCEEDED = "TIME_BUDGET_EXCEEDED"
    PARITY_FAILED = "PARITY_FAILED"
    DEVICE_UNAVAILABLE = "DEVICE_UNAVAILABLE"
    TOKEN_MISSING = "TOKEN_MISSING"  # nosec B105  # noqa: S105 - a reason
    TOKEN_UNKNOWN = "TOKEN_UNKNOWN"  # nosec B105  # noqa: S105 - a reason
    TOKEN_EXPIRED = "TOKEN_EXPIRED"  # nosec B105  # noqa: S105 - a reason
    ROLE_MISSING = "ROLE_MISSING"


@dataclass(frozen=True)
class Violation:
    """A field of the request that was wrong."""

    field: str
    description: str


class GraftError(Exception):
    """Anything that the service answers with, or that keeps it from answering."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        violations: tuple[Violation, ...] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        """A `Reason`, or a name that a newer service knows; empty where none was given."""
        self.code = code
        self.violations = violations
        self.retry_after_s = retry_after_s
        """When trying again makes sense, where the service said so."""
        self.request_id = request_id
        """What the service's log calls the call."""


class InvalidArgument(GraftError, ValueError):  # noqa: N818 - named for what happened, as its siblings
    """The request itself is wrong; sending it again will not help."""


class NotFound(GraftError):  # noqa: N818
    """The named thing does not exist."""


class AlreadyExists(GraftError):  # noqa: N818
    """The name is taken by something else."""


class NotAllowed(GraftError):  # noqa: N818
    """The caller may not do this, or is not known."""


class FailedPrecondition(GraftError):  # noqa: N818
    """The request is fine, but not in the state that things are in."""


class ResourceExhausted(GraftError):  # noqa: N818
    """A bound is reached: a queue, a message's size, the disk."""


class DeadlineExceeded(GraftError, TimeoutError):  # noqa: N818
    """No answer within the time."""


class Unavailable(GraftError, ConnectionError):  # noqa: N818
    """Not now; try again later."""


class CannotConnect(Unavailable):
    """Nothing answers at the server's address."""


class Cancelled(GraftError):  # noqa: N818
    """The call was cancelled."""


class Unimplemented(GraftError):  # noqa: N818
    """The server does not know the call: it is older than this client, or no Graft server."""


class DataLoss(GraftError):  # noqa: N818
    """Something that was stored cannot be read any more."""


class Aborted(GraftError):  # noqa: N818
    """The work was begun and failed; the same request would fail again."""


class Internal(GraftError):  # noqa: N818
    """A fault of the service; the message holds an id that its log holds too."""


KINDS: dict[grpc.StatusCode, type[GraftError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.UNAUTHENTICATED: NotAllowed,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.INTERNAL: Internal,
}
"""Maps status codes to classes; the first of a class is the one that the service sends."""

_NEVER_CONNECTED = (
    "dns resolution failed", "errors resolving", "lookup", "handshake", "ssl", "certificate",
    "failed to connect", "connection refused",
)  # fmt: skip
_BROKEN_WRITE = "Internal error from Core"

_BY_NUMBER: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def invalid(message: str, field: str = "", reason: str = Reason.INVALID_FIELD) -> InvalidArgument:
    """What the client itself refuses, before anything is sent."""
    violations = (Violation(field, message),) if field else ()
    return InvalidArgument(
        message, reason=reason, code=grpc.StatusCode.INVALID_ARGUMENT, violations=violations
    )


def from_status(status: status_pb2.Status, request_id: str = "") -> GraftError:
    """From a `google.rpc.Status` with its details."""
    code = _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    found: dict[str, Any] = {}
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            found["reason"] = info.reason
        elif detail.Unpack(bad):
            found["violations"] = tuple(
                Violation(v.field, v.description) for v in bad.field_violations
            )
        elif detail.Unpack(retry):
            found["retry_after_s"] = retry.retry_delay.ToTimedelta().total_seconds()
    kind = KINDS.get(code, GraftError)
    return kind(status.message or code.name, code=code, request_id=request_id, **found)


def from_rpc(error: grpc.RpcError, target: str, timeout_s: float | None = None) -> GraftError:
    """From what gRPC raises, sync or async; `target` is the server's address, for messages."""
    # Both kinds of RpcError are a Call too; the type does not say so.
    call: Any = error
    code: grpc.StatusCode = call.code()
    details: str = call.details() or ""
    metadata = {str(key): value for key, value in call.trailing_metadata() or ()}
    request_id = str(metadata.get(REQUEST_ID_KEY, ""))
    packed = metadata.get(DETAILS_KEY)
    if packed:
        try:
            return from_status(status_pb2.Status.FromString(bytes(packed)), request_id)
        except DecodeError:
            details += " (the error's details cannot be read)"
    kind, message = KINDS.get(code, GraftError), details or code.name
    if code is grpc.StatusCode.UNAVAILABLE:
        kind, message = _of_connection(details, target)
    elif is_broken_write(error):
        kind, code = Unavailable, grpc.StatusCode.UNAVAILABLE
        message = f"{target} ended the stream while it was being sent to; why was lost"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        within = "" if timeout_s is None else f" within {timeout_s:.3g} s"
        message = f"no answer from {target}{within}: allow more time or look at the server's load"
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"{target} does not know this call: it is not a Graft server, or an older one"
    return kind(message, code=code, request_id=request_id)


def is_broken_write(error: grpc.RpcError) -> bool:
    """Whether grpc.aio put it in the place of the server's status, since a write came too late."""
    call: Any = error
    return call.code() is grpc.StatusCode.INTERNAL and call.details() == _BROKEN_WRITE


def _of_connection(details: str, target: str) -> tuple[type[Unavailable], str]:
    # Only gRPC's text says whether there was a connection at all; `_diagnosis` finds out why
    # there is none.
    lower = details.lower()
    if any(words in lower for words in _NEVER_CONNECTED):
        return CannotConnect, f"no connection to {target} ({details})"
    return Unavailable, f"the connection to {target} broke: {details or 'no reason given'}"
