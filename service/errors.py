"""Errors that callers see: each has a reason, a reason belongs to one kind, a kind has a code.

A kind (a class) says what the caller can do about it, a `Reason` which error it is, for
programs, and the message what was wrong and what to do. `KINDS` is the one table from
which the statuses of calls and of failed jobs come, and to which the contract's reasons
and the client's classes are held by tests. Any other exception is a fault of the service.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, Final


class Reason(StrEnum):
    """Names of `graft.v1.ErrorReason`, without the prefix; documented there."""

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


class GraftError(Exception):
    """An error that a caller may see.

    `field` names the request's field that was wrong, as a path ("images[3]");
    `retry_after_s` says when trying again makes sense.
    """

    code: ClassVar[str] = "INTERNAL"
    """Name of the status code, as in `google.rpc.Code`."""

    def __init__(
        self, reason: Reason, message: str, *, field: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidInput(GraftError):
    """The request itself is wrong; sending it again will not help."""

    code = "INVALID_ARGUMENT"


class NotFound(GraftError):
    """The named thing does not exist."""

    code = "NOT_FOUND"


class Unauthenticated(GraftError):
    """The caller brings no proof of who it is, or none that is known."""

    code = "UNAUTHENTICATED"


class NotAllowed(GraftError):
    """The caller may not do this."""

    code = "PERMISSION_DENIED"


class AlreadyExists(GraftError):
    """The name is taken by something else."""

    code = "ALREADY_EXISTS"


class WrongState(GraftError):
    """The request is fine, but something must change before it can be served."""

    code = "FAILED_PRECONDITION"


class Exhausted(GraftError):
    """A limit is reached: a queue, a quota, the disk, memory."""

    code = "RESOURCE_EXHAUSTED"


class OverQuota(Exhausted):
    """A limit of the caller's tenant is reached; `subject` names which, "calls_per_second"."""

    def __init__(self, subject: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(Reason.QUOTA_EXCEEDED, message, retry_after_s=retry_after_s)
        self.subject = subject


class Expired(GraftError):
    """The time was over before there was a result."""

    code = "DEADLINE_EXCEEDED"


class Unavailable(GraftError):
    """The service cannot do this now; try again later."""

    code = "UNAVAILABLE"


class Damaged(GraftError):
    """Something that was stored cannot be read any more."""

    code = "DATA_LOSS"


class Aborted(GraftError):
    """The work was begun and failed; the same request would fail again."""

    code = "ABORTED"


class Internal(GraftError):
    """The service failed, through no fault of the request."""

    code = "INTERNAL"


KINDS: Final[Mapping[Reason, type[GraftError]]] = {
    reason: kind
    for kind, reasons in {
        InvalidInput: (
            Reason.INVALID_FIELD,
            Reason.IMAGE_UNREADABLE,
            Reason.IMAGE_TOO_LARGE,
            Reason.TENSOR_INVALID,
            Reason.ARCHIVE_UNSAFE,
            Reason.ARCHIVE_TOO_LARGE,
            Reason.ARCHIVE_UNREADABLE,
            Reason.DATASET_UNUSABLE,
            Reason.BACKBONE_UNUSABLE,
        ),
        NotFound: (
            Reason.MODEL_NOT_FOUND,
            Reason.VERSION_NOT_FOUND,
            Reason.ALIAS_NOT_FOUND,
            Reason.JOB_NOT_FOUND,
            Reason.DATASET_NOT_FOUND,
            Reason.BACKBONE_NOT_FOUND,
            Reason.IMAGE_NOT_FOUND,
            Reason.PATH_NOT_FOUND,
        ),
        Unauthenticated: (Reason.TOKEN_MISSING, Reason.TOKEN_UNKNOWN, Reason.TOKEN_EXPIRED),
        NotAllowed: (Reason.ROLE_MISSING, Reason.PATH_NOT_ALLOWED),
        AlreadyExists: (Reason.REQUEST_ID_REUSED,),
        WrongState: (
            Reason.JOB_FINISHED,
            Reason.JOB_NOT_FINISHED,
            Reason.DATASET_IN_USE,
            Reason.ALIAS_IN_USE,
            Reason.ALIAS_RESERVED,
            Reason.NO_EARLIER_VERSION,
            Reason.NOT_A_CANDIDATE,
            Reason.BASE_DATA_GONE,
            Reason.MODEL_IN_USE,
            Reason.BACKBONE_IN_USE,
            Reason.WEIGHTS_UNAVAILABLE,
            Reason.DEVICE_UNAVAILABLE,
        ),
        Exhausted: (
            Reason.QUEUE_FULL,
            Reason.TOO_MANY_CALLS,
            Reason.QUOTA_EXCEEDED,
            Reason.STORAGE_FULL,
            Reason.OUT_OF_MEMORY,
        ),
        Expired: (Reason.DEADLINE_EXCEEDED, Reason.TIME_BUDGET_EXCEEDED),
        Unavailable: (Reason.SHUTTING_DOWN, Reason.STORAGE_BUSY),
        Damaged: (Reason.MODEL_UNLOADABLE, Reason.STORAGE_DAMAGED),
        Aborted: (Reason.TRAINING_FAILED,),
        Internal: (Reason.INTERNAL, Reason.TRAINER_CRASHED, Reason.PARITY_FAILED),
    }.items()
    for reason in reasons
}
"""Maps every reason to its kind."""


def bad_field(field: str, message: str) -> InvalidInput:
    """Makes the error of a request's field that is not allowed."""
    return InvalidInput(Reason.INVALID_FIELD, message, field=field)


def unusable_dataset(message: str, field: str = "") -> InvalidInput:
    """Makes the error of images from which nothing can be learned as they are."""
    return InvalidInput(Reason.DATASET_UNUSABLE, message, field=field)


def stopping(what_to_do: str) -> Unavailable:
    """Makes the error of what the server does not do any more, since it stops."""
    return Unavailable(
        Reason.SHUTTING_DOWN, f"the service is stopping: {what_to_do}", retry_after_s=5.0
    )


def unloadable(kind: str, what: str) -> Damaged:
    """Makes the error of a stored `kind` of file, such as "backbone", that cannot be used."""
    return Damaged(
        Reason.MODEL_UNLOADABLE,
        f"the {kind} {what}; put it back from a backup, or store the same content again",
    )
