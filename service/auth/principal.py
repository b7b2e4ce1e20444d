"""Principals: a token's id, tenant and roles; one is bound to the task that serves its call."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from service.auth.quota import Quota
from service.domain import DEFAULT_TENANT, ModelKey

Role = Literal["predict", "train", "admin"]
"""Counts within the principal's tenant; `admin` includes the other two."""


@dataclass(frozen=True)
class Principal:
    """An authenticated caller."""

    name: str
    """The token's id, for logs; never the token."""
    tenant: str
    roles: frozenset[Role]
    quota: Quota = field(default_factory=Quota)
    token_sha256: str = field(default="", repr=False, compare=False)
    """SHA-256 of the secret that was presented, in hex; empty where no token is needed."""

    def key(self, model: str) -> ModelKey:
        """Returns the key of a model of this principal's tenant, for any name that was sent."""
        return ModelKey(self.tenant, model)


EVERYBODY = Principal("anonymous", DEFAULT_TENANT, frozenset({"predict", "train", "admin"}))
"""The principal of every call where no token is needed."""

UNAUTHENTICATED = Principal("unauthenticated", "", frozenset())
"""Stands for the principal of a call that was not admitted."""

# No default: a call that was never admitted must fail, not pass for everybody's.
_current: ContextVar[Principal] = ContextVar("principal")


def current() -> Principal:
    """Returns the principal of the call that is being served; raises LookupError outside one."""
    return _current.get()


def enter(principal: Principal) -> None:
    """Sets the principal of the call that this task serves."""
    _current.set(principal)
