"""Logs: the shape of their lines, the id of the call that each belongs to, and limits on floods."""

import contextvars
import datetime
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from pythonjsonlogger.json import JsonFormatter

from service.ops.escaping import escaped

GRPC_LINES_PER_SECOND: Final = 5

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The id of the call being served; the log lines that it causes carry it."""

_CALLER_LEFT: Final = 'Failed "execute_batch"'
"""How gRPC's error begins when something could not be sent any more."""
_PLACEHOLDER: Final = re.compile(r"%[-#0 +]*[0-9*]*(?:\.[0-9*]+)?[a-zA-Z]")


@dataclass
class LineBudget:
    """Lets through so many lines a second, and counts the others."""

    per_second: int
    _second: int = -1
    _taken: int = 0
    _suppressed: int = 0

    def take(self, now: float) -> int | None:
        """Takes a line at `now`, in seconds of a clock.

        Returns how many were suppressed since the line before, or None to suppress this one.
        """
        if int(now) != self._second:
            self._second, self._taken = int(now), 0
        if self._taken >= self.per_second:
            self._suppressed += 1
            return None
        self._taken += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


def set_up_logging(
    style: Literal["json", "console"], level: str, clock: Callable[[], float] = time.monotonic
) -> None:
    """Sends all log lines to standard error, as JSON objects or for people to read."""
    handler = logging.StreamHandler()
    handler.addFilter(_StrangersFilter(clock))
    handler.addFilter(_RequestId())
    if style == "json":
        renames: dict[str, Any] = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(
            _JsonFormatter("{asctime}{levelname}{name}{message}", style="{", rename_fields=renames)
        )
    else:
        handler.setFormatter(_ConsoleFormatter("{asctime} {levelname:7} {message}", style="{"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Changes are audited however quiet the rest is to be.
    logging.getLogger("audit").setLevel(logging.INFO)


class _StrangersFilter(logging.Filter):
    """Removes what callers sent from the lines that gRPC writes about it, and limits these lines.

    gRPC's Python package logs headers that it cannot decode, tokens among them; a path that it
    cannot decode ends a task of its own, which asyncio logs. Anybody who connects causes both.
    It also logs an error, with a traceback, for a caller who left while an answer was on its way
    to it, unless it heard of that before.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__("grpc")
        self._clock = clock
        self._budget = LineBudget(GRPC_LINES_PER_SECOND)
        # gRPC logs on threads of its own, too.
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        is_undecodable = isinstance(error, UnicodeError)
        if not super().filter(record) and not (record.name == "asyncio" and is_undecodable):
            return True
        if str(error).startswith(_CALLER_LEFT):
            return False
        with self._lock:
            suppressed = self._budget.take(self._clock())
        if suppressed is None:
            return False
        # asyncio has formatted the exception into its message already, from the second line on.
        text, *_ = str(record.msg).splitlines() or [""]
        record.msg, record.args = _PLACEHOLDER.sub("(left out)", text), ()
        if is_undecodable:
            # A traceback for each of them says nothing.
            record.exc_info = record.exc_text = None
        record.suppressed_before = suppressed
        return True


class _RequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if given := request_id.get():
            record.request_id = given
        return True


class _Rfc3339(logging.Formatter):
    """Writes times as RFC 3339 has them, in UTC: 2026-11-28T23:28:22.774Z."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802, ARG002
        """Returns when a line was written."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _JsonFormatter(_Rfc3339, JsonFormatter):
    """Writes a line as a JSON object."""


class _ConsoleFormatter(_Rfc3339):
    """Writes a line for people: the message, then what was given in `extra`, as key=value.

    Names of strangers forge no line and reach no terminal's controls.
    """

    _known = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Returns the line without the traceback that may follow it."""
        extra = {k: v for k, v in vars(record).items() if k not in self._known and v != ""}
        values = "".join(f" {key}={value}" for key, value in extra.items())
        return escaped(super().formatMessage(record) + values)

    def formatException(self, *given: Any) -> str:  # noqa: N802
        """Returns the traceback, indented: none of its lines begins as one of the log's does."""
        return "  " + escaped(super().formatException(*given), "\n").replace("\n", "\n  ")
