"""Who makes a call: set once when it is let in, read by whoever serves it."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from service.domain import DEFAULT_TENANT, tenant_key

Role = Literal["predict", "train", "admin"]
"""What a caller may do; `admin` may do what the others may, too, all of it within its tenant."""


@dataclass(frozen=True)
class Quota:
    """The bounds of a tenant; None means none."""

    calls_per_second: float | None = None
    concurrent_jobs: int | None = None
    """Jobs that have not ended."""
    stored_bytes: int | None = None
    """Of datasets, versions, registered backbones and jobs."""
    rankings: int | None = None
    """Rankings of backbones that wait or run."""


@dataclass(frozen=True)
class Caller:
    """One caller."""

    name: str
    """For the log: the token's id; never the token."""
    tenant: str
    roles: frozenset[Role]
    quota: Quota = Quota()
    token_sha256: str = field(default="", repr=False, compare=False)
    """Of the secret that it came with; empty where nobody has one."""

    def key(self, model: str) -> str:
        """The key of the model that this caller calls by a name, whatever was sent as one."""
        return tenant_key(self.tenant, model)


EVERYBODY = Caller("anonymous", DEFAULT_TENANT, frozenset({"predict", "train", "admin"}))
"""The caller where nobody has to say who they are."""

NOBODY = Caller("nobody", "", frozenset())
"""Who makes a call that was not let in."""

# Without a default: a call that nobody let in must fail, not pass for everybody's.
_current: ContextVar[Caller] = ContextVar("caller")


def caller() -> Caller:
    """Who makes the call that is being served; raises LookupError outside of one."""
    return _current.get()


def enter(who: Caller) -> None:
    """Says who makes the call that begins in this task."""
    _current.set(who)
