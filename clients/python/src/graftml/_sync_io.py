"""What the blocking client does with the network and the disk; `_async_io` has the same names."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

import grpc

from graftml._channel import Settings

P = ParamSpec("P")
T = TypeVar("T")
Req = TypeVar("Req")
Res = TypeVar("Res")

Channel: TypeAlias = grpc.Channel
UnaryUnary = grpc.UnaryUnaryMultiCallable
UnaryStream = grpc.UnaryStreamMultiCallable
StreamUnary = grpc.StreamUnaryMultiCallable
StreamStream = grpc.StreamStreamMultiCallable
Stream: TypeAlias = Generator[T, None, None]
Semaphore: TypeAlias = threading.Semaphore
Event: TypeAlias = threading.Event

_BIND_TIMEOUT_S = 5.0

sleep = time.sleep


def open_channel(settings: Settings) -> Channel:
    """Opens a channel, which connects when it is first used."""
    if settings.credentials is None:
        return grpc.insecure_channel(settings.target, options=settings.options)
    return grpc.secure_channel(settings.target, settings.credentials, options=settings.options)


def blocking(run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs what may read disks or a caller's iterable."""
    return run(*args, **kwargs)


def stepwise(items: Iterator[T]) -> Iterator[T]:
    """Returns the items."""
    return items


def collect(
    invoke: "StreamUnary[Req, Res]", messages: Iterator[Req], timeout_s: float, metadata: Any
) -> Res:
    """Sends a stream, returns its one answer; raises gRPC's own errors."""
    feed = Feed(messages)
    call = invoke.future(feed, timeout=timeout_s, metadata=metadata)
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
    invoke: "StreamStream[Req, Res]", messages: Iterator[Req], timeout_s: float, metadata: Any
) -> Stream[Res]:
    """Sends and receives at once; raises gRPC's own errors. Closing it ends the call."""
    feed = Feed(messages)
    call = invoke(feed, timeout=timeout_s, metadata=metadata)
    feed.bind(call.cancel)
    try:
        yield from call
    except grpc.RpcError:
        if feed.error is not None:
            raise feed.error from None
        raise
    finally:
        call.cancel()


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
