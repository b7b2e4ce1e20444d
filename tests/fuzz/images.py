"""Image files, as they come and with their checksums fixed; tensors of pixels."""

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from service.domain import DEFAULT_DECODING, ImageDecoding
from service.engine import preprocess
from service.errors import GraftError
from tests.fuzz.promise import Broken, Target
from tests.unit.engine.test_heif import composed

_TENSOR = b"T"
"""Begins an input that is a tensor: its type, three dimensions, its bytes."""
_PNG = b"\x89PNG\r\n\x1a\n"
INSTRUMENTED = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
"""Imported while imports are instrumented."""
_HEIC = Path(__file__).parents[1] / "heic"
_DECODINGS = (DEFAULT_DECODING, ImageDecoding("#204060", 10))


def run(data: bytes) -> None:
    """Decodes; what comes out must fit the network."""
    if data.startswith(_TENSOR) and len(data) >= 14:
        is_float, *shape = struct.unpack_from("<?3i", data, 1)
        _check(preprocess.from_tensor(data[14:], shape, is_float=is_float))
        return
    fixed = with_checksums(data)
    if fixed != data:
        with suppress(GraftError):
            _check(preprocess.decode(data))
    with suppress(GraftError):
        facts = preprocess.inspect(fixed)
        if facts.pixels != preprocess.count_pixels(fixed):
            raise Broken(f"{facts.pixels} pixels")
        if facts.bits not in (0, *preprocess.USUAL_BITS):
            raise Broken(f"{facts.bits} bits")
    for decoding in _DECODINGS:
        _check(preprocess.decode(fixed, decoding))


def _check(pixels: Any) -> None:
    if pixels.shape != (224, 224, 3) or pixels.dtype != np.uint8:
        raise Broken(f"{pixels.dtype} {pixels.shape}")


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums: else none would get any further."""
    if not data.startswith(_PNG):
        return data
    fixed, at = bytearray(data), len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def seeds() -> list[bytes]:
    """Every format, mode and piece of metadata."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(rng.integers(0, 2**16, (5, 4)).astype(np.uint16))
    made = [
        _saved(colour, "JPEG", quality=50),
        _saved(colour, "JPEG", progressive=True, exif=exif, icc_profile=b"profile"),
        _saved(colour.convert("CMYK"), "JPEG"),
        _saved(colour.convert("L"), "JPEG", comment=b"a word"),
        _saved(Image.new("RGB", (600, 700)), "JPEG", quality=5),
        _saved(colour, "MPO", save_all=True, append_images=[colour]),
        _saved(colour, "PNG", exif=exif, icc_profile=b"profile"),
        _saved(colour.quantize(7), "PNG", transparency=3),
        _saved(colour.convert("RGBA"), "PNG"),
        _saved(colour.convert("LA"), "PNG"),
        _saved(colour.convert("1"), "PNG"),
        _saved(grey16, "PNG"),
        _saved(colour, "PNG", save_all=True, append_images=[colour.rotate(9)]),
        _saved(colour, "WEBP", quality=20, exif=exif, icc_profile=b"profile"),
        _saved(colour.convert("RGBA"), "WEBP", lossless=True),
        _saved(colour, "WEBP", save_all=True, append_images=[colour.rotate(9)]),
        _saved(colour, "BMP"),
        _saved(colour.quantize(7), "BMP"),
        _saved(colour.convert("1"), "BMP"),
        _saved(colour, "GIF"),
        _saved(colour, "GIF", comment=b"a word", transparency=3),
        _saved(colour, "GIF", save_all=True, append_images=[colour.rotate(9)]),
        _saved(colour, "TIFF"),
        _saved(grey16, "TIFF"),
        _saved(grey16, "TIFF", compression="tiff_lzw", tiffinfo={281: 4095}),
        _saved(colour.convert("RGBA"), "TIFF", compression="tiff_adobe_deflate", exif=exif),
        _saved(colour.convert("1"), "TIFF", compression="group4"),
        _saved(colour.convert("CMYK"), "TIFF", compression="packbits", big_tiff=True),
        _saved(colour, "TIFF", compression="jpeg"),
        _saved(colour.convert("LAB"), "TIFF"),
        _saved(colour.quantize(7), "TIFF", save_all=True, append_images=[colour]),
        _saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"),
        _saved(colour, "AVIF", exif=exif),
        _saved(colour.convert("RGBA"), "AVIF"),
        _saved(colour, "AVIF", save_all=True, append_images=[colour.rotate(9)]),
        *(path.read_bytes() for path in sorted(_HEIC.glob("*.heic"))),
        composed(b"grid", 4, side=128),
        composed(b"iovl", 2),
        _TENSOR + struct.pack("<?3i", False, 2, 3, 3) + bytes(range(18)),
        _TENSOR + struct.pack("<?3i", True, 1, 1, 3) + struct.pack("<3f", 0.1, 0.5, 1),
    ]
    return [*made, *(data[: len(data) // 2] for data in made)]


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


TARGET = Target(
    "images",
    run,
    seeds,
    modules=(
        "service.engine.preprocess",
        "service.engine.decoder_limits",
        "service.engine.formats",
        "PIL",
    ),
)
