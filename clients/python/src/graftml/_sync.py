"""Carries calls out over a blocking channel: deadlines, retries, streams, errors.

Knows no service. Stops with `close`; a channel that the caller brought is the
caller's to close.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, Generic, TypeVar

import grpc

from graftml import _calls, _diagnosis, _rpcs
from graftml._channel import Settings
from graftml._rpcs import Rpc
from graftml._watch import Watch
from graftml.errors import GraftError, from_rpc
from graftml.retry import Attempts, RetryPolicy
from graftml.types import JobEvent

T = TypeVar("T")
Req = TypeVar("Req")
Res = TypeVar("Res")

_BIND_TIMEOUT_S = 5.0


class Transport:
    """One connection; may be used from many threads at once."""

    def __init__(
        self,
        settings: Settings,
        policy: RetryPolicy,
        timeout_s: float,
        channel: grpc.Channel | None,
    ) -> None:
        self.target = settings.target
        self._is_tls = settings.credentials is not None
        self.policy = policy
        self.timeout_s = timeout_s
        self._metadata = settings.metadata
        self._is_own = channel is None
        self._closes = channel is None
        self._channel = channel or _open(settings)

    def with_timeout(self, timeout_s: float) -> "Transport":
        """The same connection with another deadline."""
        other = object.__new__(Transport)
        vars(other).update(vars(self), timeout_s=timeout_s, _closes=False)
        return other

    def close(self) -> None:
        """Ends the connection, and every call on it."""
        if self._closes:
            self._channel.close()

    def unary(self, call: _calls.Call[T], timeout_s: float | None = None) -> T:
        """One question, one answer; asked again where that is safe."""
        invoke = self._channel.unary_unary(
            call.rpc.path,
            request_serializer=call.rpc.serialize,
            response_deserializer=call.rpc.parse,
        )

        def attempt(left_s: float) -> T:
            return call.read(invoke(call.request, timeout=left_s, metadata=self._metadata))

        return self.attempts(attempt, timeout_s or self.timeout_s, is_safe=call.rpc.is_safe)

    def attempts(self, run: Callable[[float], T], timeout_s: float, *, is_safe: bool) -> T:
        """Runs until it succeeds or should not be tried again; `run` is told the seconds left."""
        attempts = Attempts(self.policy, is_safe=is_safe, timeout_s=timeout_s)
        while True:
            try:
                return run(attempts.remaining_s)
            except grpc.RpcError as error:
                known = from_rpc(error, self.target, timeout_s)
                try:
                    pause_s = attempts.pause_s(known)
                except GraftError:
                    raise self.explained(known) from error
            time.sleep(pause_s)

    def explained(self, error: GraftError) -> GraftError:
        """Returns the error with what is wrong with the connection, where that can be found out.

        Returns it unchanged for a channel that the caller brought, of which nothing is known.
        """
        if not self._is_own:
            return error
        return _diagnosis.explained(error, self.target, is_tls=self._is_tls)

    def pages(self, page: Callable[[str], _calls.Call[_calls.Page[T]]]) -> Iterator[T]:
        """All items of a list, asked for page by page as they are needed."""
        token = ""  # nosec B105 # no password
        while True:
            answer = self.unary(page(token))
            yield from answer.items
            token = answer.next_token
            if not token:
                return

    def answers(
        self, rpc: Rpc[Req, Res], request: Req, timeout_s: float
    ) -> Generator[Res, None, None]:
        """The answers of one stream; raises gRPC's own errors. Closing it ends the call."""
        invoke = self._channel.unary_stream(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.parse
        )
        call = invoke(request, timeout=timeout_s, metadata=self._metadata)
        try:
            yield from call
        finally:
            call.cancel()

    def collect(self, rpc: Rpc[Req, Res], messages: Iterator[Req], timeout_s: float) -> Res:
        """Sends a stream, returns its one answer; raises gRPC's own errors."""
        invoke = self._channel.stream_unary(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.parse
        )
        feed = Feed(messages)
        call = invoke.future(feed, timeout=timeout_s, metadata=self._metadata)
        feed.bind(call.cancel)
        try:
            answer: Res = call.result()
        except BaseException:
            call.cancel()
            if feed.error is not None:
                raise feed.error from None
            raise
        if feed.error is not None:
            raise feed.error
        return answer

    def exchange(
        self, rpc: Rpc[Req, Res], messages: Iterator[Req], timeout_s: float
    ) -> Generator[Res, None, None]:
        """Sends and receives at once. Closing it ends the call."""
        invoke = self._channel.stream_stream(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.parse
        )
        feed = Feed(messages)
        call = invoke(feed, timeout=timeout_s, metadata=self._metadata)
        feed.bind(call.cancel)
        try:
            yield from call
        except grpc.RpcError as error:
            if feed.error is not None:
                raise feed.error from None
            raise self.explained(from_rpc(error, self.target, timeout_s)) from error
        finally:
            call.cancel()

    def watch(self, watch: Watch) -> Iterator[JobEvent]:
        """A job's events to its end, across lost connections."""
        while True:
            timeout_s = watch.remaining_s
            try:
                with closing(self.answers(_rpcs.WATCH_JOB, watch.request(), timeout_s)) as answers:
                    for answer in answers:
                        event = watch.take(answer)
                        if event is not None:
                            yield event
            except grpc.RpcError as error:
                known = from_rpc(error, self.target, timeout_s)
                try:
                    pause_s = watch.pause_s(known)
                except GraftError as last:
                    # An error that the watch itself raises needs no explanation.
                    raise (self.explained(last) if last is known else last) from error
            else:
                if watch.is_over(self.unary(_calls.get_job(watch.job_id))):
                    return
                pause_s = watch.idle_pause_s()
            time.sleep(pause_s)

    def probe(self, timeout_s: float, *, wait: bool) -> bool:
        """Whether the server says SERVING; with `wait`, waits for a connection."""
        invoke = self._channel.unary_unary(
            _rpcs.HEALTH.path,
            request_serializer=_rpcs.HEALTH.serialize,
            response_deserializer=_rpcs.HEALTH.parse,
        )
        try:
            answer: bytes = invoke(
                _rpcs.WHOLE_SERVER, timeout=timeout_s, metadata=self._metadata, wait_for_ready=wait
            )
        except grpc.RpcError as error:
            raise from_rpc(error, self.target, timeout_s) from error
        return answer == _rpcs.SERVING


class Feed(Generic[T]):
    """Hands messages to gRPC's sending thread, and keeps the error that they raise.

    gRPC would log such an error and lose it. The call must not end as if all
    had been sent, so it is cancelled.
    """

    def __init__(self, messages: Iterator[T]) -> None:
        self._messages = messages
        self._bound = threading.Event()
        self._cancel: Callable[[], Any] = lambda: None
        self.error: Exception | None = None

    def bind(self, cancel: Callable[[], Any]) -> None:
        """Says how to end the call; known only once the call has begun."""
        self._cancel = cancel
        self._bound.set()

    def __iter__(self) -> "Feed[T]":
        return self

    def __next__(self) -> T:
        if self.error is not None:
            raise StopIteration
        try:
            return next(self._messages)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            self._bound.wait(_BIND_TIMEOUT_S)
            self._cancel()
            raise StopIteration from error


def _open(settings: Settings) -> grpc.Channel:
    if settings.credentials is None:
        return grpc.insecure_channel(settings.target, options=settings.options)
    return grpc.secure_channel(settings.target, settings.credentials, options=settings.options)
