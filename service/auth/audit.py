"""Who changed what, and who was not let in: the lines of the logger "audit".

One line, "change", for each call that changes something and was let in, however it
ended; one, "refused", for a call that was not let in or not let go on, of which so many
a second are told for each reason and the rest counted; those of ids that tokens have are
told apart, so that no flood of others hides them. Knows tokens' ids; never writes a secret.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
from graft.v1 import model_pb2

from service.auth import authenticator, roles
from service.auth.principal import NOBODY, Caller
from service.domain import LATEST
from service.errors import GraftError
from service.ops.metrics import Metrics

REFUSALS_PER_SECOND: Final = 10
"""Of each reason, and as many again of ids that tokens have."""
_MAX_SHOWN: Final = 100

log = logging.getLogger("audit")


class AuditLog:
    """Hears of every call; belongs to the event loop."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        knows: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`knows` says whether a token has an id."""
        self._metrics = metrics
        self._clock = clock
        self._knows = knows
        self._budgets: dict[tuple[str, bool], _Budget] = {}

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
        """Logs a change that was done or refused.

        Logs nothing for calls that only read, and for requests that are only checked
        (`validate_only`).
        """
        if who is NOBODY or not roles.is_change(method) or getattr(request, "validate_only", False):
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
        """Counts a call that was not let in or not let go on; tells of it unless there are many."""
        self._metrics.refused_calls.labels(error.reason.value).inc()
        parts = authenticator.split_header(metadata.get(authenticator.METADATA_KEY, ""))
        token_id = parts[0] if parts else ""
        budget = self._budgets.setdefault((error.reason.value, self._knows(token_id)), _Budget())
        untold = budget.take(int(self._clock()))
        if untold is None:
            return
        log.info(
            "refused",
            extra={
                "method": method,
                "reason": error.reason.value,
                "token_id": token_id,
                "untold_before": untold,
                "request_id": request_id,
                "peer": peer,
            },
        )


@dataclass
class _Budget:
    """What may still be told within a second, and what was not."""

    second: int = -1
    told: int = 0
    untold: int = 0

    def take(self, second: int) -> int | None:
        """Takes a line, and says how many were not told before it; None where none is left."""
        if second != self.second:
            self.second, self.told = second, 0
        if self.told >= REFUSALS_PER_SECOND:
            self.untold += 1
            return None
        self.told += 1
        untold, self.untold = self.untold, 0
        return untold


def about(request: Any | None, response: Any | None) -> dict[str, str | int]:
    """What a call was about: what its messages name, without the images."""
    found: dict[str, str | int] = {}
    if isinstance(request, model_pb2.RollbackAliasRequest):
        # What an empty one means.
        found["alias"] = LATEST
    for message in (
        request,
        getattr(response, "job", None),
        getattr(response, "dataset", None),
        getattr(response, "backbone", None),
        response,
    ):
        for name, key in _NAMES.items():
            value = getattr(message, name, None)
            # A flag that is not set was perhaps taken away.
            if (value or value is False) and isinstance(value, str | int):
                found[key] = value if isinstance(value, int) else _shown(value)
    return found


_NAMES: Final = {
    "model": "model",
    "model_name": "model",
    "version": "version",
    "alias": "alias",
    "falls_back": "falls_back",
    "force": "force",
    "job_id": "job_id",
    "dataset_id": "dataset_id",
    "name": "backbone",
    "from_version": "from_version",
    "to_version": "to_version",
}


def _shown(value: str) -> str:
    # Callers choose it, and it must not look like another line or field of the log.
    plain = value if value.isprintable() and " " not in value else repr(value)
    return plain if len(plain) <= _MAX_SHOWN else plain[: _MAX_SHOWN - 3] + "..."
