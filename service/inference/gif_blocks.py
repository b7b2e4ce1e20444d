"""Counts what stands before a GIF's first image, without decoding any.

Pillow passes over comments block by block in Python: tens of megabytes of blocks of one byte
would take it many seconds.
"""

from typing import Final

MAX_BLOCKS: Final = 20_000
"""Blocks of at most 255 bytes; a comment or a colour profile needs a few hundred."""

_HEADER: Final = 13
_EXTENSION: Final = 0x21


def has_too_many(data: bytes) -> bool:
    """Whether more than MAX_BLOCKS stand before the first image."""
    at = _HEADER
    if len(data) > 10 and data[10] & 0x80:
        at += 3 << ((data[10] & 7) + 1)
    blocks = 0
    while at + 2 < len(data) and data[at] in (_EXTENSION, 0):
        # Zeros between the blocks are passed over, as Pillow does.
        if data[at] == 0:
            at += 1
        else:
            at += 2
            while at < len(data) and data[at] and blocks <= MAX_BLOCKS:
                at += data[at] + 1
                blocks += 1
            at += 1
        blocks += 1
        if blocks > MAX_BLOCKS:
            return True
    return False
