"""Turns an image, encoded or decoded, into the `uint8 [size, size, 3]` that a backbone takes.

Training and serving both come through here, so there is no skew between them; docs/how-to/export.md
shows the same in a few lines of Pillow, for exported models. Every function may be called
from any thread; Pillow and pi-heif release the GIL while they decode and resize.

Images come from strangers. What a header claims is checked before any pixel is
decoded: at most `MAX_PIXELS`, of a JPEG at most `MAX_SCANS` passes over them, of a TIFF a
layout that fits them. The largest that are decoded cost about 2 s of one core and 1.3 GB
while it lasts.

Of an animation the first frame counts, of a TIFF the first page, of an HEIC file its primary
image. Transparency is laid on a colour: what lies hidden below it is whatever a program
left there. Colour profiles are ignored, whole or broken, and so is all other metadata but
the orientation and the depth of 16-bit grey.
"""

import hashlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pi_heif
from PIL import AvifImagePlugin, Image, ImageFile, UnidentifiedImageError

from service.domain import DEFAULT_DECODING, ImageDecoding
from service.engine import decoder_limits, formats
from service.engine.decoder_limits import MAX_JPEG_SEGMENTS, MAX_SCANS, unreadable
from service.errors import InvalidInput, Reason

Pixels = npt.NDArray[np.uint8]

MARGIN: Final = 256 / 224
"""An image's shorter side over the side of the middle square that is cut out of it."""
MAX_PIXELS: Final = 64_000_000
"""More are not decoded: 64 megapixels are 256 MB as Pillow keeps RGB."""

# What is decoded here shares the machine with other decoders and with inference: each has
# the thread that it was called on.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
pi_heif.register_heif_opener(
    thumbnails=False, depth_images=False, aux_images=False, decode_threads=1
)
decoder_limits.limit_libraries(MAX_PIXELS)
# Pillow's own bound warns first and differs from ours, which is checked before
# any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
# What is wrong with an image is an error of its sender's call: it does not belong in the log.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
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
    RuntimeError,
    zlib.error,
)
_MOST_PARTS: Final = 4
"""Times `MAX_PIXELS` that may be decoded for one HEIC image: its tiles, what they are put
together to, and both again for its transparency."""
_RUN_LENGTHS: Final = (1, 2)
"""BMP's numbers of compression by run lengths: of 8 bits, of 4."""
USUAL_BITS: Final = (10, 12, 14, 16)
"""Bits of cameras and scanners, of which a dataset gets the smallest that holds its values."""

_IHDR_END: Final = 33
"""Where a PNG's second chunk begins."""
_Greys = npt.NDArray[np.uint16] | npt.NDArray[np.int32]
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
_ON_ITS_SIDE: Final = {_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8)}


@dataclass(frozen=True)
class ImageFacts:
    """Reports what a check found of an image file."""

    pixels: int
    """Width times height."""
    bits: int
    """Bits that 16-bit grey uses: as the file declares them, else the smallest of 10, 12, 14 and
    16 that holds its largest value. 0 for all other images."""
    look: str = ""
    """Its difference hash, 64 bits as 16 hex digits: images that look the same differ in few."""
    aspect: float = 1.0
    """The longer side over the shorter."""


def describe(decoding: ImageDecoding = DEFAULT_DECODING) -> dict[str, float | int | str]:
    """Describes what this module does to an image, for manifests and exported models."""
    return {
        "resize": round(decoding.size * MARGIN),
        "crop": decoding.size,
        "framing": decoding.framing,
        "interpolation": "bilinear",
        "colours": "RGB",
    }


class SentImage:
    """The bytes of an image that a caller sent, read when they are needed; for one thread."""

    def __init__(self, read: Callable[[], bytes], kind: str = "") -> None:
        """`kind` tells images apart whose bytes are alike."""
        self._read = read
        self._kind = kind
        self._data: bytes | None = None

    @property
    def data(self) -> bytes:
        """Returns the bytes, which are read once until they are dropped."""
        if self._data is None:
            self._data = self._read()
        return self._data

    @property
    def digest(self) -> bytes:
        """Returns what it is known by; of a file its sha256, by which datasets know it, too."""
        return hashlib.sha256(self.data).digest() + self._kind.encode()

    def drop(self) -> None:
        """Lets go of the bytes and of what was made of them; they can be read again."""
        self._data = None


class Encoded(SentImage):
    """An image file, whose size can be read before it is decoded."""

    _opened: "_Opened | None" = None

    @property
    def pixels(self) -> int:
        """Width times height, from the header, which is read once; 0 for an unreadable one."""
        try:
            self._opened = self._opened or _open(self.data)
        except InvalidInput:
            return 0
        return self._opened.pixels

    def __call__(self, decoding: ImageDecoding) -> Pixels:
        """Decodes to `uint8 [size, size, 3]`; errors as `open_image`."""
        opened, self._opened = self._opened or _open(self.data), None
        return fit(_upright(opened, decoding), decoding)

    def drop(self) -> None:
        """As `SentImage.drop`."""
        super().drop()
        self._opened = None


class Tensor(SentImage):
    """An image as numbers, as `from_tensor` takes them."""

    def __init__(self, read: Callable[[], bytes], shape: Sequence[int], *, is_float: bool) -> None:
        super().__init__(read, f"{'float32' if is_float else 'uint8'} {shape[:4]}")
        self._shape = shape
        self._is_float = is_float

    def __call__(self, decoding: ImageDecoding) -> Pixels:
        """Makes `uint8 [size, size, 3]`; errors as `from_tensor`."""
        return from_tensor(self.data, self._shape, decoding, is_float=self._is_float)


def count_pixels(data: bytes) -> int:
    """Reads width times height, in pixels, from an image's header. Raises as `open_image`."""
    return _open(data).pixels


def inspect(data: bytes) -> ImageFacts:
    """Decodes an image file and keeps nothing of it. Raises as `open_image`."""
    opened = _open(data)
    with _readable():
        image = opened.image
        pixels = opened.pixels
        aspect = max(image.size) / min(image.size)
        _load(opened, DEFAULT_DECODING)
        return ImageFacts(pixels, _grey_bits(opened), _look(opened), aspect)


def open_image(data: bytes, decoding: ImageDecoding = DEFAULT_DECODING) -> Image.Image:
    """Decodes a file of one of `formats.FORMATS` to an upright RGB image.

    JPEGs whose shorter side is more than twice what is used of it are decoded at a half,
    a quarter or an eighth of their size (libjpeg's DCT scaling), never below.
    Raises InvalidInput with IMAGE_UNREADABLE or IMAGE_TOO_LARGE.
    """
    return _upright(_open(data), decoding)


def fit(image: Image.Image, decoding: ImageDecoding = DEFAULT_DECODING) -> Pixels:
    """Cuts out the middle seven eighths of the shorter side, or squeezes all; `uint8 [s, s, 3]`."""
    width, height = image.size
    box = None
    if decoding.framing == "crop":
        side = min(width, height) / MARGIN
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    size = (decoding.size, decoding.size)
    small = image.resize(size, Image.Resampling.BILINEAR, box=box)
    return np.asarray(small, dtype=np.uint8)


def decode(data: bytes, decoding: ImageDecoding = DEFAULT_DECODING) -> Pixels:
    """Decodes the bytes of an image file to `uint8 [size, size, 3]`; errors as `open_image`."""
    return fit(open_image(data, decoding), decoding)


def from_tensor(
    data: bytes,
    shape: Sequence[int],
    decoding: ImageDecoding = DEFAULT_DECODING,
    *,
    is_float: bool,
) -> Pixels:
    """Makes `uint8 [size, size, 3]` of `[height, width, 3]` numbers.

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
    return fit(Image.fromarray(array, mode=None), decoding)


@dataclass
class _Opened:
    """An image whose header was read, and what the file declares of its grey."""

    image: ImageFile.ImageFile
    nbytes: int
    """Of the file."""
    declared_bits: int = 0
    is_white_zero: bool = False

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.image.width * self.image.height


@contextmanager
def _readable() -> Iterator[None]:
    """Turns what Pillow raises inside into InvalidInput."""
    try:
        yield
    except MemoryError as error:
        # Pillow's own, too, for images of a size that no allocation is tried for.
        raise unreadable("the image needs more memory to be decoded than there is") from error
    except _UNREADABLE as error:
        raise unreadable(_why(error)) from error


def _open(data: bytes) -> _Opened:
    """Reads a header and checks it."""
    kind = formats.recognise(data)
    with _readable():
        page = decoder_limits.tiff_page(data) if kind == "TIFF" else None
        if kind == "JPEG" and decoder_limits.is_endless_jpeg(data):
            raise unreadable(
                f"the JPEG has more than {MAX_SCANS} scans or {MAX_JPEG_SEGMENTS} segments, which "
                "no camera or program writes: save it again"
            )
        if kind == "GIF":
            _check_size(*decoder_limits.gif_size(data))
        if kind == "HEIF":
            decoder_limits.check_heif(data, _MOST_PARTS * MAX_PIXELS)
        image = Image.open(io.BytesIO(page.data if page else data), formats=(kind,))
        _check_size(*image.size)
        if image.mode == "F":
            raise decoder_limits.float_samples()
        if kind == "BMP" and image.info.get("compression") in _RUN_LENGTHS:
            # Pillow decodes these byte by byte in Python, and holds all other threads up.
            raise unreadable(
                "the BMP is compressed by run lengths, which are not decoded: save it "
                "uncompressed, or as PNG"
            )
        opened = _Opened(image, len(data))
        if page is not None:
            opened.declared_bits = page.declared_bits
            opened.is_white_zero = page.is_white_zero
        elif kind == "HEIF":
            # libheif has scaled what the file declares to 16.
            opened.declared_bits = 16
        elif _is_deep(image):
            opened.declared_bits = _bits_of_png(data)
        return opened


def _upright(opened: _Opened, decoding: ImageDecoding) -> Image.Image:
    with _readable():
        _load(opened, decoding)
        orientation = _orientation(opened.image)
        upright = _to_rgb(opened, decoding)
    if isinstance(orientation, int) and orientation in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[orientation])
    return upright


def _load(opened: _Opened, decoding: ImageDecoding) -> None:
    image = opened.image
    # An MPO is a JPEG with others behind it, such as a phone's depth image.
    if image.format in ("JPEG", "MPO"):
        width, height = image.size
        scale = round(decoding.size * MARGIN) / min(width, height)
        if scale < 1:
            image.draft("RGB", (int(width * scale) + 1, int(height * scale) + 1))
        # Pillow decodes 64 KiB at a time, and after each waits to get the interpreter back.
        image.decodermaxblock = opened.nbytes
    image.load()
    # The header of an HEIC file may name another size than its coded image has.
    _check_size(*image.size)


def _grey_bits(opened: _Opened) -> int:
    if not _is_deep(opened.image):
        return 0
    values = _greys(opened.image)
    return _usual_bits(opened.declared_bits or int(values.max()).bit_length())


def _look(opened: _Opened) -> str:
    """Returns the difference hash of an image as it is upright.

    N. Krawetz, "Kind of Like That", 2013: of the grey image scaled to 9 x 8, whether each pixel
    is brighter than the one to its left.
    """
    image: Image.Image = opened.image
    orientation = _orientation(image)
    turn = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    if image.mode not in ("L", "RGB") or image.has_transparency_data:
        image = _to_rgb(opened, DEFAULT_DECODING)
    # Turned when it is small, which costs nothing.
    size = (8, 9) if turn in _ON_ITS_SIDE else (9, 8)
    small = image.resize(size, Image.Resampling.BOX, reducing_gap=16).convert("L")
    if turn is not None:
        small = small.transpose(turn)
    grey = np.asarray(small)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidInput(
            Reason.IMAGE_TOO_LARGE,
            f"the image has {width} x {height} pixels, more than the {MAX_PIXELS} that are "
            "decoded: scale it down before sending it",
        )


def _orientation(image: Image.Image) -> object:
    """Reads the EXIF orientation; 1 where there is none, or the block is damaged."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except _UNREADABLE:
        return 1


def _to_rgb(opened: _Opened, decoding: ImageDecoding) -> Image.Image:
    image: Image.Image = opened.image
    if _is_deep(image):
        transparent = image.info.get("transparency")
        image = _to_8_bits(
            _greys(image),
            opened.declared_bits or decoding.bit_depth,
            is_white_zero=opened.is_white_zero,
            transparent=transparent if isinstance(transparent, int) else None,
        )
    if not image.has_transparency_data:
        # Not copied where it is RGB already.
        return image if image.mode == "RGB" else image.convert("RGB")
    above = image.convert("RGBA")
    below = Image.new("RGB", above.size, decoding.background)
    below.paste(above, mask=above)
    return below


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the image cannot be decoded, it is damaged or cut short within its header"
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return f"the image cannot be decoded, it is damaged or cut short: {why}"


def _bad_tensor(why: str) -> InvalidInput:
    return InvalidInput(Reason.TENSOR_INVALID, f"the tensor is not an image: {why}")


# Grey of up to 16 bits.
#
# A file of 16 bits seldom says how many its camera has, and 12 bits shown as 16 are nearly
# black. What a file declares counts; else the smallest usual depth that holds all images of a
# dataset, so that an image that is darker than another stays darker.


def _is_deep(image: Image.Image) -> bool:
    """Tells whether an image is grey of more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _bits_of_png(data: bytes) -> int:
    """Reads how many bits a PNG's grey uses from its chunk sBIT; 0 where it has none."""
    at = _IHDR_END
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"sBIT":
            return data[at + 8] if length and 8 < data[at + 8] <= 16 else 0
        if kind in (b"PLTE", b"IDAT", b"IEND"):
            return 0
        at += 12 + length
    return 0


def _greys(image: Image.Image) -> _Greys:
    """Returns the grey values of a decoded image, [height, width], 0 to 65535.

    Raises InvalidInput (IMAGE_UNREADABLE) for values of more than 16 bits, or below 0.
    """
    values: _Greys = np.asarray(image)
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 0xFFFF):
        raise InvalidInput(
            Reason.IMAGE_UNREADABLE,
            f"the image's grey goes from {values.min()} to {values.max()}, beyond 0 to 65535: "
            "scale it to 0..65535 and save it as 16-bit grey, or to 0..255 as 8 bit",
        )
    return values


def _usual_bits(bits: int) -> int:
    """Returns the smallest of `USUAL_BITS` that is no less than so many bits, at most 16."""
    return next(usual for usual in USUAL_BITS if bits <= usual)


def _to_8_bits(
    values: _Greys, bits: int, *, is_white_zero: bool, transparent: int | None
) -> Image.Image:
    """Returns the upper 8 of `bits` bits of grey values [height, width] as an image.

    Values of more bits are white. With `is_white_zero` the largest value is black. The
    image is in mode L; in LA where a value is given that means transparent.
    """
    alpha = None if transparent is None else values != transparent
    if is_white_zero:
        most = (1 << bits) - 1
        values = most - np.minimum(values, most)
    upper = np.right_shift(values, bits - 8)
    grey = Image.fromarray(np.minimum(upper, 255).astype(np.uint8))
    if alpha is not None:
        grey.putalpha(Image.fromarray(alpha.astype(np.uint8) * np.uint8(255)))
    return grey
