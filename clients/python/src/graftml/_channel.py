"""How a connection is made: address, credentials, limits, keepalive. Of both clients."""

import ipaddress
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, Final

import grpc

from graftml.errors import DeadlineExceeded, GraftError, invalid

DEFAULT_TARGET: Final = "localhost:50051"
DEFAULT_TIMEOUT_S: Final = 60.0
TRANSFER_TIMEOUT_S: Final = 3600.0
"""For uploads and exports, whose length is the data's."""
_RANKING_BUDGET_S: Final = 60.0
"""What the service takes where no time budget is given."""
_RANKING_SLACK_S: Final = 120.0
"""Beyond the time budget: others may be before it, and a trainer must start."""
MAX_MESSAGE_BYTES: Final = 64 * 2**20
PROBE_TIMEOUT_S: Final = 5.0
"""For one question after the server's health."""
PROBE_PAUSE_S: Final = 0.1
"""Between two of them."""
NOT_SERVING: Final = "answers, but does not serve: it starts, or stops"
_SCHEMES: Final = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "vsock:", "xds:")
# What gRPC takes as a value of metadata.
_PRINTABLE: Final = re.compile(r"[\x20-\x7e]*")


def ranking_timeout_s(time_budget_s: float | None) -> float:
    """The deadline of a ranking of backbones that was given none."""
    return (time_budget_s or _RANKING_BUDGET_S) + _RANKING_SLACK_S


@dataclass(frozen=True)
class Settings:
    """Where to connect to and how."""

    target: str
    credentials: grpc.ChannelCredentials | None
    metadata: tuple[tuple[str, str], ...] = field(repr=False)
    """Holds the token, which belongs into no log."""
    options: tuple[tuple[str, Any], ...]


def settings(
    target: str,
    credentials: grpc.ChannelCredentials | None,
    token: str | None,
    metadata: Sequence[tuple[str, str]],
    max_message_bytes: int,
) -> Settings:
    """Checks the address and the token, and puts together what a channel takes."""
    scheme = target.partition("://")[0] if "://" in target else ""
    if scheme in ("http", "https", "grpc", "grpcs"):
        bare = target.partition("://")[2].rstrip("/")
        raise invalid(f"{target!r} is not a gRPC address: leave out the scheme, {bare!r}", "target")
    _check_address(target)
    # Read from a file or a variable, it may end in a new line.
    token = (token or "").strip()
    if not _PRINTABLE.fullmatch(token):
        raise invalid(
            "the token holds characters that cannot be sent, such as line breaks or letters "
            "beyond ASCII: give it as it was printed when it was made",
            "token",
        )
    if token.lower().startswith("bearer "):
        raise invalid("the token begins with 'Bearer': leave that out, it is added", "token")
    bearer = (("authorization", f"Bearer {token}"),) if token else ()
    return Settings(
        target,
        credentials,
        (*metadata, *bearer),
        (
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.primary_user_agent", f"graftml/{version()}"),
            # A connection whose other end is gone is found out while a call waits on it.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.http2.max_pings_without_data", 0),
            # gRPC's own waiting between connection attempts must not outlast the retries'.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            # No proxy of the environment is on the way to this machine itself.
            *((("grpc.enable_http_proxy", 0),) if is_loopback(target) else ()),
        ),
    )


def _check_address(target: str) -> None:
    """Refuses what gRPC would take for something else: no port, an IPv6 address without brackets.

    What begins with a scheme of gRPC's ("unix:", "dns:") is gRPC's to judge.
    """
    if not target:
        raise invalid("the server's address is empty: give HOST:PORT", "target")
    if target.startswith(_SCHEMES):
        return
    host, _, port = target.rpartition(":")
    bare = host.strip("[]")
    if ":" in bare and not (host.startswith("[") and host.endswith("]")):
        raise invalid(
            f"{target!r} is not an address: write an IPv6 address in brackets, [{bare}]:{port}",
            "target",
        )
    if not host or target.endswith("]"):
        raise invalid(
            f"{target!r} names no port: give HOST:PORT, for example {target}:50051", "target"
        )
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise invalid(
            f"the port of {target!r} is {port!r}: it must be a number from 1 to 65535", "target"
        )


def is_loopback(target: str) -> bool:
    """Tells by its text whether an address is reached without leaving this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    # What may stand before it says how the name is resolved: "dns:///".
    address = target.rpartition("/")[2]
    host = address.rpartition(":")[0] or address
    return is_this_machine(host.strip("[]"))


def is_this_machine(host: str) -> bool:
    """Tells whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Patience:
    """Waits for a server that starts: how long one question may take, and when to give up."""

    def __init__(
        self, target: str, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._target, self._timeout_s, self._clock = target, timeout_s, clock
        self._deadline = clock() + timeout_s
        self.error: GraftError | None = None
        """What the last question ended with."""

    @property
    def probe_s(self) -> float:
        """Returns how long the next question may take, in seconds."""
        return max(0.001, min(PROBE_TIMEOUT_S, self._deadline - self._clock()))

    @property
    def is_over(self) -> bool:
        """Tells whether there is no time left for another question."""
        # One with next to no time goes unanswered, and would be given as the reason.
        return self._deadline - self._clock() <= PROBE_PAUSE_S

    def gave_up(self, why: str) -> DeadlineExceeded:
        """Makes the error that ends the wait; `why` is "" for a server that does not serve."""
        why = f": {why}" if why else ": it answers, but does not serve"
        return DeadlineExceeded(
            f"{self._target} was not ready within {self._timeout_s:g} s{why}",
            code=grpc.StatusCode.DEADLINE_EXCEEDED,
        )


@cache
def version() -> str:
    """Returns the installed distribution's version; "unknown" where there is none."""
    try:
        return metadata.version("graftml")
    except metadata.PackageNotFoundError:
        return "unknown"
