"""Checks TIFF files before libtiff sees them: their first page alone, and its layout.

Pillow bounds what the tags of a page take; what is added here is what a small file could
make libtiff do: compressions that nobody uses, tiles far larger than the image, strips that
lie over each other, and JPEGs within that pass over their pixels without end. A camera's raw
file is a TIFF whose first page is a thumbnail: it is refused, since a thumbnail is not the image.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from service.engine.jpeg_scans import MAX_SCANS
from service.errors import InvalidInput, Reason

MAX_SEGMENTS: Final = 100_000
"""Strips or tiles of a page; whole-slide images have more."""
_MAX_TAGS: Final = 1000
_MOST_PADDING: Final = 4
"""Pixels of all tiles for each of the image, beyond `_SMALL`: tiles at its edges reach beyond."""
_SMALL: Final = 4_000_000

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_MAKE, _STRIP_OFFSETS, _SAMPLES, _STRIP_BYTES, _MOST_VALUE = 271, 273, 277, 279, 281
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_SAMPLE_FORMAT, _DNG_VERSION = 339, 50706
_READ: Final = frozenset({
    _SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _MAKE, _STRIP_OFFSETS, _SAMPLES,
    _STRIP_BYTES, _MOST_VALUE, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES,
    _SAMPLE_FORMAT, _DNG_VERSION,
})  # fmt: skip
_CODES: Final = {1: "B", 2: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
"""Types of values that are read, by their number, as `struct` names them."""
_JPEG: Final = 7
_COMPRESSIONS: Final = {1, 2, 3, 4, 5, _JPEG, 8, 32773, 32946}
_WHITE_IS_ZERO, _FILTER_ARRAY = 0, 32803
_FLOAT: Final = 3

Values = Sequence[int]


@dataclass(frozen=True)
class Page:
    """A TIFF file of one page."""

    data: bytes
    """The file without the pages behind the first."""
    declared_bits: int
    """How many bits of a sample are used, as the file says; 0 where it does not say."""
    is_white_zero: bool
    """The image is grey, and its largest value is black."""


def first_page(data: bytes) -> Page:
    """Checks the layout of a TIFF file's first page.

    Raises InvalidInput (IMAGE_UNREADABLE), or struct.error where the file is cut short.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    if data[8:10] == b"CR":
        raise _raw()
    offset, count_code, entry, count_at = (
        (struct.unpack_from(order + "Q", data, 8)[0], "Q", 20, 8)
        if is_big
        else (struct.unpack_from(order + "I", data, 4)[0], "H", 12, 4)
    )
    (count,) = struct.unpack_from(order + count_code, data, offset)
    if count > _MAX_TAGS:
        raise _bad(f"the TIFF has {count} tags, more than the {_MAX_TAGS} that are read")
    start = offset + struct.calcsize(order + count_code)
    tags: dict[int, Values] = {}
    for at in range(start, start + count * entry, entry):
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag in _READ and tag not in tags and kind in _CODES:
            tags[tag] = _values(data, order, at + 4, count_at, tag, _CODES[kind])
    next_at = start + count * entry
    if any(data[next_at : next_at + count_at]):
        data = b"".join((data[:next_at], bytes(count_at), data[next_at + count_at :]))
    _check(data, tags)
    bits = _first(tags, _BITS, 1)
    most = _first(tags, _MOST_VALUE, 0)
    # 16 says only how large a sample is: every file of such samples declares it.
    declared = most.bit_length() if most > 255 else bits if 8 < bits < 16 else 0
    is_grey = _first(tags, _SAMPLES, 1) == 1
    return Page(data, declared, is_grey and _first(tags, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO)


def _values(data: bytes, order: str, at: int, size: int, tag: int, code: str) -> Values:
    (count,) = struct.unpack_from(order + ("Q" if size == 8 else "I"), data, at)
    if count > MAX_SEGMENTS:
        raise _bad(f"the TIFF's tag {tag} has {count} values, more than {MAX_SEGMENTS}")
    fmt = f"{order}{count}{code}"
    at += size
    if struct.calcsize(fmt) > size:
        (at,) = struct.unpack_from(order + ("Q" if size == 8 else "I"), data, at)
    return struct.unpack_from(fmt, data, at)


def _check(data: bytes, tags: Mapping[int, Values]) -> None:
    is_thumbnail = _first(tags, _SUBFILE, 0) & 1 and _MAKE in tags
    if _DNG_VERSION in tags or is_thumbnail or _first(tags, _PHOTOMETRIC, 1) == _FILTER_ARRAY:
        raise _raw()
    compression = _first(tags, _COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        raise _bad(
            f"the TIFF's compression {compression} is not decoded: save it uncompressed, or with "
            "LZW, deflate, PackBits, JPEG or CCITT"
        )
    if _FLOAT in tags.get(_SAMPLE_FORMAT, ()):
        raise floats()
    offsets = tags.get(_TILE_OFFSETS) or tags.get(_STRIP_OFFSETS) or ()
    sizes = tags.get(_TILE_BYTES) or tags.get(_STRIP_BYTES) or ()
    # Writers get the size of a single strip wrong.
    if len(sizes) > 1 and sum(sizes) > len(data) + MAX_SEGMENTS:
        raise _bad("the TIFF's strips or tiles are larger than the file: they overlap")
    if compression == _JPEG:
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=False)]
        for start, end in zip(offsets, ends if len(ends) > 1 else [len(data)], strict=False):
            if data.count(b"\xff\xda", start, end) > MAX_SCANS:
                raise _bad(f"a JPEG in the TIFF has more than {MAX_SCANS} scans: save it again")
    if (width := _first(tags, _TILE_WIDTH, 0)) and (height := _first(tags, _TILE_HEIGHT, 0)):
        image = _first(tags, _WIDTH, 0), _first(tags, _HEIGHT, 0)
        tiled = -(-image[0] // width) * width * -(-image[1] // height) * height
        if tiled > _MOST_PADDING * image[0] * image[1] + _SMALL:
            raise _bad(
                f"the TIFF's tiles of {width} x {height} are far larger than its "
                f"{image[0]} x {image[1]} pixels: save it in strips"
            )


def floats() -> InvalidInput:
    """Makes the error for images of floating-point samples."""
    return _bad(
        "the image's samples are floating-point numbers, whose black and white no file says: "
        "scale them to 0..255 and save it as 8 bit, or to 0..65535 and as 16-bit grey"
    )


def _first(tags: Mapping[int, Values], tag: int, default: int) -> int:
    values = tags.get(tag)
    return values[0] if values else default


def _raw() -> InvalidInput:
    return _bad(
        "it is a camera's raw file, of which only a thumbnail could be read: develop it, and send "
        "JPEG, PNG or TIFF"
    )


def _bad(why: str) -> InvalidInput:
    return InvalidInput(Reason.IMAGE_UNREADABLE, why)
