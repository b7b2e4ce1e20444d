"""Pagination: the size of a page, and the token that leads to the next.

A token holds the key of the last thing shown, so pages stay right while things
come and go. Callers must take it for opaque.
"""

import base64
import binascii
from collections.abc import Iterable
from typing import Any

import msgspec

from service.errors import bad_field

DEFAULT_SIZE = 50
MAX_SIZE = 1000
MAX_BYTES = 8 * 2**20
"""Limit on the text of a page, but for its last row: an answer must stay small enough to send."""

Key = tuple[str | float, ...]


def size(page_size: int) -> int:
    """The page size that is meant; raises InvalidInput (page_size) outside 0 to 1000."""
    if not 0 <= page_size <= MAX_SIZE:
        raise bad_field(
            "page_size",
            f"page_size is {page_size}: it must be 1 to {MAX_SIZE}, or 0 for {DEFAULT_SIZE}",
        )
    return page_size or DEFAULT_SIZE


def page(rows: Iterable[Any], limit: int, column: str) -> tuple[list[Any], bool]:
    """Reads the rows of one page; returns them, and whether more follow.

    A page ends at `limit` rows, or once what `column` holds, or counts, passes `MAX_BYTES`.
    """
    found: list[Any] = []
    size_bytes = 0
    for row in rows:
        if len(found) == limit or size_bytes > MAX_BYTES:
            return found, True
        found.append(row)
        held = row[column]
        size_bytes += held if isinstance(held, int) else len(held)
    return found, False


def token(kind: str, tenant: str, *key: str | float) -> str:
    """Returns the token for what follows `key` in a tenant's list called `kind`."""
    parts = msgspec.json.encode([kind, tenant, *key])
    return base64.urlsafe_b64encode(parts).decode().rstrip("=")


def key(kind: str, tenant: str, page_token: str, *shape: type) -> Key | None:
    """Returns the key in a token of a tenant's list, None for the first page.

    Raises InvalidInput (page_token) for a token of another list or tenant, or of none.
    """
    if not page_token:
        return None
    try:
        padded = page_token + "=" * (-len(page_token) % 4)
        parts = msgspec.json.decode(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError, msgspec.DecodeError):
        parts = None
    fits = (
        isinstance(parts, list)
        and len(parts) == len(shape) + 2
        and parts[:2] == [kind, tenant]
        and all(_is(part, want) for part, want in zip(parts[2:], shape, strict=True))
    )
    if not fits:
        raise bad_field(
            "page_token",
            "page_token is none that this list gave: send next_page_token of the page before, "
            "unchanged, or nothing for the first page",
        )
    return tuple(parts[2:])


def _is(part: object, want: type) -> bool:
    # A database's whole numbers end at 64 bits.
    return type(part) is want and not (isinstance(part, int) and abs(part) >= 2**63)
