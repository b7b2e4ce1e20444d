# Generated from graftml/_async by clients/generate_sync.py: edit that, and `make generate`.
"""The client: a connection, and whether its server serves."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import grpc

from graftml import _channel
from graftml import _sync_io as io
from graftml._channel import NOT_SERVING, PROBE_TIMEOUT_S
from graftml._sync.backbones import Backbones
from graftml._sync.fine_tuning import FineTuning
from graftml._sync.prediction import Predictions
from graftml._sync.transport import Transport
from graftml.errors import DeadlineExceeded, GraftError, Unavailable
from graftml.retry import RetryPolicy


class Client(FineTuning, Backbones, Predictions):
    """A connection to a Graft server; ends with `close` or its `with`.

    `Client` blocks and may be shared by threads. `Client` has the same methods, to be
    awaited; it belongs to the event loop that it was made in, and reads disks and iterables
    on worker threads.

    `timeout_s` is the deadline of each call, its repeats included; uploads and
    exports have an hour instead. `token` travels as a bearer token;
    `credentials` switch TLS on. A `channel` of your own is used as it is and
    left open.
    """

    def __init__(
        self,
        target: str = _channel.DEFAULT_TARGET,
        *,
        timeout_s: float = _channel.DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        max_message_bytes: int = _channel.MAX_MESSAGE_BYTES,
        channel: io.Channel | None = None,
    ) -> None:
        settings = _channel.settings(target, credentials, token, metadata, max_message_bytes)
        self._transport = Transport(settings, retry or RetryPolicy(), timeout_s, channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and every call on it."""
        self._transport.close()

    def with_timeout(self, timeout_s: float) -> "Client":
        """Returns the same connection with another deadline for its calls."""
        other = object.__new__(type(self))
        other._transport = self._transport.with_timeout(timeout_s)
        return other

    def is_serving(self, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
        """Tells whether the server answers and says that it serves."""
        return self.why_not_serving(timeout_s) is None

    def why_not_serving(self, timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
        """Says why the server does not serve: what is wrong with the connection, or with it.

        Returns None where it answers and says that it serves.
        """
        try:
            is_serving = self._transport.probe(timeout_s, wait=False)
        except GraftError as error:
            found = self._transport.explained(error)
            return found.message
        return None if is_serving else f"{self._transport.target} {NOT_SERVING}"

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Returns when the server serves; raises DeadlineExceeded when it does not in time."""
        patience = _channel.Patience(self._transport.target, timeout_s)
        while True:
            try:
                if self._transport.probe(patience.probe_s, wait=True):
                    return
                patience.error = None
            except (Unavailable, DeadlineExceeded) as error:
                patience.error = error
            if patience.is_over:
                why = ""
                if patience.error is not None:
                    found = self._transport.explained(patience.error)
                    why = found.message
                raise patience.gave_up(why)
            io.sleep(_channel.PROBE_PAUSE_S)
