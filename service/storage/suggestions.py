"""What to say when a model or a version is not there: what there is of the same tenant instead.

Models are named by their keys, in messages by what their tenants call them.
"""

import difflib

from service.domain import plain_name, tenant_of
from service.errors import GraftError, InvalidInput, NotFound, Reason
from service.storage.database import Connection

_NEIGHBOURS = 8
"""Names compared on either side of the one that is missing."""
_COMPARED = 40
"""Characters of them: a comparison of long names takes up to 2 ms, on the event loop too."""
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
    tenant, plain = tenant_of(name), plain_name(name)
    if not plain:
        return InvalidInput(Reason.INVALID_FIELD, "model is empty: name one", field="model")
    shown = plain if len(plain) <= 80 else plain[:77] + "..."
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
    names = {plain_name(row["name"])[:_COMPARED]: plain_name(row["name"]) for row in rows}
    near = difflib.get_close_matches(plain[:_COMPARED], names, n=3)
    if near:
        hint = f"did you mean {' or '.join(names[each] for each in near)}?"
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
    return NotFound(
        Reason.VERSION_NOT_FOUND, f"model {plain_name(model)} has no version {version}; {there}"
    )
