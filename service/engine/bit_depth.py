"""Grey of up to 16 bits: how many of them are used, and how it becomes 8.

A file of 16 bits seldom says how many its camera has, and 12 bits shown as 16 are nearly
black. What a file declares counts; else the smallest usual depth that holds all images of a
dataset, so that an image that is darker than another stays darker.
"""

import struct
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.errors import InvalidInput, Reason

USUAL: Final = (10, 12, 14, 16)
"""Bits of cameras and scanners, of which a dataset gets the smallest that holds its values."""

_IHDR_END: Final = 33
_PNG_SIGNATURE: Final = 8

Greys = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


def is_deep(image: Image.Image) -> bool:
    """Tells whether an image is grey of more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def declared_by_png(data: bytes) -> int:
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


def greys(image: Image.Image) -> Greys:
    """Returns the grey values of a decoded image, [height, width], 0 to 65535.

    Raises InvalidInput (IMAGE_UNREADABLE) for values of more than 16 bits, or below 0.
    """
    values: Greys = np.asarray(image)
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 0xFFFF):
        raise InvalidInput(
            Reason.IMAGE_UNREADABLE,
            f"the image's grey goes from {values.min()} to {values.max()}, beyond 0 to 65535: "
            "scale it to 0..65535 and save it as 16-bit grey, or to 0..255 as 8 bit",
        )
    return values


def usual(bits: int) -> int:
    """Returns the smallest of `USUAL` that is no less than so many bits, at most 16."""
    return next(usual for usual in USUAL if bits <= usual)


def to_8_bits(
    values: Greys, bits: int, *, is_white_zero: bool, transparent: int | None
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
