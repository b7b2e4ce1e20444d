"""Who changed what, and who was not let in: the lines of the logger "audit".

One line, "change", for each call that changes something and was let in, however it
ended; one, "refused", for a call that was not let in, of which so many a second are
told and the rest counted. Knows tokens' ids; never writes a secret.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import grpc

from service.errors import GraftError
from service.rpc import access, roles
from service.rpc.caller import NOBODY, Caller
from service.telemetry import Telemetry

REFUSALS_PER_SECOND: Final = 10
_MAX_SHOWN: Final = 100

log = logging.getLogger("audit")


class AuditLog:
    """Hears of every call; belongs to the event loop."""

    def __init__(self, metrics: Telemetry, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._second = -1
        self._told = 0
        self._untold = 0

    def ended(
        self,
        method: str,
        who: Caller,
        code: grpc.StatusCode,
        request: Any | None,
        response: Any | None,
        *,
        request_id: str,
        peer: str,
    ) -> None:
        """Tells of a change that was done or refused; says nothing of calls that only read."""
        if who is NOBODY or not roles.is_change(method):
            return
        log.info(
            "change",
            extra={
                "method": method,
                "tenant": who.tenant,
                "caller": who.name,
                "code": code.name,
                **about(request, response),
                "request_id": request_id,
                "peer": peer,
            },
        )

    def refused(
        self,
        method: str,
        error: GraftError,
        metadata: Mapping[str, str | bytes],
        *,
        request_id: str,
        peer: str,
    ) -> None:
        """Counts a call that the gate did not let in, and tells of it unless there are many."""
        self._metrics.refused_calls.labels(error.reason.value).inc()
        second = int(self._clock())
        if second != self._second:
            self._second, self._told = second, 0
        if self._told >= REFUSALS_PER_SECOND:
            self._untold += 1
            return
        self._told += 1
        untold, self._untold = self._untold, 0
        parts = access.split_header(metadata.get(access.METADATA_KEY, ""))
        log.info(
            "refused",
            extra={
                "method": method,
                "reason": error.reason.value,
                "token_id": parts[0] if parts else "",
                "untold_before": untold,
                "request_id": request_id,
                "peer": peer,
            },
        )


def about(request: Any | None, response: Any | None) -> dict[str, str | int]:
    """What a call was about: what its messages name, without the pictures."""
    found: dict[str, str | int] = {}
    for message in (
        request,
        getattr(response, "job", None),
        getattr(response, "dataset", None),
        response,
    ):
        for name, key in _NAMES.items():
            value = getattr(message, name, None)
            if value and isinstance(value, str | int):
                found[key] = value if isinstance(value, int) else _shown(value)
    return found


_NAMES: Final = {
    "model": "model",
    "model_name": "model",
    "version": "version",
    "alias": "alias",
    "job_id": "job_id",
    "dataset_id": "dataset_id",
    "from_version": "from_version",
    "to_version": "to_version",
}


def _shown(value: str) -> str:
    # Callers choose it, and it must not look like another line or field of the log.
    plain = value if value.isprintable() and " " not in value else repr(value)
    return plain if len(plain) <= _MAX_SHOWN else plain[: _MAX_SHOWN - 3] + "..."
