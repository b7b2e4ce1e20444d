"""From what callers have (paths, bytes, PIL pictures, arrays) to what travels.

Knows pictures and arrays by what they can do, so that neither Pillow nor NumPy
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

MAX_PICTURES: Final = 256
"""In one call; the server's limit unless configured."""
MAX_CALL_BYTES: Final = 32 * 2**20
"""Pictures in one call; half of what the server takes, since a bound is no target."""
MAX_PICTURE_BYTES: Final = 63 * 2**20
"""One picture; with what is around it, it must fit a message of 64 MiB."""

_PNG_MODES: Final = frozenset({"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"})


@runtime_checkable
class PilPicture(Protocol):
    """A `PIL.Image.Image`."""

    @property
    def mode(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    def convert(self, mode: str) -> Any: ...
    def save(self, fp: Any, format: str) -> None: ...
    def tobytes(self) -> bytes: ...


@runtime_checkable
class ArrayPicture(Protocol):
    """A NumPy array, or what looks like one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def tobytes(self) -> bytes: ...


PictureLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | PilPicture | ArrayPicture
)
"""A path, the bytes of a picture file, a PIL picture, or an array: `[height, width, 3]`,
uint8 or float32 from 0 to 1."""


def as_many(pictures: PictureLike | Iterable[PictureLike]) -> Iterable[PictureLike]:
    """One picture becomes a list of one; an array of four dimensions is a batch."""
    if isinstance(pictures, str | os.PathLike | bytes | bytearray | memoryview | PilPicture):
        return [pictures]
    if isinstance(pictures, ArrayPicture):
        is_batch = len(pictures.shape) == 4 and isinstance(pictures, Iterable)
        return pictures if is_batch else [pictures]  # type: ignore[return-value]
    if not isinstance(pictures, Iterable):
        raise _strange(pictures, "pictures")
    return pictures


def predict_requests(
    pictures: PictureLike | Iterable[PictureLike],
    model: str,
    version: int | None,
    alias: str | None,
    *,
    top_k: int = 1,
    include_features: bool = False,
    max_pictures: int = MAX_PICTURES,
) -> Iterator[pb.PredictRequest]:
    """Requests that fit, in order; pictures are read as they are needed."""
    chosen = which(version, alias)
    if top_k < 1:
        raise invalid(f"top_k is {top_k}: it must be 1 or more", "top_k")
    if not max_pictures >= 1:
        raise invalid(f"{max_pictures} pictures a call: it must be 1 or more", "pictures")
    for batch in _batches(as_many(pictures), max_pictures):
        yield pb.PredictRequest(
            model=model, **chosen, pictures=batch, top_k=top_k, include_features=include_features
        )


def _batches(pictures: Iterable[PictureLike], max_pictures: int) -> Iterator[list[pb.Picture]]:
    batch: list[pb.Picture] = []
    size = 0
    for index, picture in enumerate(pictures):
        message = to_message(picture, f"pictures[{index}]")
        bytes_ = message.ByteSize()
        if batch and (len(batch) == max_pictures or size + bytes_ > MAX_CALL_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += bytes_
    if batch:
        yield batch


def to_message(picture: PictureLike, where: str) -> pb.Picture:
    """One picture as it travels to Predict; `where` names it in errors."""
    if isinstance(picture, PilPicture):
        upright = _upright(picture)
        if upright.mode == "RGB":
            width, height = upright.size
            tensor = pb.Tensor(
                data_type=pb.DATA_TYPE_UINT8, shape=[height, width, 3], data=upright.tobytes()
            )
            return _fitting(pb.Picture(tensor=tensor), where)
        return _fitting(pb.Picture(encoded=_encoded(upright)), where)
    if isinstance(picture, ArrayPicture) and not isinstance(picture, memoryview):
        kind = _check_array(picture, where)
        tensor = pb.Tensor(data_type=kind, shape=list(picture.shape), data=picture.tobytes())
        return _fitting(pb.Picture(tensor=tensor), where)
    return _fitting(pb.Picture(encoded=_file_bytes(picture, where)), where)


def to_file(picture: PictureLike, where: str) -> bytes:
    """One picture as the bytes of a picture file, as uploads need it."""
    if isinstance(picture, PilPicture):
        return _encoded(_upright(picture))
    if isinstance(picture, ArrayPicture) and not isinstance(picture, memoryview):
        pixels: Any = picture
        if _check_array(picture, where) == pb.DATA_TYPE_FLOAT32:
            # As the service does it; what is not from 0 to 1 must not wrap around.
            if not (pixels.min() >= 0 and pixels.max() <= 1):
                raise invalid(
                    f"{where}: its values are not all from 0 to 1", where, Reason.TENSOR_INVALID
                )
            pixels = (pixels * 255).round().astype("uint8")
        return _png(pixels.tobytes(), picture.shape[0], picture.shape[1])
    return _file_bytes(picture, where)


def _file_bytes(picture: Any, where: str) -> bytes:
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    raise _strange(picture, where)


def _strange(picture: object, where: str) -> InvalidArgument:
    return invalid(
        f"{where}: a {type(picture).__name__} is no picture: give a path, the bytes of a picture "
        "file, a PIL picture or a NumPy array (of a tensor, its .numpy())",
        where,
    )


def _check_array(array: ArrayPicture, where: str) -> pb.DataType:
    shape, kind = tuple(array.shape), getattr(array.dtype, "str", str(array.dtype))
    if len(shape) == 2:
        hint = "it is grey: repeat it with numpy.stack([picture] * 3, axis=-1)"
    elif len(shape) == 3 and shape[2] == 1:
        hint = "it is grey: repeat it with numpy.repeat(picture, 3, axis=-1)"
    elif len(shape) == 3 and shape[2] == 4:
        hint = "it has an alpha channel: leave it out with picture[..., :3]"
    elif len(shape) == 3 and shape[0] == 3 and shape[2] != 3:
        hint = "its channels come first: move them with picture.transpose(1, 2, 0)"
    elif len(shape) != 3 or shape[2] != 3 or 0 in shape:
        hint = "give one picture, in the colours red, green, blue"
    elif kind in ("|u1", "uint8"):
        return pb.DATA_TYPE_UINT8
    elif kind == "<f4":
        return pb.DATA_TYPE_FLOAT32
    else:
        raise invalid(
            f"{where}: its elements are {array.dtype}: give uint8 (0 to 255), or float32 (0 to 1) "
            "with picture.astype('<f4')",
            where,
            Reason.TENSOR_INVALID,
        )
    raise invalid(
        f"{where}: its shape is {list(shape)}, which must be [height, width, 3]; {hint}",
        where,
        Reason.TENSOR_INVALID,
    )


def _fitting(message: pb.Picture, where: str) -> pb.Picture:
    size = message.ByteSize()
    if size > MAX_PICTURE_BYTES:
        raise invalid(
            f"{where}: it takes {size / 2**20:.0f} MiB, more than the "
            f"{MAX_PICTURE_BYTES // 2**20} MiB that fit one message: scale it down, or send the "
            "picture's file instead of its pixels",
            where,
            Reason.PICTURE_TOO_LARGE,
        )
    return message


def _upright(picture: PilPicture) -> PilPicture:
    """Turned as its EXIF data says, as the service turns files."""
    # Whoever has a PIL picture has Pillow; importing graft must not load it.
    from PIL import Image, ImageOps  # noqa: PLC0415

    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture)
    return picture


def _encoded(picture: PilPicture) -> bytes:
    out = io.BytesIO()
    fit = picture if picture.mode in _PNG_MODES else picture.convert("RGB")
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
