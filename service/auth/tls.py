"""The port's certificate: read, checked, and read again when its files change.

gRPC asks for a configuration before every handshake, on threads of its own.
Connections that stand keep the certificate that they were made with.
"""

import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import grpc

from service.auth.reload import BadFile, Reloaded
from service.ops.metrics import Metrics

TICKET_LIFETIME_S: Final = 3600.0
"""Sessions are resumed for at most this long after the last full handshake.

A resumed session does not look at the client's certificate again, and brings a new
ticket. A new configuration has new ticket keys, so that all older tickets end.
"""


@dataclass(frozen=True)
class Files:
    """Paths of PEM files; with `client_ca`, clients must show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """The paths that are set."""
        return tuple(path for path in (self.cert, self.key, self.client_ca) if path is not None)


@dataclass(frozen=True)
class _Pem:
    """Contents of the files."""

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
    expires_at: float
    """Unix time."""

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Builds a configuration; gRPC consumes each one that it is given."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)], self.client_ca)


class Certificate:
    """The certificate of a port."""

    def __init__(
        self, files: Files, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Reads the files; raises BadFile."""
        self._wants_client_certificate = files.client_ca is not None
        self._files = Reloaded("certificate", files.all, lambda: read(files), metrics)
        self._clock = clock
        self._lock = threading.Lock()
        self._given, self._given_at = self._files.value, clock()
        self._expiry = metrics.certificate_expiry
        self._expiry.set(self._given.expires_at)

    def credentials(self) -> grpc.ServerCredentials:
        """Returns the credentials of a port, which follow the files."""
        return grpc.dynamic_ssl_server_credentials(
            self._given.configuration(),
            # It may return None, whatever the stubs say, to keep the configuration.
            cast(Any, self._configuration),
            require_client_authentication=self._wants_client_certificate,
        )

    def poll(self) -> bool:
        """Reads the files again if they changed; returns whether there is a new certificate."""
        if not self._files.poll():
            return False
        self._expiry.set(self._files.value.expires_at)
        return True

    def _configuration(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            current, now = self._files.value, self._clock()
            if current is self._given and now - self._given_at < TICKET_LIFETIME_S:
                return None
            self._given, self._given_at = current, now
            return current.configuration()


def read(files: Files) -> _Pem:
    """Reads and checks the files; raises BadFile."""
    cert = _content(files.cert, "--tls-cert-file")
    key = _content(files.key, "--tls-key-file")
    _check_certificates(cert, files.cert, "--tls-cert-file")
    client_ca = None
    if files.client_ca is not None:
        client_ca = _content(files.client_ca, "--tls-client-ca-file")
        _check_certificates(client_ca, files.client_ca, "--tls-client-ca-file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The password is for a locked key, which would be asked for on the terminal otherwise.
        context.load_cert_chain(files.cert, files.key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise BadFile(
                f"--tls-key-file {files.key} is not the key of the first certificate in "
                f"{files.cert}"
            ) from None
        raise BadFile(
            f"--tls-key-file {files.key} holds no private key that can be read: PEM, without a "
            "password"
        ) from None
    return _Pem(cert, key, client_ca, _expires_at(files.cert))


def _expires_at(path: Path) -> float:
    """The end of the first certificate in a file that holds one."""
    # Python reads certificates, and has no public name for it but after a handshake.
    decoded = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
    return float(ssl.cert_time_to_seconds(decoded["notAfter"]))


def _content(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"{setting} {path} cannot be read: {error.strerror}") from None


def _check_certificates(content: bytes, path: Path, setting: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(
            cadata=content.decode("ascii")
        )
    except (ssl.SSLError, ValueError) as error:
        raise BadFile(f"{setting} {path} holds no certificate in PEM") from error
