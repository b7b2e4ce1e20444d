"""One call from its arrival to its end: its caller, its id, its log line, metrics and error."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any, Self

import grpc
from grpc import aio

from service.auth import principal
from service.auth.audit import Audit
from service.auth.authenticator import Authenticator
from service.auth.principal import UNAUTHENTICATED, Principal
from service.errors import GraftError
from service.ops import logs
from service.ops.metrics import Metrics
from service.rpc import messages, reset, status

REQUEST_ID_KEY = "x-request-id"

_STATUS_TIMEOUT_S = 5.0
"""For the status of a call that was ended in the middle to be taken by its reader."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = logging.getLogger(__name__)

Context = aio.ServicerContext[Any, Any]


class Call:
    """A context: what it raises becomes the call's status."""

    def __init__(
        self, method: str, context: Context, metrics: Metrics, audit: Audit | None
    ) -> None:
        self.request: Any | None = None
        self.response: Any | None = None
        self._method = method
        self._context = context
        # Now, because a context that is collected at the end of the process may not be asked.
        self._peer = context.peer()
        self._metrics = metrics
        self._audit = audit
        self._who = UNAUTHENTICATED
        self._task = asyncio.current_task()
        self._ended_by: GraftError | None = None
        self._metadata = tuple(context.invocation_metadata() or ())
        given = dict(self._metadata).get(REQUEST_ID_KEY, "")
        fits = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
        self._id = str(given) if fits else secrets.token_hex(8)

    def enter(self, gate: Authenticator) -> Principal:
        """Lets it in and says who calls; raises what the gate raises."""
        try:
            self._who = gate.admit(self._method, self._metadata)
        except GraftError as error:
            self._refused(error)
            raise
        principal.enter(self._who)
        return self._who

    def stay(self, gate: Authenticator) -> None:
        """Lets it go on; raises what the gate raises when it may not any more."""
        if self._who is UNAUTHENTICATED:
            return
        try:
            gate.recheck(self._method, self._who)
        except GraftError as error:
            # Once, whoever finds it out first.
            if self._ended_by is None:
                self._ended_by = error
                self._refused(error)
            raise

    def pace(self, gate: Authenticator) -> Callable[[], float]:
        """How the further requests of a stream ask for their turn."""
        return lambda: gate.wait_s(self._who)

    def recheck(self, gate: Authenticator) -> None:
        """Ends it, from another task, if it may not go on."""
        if self._ended_by is not None or self._task is None:
            return
        try:
            self.stay(gate)
        except GraftError:
            self._task.cancel()

    async def __aenter__(self) -> Self:
        logs.request_id.set(self._id)
        self._started = time.monotonic()
        self._metrics.rpc_active.labels(self._method).inc()
        self._context.set_trailing_metadata(((REQUEST_ID_KEY, self._id),))
        return self

    async def __aexit__(self, _type: object, error: BaseException | None, _tb: object) -> None:
        # Its task may be about to be cancelled, or its caller may have been first.
        if self._ended_by is not None and isinstance(error, asyncio.CancelledError):
            error = self._ended_by
            if self._task is not None:
                self._task.uncancel()
        if error is None:
            code = self._context.code() or grpc.StatusCode.OK
            self._ended(code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.OK)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._ended(grpc.StatusCode.CANCELLED)
        elif isinstance(error, aio.AbortError):
            self._ended(self._context.code())
        elif isinstance(error, messages.NotTaken):
            self._ended(grpc.StatusCode.DEADLINE_EXCEEDED, error.message)
            reset.reset()
            raise asyncio.CancelledError from None
        else:
            answer = status.from_error(error)
            code = status.code_of(answer)
            self._ended(code, answer.message)
            try:
                # Behind an answer that nobody takes a status would wait for ever.
                async with asyncio.timeout(_STATUS_TIMEOUT_S if self._ended_by else None):
                    await self._context.abort(
                        code,
                        answer.message,
                        (
                            (REQUEST_ID_KEY, self._id),
                            (status.DETAILS_KEY, answer.SerializeToString()),
                        ),
                    )
            except TimeoutError:
                reset.reset()
                raise asyncio.CancelledError from None

    def _refused(self, error: GraftError) -> None:
        if self._audit is not None:
            self._audit.refused(
                self._method, error, self._metadata, request_id=self._id, peer=self._peer
            )

    def _ended(self, code: grpc.StatusCode, message: str = "") -> None:
        seconds = time.monotonic() - self._started
        self._metrics.rpc_active.labels(self._method).dec()
        self._metrics.rpc_calls.labels(self._method, code.name).inc()
        self._metrics.rpc_seconds.labels(self._method).observe(seconds)
        if self._audit is not None:
            self._audit.ended(
                self._method,
                self._who,
                code,
                self.request,
                self.response,
                request_id=self._id,
                peer=self._peer,
            )
        level = logging.DEBUG if code is grpc.StatusCode.OK else logging.INFO
        # Asked first: the peer's name and the rest cost more than most of a call.
        if not log.isEnabledFor(level):
            return
        log.log(
            level,
            "call ended",
            extra={
                "method": self._method,
                "code": code.name,
                "duration_ms": round(seconds * 1000, 1),
                "peer": self._peer,
                "error": message,
            },
        )
