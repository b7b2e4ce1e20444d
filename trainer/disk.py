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
    """Whether the error, or what it came from, is that a disk or a quota has no room."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _CODES:
            return True
        if any(word in str(cause) for word in _WORDS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
