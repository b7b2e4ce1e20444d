"""What to say when a model or a version is not there: what there is instead."""

import difflib

from service.errors import GraftError, InvalidInput, NotFound, Reason
from service.storage.database import Connection

_NEIGHBOURS = 40
_SHOWN = 10


def check_model(connection: Connection, name: str) -> None:
    """Raises what `model_not_found` makes when there is no such model."""
    if connection.execute("SELECT 1 FROM models WHERE name = ?", (name,)).fetchone() is None:
        raise model_not_found(connection, name)


def model_not_found(connection: Connection, name: str) -> GraftError:
    """The error for a model that does not exist; names close ones.

    Looks only at names that sort next to it, so that it stays cheap enough for
    the event loop however many models there are.
    """
    if not name:
        return InvalidInput(Reason.INVALID_FIELD, "model is empty: name one", field="model")
    shown = name if len(name) <= 80 else name[:77] + "..."
    rows = [
        *connection.execute(
            "SELECT name FROM models WHERE name >= ? ORDER BY name LIMIT ?", (name, _NEIGHBOURS)
        ),
        *connection.execute(
            "SELECT name FROM models WHERE name < ? ORDER BY name DESC LIMIT ?",
            (name, _NEIGHBOURS),
        ),
    ]
    near = difflib.get_close_matches(name[:80], [row["name"] for row in rows], n=3)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif rows:
        hint = "ListModels says which there are"
    else:
        hint = "there are no models yet; FineTune makes one"
    return NotFound(Reason.MODEL_NOT_FOUND, f"no model is called {shown!r}: {hint}")


def version_not_found(connection: Connection, model: str, version: int) -> NotFound:
    """The error for a version that does not exist; says which do."""
    rows = connection.execute(
        "SELECT version FROM versions WHERE model = ? ORDER BY version DESC LIMIT ?",
        (model, _SHOWN + 1),
    ).fetchall()
    numbers = sorted(row["version"] for row in rows[:_SHOWN])
    which = ", ".join(map(str, numbers))
    there = (
        f"its newest versions are {which}" if len(rows) > _SHOWN else f"its versions are {which}"
    )
    return NotFound(Reason.VERSION_NOT_FOUND, f"model {model} has no version {version}; {there}")
