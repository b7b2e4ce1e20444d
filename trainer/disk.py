"""How a full disk shows: to Python, safetensors, torch and SQLite. Never imports torch."""

import errno
import os

_CODES = {errno.ENOSPC, errno.EDQUOT}
_WORDS = (
    *(os.strerror(code) for code in sorted(_CODES)),
    # torch writes through a door that keeps the cause to itself.
    "PytorchStreamWriter failed writing",
    "database or disk is full",
)


def is_full(error: BaseException) -> bool:
    """Whether the error, or what it came from, is that a disk or a quota has no room.

    What it came from is what it was raised from. What it was raised beside counts for an
    error of writing alone, which libraries raise in place of the system's; any other may
    have nothing to do with a full disk that was dealt with before.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _CODES:
            return True
        if any(word in str(cause) for word in _WORDS):
            return True
        beside = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or (beside if isinstance(cause, OSError) else None)
    return False
