"""Reads what comes before a GIF's first image, and how large that makes it; decodes nothing.

Pillow passes over comments block by block in Python: tens of megabytes of blocks of one byte
would take it many seconds. And it fills a frame that is to be cleared as soon as it is read,
gigabytes for a few bytes.
"""

import struct
from typing import Final

from service.errors import InvalidInput, Reason

MAX_BLOCKS: Final = 20_000
"""Blocks of at most 255 bytes; a comment or a colour profile needs a few hundred."""

_HEADER: Final = 13
_EXTENSION, _FRAME = 0x21, 0x2C


def size(data: bytes) -> tuple[int, int]:
    """Reads the width and the height of a GIF: of its canvas, and of a first frame beyond it.

    Both in pixels. Raises InvalidInput (IMAGE_UNREADABLE) where more than MAX_BLOCKS come
    before that frame, and struct.error or IndexError for a file that is cut short.
    """
    width, height = struct.unpack_from("<HH", data, 6)
    at = _HEADER
    if data[10] & 0x80:
        at += 3 << ((data[10] & 7) + 1)
    for _ in range(MAX_BLOCKS):
        kind = data[at]
        if kind == _FRAME:
            left, top, wide, high = struct.unpack_from("<4H", data, at + 1)
            return max(width, left + wide), max(height, top + high)
        # Anything else between the blocks is passed over, as Pillow does.
        at = _after_blocks(data, at + 2) if kind == _EXTENSION else at + 1
    raise _too_many()


def _after_blocks(data: bytes, at: int) -> int:
    for _ in range(MAX_BLOCKS):
        if not data[at]:
            return at + 1
        at += data[at] + 1
    raise _too_many()


def _too_many() -> InvalidInput:
    return InvalidInput(
        Reason.IMAGE_UNREADABLE,
        f"more than {MAX_BLOCKS} blocks come before the GIF's first image: save it again",
    )
