"""From what callers have (paths, bytes, PIL images, arrays) to what travels.

Knows images and arrays by what they can do, so that neither Pillow nor NumPy
is needed. Nothing is resized here: the service does that, in one way for all.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from graft._requests import which
from graft.errors import InvalidArgument, Reason, invalid
from graft.v1 import prediction_pb2 as pb

MAX_IMAGES: Final = 256
"""In one call; the server's limit unless configured."""
MAX_SCORES: Final = 100_000
"""Of all images of one call; the server's limit."""
MAX_CALL_BYTES: Final = 32 * 2**20
"""Images in one call; half of what the server takes, since a bound is no target."""
MAX_IMAGE_BYTES: Final = 63 * 2**20
"""One image; with what is around it, it must fit a message of 64 MiB."""

_PNG_MODES: Final = frozenset({"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"})


@runtime_checkable
class PilImage(Protocol):
    """A `PIL.Image.Image`."""

    @property
    def mode(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    def convert(self, mode: str) -> Any: ...
    def save(self, fp: Any, format: str) -> None: ...
    def tobytes(self) -> bytes: ...


@runtime_checkable
class ArrayImage(Protocol):
    """A NumPy array, or what looks like one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def tobytes(self) -> bytes: ...


ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | PilImage | ArrayImage
)
"""A path, the bytes of an image file, a PIL image, or an array: `[height, width, 3]`,
uint8 or float32 from 0 to 1."""


def as_many(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """One image becomes a list of one; an array of four dimensions is a batch."""
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | PilImage):
        return [images]
    if isinstance(images, ArrayImage):
        is_batch = len(images.shape) == 4 and isinstance(images, Iterable)
        return images if is_batch else [images]  # type: ignore[return-value]
    if not isinstance(images, Iterable):
        raise _strange(images, "images")
    return images


def predict_requests(
    images: ImageLike | Iterable[ImageLike],
    model: str,
    version: int | None,
    alias: str | None,
    *,
    top_k: int = 1,
    include_features: bool = False,
    max_images: int = MAX_IMAGES,
) -> Iterator[pb.PredictRequest]:
    """Requests that fit, in order; images are read as they are needed."""
    chosen = which(version, alias)
    if top_k < 1:
        raise invalid(f"top_k is {top_k}: it must be 1 or more", "top_k")
    if not max_images >= 1:
        raise invalid(f"{max_images} images a call: it must be 1 or more", "images")
    max_images = min(max_images, max(1, MAX_SCORES // top_k))
    for batch in _batches(as_many(images), max_images):
        yield pb.PredictRequest(
            model=model, **chosen, images=batch, top_k=top_k, include_features=include_features
        )


def _batches(images: Iterable[ImageLike], max_images: int) -> Iterator[list[pb.Image]]:
    batch: list[pb.Image] = []
    size = 0
    for index, image in enumerate(images):
        message = to_message(image, f"images[{index}]")
        bytes_ = message.ByteSize()
        if batch and (len(batch) == max_images or size + bytes_ > MAX_CALL_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += bytes_
    if batch:
        yield batch


def to_message(image: ImageLike, where: str) -> pb.Image:
    """One image as it travels to Predict; `where` names it in errors."""
    if isinstance(image, PilImage):
        upright = _upright(image)
        if upright.mode == "RGB":
            width, height = upright.size
            tensor = pb.Tensor(
                data_type=pb.DATA_TYPE_UINT8, shape=[height, width, 3], data=upright.tobytes()
            )
            return _fitting(pb.Image(tensor=tensor), where)
        return _fitting(pb.Image(encoded=_encoded(upright)), where)
    if isinstance(image, ArrayImage) and not isinstance(image, memoryview):
        kind = _check_array(image, where)
        tensor = pb.Tensor(data_type=kind, shape=list(image.shape), data=image.tobytes())
        return _fitting(pb.Image(tensor=tensor), where)
    return _fitting(pb.Image(encoded=_file_bytes(image, where)), where)


def to_file(image: ImageLike, where: str) -> bytes:
    """One image as the bytes of an image file, as uploads need it."""
    if isinstance(image, PilImage):
        return _encoded(_upright(image))
    if isinstance(image, ArrayImage) and not isinstance(image, memoryview):
        pixels: Any = image
        if _check_array(image, where) == pb.DATA_TYPE_FLOAT32:
            # As the service does it; what is not from 0 to 1 must not wrap around.
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise invalid(
                    f"{where}: its values are not all from 0 to 1", where, Reason.TENSOR_INVALID
                )
            pixels = (pixels * 255).round().astype("uint8")
        return _png(pixels.tobytes(), image.shape[0], image.shape[1])
    return _file_bytes(image, where)


def _file_bytes(image: Any, where: str) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    raise _strange(image, where)


def _strange(image: object, where: str) -> InvalidArgument:
    return invalid(
        f"{where}: a {type(image).__name__} is no image: give a path, the bytes of an image "
        "file, a PIL image or a NumPy array (of a tensor, its .numpy())",
        where,
    )


def _check_array(array: ArrayImage, where: str) -> pb.DataType:
    shape, kind = tuple(array.shape), getattr(array.dtype, "str", str(array.dtype))
    if len(shape) == 2:
        hint = "it is grey: repeat it with numpy.stack([image] * 3, axis=-1)"
    elif len(shape) == 3 and shape[2] == 1:
        hint = "it is grey: repeat it with numpy.repeat(image, 3, axis=-1)"
    elif len(shape) == 3 and shape[2] == 4:
        hint = "it has an alpha channel: leave it out with image[..., :3]"
    elif len(shape) == 3 and shape[0] == 3 and shape[2] != 3:
        hint = "its channels come first: move them with image.transpose(1, 2, 0)"
    elif len(shape) != 3 or shape[2] != 3 or 0 in shape:
        hint = "give one image, in the colours red, green, blue"
    elif kind in ("|u1", "uint8"):
        return pb.DATA_TYPE_UINT8
    elif kind == "<f4":
        return pb.DATA_TYPE_FLOAT32
    else:
        raise invalid(
            f"{where}: its elements are {array.dtype}: give uint8 (0 to 255), or float32 (0 to 1) "
            "with image.astype('<f4')",
            where,
            Reason.TENSOR_INVALID,
        )
    raise invalid(
        f"{where}: its shape is {list(shape)}, which must be [height, width, 3]; {hint}",
        where,
        Reason.TENSOR_INVALID,
    )


def _fitting(message: pb.Image, where: str) -> pb.Image:
    size = message.ByteSize()
    if size > MAX_IMAGE_BYTES:
        raise invalid(
            f"{where}: it takes {size / 2**20:.0f} MiB, more than the "
            f"{MAX_IMAGE_BYTES // 2**20} MiB that fit one message: scale it down, or send the "
            "image's file instead of its pixels",
            where,
            Reason.IMAGE_TOO_LARGE,
        )
    return message


def _upright(image: PilImage) -> PilImage:
    """Turned as its EXIF data says, as the service turns files."""
    # Whoever has a PIL image has Pillow; importing graft must not load it.
    from PIL import Image, ImageOps  # noqa: PLC0415

    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image)
    return image


def _encoded(image: PilImage) -> bytes:
    out = io.BytesIO()
    fit = image if image.mode in _PNG_MODES else image.convert("RGB")
    fit.save(out, "PNG")
    return out.getvalue()


def _png(rgb: bytes, height: int, width: int) -> bytes:
    """The pixels as a PNG file, https://www.w3.org/TR/png-3/: 8 bits, RGB, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = width * 3
    lines = b"".join(b"\0" + rgb[start : start + row] for start in range(0, len(rgb), row))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines, 1))
        + chunk(b"IEND", b"")
    )
