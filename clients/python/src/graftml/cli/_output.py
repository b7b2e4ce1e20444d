"""What goes to standard output: JSON lines for programs, or tables for people (with rich)."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from google.protobuf.message import Message

from graftml import types
from graftml._escaping import escaped
from graftml.errors import GraftError

_PIPE_WIDTH = 200
"""Characters; what goes into a pipe is not cut to a terminal's width."""

_EVENT_NAMES: dict[type, str] = {
    types.StateChanged: "state_change",
    types.Progress: "progress",
    types.EpochMetrics: "epoch",
    types.DataSummary: "data",
    types.Note: "note",
    types.VersionPublished: "published",
    types.Unknown: "unknown",
}


class Usage(Exception):  # noqa: N818 - named for what happened
    """The command was used wrongly; the message says how to use it."""


class RichMissing(Exception):  # noqa: N818
    """Output for people needs rich."""

    def __init__(self) -> None:
        super().__init__(
            "output for people needs the package rich: pip install 'graftml[cli]', or use --json"
        )


class Output:
    """Standard output, in one of its two forms."""

    def __init__(self, *, is_json: bool, is_quiet: bool = False) -> None:
        self.is_json, self.is_quiet = is_json, is_quiet
        if not is_json:
            try:
                from rich.console import Console  # noqa: PLC0415 - only where people read
            except ImportError as error:
                raise RichMissing from error
            width = None if sys.stdout.isatty() else _PIPE_WIDTH
            self.console = Console(width=width, markup=False, highlight=False, emoji=False)

    def emit(self, value: Any) -> None:
        """Prints one JSON line, in ASCII, which every pipe and every terminal takes."""
        print(json.dumps(plain(value)), flush=True)

    def line(self, text: str) -> None:
        """Prints one line for people."""
        self.console.print(escaped(text), soft_wrap=True)

    def document(self, text: str) -> None:
        """Writes a text of many lines: escaped on a terminal, as it is into a file or a pipe."""
        sys.stdout.write(escaped(text, keep="\n") if sys.stdout.isatty() else text)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table for people."""
        from rich.box import SIMPLE_HEAD  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(escaped(shown(cell))) for cell in row))
        self.console.print(table)

    def items(self, values: Iterable[Any], columns: Sequence[str], row: Any) -> None:
        """Many things of a kind: JSON lines, or a table with a row for each."""
        if self.is_json:
            for value in values:
                self.emit(value)
        else:
            self.table(columns, [row(value) for value in values])

    def thing(self, value: Any) -> None:
        """One thing with its fields."""
        if self.is_json:
            self.emit(value)
        else:
            names = [field.name for field in dataclasses.fields(value)]
            self.table(["field", "value"], [(n, getattr(value, n)) for n in names])


def complain(text: str, code: int) -> int:
    """One line on standard error; returns the exit code."""
    print("graft: " + escaped(" ".join(text.split())), file=sys.stderr)
    return code


def warn(text: str) -> None:
    """One line on standard error, of what does not keep the command from running."""
    print(f"graft: warning: {escaped(text)}", file=sys.stderr)


def shown(value: object) -> str:
    """A value for people."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, GraftError):
        return value.message
    if isinstance(value, dict | list | tuple | Message) or dataclasses.is_dataclass(value):
        return json.dumps(plain(value), ensure_ascii=False) if value else "-"
    return str(value)


def _message(message: Message) -> Any:
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - for jobs alone

    return MessageToDict(message, preserving_proto_field_name=True)


def plain(value: Any) -> Any:  # noqa: PLR0911 - one for each kind
    """A value as JSON holds it."""
    if isinstance(value, types.JobEvent):
        head = {"sequence": value.sequence, "time": value.time}
        return plain({**head, "type": _EVENT_NAMES[type(value.payload)], **vars(value.payload)})
    if isinstance(value, GraftError):
        return {"reason": value.reason, "code": value.code.name, "message": value.message}
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Message):
        return _message(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value
