"""Who may come in, from the configuration: the access list, the certificate, the folders.

A part of the composition; `service.config` has said already whether the settings fit
each other, here their files are read. What watches the files ends with the stack.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from service.auth.access_file import BadAccessFile
from service.auth.audit import AuditLog
from service.auth.authenticator import Access
from service.auth.tls import BadCertificate, Certificate, Credentials, Files
from service.config import BadConfig, Config, is_loopback
from service.domain import DEFAULT_TENANT
from service.ops.metrics import Metrics

log = logging.getLogger(__name__)


class Door:
    """The server's door."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        """Reads the files; raises BadConfig for what is no good in them."""
        self._config = config
        try:
            self.gate = _access(config, metrics)
            """None: everybody comes in."""
            self._certificate = _certificate(config, metrics)
        except (BadAccessFile, BadCertificate) as error:
            raise BadConfig(str(error)) from error
        self.audit = AuditLog(metrics, knows=self.gate.knows) if self.gate else AuditLog(metrics)
        if self.gate and not self._certificate and not is_loopback(config.host):
            log.warning(
                "tokens reach %s unencrypted: set --tls-cert-file and --tls-key-file, unless "
                "something before this server does TLS",
                config.host,
            )

    @property
    def credentials(self) -> Credentials | None:
        """The port's; None without TLS."""
        return self._certificate.credentials() if self._certificate else None

    def allowed_dirs_of(self, tenant: str) -> tuple[Path, ...]:
        """The folders that a tenant's jobs may read from."""
        if self.gate:
            return self.gate.allowed_dirs_of(tenant)
        return self._config.allowed_dirs if tenant == DEFAULT_TENANT else ()

    def max_stored_bytes_of(self, tenant: str) -> int | None:
        """What a tenant may store; None means no bound."""
        return self.gate.max_stored_bytes_of(tenant) if self.gate else None

    def is_shared(self) -> bool:
        """Says whether there are several tenants."""
        return self.gate is not None and self.gate.is_shared

    def watch(self, stack: AsyncExitStack, on_change: Callable[[], None]) -> None:
        """Begins to look at the access file, until the stack is left; tells of new lists."""
        if self.gate:
            stack.callback(asyncio.create_task(self.gate.watch(on_change)).cancel)


def _access(config: Config, metrics: Metrics) -> Access | None:
    if config.access_file is None:
        return None
    return Access(config.access_file, config.allowed_dirs, metrics)


def _certificate(config: Config, metrics: Metrics) -> Certificate | None:
    if config.tls_cert_file is None or config.tls_key_file is None:
        return None
    files = Files(config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file)
    return Certificate(files, metrics)
