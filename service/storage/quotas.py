"""Quotas of stored bytes: what a tenant stores, and whether there is room for more.

Each store reports what its own tables say. Works in its caller's transaction. The limit is
handed in: who may store how much is the operator's.
"""

from collections.abc import Callable, Sequence

from service.errors import OverQuota
from service.storage.database import Connection

Stored = Callable[[Connection, str], int]
"""Counts the bytes that one store holds for a tenant."""

_MB = 2**20
_MAKE_ROOM = "delete datasets, versions or jobs that you do not need, or ask the operator for more"


class Quotas:
    """Adds up what the stores report."""

    def __init__(self, stores: Sequence[Stored]) -> None:
        self._stores = stores

    def stored_bytes(self, connection: Connection, tenant: str) -> int:
        """Counts what all that a tenant stores takes; what several versions share counts once."""
        return sum(stored(connection, tenant) for stored in self._stores)

    def check_version(self, connection: Connection, tenant: str, limit: int | None) -> None:
        """Raises OverQuota (stored_bytes) for a version whose row has just been written."""
        if limit is None or (used := self.stored_bytes(connection, tenant)) <= limit:
            return
        raise OverQuota(
            "stored_bytes",
            "with this version your datasets, versions, backbones and jobs would take "
            f"{_mb(used)} of the {_mb(limit)} that you may store: {_MAKE_ROOM}; then fine-tune "
            "again, which is quick where the images' features are kept",
        )


def check_room(used: int, asked: int, bound: int | None) -> None:
    """Raises OverQuota (stored_bytes) where `asked` bytes more are over the bound.

    At the bound nothing more is taken, 0 bytes neither. None means no bound.
    """
    if bound is None or (used < bound and used + asked <= bound):
        return
    brings = f"this would add {_mb(asked)} to it" if asked else "this would add to it"
    raise OverQuota(
        "stored_bytes",
        f"your datasets, versions, backbones and jobs take {_mb(used)} of the {_mb(bound)} that "
        f"you may store, and {brings}: {_MAKE_ROOM}",
    )


def _mb(size: int) -> str:
    return f"{size / _MB:.4g} MB"
