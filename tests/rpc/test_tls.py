"""TLS on the gRPC port: who is trusted, who must show a certificate, new files while serving."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from graftml import cli
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from service.__main__ import main
from service.auth import access_control
from service.auth.tls import TICKET_LIFETIME_S, Certificate, Files
from service.config import BadConfig
from service.ops.metrics import Metrics
from tests.certificates import Authority, Pair
from tests.rpc.conftest import GUARD_S, MakeService, Service
from tests.rpc.test_server import scrape

Dial = Callable[..., aio.Channel]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def flags(authority: Authority, tmp_path: Path) -> dict[str, Path]:
    cert, key = authority.sign().write(tmp_path, "server")
    return {"tls_cert_file": cert, "tls_key_file": key}


@pytest.fixture(autouse=True)
def _polled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_control, "POLL_EVERY_S", 0.02)


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    async with AsyncExitStack() as stack:

        def to(service: Service, trusted: bytes, shown: Pair | None = None) -> aio.Channel:
            own = (shown.key, shown.cert) if shown else (None, None)
            channel = aio.secure_channel(
                f"127.0.0.1:{service.app.port}", grpc.ssl_channel_credentials(trusted, *own)
            )
            stack.push_async_exit(channel)
            return channel

        yield to


async def is_serving(channel: aio.Channel) -> bool:
    """Whether a health check comes through; False when there is no connection to be had."""
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=GUARD_S
        )
    except aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def reloaded(service: Service, outcome: str) -> None:
    """Waits until a changed certificate was read, "ok" or "failed"."""
    line = f'graft_reloads_total{{outcome="{outcome}",what="certificate"}} 1.0'
    async with asyncio.timeout(GUARD_S):
        while line not in await scrape(service):
            pass


async def test_with_a_certificate_only_those_who_trust_it_talk_to_the_server(
    make_service: MakeService, flags: dict[str, Path], authority: Authority, dial: Dial
) -> None:
    service = await make_service(**flags)
    assert await is_serving(dial(service, authority.pem))
    assert not await is_serving(dial(service, Authority("another").pem))
    assert not await is_serving(service.channel)  # without TLS


async def test_with_an_authority_for_clients_only_those_it_signed_for_get_in(
    make_service: MakeService, flags: dict[str, Path], tmp_path: Path, dial: Dial
) -> None:
    ours, servers = Authority("of clients"), Authority("of servers")
    servers.sign().write(tmp_path, "server")
    (tmp_path / "clients.pem").write_bytes(ours.pem)
    service = await make_service(**flags, tls_client_ca_file=tmp_path / "clients.pem")
    assert await is_serving(dial(service, servers.pem, ours.sign("a client")))
    assert not await is_serving(dial(service, servers.pem))
    assert not await is_serving(dial(service, servers.pem, servers.sign("a client")))


async def test_a_new_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    make_service: MakeService, flags: dict[str, Path], authority: Authority, tmp_path: Path,
    dial: Dial,
) -> None:  # fmt: skip
    service = await make_service(**flags)
    old = dial(service, authority.pem)
    assert await is_serving(old)
    successor = Authority("its successor")
    successor.sign().write(tmp_path, "server")
    await reloaded(service, "ok")
    assert await is_serving(dial(service, successor.pem))
    assert not await is_serving(dial(service, authority.pem))
    assert await is_serving(old)
    assert 'graft_reload_failing{what="certificate"} 0.0' in await scrape(service)


async def test_a_new_authority_for_clients_counts_for_new_connections(
    make_service: MakeService, flags: dict[str, Path], authority: Authority, tmp_path: Path,
    dial: Dial,
) -> None:  # fmt: skip
    first, second = Authority("first"), Authority("second")
    file = tmp_path / "clients.pem"
    file.write_bytes(first.pem)
    service = await make_service(**flags, tls_client_ca_file=file)
    assert await is_serving(dial(service, authority.pem, first.sign("a client")))
    file.write_bytes(second.pem)
    await reloaded(service, "ok")
    assert await is_serving(dial(service, authority.pem, second.sign("a client")))
    assert not await is_serving(dial(service, authority.pem, first.sign("a client")))


@pytest.mark.parametrize("damage", ["nonsense", "key of another", "gone"])
async def test_a_new_certificate_that_cannot_be_used_is_reported_and_the_old_one_stays(
    make_service: MakeService,
    flags: dict[str, Path],
    authority: Authority,
    dial: Dial,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    service = await make_service(**flags)
    if damage == "nonsense":
        flags["tls_cert_file"].write_bytes(b"no certificate")
    elif damage == "key of another":
        flags["tls_key_file"].write_bytes(authority.sign().key)
    else:
        flags["tls_key_file"].unlink()
    await reloaded(service, "failed")
    for _ in range(3):
        assert await is_serving(dial(service, authority.pem))
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "cannot be used, the one before stays in force: --tls-" in errors[0]
    assert 'graft_reload_failing{what="certificate"} 1.0' in await scrape(service)


def test_a_key_that_is_renamed_after_its_certificate_is_no_error(
    flags: dict[str, Path], authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics({"version": "1"})
    certificate = Certificate(Files(flags["tls_cert_file"], flags["tls_key_file"]), metrics)
    for _ in range(3):
        successor = authority.sign()
        flags["tls_cert_file"].write_bytes(successor.cert)
        assert not certificate.poll()
        flags["tls_key_file"].write_bytes(successor.key)
        assert certificate.poll()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert 'outcome="failed"' not in generate_latest(metrics.registry).decode()


def test_the_metrics_say_when_the_certificate_in_use_expires(
    flags: dict[str, Path], authority: Authority
) -> None:
    def expiry() -> float | None:
        return metrics.registry.get_sample_value("graft_certificate_expiry_timestamp_seconds")

    metrics = Metrics({"version": "1"})
    assert expiry() == float("inf")
    cert, key = flags["tls_cert_file"], flags["tls_key_file"]
    certificate = Certificate(Files(cert, key), metrics)
    for is_expired in (False, True):
        pair = authority.sign(is_expired=is_expired)
        # With the authority's own behind it, which lasts longer.
        cert.write_bytes(pair.cert + authority.pem)
        key.write_bytes(pair.key)
        assert certificate.poll()
        told = x509.load_pem_x509_certificate(pair.cert).not_valid_after_utc
        assert expiry() == told.timestamp()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_sessions_are_resumed_for_an_hour_and_not_for_ever(
    flags: dict[str, Path], authority: Authority, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """A resumed session does not look at the client's certificate, which may have expired."""
    clock, clients = Clock(), Authority("of clients")
    (tmp_path / "clients.pem").write_bytes(clients.pem)
    cert, key = clients.sign("a client").write(tmp_path, "client")
    files = Files(flags["tls_cert_file"], flags["tls_key_file"], tmp_path / "clients.pem")
    certificate = Certificate(files, Metrics({"version": "1"}), clock)
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"])

    def connect(session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
        ):
            # The server speaks first; in TLS 1.3 its tickets come before that.
            assert secure.recv(9)
            return bool(secure.session_reused), secure.session

    server = aio.server()
    port = server.add_secure_port("127.0.0.1:0", certificate.credentials())
    await server.start()
    try:
        was_resumed, session = await asyncio.to_thread(connect, None)
        assert not was_resumed
        clock.now += TICKET_LIFETIME_S - 1
        # Each brings a new ticket, which is as old as the full handshake.
        for _ in range(3):
            was_resumed, session = await asyncio.to_thread(connect, session)
            assert was_resumed
        clock.now += 1
        was_resumed, session = await asyncio.to_thread(connect, session)
        assert not was_resumed
        was_resumed, _ = await asyncio.to_thread(connect, session)
        assert was_resumed
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("setting", "content", "says"),
    [
        ("tls_cert_file", None, "--tls-cert-file .*server.pem cannot be read: No such file"),
        ("tls_cert_file", b"x", "--tls-cert-file .*server.pem holds no certificate in PEM"),
        ("tls_key_file", None, "--tls-key-file .*server.key cannot be read: No such file"),
        ("tls_key_file", b"x", "--tls-key-file .*server.key holds no private key"),
        ("tls_key_file", "another", "server.key is not the key of the first certificate in"),
    ],
)
async def test_a_file_that_is_no_good_keeps_the_server_from_starting_and_its_setting_is_named(
    make_service: MakeService,
    flags: dict[str, Path],
    authority: Authority,
    setting: str,
    content: Any,
    says: str,
) -> None:
    if content is None:
        flags[setting].unlink()
    else:
        flags[setting].write_bytes(authority.sign().key if content == "another" else content)
    with pytest.raises(BadConfig, match=says):
        await make_service(**flags)


def test_a_bad_authority_for_clients_is_named(flags: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(ValueError, match=r"--tls-client-ca-file .*ca.pem holds no certificate"):
        Certificate(
            Files(flags["tls_cert_file"], flags["tls_key_file"], tmp_path / "ca.pem"),
            Metrics({"version": "1"}),
        )


def test_a_key_with_a_password_is_refused_and_not_asked_for(
    flags: dict[str, Path],
) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(flags["tls_key_file"].read_bytes(), None)
    flags["tls_key_file"].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"a password"),
        )
    )
    with pytest.raises(ValueError, match="without a password"):
        Certificate(Files(flags["tls_cert_file"], flags["tls_key_file"]), Metrics({"v": "1"}))


async def test_the_command_shows_its_certificate_and_its_token(
    make_service: MakeService,
    flags: dict[str, Path],
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clients = Authority("of clients")
    (tmp_path / "clients.pem").write_bytes(clients.pem)
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    cert, key = clients.sign("a client").write(tmp_path, "client")
    made = ["--tenant=acme", "--role=admin", f"--access-file={tmp_path}/access.toml"]
    assert main(["tokens", "create", *made]) == 0
    monkeypatch.setenv("GRAFT_TOKEN", capsys.readouterr().out.strip())
    service = await make_service(
        **flags,
        tls_client_ca_file=tmp_path / "clients.pem",
        access_file=tmp_path / "access.toml",
    )
    server = [f"--server=127.0.0.1:{service.app.port}", f"--tls-ca={tmp_path}/ca.pem"]

    async def command(*given: str) -> tuple[int, str]:
        code = await asyncio.to_thread(cli.main, ["models", "--json", *server, *given])
        return code, capsys.readouterr().err

    shown = (f"--tls-cert={cert}", f"--tls-key={key}")
    assert await command(*shown) == (0, "")
    assert (await command("--timeout=1"))[0] == 1
    monkeypatch.setenv("GRAFT_TOKEN", "wrong")
    code, said = await command(*shown)
    assert (code, "TOKEN_UNKNOWN" in said) == (1, True)
