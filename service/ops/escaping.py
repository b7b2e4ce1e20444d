"""Escapes characters that a terminal, a log or a page would obey instead of showing.

Names of files and texts in requests may hold them: escape sequences that set a terminal's
title or its clipboard, line ends that forge a line of a log, and marks that turn the text
around, so that one name looks like another.
"""

import re
import unicodedata
from typing import Final

_OBEYED: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: controls, format characters, halves of characters, line ends."""
_JOINERS: Final = "\u200c\u200d"
"""Format characters that Persian, Hindi and many emoji are spelled with."""
_TURNING: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_PERHAPS: Final = re.compile(r"[^ -~]")


def escaped(text: str, keep: str = "") -> str:
    r"""Returns the text with each such character as `\x1b` or `\u202e`, but for those to keep."""
    return _PERHAPS.sub(
        lambda found: _escape(found[0]) if found[0] not in keep + _JOINERS else found[0], text
    )


def may_name(text: str) -> bool:
    """Tells whether a name of a class or a dataset may hold these characters.

    Marks that turn the text are refused in pairs alone: Hebrew and Arabic need the single
    ones, and many texts hold format characters by accident.
    """
    return not any(
        char in _TURNING or unicodedata.category(char) in _OBEYED - {"Cf"} for char in text
    )


def _escape(char: str) -> str:
    if unicodedata.category(char) not in _OBEYED:
        return char
    return char.encode("unicode_escape").decode()
