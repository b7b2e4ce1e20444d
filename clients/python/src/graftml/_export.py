"""A file that appears whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Writes beside `path`, and renames when all went well; nothing is left otherwise.

    Raises OSError that names `path` or its folder, never the file beside it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder: name a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _renamed(error, path.parent) from error
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == name:
            raise _renamed(error, path) from error
        raise


def _renamed(error: OSError, path: Path) -> OSError:
    # OSError itself chooses the class of the number.
    return OSError(error.errno, error.strerror, str(path))


def _umask() -> int:
    # There is no asking without setting; a file made by another thread in between is private.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
