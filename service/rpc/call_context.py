"""The context of one call: its id, its principal, and the account that is kept of it."""

import asyncio
import logging
import re
import secrets
import time
from typing import Any

import grpc

from service.auth.audit import Audit
from service.auth.principal import UNAUTHENTICATED
from service.errors import GraftError
from service.ops import logs
from service.ops.metrics import Metrics
from service.rpc.message_io import Context

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = logging.getLogger(__name__)


class CallContext:
    """One call, from its arrival in the task that serves it."""

    def __init__(self, method: str, context: Context, metrics: Metrics) -> None:
        """Begins the account: counts the call as active and sets its id for log lines."""
        self.method = method
        self.context = context
        self.principal = UNAUTHENTICATED
        self.request: Any | None = None
        """The request, of a call that brings one."""
        self.response: Any | None = None
        """The answer, of a call that gives one."""
        self.revoked: GraftError | None = None
        """The error with which a call ends whose permission was taken back."""
        self.task = asyncio.current_task()
        self.metadata = tuple(context.invocation_metadata() or ())
        # Read now: a context that is collected while the process ends may not be asked.
        self._peer = context.peer()
        self._metrics = metrics
        self._started = time.monotonic()
        given = dict(self.metadata).get(REQUEST_ID_KEY, "")
        fits = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
        self.request_id = str(given) if fits else secrets.token_hex(8)
        logs.request_id.set(self.request_id)
        metrics.rpc_active.labels(method).inc()
        context.set_trailing_metadata(((REQUEST_ID_KEY, self.request_id),))

    def refused(self, error: GraftError, audit: Audit | None) -> None:
        """Writes into the audit log that the call was refused."""
        if audit is not None:
            audit.refused(
                self.method, error, self.metadata, request_id=self.request_id, peer=self._peer
            )

    def ended(self, code: grpc.StatusCode, audit: Audit | None, message: str = "") -> None:
        """Closes the account: metrics, the audit log and the log."""
        seconds = time.monotonic() - self._started
        self._metrics.rpc_active.labels(self.method).dec()
        self._metrics.rpc_calls.labels(self.method, code.name).inc()
        self._metrics.rpc_seconds.labels(self.method).observe(seconds)
        if audit is not None:
            audit.ended(
                self.method,
                self.principal,
                code,
                self.request,
                self.response,
                request_id=self.request_id,
                peer=self._peer,
            )
        level = logging.DEBUG if code is grpc.StatusCode.OK else logging.INFO
        # Checked first: making the line costs more than most of a call.
        if log.isEnabledFor(level):
            log.log(
                level,
                "call ended",
                extra={
                    "method": self.method,
                    "code": code.name,
                    "duration_ms": round(seconds * 1000, 1),
                    "peer": self._peer,
                    "error": message,
                },
            )
