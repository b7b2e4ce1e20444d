"""Shows texts, of which some come from strangers: on terminals, and in notebooks as HTML.

Escapes what a terminal obeys rather than shows: names of files and classes may hold it. Texts of
a server go through it before a terminal gets them, and names of local files before a server does.
"""

import unicodedata
from collections.abc import Iterable
from html import escape
from typing import Final

_OBEYED: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: controls, format characters, halves of characters, line ends."""
_JOINERS: Final = "\u200c\u200d"
"""Format characters that Persian, Hindi and many emoji are spelled with."""


def escaped(text: str, keep: str = "") -> str:
    r"""Returns the text with each such character as `\x1b` or `\u202e`, but for those to keep."""
    if text.isprintable():
        return text
    kept = keep + _JOINERS
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _OBEYED and char not in kept
        else char
        for char in text
    )


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
