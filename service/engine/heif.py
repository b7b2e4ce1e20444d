"""Checks HEIC files before libheif sees them: how much would be decoded for one image.

An image may be put together of up to a thousand others, as a grid or as layers, each of which
may be as large as the largest that are decoded and hardly take a byte: libheif decodes them
all, whatever of them is seen. The box `meta` of a file lists its images (ISO/IEC 23008-12).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from service.errors import InvalidInput, Reason

_SINGLE: Final = (b"pitm", b"iref", b"iprp")
_MOST_BOXES: Final = 10_000
_DEEPEST: Final = 8
"""Levels of images that are put together of others, put together themselves."""


@dataclass
class _Items:
    primary: int = 0
    parts: dict[int, list[int]] = field(default_factory=dict)
    """The images that an image is put together of (`dimg`)."""
    beside: dict[int, list[int]] = field(default_factory=dict)
    """The images that belong to an image, such as its transparency (`auxl`)."""
    pixels: dict[int, int] = field(default_factory=dict)


def check_work(data: bytes, most: int) -> None:
    """Refuses a file for whose primary image more than `most` pixels would be decoded.

    Raises InvalidInput (IMAGE_UNREADABLE), and struct.error or IndexError for a file that is
    cut short.
    """
    metas = [body for kind, body in _boxes(memoryview(data)) if kind == b"meta"]
    if len(metas) > 1:
        raise _bad("has more than one directory of images")
    # Without one it is a sequence or the short form of a single image, which libheif bounds.
    if metas and (pixels := _work(items := _read(metas[0][4:]), items.primary, 0, {})) > most:
        raise _bad(f"is put together of images with {pixels} pixels in all, more than {most}")


def _work(items: _Items, item: int, depth: int, known: dict[int, int]) -> int:
    if depth > _DEEPEST:
        raise _bad(f"is put together of images more than {_DEEPEST} times over")
    if item not in known:
        # The size of an image that is put together counts too: its canvas is filled.
        others = (*items.parts.get(item, ()), *items.beside.get(item, ()))
        known[item] = items.pixels.get(item, 0) + sum(
            _work(items, other, depth + 1, known) for other in others
        )
    return known[item]


def _read(meta: memoryview) -> _Items:
    items = _Items()
    seen: set[bytes] = set()
    for kind, body in _boxes(meta):
        if kind in _SINGLE and kind in seen:
            raise _bad("has more than one list of its images")
        seen.add(kind)
        if kind == b"pitm":
            (items.primary,) = struct.unpack_from(">I" if body[0] else ">H", body, 4)
        elif kind == b"iref":
            _read_references(items, body)
        elif kind == b"iprp":
            _read_sizes(items, body)
    return items


def _read_references(items: _Items, body: memoryview) -> None:
    code = "I" if body[0] else "H"
    for kind, reference in _boxes(body[4:]):
        source, count = struct.unpack_from(f">{code}H", reference, 0)
        targets = struct.unpack_from(f">{count}{code}", reference, struct.calcsize(f">{code}H"))
        if kind == b"dimg":
            items.parts.setdefault(source, []).extend(targets)
        elif kind == b"auxl":
            for target in targets:
                items.beside.setdefault(target, []).append(source)


def _read_sizes(items: _Items, body: memoryview) -> None:
    boxes = list(_boxes(body))
    sizes: list[int] = []
    for properties in (inner for kind, inner in boxes if kind == b"ipco"):
        for name, value in _boxes(properties):
            width, height = struct.unpack_from(">II", value, 4) if name == b"ispe" else (0, 0)
            sizes.append(width * height)
    for associations in (inner for kind, inner in boxes if kind == b"ipma"):
        _read_associations(items, associations, sizes)


def _read_associations(items: _Items, body: memoryview, sizes: list[int]) -> None:
    id_code = "I" if body[0] else "H"
    index_code, mask = (">H", 0x7FFF) if body[3] & 1 else (">B", 0x7F)
    (count,) = struct.unpack_from(">I", body, 4)
    if count > _MOST_BOXES:
        raise _bad(f"has more than {_MOST_BOXES} images")
    at = 8
    for _ in range(count):
        item, properties = struct.unpack_from(f">{id_code}B", body, at)
        at += struct.calcsize(f">{id_code}B")
        for _ in range(properties):
            index = struct.unpack_from(index_code, body, at)[0] & mask
            at += struct.calcsize(index_code)
            if 0 < index <= len(sizes):
                items.pixels[item] = max(items.pixels.get(item, 0), sizes[index - 1])


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yields the type and the content of each box."""
    at = 0
    for _ in range(_MOST_BOXES):
        if at + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
            head = 16
        end = at + size if size else len(data)
        if end < at + head:
            raise _bad("is damaged: a box is smaller than its own beginning")
        yield kind, data[at + head : end]
        at = end
    raise _bad(f"has more than {_MOST_BOXES} boxes")


def _bad(why: str) -> InvalidInput:
    return InvalidInput(Reason.IMAGE_UNREADABLE, f"the HEIC file {why}: save it as JPEG or PNG")
