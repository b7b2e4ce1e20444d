"""The log of changes that every replica must know, and the notices that say "look again".

Owns the tables `changes` and `counters`. A change has a kind and a key, never data: whoever
hears of one reads the tables again. Positions come from a counter's row, which is locked until
the commit: a sequence gives positions before they are committed, and who polls would miss some.
The writer's own replica hears at once, the others when they poll; a lost notice costs time alone.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Literal

from service.storage.database import Connection, Database, now_s

Kind = Literal["model", "pins", "image"]
"""`model`: its versions or aliases; `pins`: what its tenant keeps in memory; `image`: it was
erased, and is named by its digest."""

Listener = Callable[[str, str], None]
"""Gets a tenant and a name; two empty strings for everything."""

_PAGE = 1000


class Changes:
    """The change log, as one replica follows it; every method may be called from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._listeners: dict[Kind, list[Listener]] = {}
        self._noticed: set[int] = set()
        """Positions that this replica wrote and has heard of."""
        self._guard = threading.Lock()
        self._polling = threading.Lock()
        with database.read() as connection:
            self.position = _newest(connection)
            """The newest change that this replica has heard of."""

    def listen(self, kind: Kind, listener: Listener) -> None:
        """Calls `listener` for every change of a kind, from any thread.

        It must neither block nor raise.
        """
        self._listeners.setdefault(kind, []).append(listener)

    def note(self, connection: Connection, kind: Kind, tenant: str, name: str) -> int:
        """Writes a change in the caller's transaction; returns its position."""
        (position,) = connection.execute(
            "INSERT INTO counters (name, value) VALUES ('changes', 1)"
            " ON CONFLICT (name) DO UPDATE SET value = counters.value + 1 RETURNING value"
        ).fetchone()
        connection.execute(
            "INSERT INTO changes (position, time_s, kind, tenant, name) VALUES (?, ?, ?, ?, ?)",
            (position, now_s(connection), kind, tenant, name),
        )
        self._database.after_commit(partial(self._noted, int(position), kind, tenant, name))
        return int(position)

    def poll(self) -> None:
        """Hears of what other replicas have written since the last poll, or all where it is lost.

        Raises as `Database.read`.
        """
        with self._polling:
            while self._poll_page() == _PAGE:
                pass

    def trim(self, older_than_s: float) -> None:
        """Deletes changes that are older; a replica that missed one looks at everything again."""
        with self._database.transaction() as connection:
            connection.execute(
                "DELETE FROM changes WHERE time_s < ?", (now_s(connection) - older_than_s,)
            )

    def _poll_page(self) -> int:
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT position, kind, tenant, name FROM changes WHERE position > ?"
                " ORDER BY position LIMIT ?",
                (self.position, _PAGE),
            ).fetchall()
            newest = int(rows[-1]["position"]) if rows else _newest(connection)
        if newest - self.position > len(rows):
            for kind in self._listeners:
                self._tell(kind, "", "")
        with self._guard:
            noticed = self._noticed
            self._noticed = {position for position in noticed if position > newest}
        for row in rows:
            if row["position"] not in noticed:
                self._tell(row["kind"], row["tenant"], row["name"])
        self.position = newest
        return len(rows)

    def _noted(self, position: int, kind: Kind, tenant: str, name: str) -> None:
        with self._guard:
            self._noticed.add(position)
        self._tell(kind, tenant, name)

    def _tell(self, kind: Kind, tenant: str, name: str) -> None:
        for listener in self._listeners.get(kind, ()):
            listener(tenant, name)


def _newest(connection: Connection) -> int:
    row = connection.execute("SELECT value FROM counters WHERE name = 'changes'").fetchone()
    return 0 if row is None else int(row["value"])
