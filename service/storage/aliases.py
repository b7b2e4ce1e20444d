"""Aliases of a model's versions: where they point, and where they pointed before.

Owns the tables aliases and alias_moves. Every function works in its caller's
transaction, so that no move is ever without its trace. A rollback takes the
last move back; of an alias the last moves alone are kept.
"""

from collections.abc import Iterable, Sequence

import msgspec

from service.domain import LATEST, GateCheck, ModelKey
from service.errors import NotFound, OverQuota, Reason, WrongState
from service.ops import failpoints
from service.storage import version_rows
from service.storage.database import Connection

_MAX_MOVES = 100
"""Kept of each alias."""
_MAX_ALIASES = 100
"""Of a model, `latest` among them; all of them are read with it."""
_SHOWN = 10


def all_of(connection: Connection, model: ModelKey) -> dict[str, int]:
    """The model's aliases by name, and the version that each points to."""
    rows = connection.execute(
        "SELECT alias, version FROM aliases WHERE tenant = ? AND model = ? ORDER BY alias", model
    )
    return {row["alias"]: row["version"] for row in rows}


def version_of(connection: Connection, model: ModelKey, alias: str) -> int:
    """Where an alias points; raises NotFound (MODEL_NOT_FOUND or ALIAS_NOT_FOUND)."""
    row = connection.execute(
        "SELECT version FROM aliases WHERE tenant = ? AND model = ? AND alias = ?", (*model, alias)
    ).fetchone()
    if row is not None:
        return int(row["version"])
    version_rows.check_model(connection, model)
    if alias == LATEST:
        raise NotFound(Reason.ALIAS_NOT_FOUND, _no_latest(connection, model))
    rows = connection.execute(
        "SELECT alias FROM aliases WHERE tenant = ? AND model = ? ORDER BY alias LIMIT ?",
        (*model, _SHOWN + 1),
    )
    names = shown([row["alias"] for row in rows]) or "none"
    raise NotFound(
        Reason.ALIAS_NOT_FOUND, f"model {model.name} has no alias {alias[:80]!r}; it has {names}"
    )


def check_not_reserved(alias: str) -> None:
    """Raises WrongState (ALIAS_RESERVED) for `latest`, which nobody moves by hand."""
    if alias == LATEST:
        raise WrongState(
            Reason.ALIAS_RESERVED,
            f"the alias {LATEST} is moved by publishing, promoting and rolling back alone: use "
            "another name",
        )


def check_unnamed(connection: Connection, model: ModelKey) -> None:
    """Raises WrongState (MODEL_IN_USE) when the model has aliases other than `latest`."""
    named = {name: version for name, version in all_of(connection, model).items() if name != LATEST}
    if named:
        told = shown([f"{name} (version {version})" for name, version in named.items()])
        raise WrongState(
            Reason.MODEL_IN_USE,
            f"model {model.name} is called by {told}, and callers of these names would "
            "fail: delete the aliases first, or delete the model by force, "
            "with all its versions and aliases",
        )


def shown(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")


def point(connection: Connection, model: ModelKey, alias: str, version: int) -> None:
    """Moves an alias to a version, new or not. One that points there already does not move.

    Raises OverQuota (aliases) for a new one beside as many as a model may have.
    """
    before = connection.execute(
        "SELECT version FROM aliases WHERE tenant = ? AND model = ? AND alias = ?", (*model, alias)
    ).fetchone()
    if before is not None and before["version"] == version:
        return
    if before is None and alias != LATEST:
        _check_room(connection, model, alias)
    _set(connection, model, alias, version)
    last = connection.execute(
        "SELECT move, version FROM alias_moves WHERE tenant = ? AND model = ? AND alias = ?"
        " ORDER BY move DESC LIMIT 1",
        (*model, alias),
    ).fetchone()
    # When a version is deleted, its alias may go where it came from.
    if last is not None and last["version"] == version:
        return
    move = 1 if last is None else last["move"] + 1
    connection.execute(
        "INSERT INTO alias_moves (tenant, model, alias, move, version) VALUES (?, ?, ?, ?, ?)",
        (*model, alias, move, version),
    )
    connection.execute(
        "DELETE FROM alias_moves WHERE tenant = ? AND model = ? AND alias = ? AND move <= ?",
        (*model, alias, move - _MAX_MOVES),
    )


def roll_back(connection: Connection, model: ModelKey, alias: str) -> tuple[int, int]:
    """Takes an alias's last move back; answers with where it pointed and where it points now.

    Raises NotFound (MODEL_NOT_FOUND, ALIAS_NOT_FOUND) or WrongState
    (NO_EARLIER_VERSION).
    """
    now = version_of(connection, model, alias)
    # Two moves to one version lie side by side when what was between them is deleted.
    earlier = connection.execute(
        "SELECT move, version FROM alias_moves WHERE tenant = ? AND model = ? AND alias = ?"
        " AND version <> ? ORDER BY move DESC LIMIT 1",
        (*model, alias, now),
    ).fetchone()
    if earlier is None:
        instead = "promote or publish another one" if alias == LATEST else "point it to another one"
        raise WrongState(
            Reason.NO_EARLIER_VERSION,
            f"the alias {alias} of {model.name} points to version {now} and has no earlier "
            f"version to roll back to: {instead}",
        )
    connection.execute(
        "DELETE FROM alias_moves WHERE tenant = ? AND model = ? AND alias = ? AND move > ?",
        (*model, alias, earlier["move"]),
    )
    _set(connection, model, alias, earlier["version"])
    return now, int(earlier["version"])


def checked(
    connection: Connection,
    model: ModelKey,
    alias: str,
    checks: Iterable[GateCheck],
    compared_with: int | None,
) -> list[GateCheck]:
    """Returns a gate's checks; `not_worse` fails where `alias` has moved since the comparison.

    The trainer compared with the version that the alias pointed to when its attempt began, None
    where there was none. An alias that is gone leaves nothing to be worse than.
    """
    now = all_of(connection, model).get(alias)
    if now is None or now == compared_with:
        return list(checks)
    before = "none" if compared_with is None else f"version {compared_with}"
    detail = (
        f"the alias {alias} moved to version {now} while this version was made: it was compared "
        f"with {before}; promote it, or fine-tune again"
    )
    return [
        msgspec.structs.replace(check, verdict="failed", passed=False, detail=detail)
        if check.name == "not_worse" and check.passed
        else check
        for check in checks
    ]


def remove(connection: Connection, model: ModelKey, alias: str) -> None:
    """Deletes an alias with its moves."""
    which = (*model, alias)
    connection.execute("DELETE FROM aliases WHERE tenant = ? AND model = ? AND alias = ?", which)
    connection.execute(
        "DELETE FROM alias_moves WHERE tenant = ? AND model = ? AND alias = ?", which
    )


def forget_version(connection: Connection, model: ModelKey, version: int) -> None:
    """For a version that goes: no alias will be rolled back to it."""
    connection.execute(
        "DELETE FROM alias_moves WHERE tenant = ? AND model = ? AND version = ?", (*model, version)
    )


def forget_model(connection: Connection, model: ModelKey) -> None:
    """Deletes all aliases of a model that goes."""
    connection.execute("DELETE FROM aliases WHERE tenant = ? AND model = ?", model)
    connection.execute("DELETE FROM alias_moves WHERE tenant = ? AND model = ?", model)


def _check_room(connection: Connection, model: ModelKey, alias: str) -> None:
    (count,) = connection.execute(
        "SELECT COUNT(*) FROM aliases WHERE tenant = ? AND model = ?", model
    ).fetchone()
    if count >= _MAX_ALIASES:
        raise OverQuota(
            "aliases",
            f"model {model.name} has {count} aliases, and {alias} would be one more than "
            "the most allowed: delete one, or point one that is there",
        )


def _set(connection: Connection, model: ModelKey, alias: str, version: int) -> None:
    connection.execute(
        "INSERT INTO aliases (tenant, model, alias, version) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (tenant, model, alias) DO UPDATE SET version = excluded.version",
        (*model, alias, version),
    )
    failpoints.reach("alias.moved")


def _no_latest(connection: Connection, model: ModelKey) -> str:
    # A model without `latest` has candidates alone.
    rows = connection.execute(
        "SELECT version FROM versions WHERE tenant = ? AND model = ? ORDER BY version DESC LIMIT ?",
        (*model, _SHOWN),
    ).fetchall()
    numbers = ", ".join(str(row["version"]) for row in reversed(rows))
    return (
        f"no version of {model.name} is published: its only versions are candidates "
        f"({numbers}), which did not pass their gate; promote one, or ask for one by its "
        "number"
    )
