"""Shows values in notebooks, as HTML. Every text is escaped: names may come from strangers."""

from collections.abc import Iterable
from html import escape

from graftml._escaping import escaped


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Returns a table of names and values, without those that have no value."""
    body = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>"
        for name, value in rows
        if value is not None and value != ""
    )
    return f"<table><caption>{_text(title)}</caption>{body}</table>"


def _text(value: object) -> str:
    return escape(escaped(str(value)))
