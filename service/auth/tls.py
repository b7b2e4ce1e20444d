"""The port's certificate: read, checked, and read again when its files change.

gRPC asks for it before every handshake, on threads of its own; connections that
stand keep what they were made with. New files that are no good are logged, and the
ones before stay. Knows nothing of who calls.
"""

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from service.ops.metrics import Metrics

log = logging.getLogger(__name__)

Credentials = grpc.ServerCredentials


class BadCertificate(ValueError):  # noqa: N818
    """A file of the port's certificate is no good; the message names its setting."""


@dataclass(frozen=True)
class Files:
    """Where they lie; `client_ca` makes clients show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """Those that there are."""
        return (
            (self.cert, self.key)
            if self.client_ca is None
            else (
                self.cert,
                self.key,
                self.client_ca,
            )
        )


class Certificate:
    """What a port shows; its files may be changed while it serves."""

    def __init__(self, files: Files, metrics: Metrics) -> None:
        """Reads the files; raises BadCertificate."""
        self._files = files
        self._metrics = metrics
        self._lock = threading.Lock()
        self._seen = _signature(files)
        self._first = _read(files)
        self._failing = metrics.reload_failing.labels("certificate")
        self._failing.set(0)

    def credentials(self) -> Credentials:
        """For a listening port."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            # None is allowed, whatever the stubs say: it keeps what there is.
            cast(Any, self._changed),
            require_client_authentication=self._files.client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What to show from now on; None while nothing changed, or what changed is no good."""
        with self._lock:
            seen = _signature(self._files)
            if seen == self._seen:
                return None
            # Remembered in any case: what is no good is told of once, until it changes again.
            self._seen = seen
            found, complaint = None, ""
            try:
                found = _read(self._files)
            except BadCertificate as error:
                complaint = str(error)
            self._metrics.reloads.labels("certificate", "ok" if found else "failed").inc()
            self._failing.set(0 if found else 1)
            if found:
                log.info("certificate read again", extra={"file": str(self._files.cert)})
            else:
                log.error("the new certificate is no good; the one before stays: %s", complaint)
            return found


def _signature(files: Files) -> tuple[tuple[int, int, int, int] | None, ...]:
    return tuple(_of_file(path) for path in files.all)


def _of_file(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(files: Files) -> grpc.ServerCertificateConfiguration:
    cert = _content(files.cert, "--tls-cert-file")
    key = _content(files.key, "--tls-key-file")
    authorities = _content(files.client_ca, "--tls-client-ca-file") if files.client_ca else None
    _check_certificates(cert, files.cert, "--tls-cert-file")
    if authorities is not None and files.client_ca is not None:
        _check_certificates(authorities, files.client_ca, "--tls-client-ca-file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The password is for a locked key, which would be asked for on the terminal otherwise.
        context.load_cert_chain(files.cert, files.key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise BadCertificate(
                f"--tls-key-file {files.key} is not the key of the first certificate in "
                f"{files.cert}"
            ) from None
        raise BadCertificate(
            f"--tls-key-file {files.key} holds no private key that can be read: PEM, without a "
            "password"
        ) from None
    return grpc.ssl_server_certificate_configuration([(key, cert)], authorities)


def _content(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCertificate(f"{setting} {path} cannot be read: {error.strerror}") from None


def _check_certificates(content: bytes, path: Path, setting: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(
            cadata=content.decode("ascii")
        )
    except (ssl.SSLError, ValueError) as error:
        raise BadCertificate(f"{setting} {path} holds no certificate in PEM") from error
