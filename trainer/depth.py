"""The depth of a data set's 16-bit grey: found before any of its images is decoded to be used.

One depth for all images, those that it grows from and those of a target domain too, so that
what is darker in one image than in another stays so. Files that cannot be such images are
known by their first bytes; the others are decoded, unless they declare a depth, which
then counts for those that do not.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service import class_folders
from service.domain import DEFAULT_DECODING, WHITE, ImageDecoding
from service.errors import GraftError
from service.inference import preprocess
from service.jobs.contract import Note
from trainer.records import Send

_START_BYTES = 32


def decoding_of_folders(
    roots: Sequence[Path], background: str, threads: int, send: Send
) -> ImageDecoding:
    """Returns how the images at any depth below the folders are decoded, and reports the depth."""
    paths: list[Path] = []
    for root in roots:
        try:
            paths += [file.path for file in class_folders.find_any(root)]
        except (GraftError, OSError):
            continue  # whoever reads its images says what is wrong with it
    decoding = decoding_of(paths, threads, background)
    if decoding.bit_depth != DEFAULT_DECODING.bit_depth:
        text = (
            f"the 16-bit grey images hold values of {decoding.bit_depth} bits at most: "
            f"{2**decoding.bit_depth - 1} is taken for white, for images to classify too"
        )
        send(Note("info", text))
    return decoding


def decoding_of(paths: Iterable[Path], threads: int = 0, background: str = WHITE) -> ImageDecoding:
    """Returns how these files are decoded; those that cannot be read count for nothing."""
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        bits = max(pool.map(_bits, paths), default=0)
    return ImageDecoding(background, bits or DEFAULT_DECODING.bit_depth)


def _bits(path: Path) -> int:
    try:
        with class_folders.open_plain(path, None) as file:
            start = file.read(_START_BYTES)
        if not preprocess.may_hold_16_bits(start):
            return 0
        return preprocess.grey_bits(class_folders.read_plain(path))
    except (GraftError, OSError):
        return 0
