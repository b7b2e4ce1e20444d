"""Counts the scans of a JPEG without decoding any.

A progressive JPEG may pass over all of its pixels as often as it likes, at some ten
bytes a pass: a file of 100 kB can cost minutes. Encoders write about ten scans, at
most a few dozen.
"""

import re
from typing import Final

MAX_SCANS: Final = 64

_SCAN: Final = b"\xff\xda"
_END: Final = 0xD9
# In a scan's data 0xFF is followed by 0 or by a restart; elsewhere bytes of 0xFF pad.
_MARKER: Final = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_ALONE: Final = frozenset({0x01, 0xD8})
"""Markers without a length."""


def has_too_many(data: bytes) -> bool:
    """Whether there are more than MAX_SCANS; False for what is no JPEG."""
    # Metadata may hold the same two bytes, so that this alone says nothing.
    if not data.startswith(b"\xff\xd8") or data.count(_SCAN) <= MAX_SCANS:
        return False
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = found[1][0], found.end()
        if marker == _END:
            return False
        if marker in _ALONE:
            continue
        scans += marker == _SCAN[1]
        if scans > MAX_SCANS:
            return True
        at += int.from_bytes(data[at : at + 2], "big")
    return False
