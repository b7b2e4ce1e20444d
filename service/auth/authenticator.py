"""Authenticates calls: which principal makes one, whether its role and its quota allow it.

Secrets of tokens are compared in here and go nowhere else: not into logs, errors
or reprs.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Final

from service.auth import access_file
from service.auth.access_file import AccessList, Token
from service.auth.principal import EVERYBODY, CallMeter, Principal, check_role
from service.auth.reload import Reloaded
from service.errors import OverQuota, Reason, Unauthenticated
from service.ops.metrics import Metrics

Metadata = Sequence[tuple[str, str | bytes]]
"""A call's headers as they came; a key may stand in it more than once."""

METADATA_KEY: Final = "authorization"
EXPIRY_WARNING_S: Final = 7 * 24 * 3600.0
"""Tokens that expire within this time are warned about."""

# Compared for unknown ids, so that they take as long as a wrong secret.
_NO_TOKEN: Final = Token("0" * 64, Principal("", "", frozenset()))

log = logging.getLogger(__name__)


class Authenticator:
    """Decides who may call what: this one admits every call, as EVERYBODY."""

    @property
    def is_shared(self) -> bool:
        """Whether several tenants share the server, so that none may take all of it."""
        return False

    def admit(self, method: str, metadata: Metadata) -> Principal:  # noqa: ARG002
        """Returns the principal of a call, whose method is "/graft.v1.ModelService/GetModel".

        Raises Unauthenticated, NotAllowed or OverQuota.
        """
        return EVERYBODY

    def recheck(self, method: str, principal: Principal) -> None:
        """Raises Unauthenticated or NotAllowed if the principal may not go on with its call."""

    def wait_s(self, principal: Principal) -> float:  # noqa: ARG002
        """Counts one more request of a stream and returns 0.0; or returns the seconds to wait."""
        return 0.0

    def has_token(self, token_id: str) -> bool:  # noqa: ARG002
        """Tells whether a token has this id, whatever its secret."""
        return False


class TokenAuthenticator(Authenticator):
    """Admits calls by the tokens of an access file, which it reads again when it changes.

    `poll` may run in another thread; everything else belongs to the event loop.
    """

    def __init__(
        self,
        path: Path,
        server_dirs: Sequence[Path],
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Reads the file; raises BadFile.

        `server_dirs` are the server's folders, resolved; `now` gives seconds since 1970.
        """
        self._file = Reloaded(
            "access_file", [path], lambda: access_file.read(path, server_dirs), metrics
        )
        self._next_expiry = metrics.next_token_expiry
        self._now = now
        self._meter = CallMeter(clock)
        self._expired: Set[str] = set()
        self._warned: Set[tuple[str, float]] = set()
        _warn_of_folders(set(), self._list)
        self._check_expiry()

    @property
    def _list(self) -> AccessList:
        return self._file.value

    @property
    def is_shared(self) -> bool:
        """Whether the file has several tenants."""
        return len(self._list.quotas) > 1

    def admit(self, method: str, metadata: Metadata) -> Principal:
        """Returns the principal; raises Unauthenticated, NotAllowed or OverQuota."""
        principal = self._authenticate(metadata)
        check_role(principal, method)
        rate, tenant = principal.quota.calls_per_second, principal.tenant
        wait_s = 0.0 if rate is None else self._meter.take(tenant, rate)
        if wait_s > 0:
            raise OverQuota(
                "calls_per_second",
                f"tenant {tenant} may make {rate:g} calls a second; try again in {wait_s:.2g} s",
                retry_after_s=wait_s,
            )
        return principal

    def recheck(self, method: str, principal: Principal) -> None:
        """Raises if the principal's token was revoked, has expired or lost the role.

        For calls that go on: their quota was taken when they began.
        """
        token = self._list.tokens.get(principal.name)
        # The same list as a rule, so that this costs next to nothing.
        if token is None or (
            token.principal is not principal
            and (token.sha256, token.principal.tenant) != (principal.token_sha256, principal.tenant)
        ):
            raise _unknown()
        self._check_not_expired(token)
        if token.principal is not principal:
            check_role(token.principal, method)

    def wait_s(self, principal: Principal) -> float:
        """Counts one more request of a stream and returns 0.0; or returns the seconds to wait."""
        # By the quota in force, which may be another than when the stream began.
        quota = self._list.quotas.get(principal.tenant)
        if quota is None or quota.calls_per_second is None:
            return 0.0
        return self._meter.take(principal.tenant, quota.calls_per_second)

    def allowed_dirs_of(self, tenant: str) -> tuple[Path, ...]:
        """Returns the folders that a tenant's jobs may read, resolved; none for an unknown one."""
        return self._list.allowed_dirs.get(tenant, ())

    def max_stored_bytes_of(self, tenant: str) -> int | None:
        """Returns how many bytes a tenant may store; None for no limit, 0 for an unknown one."""
        quota = self._list.quotas.get(tenant)
        return quota.stored_bytes if quota else 0

    def has_token(self, token_id: str) -> bool:
        """Tells whether a token has this id, whatever its secret."""
        return token_id in self._list.tokens

    def poll(self) -> bool:
        """Reads the file again if it changed; returns whether a principal may have lost its access.

        Logs what changed, which tokens expire soon and which have expired.
        """
        before = self._list
        # A folder that did not exist may exist now.
        is_new = self._file.poll(is_stale=bool(before.missing))
        if is_new:
            found = self._list
            _warn_of_folders({*before.missing, *before.shared}, found)
            log.info(
                "access file read again",
                extra={
                    "new_tokens": sorted(found.tokens.keys() - before.tokens.keys()),
                    "gone_tokens": sorted(before.tokens.keys() - found.tokens.keys()),
                },
            )
        return self._check_expiry() or is_new

    def _check_expiry(self) -> bool:
        """Updates the metric and logs; returns whether a token has expired since the last check."""
        now, tokens = self._now(), self._list.tokens
        expired = {name for name, token in tokens.items() if token.expires_at <= now}
        self._next_expiry.set(
            min(
                (token.expires_at for name, token in tokens.items() if name not in expired),
                default=float("inf"),
            )
        )
        soon = {
            (name, token.expires_at)
            for name, token in tokens.items()
            if name not in expired and token.expires_at <= now + EXPIRY_WARNING_S
        }
        new = expired - self._expired
        for name in sorted(new):
            log.warning("the token %s has expired: its calls are refused", name)
        for name, expires_at in sorted(soon - self._warned):
            log.warning(
                "the token %s expires on %s: give its owner another one (graft-server tokens)",
                name,
                access_file.shown_time(expires_at),
            )
        self._expired, self._warned = expired, soon
        return bool(new)

    def _authenticate(self, metadata: Metadata) -> Principal:
        given = list(_authorizations(metadata))
        if not any(given):
            raise Unauthenticated(
                Reason.TOKEN_MISSING,
                "this server wants to know who calls: give a token in GRAFT_TOKEN to the graft "
                "command, as token= in Python, or else as the metadata authorization: Bearer TOKEN",
            )
        if len(given) > 1:
            # Something in between may have looked at another one than we would.
            raise Unauthenticated(
                Reason.TOKEN_UNKNOWN, f"the call has {len(given)} authorization headers: send one"
            )
        token_id, secret = _split(given[0]) or ("", "")
        token = self._list.tokens.get(token_id, _NO_TOKEN)
        if not token.matches(secret) or token is _NO_TOKEN:
            raise _unknown()
        self._check_not_expired(token)
        return token.principal

    def _check_not_expired(self, token: Token) -> None:
        if self._now() >= token.expires_at:
            raise Unauthenticated(
                Reason.TOKEN_EXPIRED,
                f"the token {token.principal.name} expired on "
                f"{access_file.shown_time(token.expires_at)}: ask the server's operator for "
                "another",
            )


def claimed_id(metadata: Metadata) -> str:
    """Returns the id of the token that a call brings, valid or not; empty if it has no such form.

    For logs: the secret beside it is left out.
    """
    parts = (_split(given) for given in _authorizations(metadata))
    return next((found[0] for found in parts if found), "")


def _authorizations(metadata: Metadata) -> Iterator[str | bytes]:
    return (value for key, value in metadata if key == METADATA_KEY)


def _split(given: str | bytes) -> tuple[str, str] | None:
    """Splits "Bearer TOKEN" into the token's id and secret; None if it has not that form."""
    text = given if isinstance(given, str) else given.decode("ascii", "replace")
    scheme, _, token = text.strip().partition(" ")
    return access_file.split(token.strip()) if scheme.lower() == "bearer" else None


def _unknown() -> Unauthenticated:
    # One text for an unknown id and a wrong secret.
    return Unauthenticated(
        Reason.TOKEN_UNKNOWN,
        "the token is not known: it was mistyped, revoked, or is another server's",
    )


def _warn_of_folders(known: Set[str], found: AccessList) -> None:
    """Logs folders that are allowed and hardly meant, except for warnings that are `known`."""
    for text in found.missing:
        if text not in known:
            log.warning("%s: its tenant cannot read there until it is", text)
    for text in found.shared:
        if text not in known:
            log.warning("%s: give each a folder of its own if that is not meant", text)
