"""What is printed: JSON lines for programs, or columns for people (with rich).

Results go to standard output, errors and warnings to standard error, both in one form.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from enum import IntEnum
from typing import Any, TextIO

from google.protobuf.message import Message

from graftml import types
from graftml._display import escaped
from graftml.errors import GraftError

_EVENT_NAMES: dict[type, str] = {
    types.StateChanged: "state_change",
    types.Progress: "progress",
    types.EpochMetrics: "epoch",
    types.DataSummary: "data",
    types.Note: "note",
    types.VersionPublished: "published",
    types.Unknown: "unknown",
}


class Code(IntEnum):
    """The exit codes; documented in the client's README and in `graft --help`."""

    OK = 0
    REFUSED = 1
    """The service refused, or could not be reached; or an image could not be read."""
    USAGE = 2
    """Wrong usage, or a local file that is not there."""
    JOB_FAILED = 3
    """A job failed or was cancelled."""
    GATE_REFUSED = 4
    """A job made a version that did not pass its gate: a candidate, and no alias moved."""
    NOT_SERVING = 5
    """`graft health`: the server does not serve, or cannot be reached."""
    INTERRUPTED = 130


class Usage(Exception):  # noqa: N818 - named for what happened
    """The command was used wrongly; the message says how to use it."""


class RichMissing(Exception):  # noqa: N818
    """Output for people needs rich."""

    def __init__(self) -> None:
        super().__init__(
            "output for people needs the package rich: pip install 'graftml[cli]', or use --json"
        )


class Output:
    """Standard output and standard error, in one of their two forms."""

    def __init__(self, *, is_json: bool, is_quiet: bool = False) -> None:
        self.is_json, self.is_quiet = is_json, is_quiet
        if not is_json:
            try:
                from rich.console import Console  # noqa: PLC0415 - only where people read
            except ImportError as error:
                raise RichMissing from error
            self.console = Console(markup=False, highlight=False, emoji=False)

    def emit(self, value: Any) -> None:
        """Prints one JSON line, in ASCII, which every pipe and every terminal takes."""
        print(json.dumps(plain(value)), flush=True)

    def line(self, text: str) -> None:
        """Prints one line for people."""
        self.console.print(escaped(text), soft_wrap=True)

    def document(self, text: str) -> None:
        """Writes a text of many lines: escaped on a terminal, as it is into a file or a pipe."""
        sys.stdout.write(escaped(text, keep="\n") if sys.stdout.isatty() else text)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        is_prose: bool = False,
        file: TextIO | None = None,
    ) -> int:
        """Prints rows for people as they come; returns how many. `is_prose`: the last column."""
        from graftml.cli import _layout  # noqa: PLC0415 - rich, only where people read

        count = 0

        def cells() -> Iterator[list[str]]:
            nonlocal count
            for count, row in enumerate(rows, 1):  # noqa: B007 - read when they have ended
                yield [escaped(shown(cell)) for cell in row]

        out = file or sys.stdout
        width = self.console.width if out.isatty() else None
        for line in _layout.table(columns, cells(), width, is_prose=is_prose):
            print(line, file=out)
        return count

    def items(
        self,
        values: Iterable[Any],
        columns: Sequence[str],
        row: Any,
        *,
        kinds: str,
        is_prose: bool = False,
    ) -> None:
        """Prints many things of a kind: JSON lines, or a row for each; says where there is none."""
        if self.is_json:
            for value in values:
                self.emit(value)
        elif not self.table(columns, (row(value) for value in values), is_prose=is_prose):
            self.note(f"no {kinds}")

    def thing(self, value: Any, *more: tuple[str, str], without: Sequence[str] = ()) -> None:
        """Prints one thing with its fields, and `more`; for people without some, and empty ones."""
        if self.is_json:
            self.emit(value)
            return
        from graftml.cli import _layout  # noqa: PLC0415 - rich, only where people read

        pairs = [
            pair
            for field in dataclasses.fields(value)
            if field.name not in without
            for pair in _flat(field.name, getattr(value, field.name))
        ]
        escapes = [(escaped(name), escaped(text)) for name, text in (*pairs, *more)]
        for line in _layout.fields(escapes, self.console.width if sys.stdout.isatty() else None):
            print(line)

    def deleted(self, name: str) -> int:
        """Says that something is gone; returns the exit code."""
        if self.is_json:
            self.emit({"deleted": name})
        else:
            self.line(f"deleted {name}")
        return Code.OK

    def complain(self, error: Exception | str, code: Code, what: str = "") -> int:
        """Prints one line on standard error, on `what` where it is not empty; returns the code."""
        return complain(error, code, what, is_json=self.is_json)

    def warn(self, text: str) -> None:
        """Prints one line on standard error, of what does not keep the command from running."""
        self.note(text, "warning")

    def note(self, text: str, kind: str = "note") -> None:
        """Prints one line on standard error, beside the results."""
        if self.is_json:
            print(json.dumps({kind: text.strip()}), file=sys.stderr)
        else:
            head = f"graft: {kind}: " if kind == "warning" else "graft: "
            print(head + escaped(text), file=sys.stderr)


def complain(error: Exception | str, code: Code, what: str = "", *, is_json: bool) -> int:
    """Prints one line on standard error, on `what` where it is not empty; returns the code."""
    text, reason = _message(error), ""
    if isinstance(error, GraftError):
        reason = str(error.reason or "")
    if is_json:
        told = {
            "message": text,
            "reason": reason,
            "code": error.code.name if isinstance(error, GraftError) else "",
            "exit_code": int(code),
        }
        print(json.dumps({"error": {"image": what, **told} if what else told}), file=sys.stderr)
    else:
        line = " ".join(f"{what}: {text}".split() if what else text.split())
        print("graft: " + escaped(line) + (f" [{reason}]" if reason else ""), file=sys.stderr)
    return code


def _message(error: Exception | str) -> str:
    if isinstance(error, GraftError):
        return error.message
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def shown(value: object) -> str:  # noqa: PLR0911 - one for each kind
    """Returns a value in one cell, for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, GraftError):
        return value.message
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if dataclasses.is_dataclass(value) and type(value).__str__ is object.__str__:
        pairs = (f"{name} {shown(part)}" for name, part in vars(value).items() if _is_told(part))
        return " ".join(pairs)
    return str(value)


def _is_told(value: object) -> bool:
    return value not in (None, "", (), {}, [])


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yields the lines of a field: one for each thing in it, none for an empty one."""
    if isinstance(value, Message):
        value = _of_message(value)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    elif isinstance(value, tuple | list) and value and dataclasses.is_dataclass(value[0]):
        for item in value:
            yield name, shown(item)
    elif _is_told(value):
        yield name, shown(value)


def _of_message(message: Message) -> Any:
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - for jobs alone

    return MessageToDict(message, preserving_proto_field_name=True)


def plain(value: Any) -> Any:  # noqa: PLR0911 - one for each kind
    """Returns a value as JSON holds it."""
    if isinstance(value, types.JobEvent):
        head = {"sequence": value.sequence, "time": value.time}
        return plain({**head, "type": _EVENT_NAMES[type(value.payload)], **vars(value.payload)})
    if isinstance(value, GraftError):
        return {"reason": value.reason, "code": value.code.name, "message": value.message}
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Message):
        return _of_message(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value


def percent(fraction: float) -> str:
    """Returns a fraction as percent, rounded down: never 100 % before the end."""
    return f"{int(fraction * 100)}%"


def times(elapsed_s: float, remaining_s: float | None) -> str:
    """Returns how long a stage has taken, and how long it may still take where that is known."""
    text = clock(elapsed_s)
    if remaining_s is not None and remaining_s >= 1:
        text += f", about {clock(remaining_s)} left"
    return text


def clock(seconds: float) -> str:
    """Returns seconds as M:SS, or as H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
