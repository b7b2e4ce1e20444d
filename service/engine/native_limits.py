"""Sets limits within libheif, and keeps libtiff from printing.

pi-heif and Pillow bring these libraries and offer none of this, so it is set in the libraries
themselves, by what their headers declare. It holds for the whole process, and is set before
anything is decoded.
"""

import ctypes
from typing import ClassVar, Final

import _pi_heif
from PIL import _imaging

MAX_TILES: Final = 4096
"""In one HEIC image; a phone's has some fifty."""
MAX_BYTES: Final = 1_500_000_000
"""Bytes that libheif may hold at once while it decodes one file."""


class _HeifLimits(ctypes.Structure):
    """The beginning of `struct heif_security_limits` (libheif/heif_security.h), version 2 on."""

    _fields_: ClassVar = [
        ("version", ctypes.c_uint8),
        ("max_image_size_pixels", ctypes.c_uint64),
        ("max_number_of_tiles", ctypes.c_uint64),
        ("max_bayer_pattern_pixels", ctypes.c_uint32),
        ("max_items", ctypes.c_uint32),
        ("max_color_profile_size", ctypes.c_uint32),
        ("max_memory_block_size", ctypes.c_uint64),
        ("max_components", ctypes.c_uint32),
        ("max_iloc_extents_per_item", ctypes.c_uint32),
        ("max_size_entity_group", ctypes.c_uint32),
        ("max_children_per_box", ctypes.c_uint32),
        ("max_total_memory", ctypes.c_uint64),
    ]


def limit(max_pixels: int) -> None:
    """Limits what libheif decodes, and stops libtiff's messages on standard error.

    The size in a HEIC file's header is that after cropping, which Pillow reports; what is
    coded may be far larger, and is bounded here alone. Raises RuntimeError for a libheif
    whose limits cannot be found, or lie elsewhere than its header says.
    """
    get_limits = getattr(ctypes.CDLL(_pi_heif.__file__), "heif_get_global_security_limits", None)
    if get_limits is None:
        raise RuntimeError("pi-heif hides its libheif: install its wheel")
    get_limits.restype = ctypes.POINTER(_HeifLimits)
    limits = get_limits().contents
    if limits.version < 2 or limits.max_image_size_pixels not in (2**30, max_pixels):
        raise RuntimeError("libheif's limits are not where they were: take another pi-heif")
    limits.max_image_size_pixels = max_pixels
    limits.max_number_of_tiles = MAX_TILES
    limits.max_memory_block_size = MAX_BYTES
    limits.max_total_memory = MAX_BYTES
    # What is wrong with a file is an error of its sender's call: it does not belong in the log.
    tiff = ctypes.CDLL(_imaging.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        # A Pillow that hides its libtiff prints; nothing else changes.
        if (set_handler := getattr(tiff, name, None)) is not None:
            set_handler(None)
