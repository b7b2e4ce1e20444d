"""The collector: deletes blobs that no row refers to, in two steps with an hour between them.

A blob is marked when nobody has put or referenced it for a while and no row names it, and its row
is deleted when that still holds an hour later; its object goes after the row, as does every
object whose row is not there: an intent comes before its object, and no generation comes again.
Which rows name blobs the foreign keys of the schema say, so that no table can be forgotten. Never
runs at the start, when what looks unneeded may be what another process is about to use. Several
collectors at once do no harm.
"""

import itertools
import logging
from dataclasses import dataclass

from service.ops import failpoints
from service.storage.blobs import BlobStore
from service.storage.database import Connection, Database, marks, now_s, references_to

_PAGE = 200
_TEMPORARY_S = 86_400.0
"""How long what a put left behind is left alone: longer than the largest takes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collected:
    """Counts what one run did."""

    marked: int
    deleted: int
    """Blobs, each with its object."""
    stray: int
    """Objects without a row: what a process that died left between two steps."""


class Collector:
    """Collects unneeded blobs whenever it is run."""

    def __init__(self, database: Database, store: BlobStore, *, grace_s: float = 3600.0) -> None:
        """`grace_s` is how long a blob is left alone before it is marked, and before it goes."""
        self._database = database
        self._store = store
        self._grace_s = grace_s

    def run(self) -> Collected:
        """Marks, deletes what was marked long enough ago, and objects without a row.

        Raises as `Database.transaction`, or OSError.
        """
        marked, deleted = self._mark(), 0
        while names := self._sweep():
            failpoints.reach("collector.swept")
            for name in names:
                self._store.delete(name)
            deleted += len(names)
        stray = self._delete_strays()
        self._store.sweep(_TEMPORARY_S)
        if marked or deleted or stray:
            log.info(
                "unneeded blobs were collected",
                extra={"marked": marked, "deleted": deleted, "stray": stray},
            )
        return Collected(marked, deleted, stray)

    def _mark(self) -> int:
        due = "doomed_s IS NULL AND touched_s <= ? AND "
        # Looked for beside all writers, and judged again by page: there may be a million of them.
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT digest FROM blobs WHERE {due}NOT {needed(connection)}",  # nosec B608  # noqa: S608
                (now_s(connection) - self._grace_s,),
            ).fetchall()
        marked = 0
        for start in range(0, len(rows), _PAGE):
            page = [row["digest"] for row in rows[start : start + _PAGE]]
            with self._database.transaction() as connection:
                now = now_s(connection)
                marked += connection.execute(
                    f"UPDATE blobs SET doomed_s = ? WHERE digest IN ({marks(page)})"  # nosec B608  # noqa: S608
                    f" AND {due}NOT {needed(connection)}",
                    (now, *page, now - self._grace_s),
                ).rowcount
        return marked

    def _sweep(self) -> list[str]:
        """Deletes rows that are unneeded still; returns their objects' names."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                "DELETE FROM blobs WHERE digest IN (SELECT digest FROM blobs"  # nosec B608  # noqa: S608
                f" WHERE doomed_s <= ? AND NOT {needed(connection)} LIMIT ?)"
                " RETURNING digest, generation",
                (now_s(connection) - self._grace_s, _PAGE),
            ).fetchall()
        return [f"{row['digest']}-{row['generation']}" for row in rows]

    def _delete_strays(self) -> int:
        stray = 0
        names = self._store.names()
        while page := list(itertools.islice(names, _PAGE)):
            with self._database.read() as connection:
                rows = connection.execute(
                    f"SELECT digest, generation FROM blobs WHERE digest IN ({marks(page)})",  # nosec B608  # noqa: S608
                    [name.partition("-")[0] for name in page],
                )
                known = {f"{row['digest']}-{row['generation']}" for row in rows}
            for name in page:
                if name not in known:
                    self._store.delete(name)
                    stray += 1
        return stray


def needed(connection: Connection) -> str:
    """Returns the condition that a row refers to a row of `blobs`."""
    named_by = (
        f" OR EXISTS (SELECT 1 FROM {table} WHERE {table}.{column} = blobs.digest)"  # nosec B608  # noqa: S608 - names of our schema
        for table, column in references_to(connection, "blobs")
    )
    return f"(1 = 0{''.join(named_by)})"


def needed_objects(connection: Connection) -> set[str]:
    """Returns the names of the objects that rows need."""
    rows = connection.execute(f"SELECT digest, generation FROM blobs WHERE {needed(connection)}")  # nosec B608  # noqa: S608
    return {f"{row['digest']}-{row['generation']}" for row in rows}
