"""From an image, encoded or decoded, to the `uint8 [224, 224, 3]` that a backbone takes.

Training and serving both come through here, so there is no skew between them.
Every function may be called from any thread; Pillow releases the GIL while it
decodes and resizes.

Images come from strangers. What a header claims is checked before any pixel is
decoded: at most `MAX_PIXELS`, and of a JPEG at most `MAX_SCANS` passes over them. The
largest that are decoded cost about 2 s of one core and 770 MB while it lasts.

Of an animated WebP or PNG the first frame counts; GIFs are refused. Transparency is
dropped, so that the colours below it show, as in most training pipelines. Colour
profiles are ignored, whole or broken, and so is all other metadata but the orientation.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from service.errors import InvalidInput, Reason
from service.inference import jpeg_scans
from service.inference.jpeg_scans import MAX_SCANS

Pixels = npt.NDArray[np.uint8]

SIZE: Final = 224
"""Side of what a backbone sees, in pixels."""
RESIZE: Final = 256
"""What the shorter side is scaled to before the middle is cut out, in pixels."""
MAX_PIXELS: Final = 50_000_000
"""More are not decoded: 50 megapixels are 150 MB as RGB."""
FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP")

# Pillow's own bound warns first and differs from ours, which is checked before
# any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
# A damaged EXIF block warns; it must not fail an image that decodes. For the whole
# process, since a filter for the time of one call is not safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

# What Pillow's parsers raise for bytes that make no sense to them.
_UNREADABLE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    zlib.error,
)
_RUN_LENGTHS: Final = (1, 2)
"""As BMPs number them: of 8 bits, of 4."""
_EXIF_ORIENTATION: Final = 0x0112
_TRANSPOSE: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def describe() -> dict[str, float | int | str]:
    """Says what this module does to an image, for manifests."""
    return {"resize": RESIZE, "crop": SIZE, "interpolation": "bilinear", "colours": "RGB"}


class WrongFormat(InvalidInput):
    """The bytes are something other than an image that is decoded here."""


class ImageFacts(NamedTuple):
    """Facts of an image that was decoded."""

    pixels: int
    bits: int


def inspect(data: bytes) -> ImageFacts:
    """Decodes an image and keeps nothing of it. Raises as `open_image`."""
    open_image(data)
    return ImageFacts(count_pixels(data), 0)


def count_pixels(data: bytes) -> int:
    """Reads width times height from an image's header. Raises as `open_image`."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            return image.width * image.height
    except _UNREADABLE as error:
        raise InvalidInput(Reason.IMAGE_UNREADABLE, _why_unreadable(data, error)) from error


def open_image(data: bytes) -> Image.Image:
    """Decodes a JPEG, PNG, WebP or BMP file to an upright RGB image.

    JPEGs whose shorter side is more than twice `RESIZE` are decoded at a half,
    a quarter or an eighth of their size (libjpeg's DCT scaling), never below
    `RESIZE`. Raises InvalidInput with IMAGE_UNREADABLE or IMAGE_TOO_LARGE.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            _check_size(width, height)
            if jpeg_scans.has_too_many(data):
                raise InvalidInput(
                    Reason.IMAGE_UNREADABLE,
                    f"the JPEG has more than {MAX_SCANS} scans, which no camera or program "
                    "writes: save it again",
                )
            if image.format == "BMP" and image.info.get("compression") in _RUN_LENGTHS:
                # Pillow decodes these byte by byte in Python, and holds all other threads up.
                raise InvalidInput(
                    Reason.IMAGE_UNREADABLE,
                    "the BMP is compressed by run lengths, which are not decoded: save it "
                    "uncompressed, or as PNG",
                )
            if image.format == "JPEG":
                scale = RESIZE / min(width, height)
                if scale < 1:
                    image.draft("RGB", (int(width * scale) + 1, int(height * scale) + 1))
            image.load()
            orientation = _orientation(image)
            upright = _to_rgb(image)
    except _UNREADABLE as error:
        kind = WrongFormat if data and isinstance(error, UnidentifiedImageError) else InvalidInput
        raise kind(Reason.IMAGE_UNREADABLE, _why_unreadable(data, error)) from error
    if isinstance(orientation, int) and orientation in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[orientation])
    return upright


def fit(image: Image.Image) -> Pixels:
    """Scales the shorter side to 256 and cuts out the middle 224 x 224, in one step."""
    width, height = image.size
    side = min(width, height) * SIZE / RESIZE
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    small = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    return np.asarray(small, dtype=np.uint8)


def decode(data: bytes) -> Pixels:
    """From the bytes of an image file to `uint8 [224, 224, 3]`; errors as `open_image`."""
    return fit(open_image(data))


def from_tensor(data: bytes, shape: Sequence[int], *, is_float: bool) -> Pixels:
    """From `[height, width, 3]` numbers to `uint8 [224, 224, 3]`.

    `data` holds unsigned bytes 0 to 255 or little-endian float32 0 to 1, rows
    first. Raises InvalidInput with TENSOR_INVALID or IMAGE_TOO_LARGE.
    """
    if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
        raise _bad_tensor(f"its shape is {list(shape)[:8]}; it must be [height, width, 3]")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise InvalidInput(
            Reason.IMAGE_TOO_LARGE,
            f"the tensor has {shape[1]} x {shape[0]} pixels, more than the {MAX_PIXELS} that are "
            "taken: scale it down before sending it",
        )
    expected = shape[0] * shape[1] * 3 * (4 if is_float else 1)
    if len(data) != expected:
        raise _bad_tensor(f"it has {len(data)} bytes where its shape and type need {expected}")
    if is_float:
        floats = np.frombuffer(data, dtype="<f4")
        # Written so that NaN fails too.
        if not (floats.min() >= 0 and floats.max() <= 1):
            raise _bad_tensor("its values are not all between 0 and 1")
        array = np.rint(floats * 255).astype(np.uint8).reshape(shape)
    else:
        array = np.frombuffer(data, dtype=np.uint8).reshape(shape)
    return fit(Image.fromarray(array, mode=None))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidInput(
            Reason.IMAGE_TOO_LARGE,
            f"the image has {width} x {height} pixels, more than the {MAX_PIXELS} that are "
            "decoded: scale it down before sending it",
        )


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation; 1 where there is none, or the block is damaged."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except _UNREADABLE:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16-bit grey: Pillow's own conversion clips instead of scaling.
        grey = np.right_shift(np.asarray(image), 8)
        return Image.fromarray(grey.clip(0, 255, out=grey).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _why_unreadable(data: bytes, error: Exception) -> str:
    if not data:
        return "the image is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        kind = " (it is a GIF)" if data[:4] == b"GIF8" else ""
        return f"the bytes are not a JPEG, PNG, WebP or BMP image{kind}"
    return f"the image cannot be decoded, it is damaged or cut short: {error}"


def _bad_tensor(why: str) -> InvalidInput:
    return InvalidInput(Reason.TENSOR_INVALID, f"the tensor is not an image: {why}")
