"""Formats: what each gives, what is refused in it, and what is named for what it is."""

import contextlib
import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image

from service.engine import decoder_limits, formats, preprocess
from service.errors import InvalidInput, Reason
from tests.unit.engine.test_hostile_images import cost
from tests.unit.engine.test_preprocess import encode, gradient

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")

HEIC = Path(__file__).parents[2] / "heic"


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidInput) as refused:
        preprocess.decode(data)
    assert refused.value.reason is Reason.IMAGE_UNREADABLE
    return refused.value.message


def npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros((2, 2)))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.txt", "a")
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("a"))
    return out.getvalue()


NAMED = [
    (b"", "0 bytes", "fetch it again"),
    (bytes(5000), "nothing but zero bytes", "fetch the image again"),
    (b"\n <!DOCTYPE html><html>", "web page", "fetch the image itself"),
    (b"\xef\xbb\xbf<html lang=en>", "web page", "fetch the image itself"),
    (b"<?xml version='1.0'?><html xmlns='x'>", "web page", "fetch the image itself"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
    (b"<?xml version='1.0'?><!-- a --><svg xmlns='x'/>", "SVG", "PNG"),
    (b"<svg xmlns='x'/>", "SVG", "PNG"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an XML document", "read it"),
    (b'{"error": "not found"}', "JSON", "read it"),
    (b"%PDF-1.7\n\xff", "PDF", "PNG"),
    (zipped(), "zip", "unpack"),
    (gzip.compress(b"a", mtime=0), "gzip", "unpack"),
    (tarred(), "tar", "unpack"),
    (b"\0\0\0\x18ftypmp42" + bytes(20), "video", "frames"),
    (b"\0\0\0\x14ftypqt  " + bytes(20), "video", "frames"),
    (b"RIFF\0\0\0\0AVI LIST", "video", "frames"),
    (b"\x1aE\xdf\xa3" + bytes(30), "video", "frames"),
    (b"8BPS\0\x01" + bytes(30), "Photoshop", "PNG"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000", "PNG"),
    (b"\xff\x0a" + bytes(10), "JPEG XL", "PNG"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "PNG"),
    (b"\0\0\0\x18ftypcrx " + bytes(20), "raw", "develop"),
    (b"FUJIFILMCCD-RAW 0201", "raw", "develop"),
    (b"IIRO\x08\0\0\0", "raw", "develop"),
    (b"II*\0\x10\0\0\0CR\x02\0" + bytes(50), "raw", "develop"),
    (bytes(128) + b"DICM", "DICOM", "PNG"),
    (npy(), "NumPy array", "the array itself"),
    (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "AppleDouble", "leave it out"),
    ("ein Wort, kein Bild: ä\n".encode() * 200, "text", "bytes of the image file"),
    (b"P6 2 2 255\n" + bytes(12), "Netpbm", "PNG"),
    (b"\x7fELF" + bytes(60), "JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC", "known"),
]


@pytest.mark.parametrize(("data", "what", "remedy"), NAMED)
def test_what_is_no_image_is_named_with_what_to_do(data: bytes, what: str, remedy: str) -> None:
    said = refusal(data)
    assert what in said
    assert remedy in said


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
def test_each_format_is_known_by_its_first_bytes(kind: str) -> None:
    assert formats.recognise(encode(gradient(20, 20), kind)) == kind


@pytest.mark.parametrize("major", [b"mif1", b"msf1", b"miaf"])
@pytest.mark.parametrize(("brand", "kind"), [(b"avif", "AVIF"), (b"heic", "HEIF")])
def test_a_general_brand_is_told_by_the_brands_beside_it(
    major: bytes, brand: bytes, kind: str
) -> None:
    box = b"\0\0\0\x18ftyp" + major + bytes(4) + b"mif1" + brand
    assert formats.recognise(box) == kind


def test_heic_files_give_their_primary_image_upright() -> None:
    plain = np.asarray(preprocess.open_image((HEIC / "plain.heic").read_bytes()), int)
    assert plain.shape == (48, 64, 3)
    # Red grows to the right, green downwards.
    assert plain[24, 60, 0] > plain[24, 4, 0] + 200
    assert plain[44, 32, 1] > plain[4, 32, 1] + 150
    turned = np.asarray(preprocess.open_image((HEIC / "turned.heic").read_bytes()), int)
    assert np.abs(np.rot90(turned) - plain).mean() < 4
    both = np.asarray(preprocess.open_image((HEIC / "two-images.heic").read_bytes()), int)
    assert np.abs(both - plain).mean() < 6
    deep = np.asarray(preprocess.open_image((HEIC / "grey-16-bit.heic").read_bytes()), int)
    assert np.abs(deep[..., 0] - plain[..., 0]).mean() < 4


def test_avif_is_decoded_on_the_callers_thread() -> None:
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1


def test_a_gif_frame_beyond_the_canvas_is_seen_whole() -> None:
    data = bytearray(encode(gradient(40, 30).convert("L"), "GIF"))
    struct.pack_into("<HH", data, 6, 4, 3)
    assert preprocess.open_image(bytes(data)).size == (40, 30)


def test_a_gif_of_endless_comments_is_refused_and_of_many_is_not() -> None:
    data = encode(gradient(10, 10), "GIF")
    at = 13 + (3 << ((data[10] & 7) + 1))

    def commented(comment: bytes) -> bytes:
        return data[:at] + comment + data[at:]

    many = b"!\xfe" + b"\x03abc" * 5000 + b"\0"
    np.testing.assert_array_equal(preprocess.decode(commented(many)), preprocess.decode(data))
    for endless in (b"!\xfe" + b"\x01a" * 30_000 + b"\0", b"!\xfe\0" * 30_000, bytes(30_000)):
        assert f"{decoder_limits.MAX_GIF_BLOCKS} blocks" in refusal(commented(endless))


def test_a_huge_frame_that_is_to_be_cleared_is_refused_before_it_is_filled() -> None:
    data = encode(gradient(10, 10), "GIF")
    at = 13 + (3 << ((data[10] & 7) + 1))
    cleared = b"!\xf9\x04\x08\0\0\0\0,"
    frame = struct.pack("<4H", 0, 0, 65_535, 65_535)
    refused, _, grown = cost(data[:at] + cleared + frame + b"\0\x08" + bytes(20))
    assert refused is not None
    assert refused.reason is Reason.IMAGE_TOO_LARGE
    assert grown < 20 * 2**20


# TIFF


def tagged(data: bytes, tag: int, kind: int, value: int) -> bytes:
    """The little-endian TIFF with a tag's single value replaced; the tag must be there."""
    changed = bytearray(data)
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<HHII", changed, entry, tag, kind, 1, value)
            return bytes(changed)
    raise AssertionError(tag)


def tiff_of(**options: Any) -> bytes:
    return encode(gradient(64, 48), "TIFF", **options)


@pytest.mark.parametrize(
    "compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg"]
)
def test_usual_tiff_compressions_are_decoded(compression: str) -> None:
    decoded = preprocess.decode(tiff_of(compression=compression)).astype(int)
    assert np.abs(decoded - preprocess.decode(tiff_of())).mean() < 4


@pytest.mark.parametrize("compression", [6, 34676, 34712, 34925, 50000, 50001, 65000])
def test_other_tiff_compressions_are_refused_with_the_usual_ones(compression: int) -> None:
    said = refusal(tagged(tiff_of(), 259, 3, compression))
    assert f"compression {compression} " in said
    assert "LZW, deflate" in said


@pytest.mark.parametrize(
    ("tag", "value"), [(50706, 0x00000401), (262, 32803)], ids=["DNG", "filter array"]
)
def test_a_camera_raw_file_that_is_a_tiff_is_refused(tag: int, value: int) -> None:
    info = {50706: b"\1\4\0\0"} if tag == 50706 else {}
    data = tiff_of(tiffinfo=info)
    assert "raw file" in refusal(data if info else tagged(data, tag, 3, value))


def test_a_thumbnail_before_a_raw_photo_is_refused() -> None:
    assert "raw file" in refusal(tiff_of(tiffinfo={254: 1, 271: "NIKON CORPORATION"}))
    assert preprocess.decode(tiff_of(tiffinfo={271: "NIKON CORPORATION"})).any()


def test_floating_point_images_are_refused_with_what_to_do() -> None:
    data = encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    assert "0..255" in refusal(data)
    assert "16-bit grey" in refusal(data)


def page_of(tags: dict[int, int], pixels: bytes) -> bytes:
    """A TIFF of one page: each tag with one value, and pixels at byte 1000."""
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + directory + bytes(4)
    return head.ljust(1000, b"\0") + pixels


def test_tiles_are_decoded_and_those_far_larger_than_the_image_are_refused() -> None:
    grey = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    tags = {256: 50, 257: 40, 258: 8, 259: 1, 262: 1, 277: 1, 322: 64, 323: 64, 324: 1000,
        325: 64 * 64}  # fmt: skip
    image = preprocess.open_image(page_of(tags, grey.tobytes()))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], grey[:40, :50])
    for compression in (1, 5):
        huge = page_of({**tags, 259: compression, 322: 30_000, 323: 30_000}, grey.tobytes())
        assert "far larger" in refusal(huge)


def test_strips_that_overlap_are_refused() -> None:
    data = tiff_of(tiffinfo={278: 1})
    made = bytearray(data)
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        (tag,) = struct.unpack_from("<H", data, entry)
        if tag == 279:
            struct.pack_into("<HHII", made, entry, 279, 4, 48, len(data))
    assert "overlap" in refusal(bytes(made) + struct.pack("<48I", *(len(data),) * 48))


def test_a_jpeg_of_endless_scans_in_a_tiff_is_refused() -> None:
    data = tiff_of(compression="jpeg")
    assert "64 scans" in refusal(data + b"\xff\xda" * 80)


def test_pages_behind_the_first_are_not_looked_at() -> None:
    second = tiff_of(save_all=True, append_images=[gradient(64, 48).rotate(90)] * 3)
    page = decoder_limits.tiff_page(second)
    with Image.open(io.BytesIO(page.data)) as image:
        assert getattr(image, "n_frames", 1) == 1
    np.testing.assert_array_equal(preprocess.decode(second), preprocess.decode(tiff_of()))


@pytest.mark.parametrize("big_tiff", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiffs_orientation_is_honoured_once(orientation: int, big_tiff: bool) -> None:
    plain = encode(gradient(64, 48), "PNG", exif=_turned(orientation))
    turned = tiff_of(tiffinfo={274: orientation}, big_tiff=big_tiff)
    np.testing.assert_array_equal(preprocess.decode(turned), preprocess.decode(plain))
    packed = tiff_of(tiffinfo={274: orientation}, big_tiff=big_tiff, compression="tiff_lzw")
    np.testing.assert_array_equal(preprocess.decode(packed), preprocess.decode(plain))


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_a_tiff_of_more_tags_or_strips_than_any_has_costs_nothing() -> None:
    tags = struct.pack("<H", 60_000) + struct.pack("<HHII", 300, 4, 2**24, 8) * 60_000
    strips = struct.pack("<HHHII", 1, 273, 4, 2**24, 8) + bytes(2**26)
    for body in (tags, strips):
        refused, _, grown = cost(b"II*\0\x08\0\0\0" + body + bytes(4))
        assert refused is not None
        assert grown < 100 * 2**20


def test_libraries_print_nothing_of_damaged_files(capfd: pytest.CaptureFixture[str]) -> None:
    kinds = [
        tiff_of(compression="tiff_lzw"),
        tiff_of(compression="jpeg"),
        tiff_of(compression="tiff_adobe_deflate"),
        (HEIC / "plain.heic").read_bytes(),
        encode(gradient(40, 30), "AVIF"),
    ]
    random = np.random.default_rng(0)
    for data in kinds:
        for _ in range(30):
            damaged = bytearray(data)
            for at in random.integers(8, len(data), 5):
                damaged[at] = random.integers(256)
            with contextlib.suppress(InvalidInput):
                preprocess.decode(bytes(damaged))
    assert capfd.readouterr() == ("", "")
