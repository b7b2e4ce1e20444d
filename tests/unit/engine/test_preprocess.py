import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from service.domain import DEFAULT_DECODING
from service.engine import preprocess
from service.engine.formats import FORMATS
from service.errors import InvalidInput, Reason


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def png_of(width: int, height: int) -> bytes:
    """A valid PNG header for a size, with hardly any data: what a bomb looks like."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "HEIF"])
def test_every_accepted_format_becomes_224_by_224_bytes(kind: str) -> None:
    pixels = preprocess.decode(encode(gradient(400, 300), kind))
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8


def test_the_result_is_close_to_resizing_and_then_cropping() -> None:
    image = gradient(512, 384)
    resized = image.resize((341, 256), Image.Resampling.BILINEAR)
    left = (341 - 224) // 2
    expected = np.asarray(resized.crop((left, 16, left + 224, 240)), dtype=float)
    actual = preprocess.fit(image).astype(float)
    assert np.abs(actual[..., :2] - expected[..., :2]).mean() < 1


def test_a_large_jpeg_decoded_at_a_reduced_scale_looks_the_same() -> None:
    large = gradient(2048, 1536)
    actual = preprocess.decode(encode(large, "JPEG", quality=95)).astype(float)
    expected = preprocess.decode(encode(large, "PNG")).astype(float)
    assert np.abs(actual[..., :2] - expected[..., :2]).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int) -> None:
    upright = gradient(300, 300)
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    turned = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    stored = encode(turned, "JPEG", quality=95, subsampling=0, exif=exif)
    expected = preprocess.fit(upright).astype(float)
    assert np.abs(preprocess.decode(stored)[..., :2] - expected[..., :2]).mean() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        grey = np.asarray(gradient(64, 64).convert("L"), dtype=np.uint16) * 257
        data = encode(Image.fromarray(grey), "PNG")
    else:
        data = encode(gradient(64, 64).convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    pixels = preprocess.decode(data)
    assert pixels.shape == (224, 224, 3)
    assert pixels.std() > 20, "the image's content was lost"


def test_a_tensor_gives_what_the_same_image_encoded_without_loss_gives() -> None:
    image = gradient(300, 200)
    array = np.asarray(image)
    expected = preprocess.decode(encode(image, "PNG"))
    as_bytes = preprocess.from_tensor(array.tobytes(), array.shape, is_float=False)
    floats = (array / 255).astype("<f4")
    as_floats = preprocess.from_tensor(floats.tobytes(), array.shape, is_float=True)
    np.testing.assert_array_equal(as_bytes, expected)
    np.testing.assert_array_equal(as_floats, expected)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"hello, this is text", "but text"),
        (b"GIF89a" + bytes(100), "cut short"),
        (encode(gradient(200, 200), "JPEG")[:2000], "cut short"),
        (encode(gradient(200, 200), "PNG")[:300], "cut short"),
        (encode(gradient(64, 64), "GIF")[:900], "cut short"),
        (encode(gradient(64, 64), "TIFF")[:-500], "cut short"),
        (b"%PDF-1.4 " + bytes(50), "a PDF document"),
    ],
)
def test_what_is_no_whole_image_is_unreadable_and_says_why(data: bytes, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refused:
        preprocess.decode(data)
    assert refused.value.reason is Reason.IMAGE_UNREADABLE


def test_a_bomb_of_pixels_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(InvalidInput, match="30000 x 30000") as refused:
        preprocess.decode(png_of(30_000, 30_000))
    assert refused.value.reason is Reason.IMAGE_TOO_LARGE


@pytest.mark.parametrize(
    ("shape", "nbytes", "is_float", "says"),
    [
        ([10, 10], 100, False, "must be"),
        ([10, 10, 4], 400, False, "must be"),
        ([0, 10, 3], 0, False, "must be"),
        ([-1, 10, 3], 30, False, "must be"),
        ([10, 10, 3], 299, False, "300"),
        ([10, 10, 3], 300, True, "1200"),
        ([1 << 40, 1 << 40, 3], 10, False, "pixels"),
    ],
)
def test_a_tensor_whose_shape_lies_is_refused(
    shape: list[int], nbytes: int, is_float: bool, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        preprocess.from_tensor(bytes(nbytes), shape, is_float=is_float)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.5])
def test_a_float_tensor_with_values_outside_0_to_1_is_refused(bad: float) -> None:
    floats = np.full((4, 4, 3), 0.5, dtype="<f4")
    floats[1, 2, 0] = bad
    with pytest.raises(InvalidInput, match="between 0 and 1") as refused:
        preprocess.from_tensor(floats.tobytes(), floats.shape, is_float=True)
    assert refused.value.reason is Reason.TENSOR_INVALID


def scene(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((480, 360), Image.Resampling.BICUBIC)


def bits_apart(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def test_a_look_says_where_it_grows_brighter_to_the_right() -> None:
    x = np.arange(90, dtype=np.uint8)
    # Brighter up to the middle of the width, and darker from there on.
    image = Image.fromarray(np.tile(np.minimum(x, 89 - x), (80, 1)))
    assert preprocess.inspect(encode(image, "PNG")).look == "f0" * 8
    assert preprocess.inspect(encode(Image.new("L", (50, 70)), "PNG")).look == "00" * 8


def test_copies_of_an_image_have_nearly_its_look_and_others_have_not() -> None:
    image = scene(1)
    look = preprocess.inspect(encode(image, "PNG")).look
    copies = [
        encode(image, "JPEG", quality=40), encode(image.resize((100, 75)), "PNG"),
        encode(image.resize((2000, 1500)), "JPEG"), encode(image.point(lambda p: p // 2), "PNG"),
        encode(image.convert("RGBA"), "PNG"), encode(image.quantize(64), "PNG"),
        encode(image.convert("L"), "PNG"),
    ]  # fmt: skip
    assert max(bits_apart(preprocess.inspect(data).look, look) for data in copies) <= 4
    others = [preprocess.inspect(encode(scene(seed), "PNG")).look for seed in range(2, 12)]
    assert min(bits_apart(other, look) for other in others) >= 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_look_is_of_the_upright_image(orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = scene(3)
    turned = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    look = preprocess.inspect(encode(turned, "PNG", exif=exif)).look
    assert bits_apart(look, preprocess.inspect(encode(upright, "PNG")).look) <= 1


def test_a_file_of_several_jpegs_is_decoded_as_small_as_one() -> None:
    out = io.BytesIO()
    photo = gradient(1600, 1200)
    photo.save(out, "MPO", save_all=True, append_images=[photo])
    alone = preprocess.open_image(encode(photo, "JPEG"))
    assert preprocess.open_image(out.getvalue()).size == alone.size == (400, 300)


def test_the_size_is_known_before_an_image_is_decoded() -> None:
    photo = gradient(640, 480)
    image = preprocess.Encoded(lambda: encode(photo, "PNG"))
    assert image.pixels == 640 * 480
    pixels = image(DEFAULT_DECODING)
    assert (pixels == preprocess.decode(encode(photo, "PNG"))).all()
    assert (image(DEFAULT_DECODING) == pixels).all()
    assert preprocess.Encoded(lambda: b"no image").pixels == 0
