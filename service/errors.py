"""What can go wrong, in the words of the domain; no gRPC in here.

Each class is a kind of error (what the caller can do about it), each instance
carries a `Reason` (which error it is, for programs) and a message that says
what was wrong and what to do. `service.rpc.status` alone turns them into
statuses. Anything that is not a `GraftError` is a fault of ours.
"""

from enum import StrEnum


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
    JOB_FINISHED = "JOB_FINISHED"
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

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidInput(GraftError):  # noqa: N818 - named for what happened, as its siblings
    """The request itself is wrong; sending it again will not help."""


class NotFound(GraftError):  # noqa: N818
    """The named thing does not exist."""


class Unauthenticated(GraftError):  # noqa: N818
    """Nobody knows who calls."""


class NotAllowed(GraftError):  # noqa: N818
    """The caller may not do this."""


class AlreadyExists(GraftError):  # noqa: N818
    """The name is taken by something else."""


class WrongState(GraftError):  # noqa: N818
    """The request is fine, but not in the state that things are in."""


class Exhausted(GraftError):  # noqa: N818
    """A bound is reached: a queue, a quota, the disk."""


class OverQuota(Exhausted):
    """A bound of the caller's tenant is reached; `subject` names which, "calls_per_second"."""

    def __init__(self, subject: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(Reason.QUOTA_EXCEEDED, message, retry_after_s=retry_after_s)
        self.subject = subject


class Expired(GraftError):  # noqa: N818
    """The deadline passed before the answer was ready."""


class Unavailable(GraftError):  # noqa: N818
    """Not now; try again later."""


class Damaged(GraftError):  # noqa: N818
    """Something that was stored cannot be read any more."""
