"""Who calls, and whether they may: tokens, roles and calls per second.

Owns the access list that is in force, and reads the file again when it changes;
a new file that is no good leaves the old list in force. Tokens are looked at in
here and go nowhere: not into logs, errors or reprs. `watch` ends when it is
cancelled.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.auth import access_file, roles
from service.auth.access_file import AccessList, BadAccessFile, Token
from service.auth.principal import Caller
from service.errors import OverQuota, Reason, Unauthenticated
from service.ops.metrics import Metrics

METADATA_KEY: Final = "authorization"
LOOK_EVERY_S: Final = 1.0
"""How often the file is looked at: what a deleted token still has, and a read more."""

# Compared with where no token has the id, so that this takes as long as a wrong secret.
_NOBODY: Final = Token("0" * 64, Caller("", "", frozenset()))

log = logging.getLogger(__name__)


class Access:
    """The gate of a server that has an access file."""

    def __init__(
        self,
        path: Path,
        server_dirs: Sequence[Path],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the file; raises BadAccessFile. `server_dirs`: the server's folders, resolved."""
        self._path, self._server_dirs = path, server_dirs
        self._metrics = metrics
        self._clock = clock
        self._list, self._seen = access_file.read(path, server_dirs)
        self._complaint = ""
        self._failing = metrics.reload_failing.labels("access_file")
        self._failing.set(0)
        _warn(set(), self._list)
        self._buckets: dict[str, _Bucket] = {}

    @property
    def is_shared(self) -> bool:
        """Whether there are several tenants."""
        return len(self._list.quotas) > 1

    def admit(self, method: str, metadata: Mapping[str, str | bytes]) -> Caller:
        """Says who calls; raises Unauthenticated, NotAllowed or OverQuota."""
        who = self._who(metadata)
        roles.check_role(who, method)
        rate = who.quota.calls_per_second
        if rate is not None:
            self._take(who.tenant, rate)
        return who

    def recheck(self, method: str, who: Caller) -> None:
        """Raises when the token that let a caller in was taken back, or lost the role since.

        For calls that go on: their quota was taken when they began.
        """
        token = self._list.tokens.get(who.name)
        # The same file mostly, so that this costs next to nothing.
        if token is not None and token.caller is who:
            return
        if token is None or token.sha256 != who.token_sha256 or token.caller.tenant != who.tenant:
            raise _unknown()
        roles.check_role(token.caller, method)

    def wait_s(self, who: Caller) -> float:
        """Takes a call for one more request of a stream, 0; or says when there is one to take."""
        # The quota that is in force, which may be another than when the stream began.
        quota = self._list.quotas.get(who.tenant)
        if quota is None or quota.calls_per_second is None:
            return 0.0
        return self._bucket(who.tenant, quota.calls_per_second).take(
            quota.calls_per_second, self._clock()
        )

    def allowed_dirs_of(self, tenant: str) -> tuple[Path, ...]:
        """The folders that a tenant's jobs may read, resolved; none for a tenant that is gone."""
        return self._list.allowed_dirs.get(tenant, ())

    def max_stored_bytes_of(self, tenant: str) -> int | None:
        """What a tenant may store; None means no bound, nothing for a tenant that is gone."""
        quota = self._list.quotas.get(tenant)
        return quota.stored_bytes if quota else 0

    def knows(self, token_id: str) -> bool:
        """Whether a token has this id; nothing is said of its secret."""
        return token_id in self._list.tokens

    def look(self) -> None:
        """Reads the file again if it changed; logs what happened, raises nothing."""
        before = self._list
        try:
            is_same = access_file.signature(self._path.stat()) == self._seen and not self._complaint
            # A folder that was not there may have come.
            if is_same and not before.missing:
                return
            found, self._seen = access_file.read(self._path, self._server_dirs)
        except (BadAccessFile, OSError) as error:
            self._complain(str(error))
            return
        if is_same and found == before:
            return
        gone = sorted(before.tokens.keys() - found.tokens.keys())
        new = sorted(found.tokens.keys() - before.tokens.keys())
        self._list, self._complaint = found, ""
        self._failing.set(0)
        _warn({*before.missing, *before.shared}, found)
        self._metrics.reloads.labels("access_file", "ok").inc()
        log.info("access file read again", extra={"new_tokens": new, "gone_tokens": gone})

    def _complain(self, what: str) -> None:
        self._failing.set(1)
        # Once for each thing that is wrong, not once a second.
        if what != self._complaint:
            self._complaint = what
            self._metrics.reloads.labels("access_file", "failed").inc()
            log.error("the access file is no good; the one before stays in force: %s", what)

    async def watch(self, on_change: Callable[[], None] = lambda: None) -> None:
        """Looks at the file until it is cancelled; calls `on_change` after each new list."""
        # A network's file system may take its time; and a thread of its own, since a token that
        # was taken back must not wait for the stores' threads, which its owner may keep busy.
        thread = ThreadPoolExecutor(1, thread_name_prefix="access")
        try:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                before = self._list
                try:
                    await asyncio.get_running_loop().run_in_executor(thread, self.look)
                    if self._list is not before:
                        on_change()
                except Exception:
                    log.exception("the access file could not be looked at; trying again")
        finally:
            thread.shutdown(wait=False)

    def _who(self, metadata: Mapping[str, str | bytes]) -> Caller:
        given = metadata.get(METADATA_KEY)
        if not given:
            raise Unauthenticated(
                Reason.TOKEN_MISSING,
                "this server wants to know who calls: send the metadata authorization: Bearer "
                "TOKEN (the graft command takes it from GRAFT_TOKEN)",
            )
        parts = split_header(given)
        token_id, secret = parts or ("", "")
        token = self._list.tokens.get(token_id, _NOBODY)
        if not token.is_of(secret) or token is _NOBODY:
            raise _unknown()
        return token.caller

    def _take(self, tenant: str, rate: float) -> None:
        wait_s = self._bucket(tenant, rate).take(rate, self._clock())
        if wait_s > 0:
            raise OverQuota(
                "calls_per_second",
                f"tenant {tenant} may make {rate:g} calls a second; try again in {wait_s:.2g} s",
                retry_after_s=wait_s,
            )

    def _bucket(self, tenant: str, rate: float) -> "_Bucket":
        bucket = self._buckets.get(tenant)
        if bucket is None:
            bucket = self._buckets[tenant] = _Bucket(_room(rate), self._clock())
        return bucket


def _warn(told: Set[str], found: AccessList) -> None:
    """Of what is allowed and hardly meant, but for what was told before."""
    for text in found.missing:
        if text not in told:
            log.warning("%s: its tenant cannot read there until it is", text)
    for text in found.shared:
        if text not in told:
            log.warning("%s: give each a folder of its own if that is not meant", text)


def _unknown() -> Unauthenticated:
    # One text, whatever is wrong with it.
    return Unauthenticated(
        Reason.TOKEN_UNKNOWN,
        "the token is not known: it was mistyped, taken back, or is another server's",
    )


def split_header(given: str | bytes) -> tuple[str, str] | None:
    """The token's id and secret from "Bearer TOKEN"; None when it is not shaped so."""
    text = given if isinstance(given, str) else given.decode("ascii", "replace")
    scheme, _, token = text.strip().partition(" ")
    return access_file.split(token.strip()) if scheme.lower() == "bearer" else None


def _room(rate: float) -> float:
    # What a second brings, so that a page of images sent at once is no offence.
    return max(1.0, rate)


@dataclass
class _Bucket:
    """A token bucket: what may still be called at `at`, seconds of the clock."""

    left: float
    at: float

    def take(self, rate: float, now: float) -> float:
        """Takes a call, 0; or says after how many seconds there is one to take."""
        self.left = min(_room(rate), self.left + max(0.0, now - self.at) * rate)
        self.at = now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) / rate
