"""Finds out why a connection fails: looks at the address by plain sockets, and says what it met.

gRPC tells a wrong port, a wrong certificate and a server that is not there in texts
that change between its versions, or as a deadline that passed. So after a failure the
address is looked at once, within `LIMIT_S`: is there such a host, does anybody listen,
and in what do they answer? Sends nothing but greetings; no token and no request.
"""

import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from graftml._channel import is_this_machine
from graftml.errors import CannotConnect, DeadlineExceeded, GraftError, Unavailable

LIMIT_S = 5.0
"""For one look at an address, all of its questions together."""
_STEP_S = 1.5
"""For one question."""
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""HTTP/2's preface and empty settings; an HTTP/2 server answers with its own settings."""
_SETTINGS_FRAME = 4
_EXPIRED, _NOT_YET_VALID = 10, 9
_WRONG_NAME = (62, 64)
"""OpenSSL's codes for a certificate's wrong time, host name and IP address."""
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXIES = ("no_grpc_proxy", "no_proxy")
"""As gRPC reads them: the first one that is set counts."""
_SHOWN = 5


@dataclass(frozen=True)
class Address:
    """A host and a port that can be looked at."""

    target: str
    host: str
    port: int


@dataclass(frozen=True)
class _Client:
    is_tls: bool
    details: str
    has_connected: bool


class _Found(Exception):  # noqa: N818 - no error, but the answer
    """Ends a look: what is wrong."""


def explained(error: GraftError, target: str, *, is_tls: bool) -> GraftError:
    """Returns the error with the reason why there is no connection, where that can be found out.

    Returns `error` itself where the server answered, where nothing is wrong with the connection,
    or where the look takes longer than `LIMIT_S`. Blocks that long at most.
    """
    is_answered = error.reason or error.request_id
    if is_answered or not isinstance(error, Unavailable | DeadlineExceeded):
        return error
    message = why(
        target,
        is_tls=is_tls,
        details=error.message,
        has_connected=not isinstance(error, CannotConnect),
    )
    if not message:
        return error
    kind = DeadlineExceeded if isinstance(error, DeadlineExceeded) else CannotConnect
    found = kind(message, code=error.code)
    found.__cause__ = error
    return found


def why(
    target: str,
    *,
    is_tls: bool,
    details: str = "",
    has_connected: bool = False,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Says what keeps a client from a target, and what to do; "" where nothing is found.

    `details` are gRPC's own words: they alone tell what the client did not trust. One that
    `has_connected`, or may have, has shown a certificate where it was asked for one.
    """
    address = address_of(target)
    if address is None:
        return ""
    variables = os.environ if environment is None else environment
    answer: Future[str] = Future()

    def look() -> None:
        try:
            _look(address, variables, _Client(is_tls, details, has_connected))
        except _Found as found:
            answer.set_result(str(found))
        except Exception as error:  # a look that fails must not hide the error that it is for
            answer.set_exception(error)
        else:
            answer.set_result("")

    # No timeout reaches the look-up of a name: it is left behind in its thread.
    threading.Thread(target=look, name="graft-diagnosis", daemon=True).start()
    wait([answer], LIMIT_S)
    return answer.result() if answer.done() and answer.exception() is None else ""


def address_of(target: str) -> Address | None:
    """Returns the host and port behind a gRPC target; None for other schemes, such as unix:."""
    name = target.removeprefix("dns:")
    if name.startswith("//"):
        name = name.rpartition("/")[2]
    for prefix in ("ipv4:", "ipv6:"):
        name = name.removeprefix(prefix)
    host, colon, port = name.rpartition(":")
    if not colon or not host or not port.isdecimal():
        return None
    return Address(target, host.strip("[]"), int(port))


def proxy_of(host: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns the variable by which gRPC takes a proxy to a host, and its value; None for none."""
    variable = next((name for name in _PROXIES if environment.get(name)), None)
    if variable is None or is_this_machine(host):
        return None
    spared = next((environment[name] for name in _NO_PROXIES if environment.get(name)), "")
    for entry in filter(None, (part.strip() for part in spared.split(","))):
        if entry == "*" or host.lower().endswith(entry.lower()) or _is_within(host, entry):
            return None
    return variable, environment[variable]


def _is_within(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _look(address: Address, environment: Mapping[str, str], client: "_Client") -> None:
    """Raises _Found with what is wrong; returns where the connection is as it should be."""
    proxy = proxy_of(address.host, environment)
    dial: Callable[[], socket.socket] = partial(_dialled, address)
    if proxy is not None:
        dial = _through(address, *proxy)
    dial().close()
    if client.is_tls:
        _look_with_tls(address, dial, client)
    else:
        _look_without_tls(address, dial)


def _look_without_tls(address: Address, dial: Callable[[], socket.socket]) -> None:
    answer = _greeted(dial())
    if _is_http2(answer):
        return
    if answer is None:
        raise _Found(_silent(address))
    with suppress(OSError), _handshake(dial(), address.host):
        raise _Found(
            f"{address.target} speaks TLS, and this client does not: add --tls, or --tls-ca FILE "
            "for an authority of your own (in Python credentials=grpc.ssl_channel_credentials())"
        )
    _look_for_another_protocol(address, dial, answer)


def _look_with_tls(address: Address, dial: Callable[[], socket.socket], client: "_Client") -> None:
    try:
        session = _handshake(dial(), address.host)
    except TimeoutError:
        raise _Found(_silent(address)) from None
    except OSError:
        _look_for_no_tls(address, dial)
        return
    with session:
        certificate = session.getpeercert(binary_form=True) or b""
        has_http2 = session.selected_alpn_protocol() == "h2"
    is_distrusted = "certificate_verify_failed" in client.details.lower()
    _check_certificate(address, dial, certificate, is_distrusted=is_distrusted)
    if not has_http2:
        raise _Found(
            f"{address.target} speaks TLS, but no HTTP/2, which gRPC needs: is it the gRPC port, "
            "and does a proxy before it pass HTTP/2 on?"
        )
    try:
        answer = _greeted(_handshake(dial(), address.host))
    except ssl.SSLError:
        answer = b""
    if answer is None:
        raise _Found(_silent(address))
    if client.has_connected:
        return
    # In TLS 1.3 a server refuses a client only once that thinks that all is well; in TLS 1.2 the
    # same refusal ends the handshake.
    if not answer and not _takes_old_handshake(address, dial):
        raise _Found(
            f"{address.target} asks for a certificate of the client, and has got none that it "
            "takes: give one with --tls-cert and --tls-key (in Python "
            "grpc.ssl_channel_credentials(ca, key, certificate))"
        )


def _takes_old_handshake(address: Address, dial: Callable[[], socket.socket]) -> bool:
    context = _unverified()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        _handshake(dial(), address.host, context).close()
    except OSError:
        return False
    return True


def _look_for_no_tls(address: Address, dial: Callable[[], socket.socket]) -> None:
    answer = _greeted(dial())
    if _is_http2(answer):
        raise _Found(
            f"{address.target} speaks no TLS, and this client does: leave out --tls and --tls-ca "
            "(in Python credentials), or have the server given a certificate"
        )
    if answer is None:
        raise _Found(_silent(address))
    _look_for_another_protocol(address, dial, answer)


def _look_for_another_protocol(
    address: Address, dial: Callable[[], socket.socket], answer: bytes
) -> None:
    with dial() as connection:
        request = f"GET / HTTP/1.1\r\nHost: {address.host}\r\nConnection: close\r\n\r\n"
        if (_asked(connection, request.encode()) or b"").startswith(b"HTTP/"):
            raise _Found(
                f"{address.target} speaks HTTP/1, not gRPC: is it the metrics port, or a web "
                "server's? The gRPC port is 50051 unless the server is configured otherwise"
            )
    if answer:
        text = answer[:40].split(b"\n")[0].decode("ascii", "backslashreplace").strip()
        raise _Found(f"{address.target} speaks something other than gRPC: it says {text!r}")
    raise _Found(
        f"{address.target} takes connections and closes them at once: it is not a gRPC server, or "
        "one that refuses this machine"
    )


def _check_certificate(
    address: Address,
    dial: Callable[[], socket.socket],
    certificate: bytes,
    *,
    is_distrusted: bool,
) -> None:
    # The certificate is trusted here by itself, so that its time and its names are what is left
    # to be checked.
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(certificate))
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    names, is_for_another = "", False
    try:
        _handshake(dial(), address.host, trusting).close()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
            how = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
            raise _Found(
                f"the certificate of {address.target} {how}: have the server given a new one, and "
                "look at both machines' clocks"
            ) from None
        is_for_another = error.verify_code in _WRONG_NAME
    except OSError:
        return
    if is_for_another:
        trusting.check_hostname = False
        with suppress(OSError), _handshake(dial(), address.host, trusting) as session:
            names = _names(session)
    if is_distrusted:
        beside = f"; it is also for {names}, not for {address.host}" if is_for_another else ""
        raise _Found(
            f"the certificate of {address.target} is signed by an authority that this client does "
            "not trust: name the authority's certificate with --tls-ca FILE (in Python "
            f"grpc.ssl_channel_credentials(root_certificates)){beside}"
        )
    if is_for_another:
        raise _Found(
            f"the certificate of {address.target} is for {names or 'other names'}, not for "
            f"{address.host}: call the server by a name that is in it, or have one made for this "
            "name"
        )


def _names(session: ssl.SSLSocket) -> str:
    found = session.getpeercert() or {}
    pairs: tuple[tuple[str, str], ...] = found.get("subjectAltName", ())  # type: ignore[assignment]
    names = [name for _, name in pairs]
    return ", ".join(names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")


def _dialled(address: Address) -> socket.socket:
    """Opens a connection; raises _Found where none can be opened."""
    try:
        return socket.create_connection((address.host, address.port), _STEP_S)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise _Found(
                f"the name {address.host} cannot be resolved now: no name server answers"
            ) from None
        raise _Found(
            f"the name {address.host} cannot be resolved: there is no such host; is it spelled "
            "right?"
        ) from None
    except ConnectionRefusedError:
        raise _Found(
            f"nothing listens at {address.target}: is the server running, and is this its port?"
        ) from None
    except TimeoutError:
        raise _Found(
            f"{address.target} does not answer to a connection: is the address right, and does a "
            "firewall let it through?"
        ) from None
    except OSError as error:
        raise _Found(f"{address.target} cannot be reached: {error.strerror or error}") from None


def _through(address: Address, variable: str, value: str) -> Callable[[], socket.socket]:
    """Dials through a proxy, as gRPC does; raises _Found where that leads nowhere."""
    place = value.partition("://")[2] or value
    place = place.rpartition("@")[2].rstrip("/")
    proxy = address_of(place) or Address(place, place, 80)
    advice = f"add {address.host} to no_proxy, or unset {variable}"

    def dial() -> socket.socket:
        try:
            connection = socket.create_connection((proxy.host, proxy.port), _STEP_S)
        except OSError as error:
            raise _Found(
                f"connections to {address.target} go through the proxy that the variable "
                f"{variable} names, {place}, which cannot be reached "
                f"({error.strerror or error}). If the server can be reached without it, {advice}"
            ) from None
        request = f"CONNECT {address.host}:{address.port} HTTP/1.1\r\nHost: {address.host}\r\n\r\n"
        answer = _asked(connection, request.encode()) or b""
        status = answer.partition(b"\r\n")[0].decode("ascii", "backslashreplace")
        if status.split(" ")[1:2] == ["200"]:
            return connection
        connection.close()
        said = f"answers {status!r}" if status else "does not answer"
        raise _Found(
            f"connections to {address.target} go through the proxy that the variable {variable} "
            f"names, {place}, which {said}. If the server can be reached without it, {advice}"
        )

    return dial


def _handshake(
    connection: socket.socket, host: str, context: ssl.SSLContext | None = None
) -> ssl.SSLSocket:
    """Speaks TLS on a connection; without a context nothing is verified: no secret goes over it."""
    try:
        return (context or _unverified()).wrap_socket(connection, server_hostname=host)
    except BaseException:
        connection.close()
        raise


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _greeted(connection: socket.socket) -> bytes | None:
    """Sends HTTP/2's greeting; returns the answer, b"" for a closed connection, None for none."""
    with connection:
        return _asked(connection, _GREETING)


def _asked(connection: socket.socket, question: bytes) -> bytes | None:
    try:
        connection.sendall(question)
        return connection.recv(4096)
    except TimeoutError:
        return None
    except ssl.SSLError:
        raise
    except OSError:
        return b""


def _is_http2(answer: bytes | None) -> bool:
    # A frame: three bytes of length, its type, flags, and stream 0.
    return (
        answer is not None
        and len(answer) >= 9
        and (answer[3] == _SETTINGS_FRAME and answer[5:9] == bytes(4))
    )


def _silent(address: Address) -> str:
    return (
        f"{address.target} takes connections and does not answer: the server hangs, or it is not a "
        "Graft server"
    )
