"""A version's decoding: the colour below transparency, the depth of 16-bit grey."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from service.domain import ImageDecoding, check_colour
from service.engine import preprocess
from service.errors import InvalidInput
from tests.unit.engine.test_preprocess import encode, gradient

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")

HEIC = Path(__file__).parents[2] / "heic"
GREYS = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
"""Of 12 bits, each value once."""


def cut_out(mode: str) -> Image.Image:
    """Left hidden: bright red (or grey) below full transparency; right half opaque blue."""
    image = Image.new("RGBA", (64, 48), (0, 0, 255, 255))
    image.paste((255, 0, 0, 0), (0, 0, 32, 48))
    return image.convert(mode)


def transparent(kind: str, mode: str) -> bytes:
    if mode in ("RGBA", "LA"):
        return encode(cut_out(mode), kind, lossless=True)
    if mode == "P":
        image = Image.new("P", (64, 48), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.paste(0, (0, 0, 32, 48))
        return encode(image, kind, transparency=0)
    if mode == "P alphas":
        image = Image.new("P", (64, 48), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.paste(0, (0, 0, 32, 48))
        return encode(image, kind, transparency=b"\0\xff")
    hidden = (255, 0, 0) if mode == "RGB" else 255
    image = Image.new(mode, (64, 48), (0, 0, 255) if mode == "RGB" else 0)
    image.paste(hidden, (0, 0, 32, 48))
    return encode(image, kind, transparency=hidden)


CASES = [
    ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "P alphas"), ("PNG", "RGB"),
    ("PNG", "L"), ("PNG", "1"), ("WEBP", "RGBA"), ("GIF", "P"), ("TIFF", "RGBA"), ("TIFF", "LA"),
    ("AVIF", "RGBA"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.parametrize("background", ["#ffffff", "#000000", "#20c040"])
def test_transparency_shows_the_background_and_no_hidden_colour(
    kind: str, mode: str, background: str
) -> None:
    image = preprocess.open_image(transparent(kind, mode), ImageDecoding(background))
    assert image.mode == "RGB"
    wanted = bytes.fromhex(background[1:])
    tolerance = 12 if kind == "AVIF" else 0
    left = np.abs(np.asarray(image)[:, :24].astype(int) - list(wanted)).max()
    assert left <= tolerance
    right = np.asarray(image)[:, 40:].mean(axis=(0, 1))
    assert right[2] < 80 if mode in ("L", "LA", "1") else right[2] > 200


def test_heic_and_tiff_of_premultiplied_colours_are_laid_on_the_background_too() -> None:
    heic = preprocess.open_image((HEIC / "transparent.heic").read_bytes(), ImageDecoding("#000000"))
    assert np.asarray(heic)[:, :16].max() < 12
    premultiplied = encode(cut_out("RGBA"), "TIFF", tiffinfo={338: 1})
    image = preprocess.open_image(premultiplied, ImageDecoding("#20c040"))
    assert image.getpixel((4, 4)) == (0x20, 0xC0, 0x40)


def test_half_transparency_is_half_of_each() -> None:
    half = encode(Image.new("RGBA", (8, 8), (200, 100, 0, 128)), "PNG")
    assert preprocess.open_image(half).getpixel((3, 3)) == (227, 177, 127)
    assert preprocess.open_image(half, ImageDecoding("#000000")).getpixel((3, 3)) == (100, 50, 0)


def test_opaque_images_do_not_depend_on_the_background() -> None:
    data = encode(gradient(40, 30), "PNG")
    np.testing.assert_array_equal(
        preprocess.decode(data, ImageDecoding("#000000")), preprocess.decode(data)
    )


@pytest.mark.parametrize("good", ["#ffffff", "#00AAff"])
def test_a_colour_is_kept_in_lower_case(good: str) -> None:
    assert check_colour(good, "background") == good.lower()


@pytest.mark.parametrize("bad", ["white", "#fff", "#gggggg", "ffffff", "#ffffff ", "#" * 500])
def test_what_is_no_colour_is_refused(bad: str) -> None:
    with pytest.raises(InvalidInput, match="six hexadecimal digits") as refused:
        check_colour(bad, "background")
    assert refused.value.field == "background"
    assert len(refused.value.message) < 300


# 16-bit grey


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    chunk = struct.pack(">I", len(data)) + kind + data
    return png[:33] + chunk + struct.pack(">I", zlib.crc32(kind + data)) + png[33:]


def deep(kind: str, values: npt.NDArray[np.uint16]) -> bytes:
    """16-bit grey, as Pillow writes it in either order of bytes."""
    if kind == "PNG":
        return encode(Image.fromarray(values), "PNG")
    if kind.startswith("TIFF, big"):
        out = io.BytesIO()
        image = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
        image.save(out, "TIFF", compression="tiff_lzw" if "LZW" in kind else "raw")
        return out.getvalue()
    compression = "tiff_lzw" if "LZW" in kind else "raw"
    return encode(Image.fromarray(values), "TIFF", compression=compression)


KINDS = ["PNG", "TIFF, little-endian", "TIFF, big-endian", "TIFF, little-endian, LZW",
    "TIFF, big-endian, LZW"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_grey_is_scaled_by_the_depth_of_the_version(kind: str) -> None:
    data = deep(kind, GREYS)
    facts = preprocess.inspect(data)
    assert (facts.pixels, facts.bits) == (64 * 64, 12)
    for bits in (12, 14, 16):
        image = preprocess.open_image(data, ImageDecoding(bit_depth=bits))
        np.testing.assert_array_equal(np.asarray(image)[..., 1], GREYS >> (bits - 8))
    # Brighter than all that was trained on: white, and no remainder of it.
    image = preprocess.open_image(data, ImageDecoding(bit_depth=10))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], np.minimum(GREYS >> 2, 255))


@pytest.mark.parametrize(
    ("most", "bits"),
    [(0, 10), (255, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14), (16383, 14), (16384, 16),
     (65535, 16)],
)  # fmt: skip
def test_the_smallest_usual_depth_that_holds_an_image_is_found(most: int, bits: int) -> None:
    values = np.zeros((5, 4), np.uint16)
    values[2, 1] = most
    data = deep("PNG", values)
    assert preprocess.inspect(data).bits == bits


def test_a_declared_depth_counts_instead_of_the_versions() -> None:
    png = with_chunk(deep("PNG", GREYS), b"sBIT", b"\x0c")
    tiff = encode(Image.fromarray(GREYS), "TIFF", tiffinfo={281: 4095})
    for data in (png, tiff):
        facts = preprocess.inspect(data)
        assert (facts.pixels, facts.bits) == (64 * 64, 12)
        for depth in (10, 16):
            image = preprocess.open_image(data, ImageDecoding(bit_depth=depth))
            np.testing.assert_array_equal(np.asarray(image)[..., 0], GREYS >> 4)


@pytest.mark.parametrize("chunk", [b"", b"\0", b"\x08", b"\x40"])
def test_a_declaration_that_makes_no_sense_is_none(chunk: bytes) -> None:
    assert preprocess.inspect(with_chunk(deep("PNG", GREYS), b"sBIT", chunk)).bits == 12


def test_samples_of_12_bits_declare_themselves() -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    flat = values.reshape(-1, 2)
    high, middle, low = flat[:, 0] >> 4, (flat[:, 0] & 15) << 4 | flat[:, 1] >> 8, flat[:, 1] & 255
    packed = np.stack([high, middle, low], axis=1).astype(np.uint8).tobytes()
    entries = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 8),
        (279, len(packed))]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    header = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    data = header + directory + bytes(4)
    data = data.ljust(122, b"\0") + packed
    assert preprocess.inspect(data).bits == 12
    np.testing.assert_array_equal(np.asarray(preprocess.open_image(data))[..., 0], values >> 4)


def test_white_may_be_zero() -> None:
    data = encode(Image.fromarray(GREYS), "TIFF", tiffinfo={262: 0})
    image = preprocess.open_image(data, ImageDecoding(bit_depth=12))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], (4095 - GREYS) >> 4)


def test_a_16_bit_value_may_mean_transparent() -> None:
    data = with_chunk(deep("PNG", GREYS), b"tRNS", struct.pack(">H", 70))
    image = np.asarray(preprocess.open_image(data, ImageDecoding("#102030", 12)))
    assert image[1, 6].tolist() == [0x10, 0x20, 0x30]
    assert image[1, 7].tolist() == [71 >> 4] * 3


@pytest.mark.parametrize("low_high", [(-3, 5), (0, 70_000)])
def test_grey_beyond_16_bits_is_refused_with_its_range(low_high: tuple[int, int]) -> None:
    values = np.zeros((4, 4), np.int32)
    values[0, :2] = low_high
    data = encode(Image.fromarray(values), "TIFF")
    for read in (preprocess.decode, preprocess.inspect):
        with pytest.raises(InvalidInput, match=f"from {low_high[0]} to {low_high[1]}"):
            read(data)


def test_images_that_are_not_deep_have_no_depth() -> None:
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "AVIF"):
        data = encode(gradient(30, 20), kind)
        facts = preprocess.inspect(data)
        assert (facts.pixels, facts.bits) == (600, 0)
    assert preprocess.USUAL_BITS == (10, 12, 14, 16)
