"""Holds: a job keeps what it works with from being deleted.

Owns the table `holds`. Every function works in its caller's transaction. A holder is a job's
id; only what has not ended holds anything.
"""

from collections.abc import Iterable
from typing import Literal

from service.storage.database import Connection

Kind = Literal["dataset", "backbone"]

_SHOWN = 4
"""One more than a message names."""


def hold(
    connection: Connection, tenant: str, kind: Kind, names: Iterable[str], holder: str
) -> None:
    """Keeps things of a tenant from being deleted until `release`; idempotent."""
    connection.executemany(
        "INSERT INTO holds (tenant, kind, name, holder) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        [(tenant, kind, name, holder) for name in names],
    )


def release(connection: Connection, holder: str) -> None:
    """Ends all holds of a holder; one without any is fine."""
    connection.execute("DELETE FROM holds WHERE holder = ?", (holder,))


def holders(connection: Connection, tenant: str, kind: Kind, name: str) -> list[str]:
    """Returns the first holders of a thing, sorted; empty where it may be deleted."""
    rows = connection.execute(
        "SELECT holder FROM holds WHERE tenant = ? AND kind = ? AND name = ?"
        " ORDER BY holder LIMIT ?",
        (tenant, kind, name, _SHOWN),
    )
    return [row["holder"] for row in rows]
