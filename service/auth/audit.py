"""The audit log: who changed what, and which calls were refused, on the logger "audit".

One line "change" for each admitted call that changes something, however it ended. One
line "refused" for each call that was not admitted or may not go on: so many a second for
each reason, the rest counted. Ids that tokens have are counted apart, so that a flood of
made-up ones does not hide them. Secrets are never written.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import grpc

from service.auth import authenticator
from service.auth.authenticator import Metadata
from service.auth.principal import UNAUTHENTICATED, Principal, is_change
from service.domain import LATEST
from service.errors import GraftError
from service.ops.logs import LineBudget
from service.ops.metrics import Metrics

REFUSALS_PER_SECOND: Final = 10
"""Lines for each reason, and as many again for ids that tokens have."""
_MAX_SHOWN: Final = 100

log = logging.getLogger("audit")


class Audit:
    """Writes the audit log; belongs to the event loop."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        has_token: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`has_token` tells whether a token has an id."""
        self._metrics = metrics
        self._clock = clock
        self._has_token = has_token
        self._budgets: dict[tuple[str, bool], LineBudget] = {}

    def ended(
        self,
        method: str,
        principal: Principal,
        code: grpc.StatusCode,
        request: Any | None,
        response: Any | None,
        *,
        request_id: str,
        peer: str,
    ) -> None:
        """Logs an admitted call that changes something, with the status that it ended with.

        Logs nothing for UNAUTHENTICATED, for methods that only read, and for requests that are
        only checked (`validate_only`). Streams have no `request` and no `response`.
        """
        if (
            principal is UNAUTHENTICATED
            or not is_change(method)
            or getattr(request, "validate_only", False)
        ):
            return
        log.info(
            "change",
            extra={
                "method": method,
                "tenant": principal.tenant,
                "principal": principal.name,
                "code": code.name,
                **about(request, response),
                "request_id": request_id,
                "peer": peer,
            },
        )

    def refused(
        self, method: str, error: GraftError, metadata: Metadata, *, request_id: str, peer: str
    ) -> None:
        """Counts a call that was not admitted or may not go on, and logs it within the budget."""
        reason = error.reason.value
        self._metrics.refused_calls.labels(reason).inc()
        token_id = authenticator.claimed_id(metadata)
        budget = self._budgets.setdefault(
            (reason, self._has_token(token_id)), LineBudget(REFUSALS_PER_SECOND)
        )
        suppressed = budget.take(self._clock())
        if suppressed is None:
            return
        log.info(
            "refused",
            extra={
                "method": method,
                "reason": reason,
                "token_id": token_id,
                "suppressed_before": suppressed,
                "request_id": request_id,
                "peer": peer,
            },
        )


def about(request: Any | None, response: Any | None) -> dict[str, str | int]:
    """Returns the fields that name what a call acted on, by their names in the log."""
    found: dict[str, str | int] = {}
    if type(request).__name__ == "RollbackAliasRequest":
        # The alias that an empty field stands for.
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
            # A flag that is False may have been set to it.
            if (value or value is False) and isinstance(value, str | int):
                found[key] = value if isinstance(value, int) else _shown(value)
    return found


_NAMES: Final = {
    "model": "model",
    "model_name": "model",
    "version": "version",
    "alias": "alias",
    "force": "force",
    "job_id": "job_id",
    "dataset_id": "dataset_id",
    "image_digest": "image_digest",
    "name": "backbone",
    "from_version": "from_version",
    "to_version": "to_version",
}


def _shown(value: str) -> str:
    # Callers choose the value: it must not look like another line or field of the log.
    plain = value if value.isprintable() and " " not in value else repr(value)
    return plain if len(plain) <= _MAX_SHOWN else plain[: _MAX_SHOWN - 3] + "..."
