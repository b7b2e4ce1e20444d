"""Recognises image formats by a file's bytes, and names what is not an image.

Knows files by their first bytes alone; by their names only what they are meant to be.
"""

import re
from collections.abc import Callable
from typing import Final

from service.errors import InvalidInput, Reason

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
"""Formats that are decoded, as Pillow names them."""
TITLES: Final = "JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC"
"""The same, as people name them."""

SUFFIXES: Final = frozenset({
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg",
    ".png", ".tif", ".tiff", ".webp",
})  # fmt: skip
"""Of names of files in these formats. Whether one is an image its bytes say."""

TIFF_STARTS: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_STARTS: Final = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    **dict.fromkeys(TIFF_STARTS, "TIFF"),
}
_AVIF_BRANDS: Final = {b"avif", b"avis"}
_HEIF_BRANDS: Final = {
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1",
}  # fmt: skip

_ARCHIVE: Final = "unpack it, or upload it as a .zip, .tar or .tar.gz archive of a dataset"
_RAW: Final = "a camera's raw file", "develop it, and send JPEG, PNG or TIFF"
_VIDEO: Final = "a video", "extract its frames as JPEG or PNG"
_AS_PNG: Final = "save it as PNG or JPEG"

# Each row: at which byte, which bytes, what they are, what to do. Longer beginnings come before
# shorter ones.
_OTHERS: Final = (
    (0, b"version https://git-lfs.", "a pointer of Git LFS", "run git lfs pull"),
    (0, b"\0\x05\x16\x07", 'an AppleDouble file ("._" before a name), which macOS leaves beside '
        "others", "leave it out"),
    (0, b"%PDF-", "a PDF document", "save its pages as PNG or JPEG"),
    (0, b"%!PS", "a PostScript file", _AS_PNG),
    (0, b"PK\x03\x04", "a zip archive", _ARCHIVE),
    (0, b"PK\x05\x06", "an empty zip archive", _ARCHIVE),
    (0, b"\x1f\x8b", "a gzip archive", _ARCHIVE),
    (0, b"BZh", "a bzip2 archive", _ARCHIVE),
    (0, b"\xfd7zXZ\0", "an xz archive", _ARCHIVE),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", _ARCHIVE),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _ARCHIVE),
    (0, b"Rar!\x1a\x07", "a RAR archive", _ARCHIVE),
    (257, b"ustar", "a tar archive", _ARCHIVE),
    (0, b"8BPS", "a Photoshop file", _AS_PNG),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image", _AS_PNG),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", _AS_PNG),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", _AS_PNG),
    (0, b"\xff\x0a", "a JPEG XL image", _AS_PNG),
    (0, b"II\xbc", "a JPEG XR image", _AS_PNG),
    (4, b"ftypcrx ", *_RAW),
    (0, b"FUJIFILMCCD-RAW", *_RAW),
    (0, b"IIRO", *_RAW),
    (0, b"IIRS", *_RAW),
    (0, b"MMOR", *_RAW),
    (0, b"IIU\0", *_RAW),
    (0, b"FOVb", *_RAW),
    (0, b"\0MRM", *_RAW),
    (6, b"HEAPCCDR", *_RAW),
    (4, b"ftyp", *_VIDEO),
    (4, b"moov", *_VIDEO),
    (4, b"mdat", *_VIDEO),
    (8, b"AVI ", *_VIDEO),
    (0, b"\x1aE\xdf\xa3", *_VIDEO),
    (0, b"\0\0\x01\xba", *_VIDEO),
    (0, b"FLV\x01", *_VIDEO),
    (128, b"DICM", "a DICOM file", "export its pixels as PNG, of 8 or 16 bits"),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", "load it, and send the array itself"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "save each of its images as PNG"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image", "scale it to 0..255, and save it as PNG"),
    (0, b"#?RADIANCE", "a Radiance HDR image", "scale it to 0..255, and save it as PNG"),
    (0, b"SIMPLE  =", "a FITS file", "scale it to 0..255, and save it as PNG"),
    (0, b"DDS ", "a DirectDraw surface", _AS_PNG),
    (0, b"gimp xcf", "a GIMP file", _AS_PNG),
    (0, b"\0\0\x01\0", "an icon", _AS_PNG),
)  # fmt: skip
_INSPECTED: Final = 1024
_NETPBM: Final = re.compile(rb"P[1-7]\s")
_HTML: Final = re.compile(r"<(!doctype html|html|head|body|meta|title)\b")
_SVG: Final = re.compile(r"<(\w+:)?svg[\s>]")
_READ_IT: Final = "where it is a server's answer that says why a download failed, read it"
FOR_CALLERS: Final = ": send the bytes of the image file, neither its name nor base64"
"""How the message about a text ends: advice to who sends images, not to who keeps files of them."""
_TEXTS: Final[tuple[tuple[Callable[[str], object], str, str], ...]] = (
    (_HTML.match, "a web page (HTML)", "a download failed: fetch the image itself"),
    (lambda text: text.startswith("<") and _SVG.search(text), "an SVG drawing",
        "render it as PNG"),
    (lambda text: text.startswith(("<?xml", "<!--")) and _HTML.search(text),
        "a web page (HTML)", "a download failed: fetch the image itself"),
    (lambda text: text.startswith("<?xml"), "an XML document", _READ_IT),
    (lambda text: text.startswith(("{", "[")), "JSON", _READ_IT),
    (lambda _: True, "text", FOR_CALLERS.removeprefix(": ")),
)  # fmt: skip
"""Tests of a text's beginning in lower case, and what it is then, in this order."""


class WrongFormat(InvalidInput):
    """Refuses bytes that are not an image of one of FORMATS."""


def recognise(data: bytes) -> str:
    """Returns which of FORMATS the bytes begin as, before anything of them is decoded.

    Raises WrongFormat (IMAGE_UNREADABLE), which says what they are and what to do.
    """
    for start, kind in _STARTS.items():
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        # The major brand may be that of any image file; the list says what is in it.
        length = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, length, 4))}
        if brands & _AVIF_BRANDS:
            return "AVIF"
        if brands & _HEIF_BRANDS:
            return "HEIF"
    error = WrongFormat if data else InvalidInput
    raise error(Reason.IMAGE_UNREADABLE, _why_not(data))


def _why_not(data: bytes) -> str:
    if not data:
        return "the image is empty (0 bytes): copy or fetch it again"
    named = _named(data)
    if named is None:
        return f"the bytes are not a {TITLES} image, nor anything else that is known"
    what, remedy = named
    return f"it is not an image but {what}: {remedy}"


def _named(data: bytes) -> tuple[str, str] | None:
    for at, start, what, remedy in _OTHERS:
        if data.startswith(start, at):
            return what, remedy
    if _NETPBM.match(data):
        return "a Netpbm file (PBM, PGM, PPM)", _AS_PNG
    if not data.strip(b"\0"):
        return "nothing but zero bytes", "a copy or a download failed: fetch the image again"
    return _named_text(data[:_INSPECTED])


def _named_text(head: bytes) -> tuple[str, str] | None:
    # The inspected part may end within a character.
    cut = head[:-3] if len(head) == _INSPECTED else head
    try:
        text = cut.decode("utf-8-sig").strip().lower()
    except UnicodeDecodeError:
        return None
    if not text or not all(char.isprintable() or char.isspace() for char in text):
        return None
    return next((what, remedy) for fits, what, remedy in _TEXTS if fits(text))
