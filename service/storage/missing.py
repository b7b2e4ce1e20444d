"""Errors of models and versions that are not there; they name what there is instead."""

import difflib

from service.domain import ModelKey
from service.errors import GraftError, InvalidInput, NotFound, Reason
from service.storage.database import Connection

_NEIGHBOURS = 8
"""Names compared on either side of the one that is missing."""
_COMPARED = 40
"""Characters of them: a comparison of long names takes up to 2 ms, on the event loop too."""
_SHOWN = 10


def check_model(connection: Connection, model: ModelKey) -> None:
    """Raises what `model_not_found` makes when there is no such model."""
    found = connection.execute("SELECT 1 FROM models WHERE tenant = ? AND name = ?", model)
    if found.fetchone() is None:
        raise model_not_found(connection, model)


def model_not_found(connection: Connection, model: ModelKey) -> GraftError:
    """Makes the error for a model that does not exist; it names close ones.

    Looks only at names that sort next to it, so that it stays cheap enough for
    the event loop however many models there are.
    """
    tenant, name = model
    if not name:
        return InvalidInput(Reason.INVALID_FIELD, "model is empty: name one", field="model")
    shown = name if len(name) <= 80 else name[:77] + "..."
    rows = [
        *connection.execute(
            "SELECT name FROM models WHERE tenant = ? AND name >= ? ORDER BY name LIMIT ?",
            (tenant, name, _NEIGHBOURS),
        ),
        *connection.execute(
            "SELECT name FROM models WHERE tenant = ? AND name < ? ORDER BY name DESC LIMIT ?",
            (tenant, name, _NEIGHBOURS),
        ),
    ]
    names = {row["name"][:_COMPARED]: row["name"] for row in rows}
    near = difflib.get_close_matches(name[:_COMPARED], names, n=3)
    if near:
        hint = f"did you mean {' or '.join(names[each] for each in near)}?"
    elif rows:
        hint = "ListModels says which there are"
    else:
        hint = "there are no models yet; FineTune makes one"
    return NotFound(Reason.MODEL_NOT_FOUND, f"no model is called {shown!r}: {hint}")


def version_not_found(connection: Connection, model: ModelKey, version: int) -> NotFound:
    """Makes the error for a version that does not exist; it names those that do."""
    rows = connection.execute(
        "SELECT version FROM versions WHERE tenant = ? AND model = ? ORDER BY version DESC LIMIT ?",
        (*model, _SHOWN + 1),
    ).fetchall()
    numbers = sorted(row["version"] for row in rows[:_SHOWN])
    which = ", ".join(map(str, numbers))
    there = (
        f"its newest versions are {which}" if len(rows) > _SHOWN else f"its versions are {which}"
    )
    return NotFound(
        Reason.VERSION_NOT_FOUND, f"model {model.name} has no version {version}; {there}"
    )
