"""Bounds what a small image file can make its decoder do, before anything is decoded.

Images come from strangers, and decoders (libjpeg, libtiff, libheif, Pillow) do what a file says.
What is checked of each format, and why, stands above its part.
"""

import ctypes
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

import _pi_heif
from PIL import _imaging

from service.errors import InvalidInput, Reason


def unreadable(why: str) -> InvalidInput:
    """Makes the error of an image that is not decoded."""
    return InvalidInput(Reason.IMAGE_UNREADABLE, why)


# JPEG
#
# A progressive JPEG may pass over all of its pixels as often as it likes, at some ten
# bytes a pass: a file of 100 kB can cost minutes. Encoders write about ten scans, at
# most a few dozen.

MAX_SCANS: Final = 64
MAX_JPEG_SEGMENTS: Final = 10_000
"""Pillow and we go through them in Python, a microsecond each: megabytes of empty ones would take
seconds. A large colour profile has 255."""

_SCAN: Final = 0xDA
_SEQUENTIAL: Final = frozenset({0xC0, 0xC1})
"""Frames that are not progressive."""
_JPEG_END: Final = 0xD9
# In a scan's data 0xFF is followed by 0 or by a restart; elsewhere bytes of 0xFF pad.
_JPEG_MARKER: Final = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_MARKERS_ALONE: Final = frozenset({0x01, 0xD8})
"""Markers without a length."""


def is_endless_jpeg(data: bytes) -> bool:
    """Tells whether a JPEG has more than MAX_SCANS or MAX_JPEG_SEGMENTS; False for other bytes."""
    if not data.startswith(b"\xff\xd8"):
        return False
    segments, scans, components, at = 0, 0, 0, 2
    while (found := _JPEG_MARKER.search(data, at)) is not None:
        marker, at = found[1][0], found.end()
        segments += 1
        if segments > MAX_JPEG_SEGMENTS:
            return True
        if marker == _JPEG_END:
            return False
        if marker in _MARKERS_ALONE:
            continue
        if marker in _SEQUENTIAL:
            (components,) = data[at + 7 : at + 8] or b"\0"
        elif marker == _SCAN:
            scans += 1
            # One whose first scan has all components, as nearly every photo, has no other that a
            # decoder reads; to look through its data would hold up other threads.
            if scans == 1 and components and data[at + 2 : at + 3] == bytes([components]):
                return False
            if scans > MAX_SCANS:
                return True
        at += int.from_bytes(data[at : at + 2], "big")
    return False


# GIF
#
# Reads what comes before a GIF's first image, and how large that makes it; decodes nothing.
#
# Pillow passes over comments block by block in Python: tens of megabytes of blocks of one byte
# would take it many seconds. And it fills a frame that is to be cleared as soon as it is read,
# gigabytes for a few bytes.

MAX_GIF_BLOCKS: Final = 20_000
"""Blocks of at most 255 bytes; a comment or a colour profile needs a few hundred."""

_GIF_HEADER: Final = 13
_GIF_EXTENSION, _GIF_FRAME = 0x21, 0x2C


def gif_size(data: bytes) -> tuple[int, int]:
    """Reads the width and the height of a GIF: of its canvas, and of a first frame beyond it.

    Both in pixels. Raises InvalidInput (IMAGE_UNREADABLE) where more than MAX_GIF_BLOCKS come
    before that frame, and struct.error or IndexError for a file that is cut short.
    """
    width, height = struct.unpack_from("<HH", data, 6)
    at = _GIF_HEADER
    if data[10] & 0x80:
        at += 3 << ((data[10] & 7) + 1)
    for _ in range(MAX_GIF_BLOCKS):
        kind = data[at]
        if kind == _GIF_FRAME:
            left, top, wide, high = struct.unpack_from("<4H", data, at + 1)
            return max(width, left + wide), max(height, top + high)
        # Anything else between the blocks is passed over, as Pillow does.
        at = _after_gif_blocks(data, at + 2) if kind == _GIF_EXTENSION else at + 1
    raise _too_many_blocks()


def _after_gif_blocks(data: bytes, at: int) -> int:
    for _ in range(MAX_GIF_BLOCKS):
        if not data[at]:
            return at + 1
        at += data[at] + 1
    raise _too_many_blocks()


def _too_many_blocks() -> InvalidInput:
    return unreadable(
        f"more than {MAX_GIF_BLOCKS} blocks come before the GIF's first image: save it again"
    )


# TIFF
#
# Checks TIFF files before libtiff sees them: their first page alone, and its layout.
#
# Pillow bounds what the tags of a page take; what is added here is what a small file could
# make libtiff do: compressions that nobody uses, tiles far larger than the image, strips that
# lie over each other, and JPEGs within that pass over their pixels without end. A camera's raw
# file is a TIFF whose first page is a thumbnail: it is refused, since a thumbnail is not the image.

MAX_TIFF_SEGMENTS: Final = 100_000
"""Strips or tiles of a page; whole-slide images have more."""
_MAX_TAGS: Final = 1000
_MOST_TILE_PIXELS: Final = 4
"""Pixels of all tiles for each of the image, beyond `_SMALL_TIFF`: tiles overlap its edges."""
_SMALL_TIFF: Final = 4_000_000

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

_Values = Sequence[int]


@dataclass(frozen=True)
class TiffPage:
    """A TIFF file of one page."""

    data: bytes
    """The file without the pages behind the first."""
    declared_bits: int
    """How many bits of a sample are used, as the file says; 0 where it does not say."""
    is_white_zero: bool
    """The image is grey, and its largest value is black."""


def tiff_page(data: bytes) -> TiffPage:
    """Checks the layout of a TIFF file's first page.

    Raises InvalidInput (IMAGE_UNREADABLE), or struct.error where the file is cut short.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    if data[8:10] == b"CR":
        raise _raw_file()
    offset, count_code, entry, count_at = (
        (struct.unpack_from(order + "Q", data, 8)[0], "Q", 20, 8)
        if is_big
        else (struct.unpack_from(order + "I", data, 4)[0], "H", 12, 4)
    )
    (count,) = struct.unpack_from(order + count_code, data, offset)
    if count > _MAX_TAGS:
        raise unreadable(f"the TIFF has {count} tags, more than the {_MAX_TAGS} that are read")
    start = offset + struct.calcsize(order + count_code)
    tags: dict[int, _Values] = {}
    for at in range(start, start + count * entry, entry):
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag in _READ and tag not in tags and kind in _CODES:
            tags[tag] = _tiff_values(data, order, at + 4, count_at, tag, _CODES[kind])
    next_at = start + count * entry
    if any(data[next_at : next_at + count_at]):
        data = b"".join((data[:next_at], bytes(count_at), data[next_at + count_at :]))
    _check_tiff(data, tags)
    bits = _first(tags, _BITS, 1)
    most = _first(tags, _MOST_VALUE, 0)
    # 16 says only how large a sample is: every file of such samples declares it.
    declared = most.bit_length() if most > 255 else bits if 8 < bits < 16 else 0
    is_grey = _first(tags, _SAMPLES, 1) == 1
    return TiffPage(data, declared, is_grey and _first(tags, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO)


def _tiff_values(data: bytes, order: str, at: int, size: int, tag: int, code: str) -> _Values:
    (count,) = struct.unpack_from(order + ("Q" if size == 8 else "I"), data, at)
    if count > MAX_TIFF_SEGMENTS:
        raise unreadable(f"the TIFF's tag {tag} has {count} values, more than {MAX_TIFF_SEGMENTS}")
    fmt = f"{order}{count}{code}"
    at += size
    if struct.calcsize(fmt) > size:
        (at,) = struct.unpack_from(order + ("Q" if size == 8 else "I"), data, at)
    return struct.unpack_from(fmt, data, at)


def _check_tiff(data: bytes, tags: Mapping[int, _Values]) -> None:
    is_thumbnail = _first(tags, _SUBFILE, 0) & 1 and _MAKE in tags
    if _DNG_VERSION in tags or is_thumbnail or _first(tags, _PHOTOMETRIC, 1) == _FILTER_ARRAY:
        raise _raw_file()
    compression = _first(tags, _COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        raise unreadable(
            f"the TIFF's compression {compression} is not decoded: save it uncompressed, or with "
            "LZW, deflate, PackBits, JPEG or CCITT"
        )
    if _FLOAT in tags.get(_SAMPLE_FORMAT, ()):
        raise float_samples()
    offsets = tags.get(_TILE_OFFSETS) or tags.get(_STRIP_OFFSETS) or ()
    sizes = tags.get(_TILE_BYTES) or tags.get(_STRIP_BYTES) or ()
    # Writers get the size of a single strip wrong.
    if len(sizes) > 1 and sum(sizes) > len(data) + MAX_TIFF_SEGMENTS:
        raise unreadable("the TIFF's strips or tiles are larger than the file: they overlap")
    if compression == _JPEG:
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=False)]
        for start, end in zip(offsets, ends if len(ends) > 1 else [len(data)], strict=False):
            if data.count(b"\xff\xda", start, end) > MAX_SCANS:
                raise unreadable(
                    f"a JPEG in the TIFF has more than {MAX_SCANS} scans: save it again"
                )
    if (width := _first(tags, _TILE_WIDTH, 0)) and (height := _first(tags, _TILE_HEIGHT, 0)):
        image = _first(tags, _WIDTH, 0), _first(tags, _HEIGHT, 0)
        tiled = -(-image[0] // width) * width * -(-image[1] // height) * height
        if tiled > _MOST_TILE_PIXELS * image[0] * image[1] + _SMALL_TIFF:
            raise unreadable(
                f"the TIFF's tiles of {width} x {height} are far larger than its "
                f"{image[0]} x {image[1]} pixels: save it in strips"
            )


def float_samples() -> InvalidInput:
    """Makes the error for images of floating-point samples."""
    return unreadable(
        "the image's samples are floating-point numbers, whose black and white no file says: "
        "scale them to 0..255 and save it as 8 bit, or to 0..65535 and as 16-bit grey"
    )


def _first(tags: Mapping[int, _Values], tag: int, default: int) -> int:
    values = tags.get(tag)
    return values[0] if values else default


def _raw_file() -> InvalidInput:
    return unreadable(
        "it is a camera's raw file, of which only a thumbnail could be read: develop it, and send "
        "JPEG, PNG or TIFF"
    )


# HEIC
#
# Checks HEIC files before libheif sees them: how much would be decoded for one image.
#
# An image may be put together of up to a thousand others, as a grid or as layers, each of which
# may be as large as the largest that are decoded and hardly take a byte: libheif decodes them
# all, whatever of them is seen. The box `meta` of a file lists its images (ISO/IEC 23008-12).

_SINGLE_BOXES: Final = (b"pitm", b"iref", b"iprp")
_MOST_HEIF_BOXES: Final = 10_000
_DEEPEST_HEIF: Final = 8
"""Levels of images that are put together of others, put together themselves."""


@dataclass
class _HeifItems:
    primary: int = 0
    parts: dict[int, list[int]] = field(default_factory=dict)
    """The images that an image is put together of (`dimg`)."""
    beside: dict[int, list[int]] = field(default_factory=dict)
    """The images that belong to an image, such as its transparency (`auxl`)."""
    pixels: dict[int, int] = field(default_factory=dict)


def check_heif(data: bytes, most: int) -> None:
    """Refuses a file for whose primary image more than `most` pixels would be decoded.

    Raises InvalidInput (IMAGE_UNREADABLE), and struct.error or IndexError for a file that is
    cut short.
    """
    metas = [body for kind, body in _heif_boxes(memoryview(data)) if kind == b"meta"]
    if len(metas) > 1:
        raise _bad_heif("has more than one directory of images")
    # Without one it is a sequence or the short form of a single image, which libheif bounds.
    if (
        metas
        and (pixels := _heif_pixels(items := _heif_items(metas[0][4:]), items.primary, 0, {}))
        > most
    ):
        raise _bad_heif(f"is put together of images with {pixels} pixels in all, more than {most}")


def _heif_pixels(items: _HeifItems, item: int, depth: int, known: dict[int, int]) -> int:
    if depth > _DEEPEST_HEIF:
        raise _bad_heif(f"is put together of images more than {_DEEPEST_HEIF} times over")
    if item not in known:
        # The size of an image that is put together counts too: its canvas is filled.
        others = (*items.parts.get(item, ()), *items.beside.get(item, ()))
        known[item] = items.pixels.get(item, 0) + sum(
            _heif_pixels(items, other, depth + 1, known) for other in others
        )
    return known[item]


def _heif_items(meta: memoryview) -> _HeifItems:
    items = _HeifItems()
    seen: set[bytes] = set()
    for kind, body in _heif_boxes(meta):
        if kind in _SINGLE_BOXES and kind in seen:
            raise _bad_heif("has more than one list of its images")
        seen.add(kind)
        if kind == b"pitm":
            (items.primary,) = struct.unpack_from(">I" if body[0] else ">H", body, 4)
        elif kind == b"iref":
            _heif_references(items, body)
        elif kind == b"iprp":
            _heif_sizes(items, body)
    return items


def _heif_references(items: _HeifItems, body: memoryview) -> None:
    code = "I" if body[0] else "H"
    for kind, reference in _heif_boxes(body[4:]):
        source, count = struct.unpack_from(f">{code}H", reference, 0)
        targets = struct.unpack_from(f">{count}{code}", reference, struct.calcsize(f">{code}H"))
        if kind == b"dimg":
            items.parts.setdefault(source, []).extend(targets)
        elif kind == b"auxl":
            for target in targets:
                items.beside.setdefault(target, []).append(source)


def _heif_sizes(items: _HeifItems, body: memoryview) -> None:
    boxes = list(_heif_boxes(body))
    sizes: list[int] = []
    for properties in (inner for kind, inner in boxes if kind == b"ipco"):
        for name, value in _heif_boxes(properties):
            width, height = struct.unpack_from(">II", value, 4) if name == b"ispe" else (0, 0)
            sizes.append(width * height)
    for associations in (inner for kind, inner in boxes if kind == b"ipma"):
        _heif_associations(items, associations, sizes)


def _heif_associations(items: _HeifItems, body: memoryview, sizes: list[int]) -> None:
    id_code = "I" if body[0] else "H"
    index_code, mask = (">H", 0x7FFF) if body[3] & 1 else (">B", 0x7F)
    (count,) = struct.unpack_from(">I", body, 4)
    if count > _MOST_HEIF_BOXES:
        raise _bad_heif(f"has more than {_MOST_HEIF_BOXES} images")
    at = 8
    for _ in range(count):
        item, properties = struct.unpack_from(f">{id_code}B", body, at)
        at += struct.calcsize(f">{id_code}B")
        for _ in range(properties):
            index = struct.unpack_from(index_code, body, at)[0] & mask
            at += struct.calcsize(index_code)
            if 0 < index <= len(sizes):
                items.pixels[item] = max(items.pixels.get(item, 0), sizes[index - 1])


def _heif_boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yields the type and the content of each box."""
    at = 0
    for _ in range(_MOST_HEIF_BOXES):
        if at + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        end = at + size if size else len(data)
        if end < at + head:
            raise _bad_heif("is damaged: a box is smaller than its own beginning")
        yield kind, data[at + head : end]
        at = end
    raise _bad_heif(f"has more than {_MOST_HEIF_BOXES} boxes")


def _bad_heif(why: str) -> InvalidInput:
    return unreadable(f"the HEIC file {why}: save it as JPEG or PNG")


# The libraries themselves
#
# Sets limits within libheif, and keeps libtiff from printing.
#
# pi-heif and Pillow bring these libraries and offer none of this, so it is set in the libraries
# themselves, by what their headers declare. It holds for the whole process, and is set before
# anything is decoded.

MAX_HEIF_TILES: Final = 4096
"""Tiles of one HEIC image; a phone's has some fifty."""
MAX_HEIF_BYTES: Final = 1_500_000_000
"""Bytes that libheif may hold at once while it decodes one file."""


class _HeifLimits(ctypes.Structure):
    """The beginning of `struct heif_security_limits` (libheif/heif_security.h), version 2 on."""

    _fields_: ClassVar = [
        ("version", ctypes.c_uint8),
        ("max_image_size_pixels", ctypes.c_uint64),
        ("max_number_of_tiles", ctypes.c_uint64),
        ("max_bayer_pattern_pixels", ctypes.c_uint32),
        ("max_items", ctypes.c_uint32),
        ("max_color_profile_size", ctypes.c_uint32),
        ("max_memory_block_size", ctypes.c_uint64),
        ("max_components", ctypes.c_uint32),
        ("max_iloc_extents_per_item", ctypes.c_uint32),
        ("max_size_entity_group", ctypes.c_uint32),
        ("max_children_per_box", ctypes.c_uint32),
        ("max_total_memory", ctypes.c_uint64),
    ]


def limit_libraries(max_pixels: int) -> None:
    """Limits what libheif decodes, and stops libtiff's messages on standard error.

    The size in a HEIC file's header is that after cropping, which Pillow reports; what is
    coded may be far larger, and is bounded here alone. Raises RuntimeError for a libheif
    whose limits cannot be found, or lie elsewhere than its header says.
    """
    get_limits = getattr(ctypes.CDLL(_pi_heif.__file__), "heif_get_global_security_limits", None)
    if get_limits is None:
        raise RuntimeError("pi-heif hides its libheif: install its wheel")
    get_limits.restype = ctypes.POINTER(_HeifLimits)
    limits = get_limits().contents
    if limits.version < 2 or limits.max_image_size_pixels not in (2**30, max_pixels):
        raise RuntimeError("libheif's limits are not where they were: take another pi-heif")
    limits.max_image_size_pixels = max_pixels
    limits.max_number_of_tiles = MAX_HEIF_TILES
    limits.max_memory_block_size = MAX_HEIF_BYTES
    limits.max_total_memory = MAX_HEIF_BYTES
    # What is wrong with a file is an error of its sender's call: it does not belong in the log.
    tiff = ctypes.CDLL(_imaging.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        # A Pillow that hides its libtiff prints; nothing else changes.
        if (set_handler := getattr(tiff, name, None)) is not None:
            set_handler(None)
