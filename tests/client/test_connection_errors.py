"""Makes each mistake of docs/how-to/connection_errors.md with a real listener."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import graftml
import grpc
import pytest
from graftml import _diagnosis
from graftml.cli import main
from graftml.testing import FakeGraft
from prometheus_client import CollectorRegistry

from service.ops.metrics_server import MetricsServer
from tests.certificates import Authority, Pair

TABLE = Path(__file__).parents[2] / "docs/how-to/connection_errors.md"
KNOWN, UNKNOWN = Authority("a known one"), Authority("an unknown one")
SILENCE_S = 0.3
"""Waited for an answer that never comes, and for nothing else: no machine is too slow."""
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@dataclass
class Case:
    """A target, how it is called, and what of the message differs from run to run."""

    target: str
    authority: bytes | None = None
    """That the client trusts; it speaks TLS then."""
    environment: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    is_address: bool = False
    """The mistake is in the target itself, which the table shows."""
    is_silent: bool = False
    """Nobody answers, however long it is waited for."""

    @property
    def timeout_s(self) -> float:
        """The deadline of a call."""
        return SILENCE_S if self.is_silent else 60.0


class Listeners:
    """Real listeners on free ports of this machine."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def graft(self) -> str:
        return self._stack.enter_context(FakeGraft()).target

    def nobody(self) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{free.getsockname()[1]}"

    def tls(self, pair: Pair, client_authority: bytes | None = None) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        credentials = grpc.ssl_server_credentials(
            [(pair.key, pair.cert)], client_authority, client_authority is not None
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        self._stack.callback(lambda: server.stop(None).wait(60))
        return f"127.0.0.1:{port}"

    def metrics(self) -> str:
        server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0, lambda: True)
        self._stack.callback(server.close)
        return f"127.0.0.1:{server.port}"

    def silent(self) -> str:
        # The kernel takes connections that nobody accepts.
        listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def saying(self, words: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._stack.callback(listener.close)

        def answer(connection: socket.socket) -> None:
            with suppress(OSError), connection:
                connection.sendall(words)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(60)
                while connection.recv(4096):
                    pass

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        self._stack.callback(lambda: listener.shutdown(socket.SHUT_RDWR))
        return f"127.0.0.1:{listener.getsockname()[1]}"


MAKE: dict[str, Callable[[Listeners], Case]] = {
    "nothing listens on the port": lambda at: Case(at.nobody()),
    "no such host": lambda at: Case("graft.invalid:50051"),
    "a client with TLS, a server without": lambda at: Case(at.graft(), KNOWN.pem),
    "a client without TLS, a server with it": lambda at: Case(at.tls(KNOWN.sign())),
    "a certificate of an unknown authority": lambda at: Case(at.tls(UNKNOWN.sign()), KNOWN.pem),
    "a certificate for another name": lambda at: Case(
        at.tls(KNOWN.sign(host="graft.example")), KNOWN.pem
    ),
    "a certificate for another name, of an unknown authority": lambda at: Case(
        at.tls(UNKNOWN.sign(host="graft.example")), KNOWN.pem
    ),
    "a certificate that has expired": lambda at: Case(
        at.tls(KNOWN.sign(is_expired=True)), KNOWN.pem
    ),
    "no certificate of the client, where the server wants one": lambda at: Case(
        at.tls(KNOWN.sign(), UNKNOWN.pem), KNOWN.pem
    ),
    "the metrics port": lambda at: Case(at.metrics()),
    "the metrics port, with TLS": lambda at: Case(at.metrics(), KNOWN.pem),
    "a port of another protocol": lambda at: Case(at.saying(b"SSH-2.0-OpenSSH_9.6\r\n")),
    "a port that closes every connection": lambda at: Case(at.saying(b"")),
    "a port that never answers": lambda at: Case(at.silent(), is_silent=True),
    "a port that never answers, with TLS": lambda at: Case(at.silent(), KNOWN.pem, is_silent=True),
    "a proxy where nothing listens": lambda at: _proxied(at.graft(), at.nobody()),
    "a proxy that lets nobody through": lambda at: _proxied(at.graft(), at.metrics()),
    "the scheme of a web address": lambda at: Case("http://127.0.0.1:50051", is_address=True),
    "an IPv6 address without brackets": lambda at: Case("::1:50051", is_address=True),
    "no port": lambda at: Case("127.0.0.1", is_address=True),
    "a port that is not a number": lambda at: Case("127.0.0.1:grpc", is_address=True),
}


def _proxied(target: str, proxy: str) -> Case:
    # The same machine by an address that is not known to be it.
    target = target.replace("127.0.0.1", "0.0.0.0")
    return Case(target, environment={"http_proxy": f"http://{proxy}"}, names={proxy: "PROXY"})


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    with ExitStack() as stack:
        yield Listeners(stack)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


def table() -> dict[str, str]:
    """Reads the message of each mistake from the document."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines()]
    return {row[0]: row[1].replace("`", "") for row in rows if len(row) == 2 and row[0] in MAKE}


def told(message: str, case: Case) -> str:
    """Returns the message without what differs from run to run."""
    if case.is_address:
        return message
    for name, stands_for in {**case.names, case.target: "HOST:PORT"}.items():
        message = message.replace(name, stands_for)
    host = case.target.rpartition(":")[0]
    return message.replace(host, "HOST") if host and "HOST:PORT" in message else message


def prepare(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the case's environment, and waits no longer than it must for one who is silent."""
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    if case.is_silent:
        monkeypatch.setattr(_diagnosis, "_STEP_S", SILENCE_S)


def options(case: Case) -> dict[str, Any]:
    secure = case.authority is not None
    return {
        "credentials": grpc.ssl_channel_credentials(case.authority) if secure else None,
        "retry": graftml.NO_RETRY,
        "timeout_s": case.timeout_s,
    }


def test_every_mistake_stands_in_the_table() -> None:
    assert list(table()) == list(MAKE)


@pytest.mark.parametrize("mistake", MAKE)
def test_a_mistake_is_told_as_the_table_says(
    connect: Any, listeners: Listeners, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    case = MAKE[mistake](listeners)
    prepare(case, monkeypatch)
    with pytest.raises(graftml.GraftError) as caught:
        connect(case.target, **options(case)).get_model("pets")
    assert told(caught.value.message, case) == table()[mistake]
    assert isinstance(caught.value, graftml.InvalidArgument) == case.is_address
    assert case.is_address or isinstance(
        caught.value, graftml.CannotConnect | graftml.DeadlineExceeded
    )


@pytest.mark.parametrize(
    "mistake", ["nothing listens on the port", "a client without TLS, a server with it",
                "the metrics port", "a port that never answers"],
)  # fmt: skip
def test_health_gives_the_reason_and_a_code_of_its_own(
    listeners: Listeners,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    case = MAKE[mistake](listeners)
    prepare(case, monkeypatch)
    assert main(["health", "--server", case.target, "--timeout", f"{case.timeout_s}"]) == 5
    err = capsys.readouterr().err
    assert told(err.strip(), case) == f"graft: {table()[mistake]}"


def test_a_proxy_in_the_environment_is_not_asked_for_this_machine(
    connect: Any, listeners: Listeners, server: FakeGraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{listeners.nobody()}")
    assert connect(server.target).is_serving()


@pytest.mark.parametrize(
    ("host", "environment", "proxy"),
    [
        ("graft.example", {"http_proxy": "http://p:1"}, ("http_proxy", "http://p:1")),
        ("graft.example", {"http_proxy": "p:1", "https_proxy": "q:1"}, ("https_proxy", "q:1")),
        ("graft.example", {"http_proxy": "p:1", "no_proxy": "other, .example"}, None),
        ("graft.example", {"http_proxy": "p:1", "no_proxy": "*"}, None),
        ("10.1.2.3", {"http_proxy": "p:1", "no_proxy": "10.0.0.0/8"}, None),
        ("10.1.2.3", {"http_proxy": "p:1", "no_proxy": "11.0.0.0/8"}, ("http_proxy", "p:1")),
        ("localhost", {"http_proxy": "p:1"}, None),
        ("graft.example", {"HTTP_PROXY": "p:1"}, None),
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(
    host: str, environment: dict[str, str], proxy: tuple[str, str] | None
) -> None:
    assert _diagnosis.proxy_of(host, environment) == proxy


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("localhost:50051", ("localhost", 50051)),
        ("[::1]:50051", ("::1", 50051)),
        ("dns:///graft.example:443", ("graft.example", 443)),
        ("dns:graft.example:443", ("graft.example", 443)),
        ("ipv4:10.0.0.1:1", ("10.0.0.1", 1)),
        ("unix:/run/graft.sock", None),
    ],
)
def test_the_address_behind_a_target_is_known(target: str, place: tuple[str, int] | None) -> None:
    found = _diagnosis.address_of(target)
    assert (found and (found.host, found.port)) == place


@pytest.mark.parametrize("authority", [None, KNOWN.pem], ids=["plain", "tls"])
def test_nothing_is_said_of_a_connection_that_is_fine(
    listeners: Listeners, authority: bytes | None
) -> None:
    target = listeners.graft() if authority is None else listeners.tls(KNOWN.sign())
    assert _diagnosis.why(target, is_tls=authority is not None) == ""


def test_a_client_that_has_shown_its_certificate_is_not_asked_for_one(
    listeners: Listeners,
) -> None:
    target = listeners.tls(KNOWN.sign(), KNOWN.pem)
    late = graftml.DeadlineExceeded("no answer within 1 s")
    assert _diagnosis.explained(late, target, is_tls=True) is late


def test_an_error_that_the_server_answered_with_stays_as_it_is(listeners: Listeners) -> None:
    answered = graftml.Unavailable("restarting", reason=graftml.Reason.SHUTTING_DOWN)
    assert _diagnosis.explained(answered, listeners.nobody(), is_tls=False) is answered
    refused = graftml.NotFound("no such model")
    assert _diagnosis.explained(refused, listeners.nobody(), is_tls=False) is refused


def test_a_look_that_takes_too_long_is_given_up(
    listeners: Listeners, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(_diagnosis, "LIMIT_S", 0.01)
    monkeypatch.setattr(_diagnosis, "_look", lambda *_: never.wait(60))
    assert _diagnosis.why("localhost:1", is_tls=False) == ""
    never.set()
