"""Put on a server's PYTHONPATH: writes down what it does to files, and what it flushed.

One JSON line for each into the file POWER_CUT_JOURNAL; what is below POWER_CUT_ROOT
alone. With POWER_CUT_FORGETS no flush is written down, as if there were none.
"""

# What pathlib calls is replaced here.
# ruff: noqa: PTH100, PTH110, PTH115, PTH118
import builtins
import ctypes
import io
import json
import os
from collections.abc import Callable
from typing import Any

_ROOT = os.environ["POWER_CUT_ROOT"] + os.sep
_FORGETS = bool(os.environ.get("POWER_CUT_FORGETS"))
_journal = os.open(os.environ["POWER_CUT_JOURNAL"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def note(what: str, **of: Any) -> None:
    if not (_FORGETS and what in ("fsync", "syncfs")):
        os.write(_journal, json.dumps({"what": what, **of}).encode() + b"\n")


def is_ours(path: Any) -> bool:
    return not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith(_ROOT)


def opening(do: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
    def opened(path: Any, *rest: Any, **named: Any) -> Any:
        if not is_ours(path) or not writes(*rest, **named):
            return do(path, *rest, **named)
        is_new = not os.path.exists(path)
        file = do(path, *rest, **named)
        if is_new:
            note("made", path=os.path.abspath(os.fsdecode(path)))
        number = file if isinstance(file, int) else file.fileno()
        note("written", inode=os.fstat(number).st_ino)
        return file

    return opened


def mode_writes(mode: str = "r", *_: Any, **__: Any) -> bool:
    return bool(set(mode) & set("wxa+"))


def flags_write(flags: int, *_: Any, **__: Any) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


def renaming(do: Callable[..., None]) -> Callable[..., None]:
    def renamed(source: Any, target: Any, **named: Any) -> None:
        do(source, target, **named)
        if is_ours(target):
            paths = [os.path.abspath(os.fsdecode(path)) for path in (source, target)]
            note("renamed", source=paths[0], target=paths[1])

    return renamed


def making(do: Callable[..., None]) -> Callable[..., None]:
    def made(path: Any, *rest: Any, **named: Any) -> None:
        do(path, *rest, **named)
        if is_ours(path):
            note("made", path=os.path.abspath(os.fsdecode(path)))

    return made


def flushing(do: Callable[[int], None]) -> Callable[[int], None]:
    def flushed(file: Any) -> None:
        do(file)
        number = file if isinstance(file, int) else file.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        if is_ours(os.path.join(path, "x")):
            note("fsync", path=path, inode=os.fstat(number).st_ino)

    return flushed


class Library(ctypes.CDLL):
    def __getattr__(self, name: str) -> Any:
        function = super().__getattr__(name)
        if name != "syncfs":
            return function

        def syncfs(file: int) -> Any:
            code = function(file)
            note("syncfs")
            return code

        # Or it would be found without this.
        self.__dict__[name] = syncfs
        return syncfs


builtins.open = io.open = opening(io.open, mode_writes)  # type: ignore[assignment]
os.open = opening(os.open, flags_write)
os.rename, os.replace = renaming(os.rename), renaming(os.replace)
os.mkdir = making(os.mkdir)
os.fsync = flushing(os.fsync)
ctypes.CDLL = Library  # type: ignore[misc]
