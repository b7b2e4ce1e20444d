"""Reads files whole, and checks that they are what their digests say."""

import hashlib
from pathlib import Path

from service.errors import unloadable


def read(path: Path, digest: str, kind: str) -> bytes:
    """Returns a file's bytes; `digest` is their sha256, "" where it is not known.

    Raises Damaged (MODEL_UNLOADABLE) for a file that is missing or another; `kind` names it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unloadable(kind, f"cannot be read ({error.strerror})") from error
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise unloadable(kind, "is damaged: its content is not what was stored")
    return content
