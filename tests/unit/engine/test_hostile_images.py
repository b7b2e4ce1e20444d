"""Images from strangers: what they claim, what they hide, and which of it counts."""

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from service.engine import decoder_limits, preprocess
from service.errors import InvalidInput, Reason
from tests.unit.engine.test_preprocess import encode, gradient

# As `service.engine.preprocess` has it, whose filters pytest takes back for each test.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
SIDE = 100_000
HEIC = Path(__file__).parents[2] / "heic" / "plain.heic"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    *chunks: bytes, width: int = 1, height: int = 1, header: bytes = b"\x08\x02\0\0\0"
) -> bytes:
    """One with an RGB image of a single black pixel, and what else is asked for."""
    first = chunk(b"IHDR", struct.pack(">II", width, height) + header)
    pixels = chunk(b"IDAT", zlib.compress(bytes(4)))
    return b"\x89PNG\r\n\x1a\n" + first + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def jpeg_claiming(side: int) -> bytes:
    data = bytearray(encode(gradient(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, side, side)
    return bytes(data)


def webp_claiming(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inner = encode(gradient(8, 8), "WEBP", lossless=True)[12:]
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + sizes + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_claiming(side: int) -> bytes:
    data = bytearray(encode(gradient(8, 8), "BMP"))
    struct.pack_into("<ii", data, 18, side, side)
    return bytes(data)


def gif_claiming(side: int, *, of_frame: bool = False) -> bytes:
    data = bytearray(encode(gradient(8, 8), "GIF"))
    after_table = 13 + (3 << ((data[10] & 7) + 1))
    at = data.index(b",", after_table) + 5 if of_frame else 6
    struct.pack_into("<HH", data, at, side, side)
    return bytes(data)


def tiff_claiming(side: int, **options: str) -> bytes:
    data = bytearray(encode(gradient(8, 8), "TIFF", **options))
    for tag in (256, 257):
        at = max(data.find(struct.pack("<HHI", tag, kind, 1)) for kind in (3, 4))
        struct.pack_into("<HHII", data, at, tag, 4, 1, side)
    return bytes(data)


def boxed_claiming(data: bytes, side: int) -> bytes:
    """One whose size lies in a box `ispe`; an HEIC file may crop it afterwards."""
    claiming = bytearray(data)
    struct.pack_into(">II", claiming, claiming.index(b"ispe") + 8, side, side)
    return bytes(claiming)


BOMBS = {
    "PNG": png(width=SIDE, height=SIDE),
    "PNG of one bit": png(width=2**31 - 1, height=2**31 - 1, header=b"\x01\0\0\0\0"),
    "JPEG": jpeg_claiming(65_000),
    "WebP": webp_claiming(2**16, 2**16 - 1),
    "WebP larger than WebPs are": webp_claiming(2**24, 2**24),
    "BMP": bmp_claiming(SIDE),
    "BMP upside down": bmp_claiming(-SIDE),
    "GIF": gif_claiming(65_535),
    "GIF whose first frame is larger than its canvas": gif_claiming(65_535, of_frame=True),
    "TIFF": tiff_claiming(SIDE),
    "TIFF of LZW": tiff_claiming(SIDE, compression="tiff_lzw"),
    "AVIF": boxed_claiming(encode(gradient(64, 64), "AVIF"), 20_000),
    "HEIC": boxed_claiming(HEIC.read_bytes(), 20_000),
    "HEIC that is cropped to less": boxed_claiming(HEIC.read_bytes(), 9_000),
}


def cost(data: bytes) -> tuple[InvalidInput | None, float, int]:
    """How it was refused, the seconds of computing, and the bytes that the process grew by."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    refused = None
    try:
        preprocess.decode(data)
    except InvalidInput as error:
        refused = error
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return refused, time.process_time() - started, grown * 1024


@pytest.mark.parametrize("name", BOMBS)
def test_what_claims_too_many_pixels_is_refused_before_any_is_decoded(name: str) -> None:
    refused, seconds, grown = cost(BOMBS[name])
    assert refused is not None
    assert refused.reason in (Reason.IMAGE_TOO_LARGE, Reason.IMAGE_UNREADABLE)
    assert seconds < 0.5
    assert grown < 20 * 2**20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_what_is_cut_short_is_unreadable(kind: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(InvalidInput) as refused:
        preprocess.decode(data[: int(len(data) * part)])
    assert refused.value.reason is Reason.IMAGE_UNREADABLE


@pytest.mark.parametrize(
    "data",
    [
        b"a line of text\n",
        b"PK\x03\x04" + bytes(100),
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.7\n",
        b"\x7fELF" + bytes(60),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        encode(gradient(9, 9), "ICO"),
        encode(gradient(9, 9), "PPM"),
        b"\0\0\0\x1cftypavif" + bytes(60),
        b"\xff\xd8",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBP",
        b"BM",
    ],
)
def test_what_is_no_image_of_a_kind_that_is_read_is_unreadable(data: bytes) -> None:
    with pytest.raises(InvalidInput) as refused:
        preprocess.decode(data)
    assert refused.value.reason is Reason.IMAGE_UNREADABLE


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_refused(width: int, height: int) -> None:
    with pytest.raises(InvalidInput):
        preprocess.decode(png(width=width, height=height))
    bmp = bytearray(encode(gradient(8, 8), "BMP"))
    struct.pack_into("<ii", bmp, 18, width, height)
    with pytest.raises(InvalidInput):
        preprocess.decode(bytes(bmp))


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    data = encode(first, kind, save_all=True, append_images=[second], lossless=True)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 2
    tolerance = 3 if kind == "AVIF" else 0
    np.testing.assert_allclose(
        preprocess.decode(data).astype(int), preprocess.fit(first), atol=tolerance
    )


def test_a_jpeg_in_print_colours_has_the_colours_that_it_shows() -> None:
    red = Image.new("RGB", (32, 32), (220, 30, 40))
    pixels = preprocess.decode(encode(red.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - (220, 30, 40)).max() < 12


def test_a_jpeg_whose_adobe_marker_says_ycck_is_read_as_that() -> None:
    data = encode(Image.new("RGB", (32, 32), (220, 30, 40)).convert("CMYK"), "JPEG", quality=95)
    at = data.index(b"Adobe")
    other = data[: at + 11] + b"\x02" + data[at + 12 :]
    assert preprocess.decode(other).shape == (224, 224, 3)
    assert (preprocess.decode(other) != preprocess.decode(data)).any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("profile", [b"", b"no profile", bytes(60_000)])
def test_a_colour_profile_changes_nothing_whole_or_broken(kind: str, profile: bytes) -> None:
    plain = encode(gradient(40, 30), kind)
    np.testing.assert_array_equal(
        preprocess.decode(encode(gradient(40, 30), kind, icc_profile=profile)),
        preprocess.decode(plain),
    )


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_is_none(kind: str, orientation: int) -> None:
    image = gradient(40, 30)
    np.testing.assert_array_equal(
        preprocess.decode(encode(image, kind, exif=exif(orientation))),
        preprocess.decode(encode(image, kind)),
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0junk"]
)
def test_a_broken_exif_block_fails_no_image(kind: str, block: bytes) -> None:
    data = encode(gradient(20, 20), kind, exif=b"Exif\0\0" + block)
    assert preprocess.decode(data).shape == (224, 224, 3)


def exif_bomb() -> bytes:
    """A directory of which every entry is as large as the block."""
    count = 20_000
    entries = b"".join(
        struct.pack(">HHII", tag, 7, 12 * count, 0) for tag in range(1000, 1000 + count)
    )
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", count) + entries + bytes(4)


METADATA: dict[str, Callable[[], bytes]] = {
    "zTXt": lambda: png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 * 2**20), 1))),
    "iTXt": lambda: png(chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(200 * 2**20), 1))),
    "iCCP": lambda: png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(200 * 2**20), 1))),
    "many zTXt": lambda: png(
        *(chunk(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(2**20), 1)) for n in range(200))
    ),
    "eXIf": lambda: png(chunk(b"eXIf", exif_bomb())),
    "exif as text": lambda: png(
        chunk(
            b"zTXt",
            b"Raw profile type exif\0\0"
            + zlib.compress(b"\nexif\n99\n" + exif_bomb().hex().encode()),
        )
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_unpacks_to_hundreds_of_megabytes_costs_little(name: str) -> None:
    _, seconds, grown = cost(METADATA[name]())
    assert seconds < 2
    assert grown < 100 * 2**20


def test_megabytes_of_metadata_are_passed_over() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("story", "x" * 900_000)
    large = encode(gradient(20, 20), "PNG", pnginfo=text)
    np.testing.assert_array_equal(
        preprocess.decode(large), preprocess.decode(encode(gradient(20, 20), "PNG"))
    )


def with_scans(count: int, middle: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes so often more."""
    data = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:2] + middle + data[2:-2] + last * count + data[-2:]


def test_a_jpeg_of_more_scans_than_any_has_is_refused() -> None:
    assert preprocess.decode(with_scans(30)).shape == (224, 224, 3)
    with pytest.raises(InvalidInput, match="64 scans") as refused:
        preprocess.decode(with_scans(80))
    assert refused.value.reason is Reason.IMAGE_UNREADABLE


def test_what_looks_like_a_scan_in_metadata_or_after_the_end_is_none() -> None:
    comment = b"\xff\xda" * 200
    segment = b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
    assert not decoder_limits.is_endless_jpeg(with_scans(3, segment))
    assert not decoder_limits.is_endless_jpeg(with_scans(3) + comment)
    assert decoder_limits.is_endless_jpeg(with_scans(80, segment))
    assert not decoder_limits.is_endless_jpeg(b"\x89PNG" + comment)


def test_a_sequential_jpeg_whose_first_scan_is_whole_has_no_other_that_is_decoded() -> None:
    data = encode(gradient(64, 64), "JPEG")
    scan = data[data.index(b"\xff\xda") : -2]
    assert not decoder_limits.is_endless_jpeg(data + scan * 80)
    with pytest.raises(InvalidInput) as refused:
        preprocess.decode(data[:-2] + scan * 80 + data[-2:])
    assert refused.value.reason is Reason.IMAGE_UNREADABLE


def test_scans_count_where_the_first_has_not_all_components() -> None:
    frame = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 64, 64, 3) + bytes(9)
    one, all_ = (
        b"\xff\xda" + struct.pack(">HB", 6 + 2 * count, count) + bytes(2 * count + 3)
        for count in (1, 3)
    )
    assert decoder_limits.is_endless_jpeg(frame + one + all_ * 64)
    assert not decoder_limits.is_endless_jpeg(frame + one + all_ * 63)
    # None of no components, nor one that is cut off.
    none = b"\xff\xda" + struct.pack(">HB", 6, 0) + bytes(3)
    progressive = frame.replace(b"\xff\xc0", b"\xff\xc2")
    assert decoder_limits.is_endless_jpeg(progressive + none * 65)
    assert decoder_limits.is_endless_jpeg(progressive + all_ * 65)
    assert not decoder_limits.is_endless_jpeg(frame[:9] + b"\xff\xda")


@pytest.mark.parametrize("segment", [b"\xff\xd8", b"\xff\x01", b"\xff\xfe\0\2"])
def test_a_jpeg_of_endless_segments_is_refused(segment: bytes) -> None:
    data = encode(gradient(64, 64), "JPEG")
    assert not decoder_limits.is_endless_jpeg(data[:2] + segment * 9_000 + data[2:])
    with pytest.raises(InvalidInput, match="10000 segments") as refused:
        preprocess.decode(data[:2] + segment * 2**20 + data[2:])
    assert refused.value.reason is Reason.IMAGE_UNREADABLE


@pytest.mark.parametrize("kind", [1, 2])
def test_a_bmp_of_run_lengths_is_refused(kind: int) -> None:
    data = bytearray(encode(gradient(40, 30).quantize(200), "BMP"))
    struct.pack_into("<I", data, 30, kind)
    with pytest.raises(InvalidInput, match="run lengths") as refused:
        preprocess.decode(bytes(data))
    assert refused.value.reason is Reason.IMAGE_UNREADABLE


def test_the_largest_16_bit_image_costs_no_more_than_others() -> None:
    side = 4500
    rows = zlib.compress(bytes((side * 2 + 1) * side), 1)
    header = chunk(b"IHDR", struct.pack(">II", side, side) + b"\x10\0\0\0\0")
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    refused, _, grown = cost(data)
    assert refused is None
    assert grown < 250 * 2**20
