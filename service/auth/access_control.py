"""Access control of a server, built from its configuration and kept up to date while it runs."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import grpc

from service.auth import access_file, tls
from service.auth.audit import Audit
from service.auth.authenticator import Authenticator, TokenAuthenticator
from service.auth.reload import BadFile
from service.auth.tls import Certificate, Files
from service.config import BadConfig, Config, is_loopback
from service.domain import DEFAULT_TENANT
from service.ops.metrics import Metrics

POLL_EVERY_S: Final = 1.0
"""How often files are looked at and tokens' expiry is checked."""

log = logging.getLogger(__name__)


def check(config: Config) -> None:
    """Raises BadConfig for an access file or a certificate that cannot be used."""
    try:
        if config.access_file is not None:
            access_file.read(config.access_file, config.allowed_dirs)
        if files := _files(config):
            tls.read(files)
    except BadFile as error:
        raise BadConfig(str(error)) from error


class AccessControl:
    """Authenticator, audit log and port credentials of one server."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        """Reads the access file and the certificate; raises BadConfig if they cannot be used."""
        self._config = config
        self._tokens: TokenAuthenticator | None = None
        self._certificate: Certificate | None = None
        try:
            if config.access_file is not None:
                self._tokens = TokenAuthenticator(config.access_file, config.allowed_dirs, metrics)
            if files := _files(config):
                self._certificate = Certificate(files, metrics)
        except BadFile as error:
            raise BadConfig(str(error)) from error
        self.authenticator = self._tokens or Authenticator()
        self.audit = Audit(metrics, has_token=self.authenticator.has_token)
        if self._tokens and not self._certificate and not is_loopback(config.host):
            log.warning(
                "tokens reach %s unencrypted: set --tls-cert-file and --tls-key-file, unless "
                "something before this server does TLS",
                config.host,
            )

    @property
    def needs_tokens(self) -> bool:
        """Whether calls need a token."""
        return self._tokens is not None

    @property
    def credentials(self) -> grpc.ServerCredentials | None:
        """Credentials of the port; None without TLS."""
        return self._certificate.credentials() if self._certificate else None

    def allowed_dirs_of(self, tenant: str) -> tuple[Path, ...]:
        """Returns the folders that a tenant's jobs may read, resolved."""
        if self._tokens:
            return self._tokens.allowed_dirs_of(tenant)
        return self._config.allowed_dirs if tenant == DEFAULT_TENANT else ()

    def max_stored_bytes_of(self, tenant: str) -> int | None:
        """Returns how many bytes a tenant may store; None for no limit."""
        return self._tokens.max_stored_bytes_of(tenant) if self._tokens else None

    def watch(self, stack: AsyncExitStack, on_change: Callable[[], None]) -> None:
        """Polls the files until the stack is left.

        Calls `on_change` each time that a principal may have lost its access.
        """
        if self._tokens or self._certificate:
            stack.callback(asyncio.create_task(self._watch(on_change)).cancel)

    async def _watch(self, on_change: Callable[[], None]) -> None:
        # A network's file system may take its time; and a thread of its own, since revoking a
        # token must not wait for the stores' threads, which its owner may keep busy.
        thread = ThreadPoolExecutor(1, thread_name_prefix="access")
        try:
            while True:
                await asyncio.sleep(POLL_EVERY_S)
                try:
                    if await asyncio.get_running_loop().run_in_executor(thread, self._poll):
                        on_change()
                except Exception:
                    log.exception("access control could not be brought up to date; trying again")
        finally:
            thread.shutdown(wait=False)

    def _poll(self) -> bool:
        if self._certificate and self._certificate.poll():
            log.info("certificate read again", extra={"file": str(self._config.tls_cert_file)})
        return self._tokens.poll() if self._tokens else False


def _files(config: Config) -> Files | None:
    if config.tls_cert_file is None or config.tls_key_file is None:
        return None
    return Files(config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file)
