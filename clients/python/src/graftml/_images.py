"""Turns what callers have (paths, bytes, open files, PIL images, arrays) into what is sent.

Knows images and arrays by what they can do, so that neither Pillow nor NumPy
is needed. Nothing is resized here: the service does that, in one way for all.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

from graftml_stubs.v1 import prediction_pb2 as pb

from graftml import _requests
from graftml._data import ArrayImage, ImageLike, PilImage
from graftml._encoding import encoding
from graftml._files import is_open_file, read_open, read_path
from graftml._options import Decision
from graftml._predictions import ModelSpec
from graftml.errors import InvalidArgument, Reason, invalid

MAX_IMAGES: Final = 256
"""In one call; the server's limit unless configured."""
MAX_SCORES: Final = 100_000
"""Of all images of one call; the server's limit."""
MAX_CALL_BYTES: Final = 32 * 2**20
"""Images in one call; half of what the server takes, since a bound is no target."""
MAX_IMAGE_BYTES: Final = 63 * 2**20
"""One image; with what is around it, it must fit a message of 64 MiB."""

_PNG_MODES: Final = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})
_MOST_GREY: Final = 65535
_BITS_PER_SAMPLE, _MOST_VALUE = 258, 281
"""Tags of TIFF that say how many bits of 16 are used."""


def as_many(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """One image becomes a list of one; an array of four dimensions is a batch."""
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | PilImage):
        return [images]
    if is_open_file(images):
        # It can be iterated, line by line.
        return [images]  # type: ignore[list-item]
    if isinstance(images, ArrayImage):
        is_batch = len(images.shape) == 4 and isinstance(images, Iterable)
        return images if is_batch else [images]  # type: ignore[return-value]
    if not isinstance(images, Iterable):
        raise _strange(images, "images")
    return images


def predict_requests(
    images: ImageLike | Iterable[ImageLike],
    models: list[pb.ModelSpec],
    *,
    top_k: int = 1,
    include_features: bool = False,
    max_images: int = MAX_IMAGES,
) -> Iterator[pb.PredictRequest]:
    """Requests that fit, in order; images are read as they are needed."""
    empty = _without_images(models, top_k, include_features)
    if not max_images >= 1:
        raise invalid(f"{max_images} images a call: it must be 1 or more", "images")
    most = min(max_images, MAX_SCORES // top_k) // len(models)
    for batch in _batches(as_many(images), max(1, most)):
        request = pb.PredictRequest(images=batch)
        request.MergeFrom(empty)
        yield request


def model_specs(models: Iterable[str | ModelSpec]) -> list[pb.ModelSpec]:
    """The models of a call as they are named in it."""
    if isinstance(models, str):
        raise invalid(f"models is {models!r}: give a list, or call predict", "models")
    found = [
        model_spec(each.model, each.version, each.alias, each.decision)
        if isinstance(each, ModelSpec)
        else model_spec(each, None, None, None)
        for each in models
    ]
    if not found:
        raise invalid("models is empty: name at least one", "models")
    return found


@encoding
def model_spec(
    model: str, version: int | None, alias: str | None, decision: Decision | None
) -> pb.ModelSpec:
    """One model as it is named in a call."""
    return pb.ModelSpec(
        **_requests.version_of(model, version, alias), decision=_requests.decision(decision)
    )


@encoding
def _without_images(
    models: list[pb.ModelSpec], top_k: int, include_features: bool
) -> pb.PredictRequest:
    if top_k < 1:
        raise invalid(f"top_k is {top_k}: it must be 1 or more", "top_k")
    return pb.PredictRequest(models=models, top_k=top_k, include_features=include_features)


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
        upright = _upright(image, where)
        if upright.mode == "RGB" and "transparency" not in getattr(upright, "info", {}):
            width, height = upright.size
            tensor = pb.Tensor(
                data_type=pb.DATA_TYPE_UINT8, shape=[height, width, 3], data=upright.tobytes()
            )
            return _fitting(pb.Image(tensor=tensor), where)
        return _fitting(pb.Image(encoded=_encoded(upright, where, image)), where)
    if isinstance(image, ArrayImage) and not isinstance(image, memoryview):
        if _is_deep(image):
            return _fitting(pb.Image(encoded=_deep_png(image)), where)
        kind = _check_array(image, where)
        tensor = pb.Tensor(data_type=kind, shape=list(image.shape), data=image.tobytes())
        return _fitting(pb.Image(tensor=tensor), where)
    return _fitting(pb.Image(encoded=_file_bytes(image, where)), where)


def to_file(image: ImageLike, where: str) -> bytes:
    """One image as the bytes of an image file, as uploads need it."""
    if isinstance(image, PilImage):
        return _encoded(_upright(image, where), where, image)
    if isinstance(image, ArrayImage) and not isinstance(image, memoryview):
        if _is_deep(image):
            return _deep_png(image)
        pixels: Any = image
        if _check_array(image, where) == pb.DATA_TYPE_FLOAT32:
            # As the service does it.
            pixels = (pixels * 255).round().astype("uint8")
        return _png(pixels.tobytes(), image.shape[0], image.shape[1])
    return _file_bytes(image, where)


def _file_bytes(image: Any, where: str) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return read_path(image, where)
    if is_open_file(image):
        return read_open(image, where)
    raise _strange(image, where)


def _strange(image: object, where: str) -> InvalidArgument:
    return invalid(
        f"{where}: a {type(image).__name__} is not an image: give a path, the bytes of an image "
        "file, an open file, a PIL image or a NumPy array (of a tensor, its .numpy())",
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
        _check_range(array, where)
        return pb.DATA_TYPE_FLOAT32
    else:
        how = _conversion(array, kind)
        raise invalid(
            f"{where}: its elements are {array.dtype}: give uint8 (0 to 255), or float32 (0 to 1) "
            f"with {how}",
            where,
            Reason.TENSOR_INVALID,
        )
    raise invalid(
        f"{where}: its shape is {list(shape)}, which must be [height, width, 3]; {hint}",
        where,
        Reason.TENSOR_INVALID,
    )


def _check_range(array: Any, where: str) -> None:
    # Written so that NaN fails too.
    if not (array.min() >= 0 and array.max() <= 1):
        hint = ": divide by 255" if array.max() > 1 and array.min() >= 0 else ""
        raise invalid(
            f"{where}: its values are not all from 0 to 1{hint}", where, Reason.TENSOR_INVALID
        )


def _conversion(array: Any, kind: str) -> str:
    """Returns the code that makes an array's elements such as are sent."""
    if kind[1:] == "u2":
        return "(image >> 8).astype('uint8')"
    if kind[1] == "b":
        return "image.astype('uint8') * 255"
    if kind[1] in "iu":
        return "image.astype('uint8'), where they are 0 to 255"
    if kind[1] != "f":
        return "image.astype('float32')"
    name = "<f4" if kind[1:] == "f4" else "float32"
    return f"(image / 255).astype('{name}')" if array.max() > 1 else f"image.astype('{name}')"


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


def _upright(image: PilImage, where: str) -> PilImage:
    """Decodes an image and turns it as its EXIF data says, as the service turns files."""
    # Whoever has a PIL image has Pillow; importing graft must not load it.
    from PIL import Image, ImageOps  # noqa: PLC0415

    if not isinstance(image, Image.Image):
        return image
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise invalid(
            f"{where}: the image cannot be decoded, it is damaged or cut short: {error}",
            where,
            Reason.IMAGE_UNREADABLE,
        ) from error


def _encoded(image: Any, where: str, original: PilImage) -> bytes:
    """Returns the pixels as a PNG file that the service decodes as it would the original."""
    options = {}
    if image.mode == "F":
        raise invalid(
            f"{where}: the image's mode is F, floating-point numbers whose black and white "
            "nothing says: scale them to 0..255 and give image.convert('L')",
            where,
            Reason.IMAGE_UNREADABLE,
        )
    if image.mode.startswith("I"):
        options = _declared_depth(original)
        image = _deep(image, where)
    elif image.mode in ("PA", "RGBa", "La"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode not in _PNG_MODES:
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise invalid(
                f"{where}: the image's mode is {image.mode}, which has no way to RGB: {error}",
                where,
                Reason.IMAGE_UNREADABLE,
            ) from error
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def _deep(image: Any, where: str) -> Any:
    """Returns grey of 16 bits in either order of bytes, or of 32 bits, as I;16."""
    if image.mode == "I;16":
        return image
    # Pillow writes the other order of bytes as if it were this one.
    wide = image.convert("I")
    low, high = wide.getextrema()
    if low < 0 or high > _MOST_GREY:
        raise invalid(
            f"{where}: the image's grey goes from {low} to {high}, beyond 0 to {_MOST_GREY}: scale "
            "it to 0..65535, or to 0..255 with mode L",
            where,
            Reason.IMAGE_UNREADABLE,
        )
    if image.mode == "I" and high <= 255:
        raise invalid(
            f"{where}: the image's mode is I, and its grey goes up to {high} alone, which looks "
            "like 8 bits: convert it to 'L', or scale it to 0..65535",
            where,
            Reason.IMAGE_UNREADABLE,
        )
    return wide.convert("I;16")


def _declared_depth(image: PilImage) -> dict[str, Any]:
    """Returns the options of a PNG that declares the depth that a TIFF file declared."""
    from PIL import PngImagePlugin  # noqa: PLC0415

    tags = getattr(image, "tag_v2", {})
    bits, most = tags.get(_BITS_PER_SAMPLE, (16,)), tags.get(_MOST_VALUE, 0)
    most = most[0] if isinstance(most, tuple) else most
    bits = bits[0] if isinstance(bits, tuple) else bits
    declared = int(most).bit_length() if most > 255 else bits
    if not 8 < declared <= 16 or (declared == 16 and not most):
        return {}
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"sBIT", bytes([declared]))
    return {"pnginfo": chunks}


def _is_deep(array: ArrayImage) -> bool:
    kind, shape = getattr(array.dtype, "str", str(array.dtype)), tuple(array.shape)
    is_grey = len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)
    return is_grey and 0 not in shape and kind in ("<u2", ">u2", "uint16")


def _deep_png(array: Any) -> bytes:
    height, width = array.shape[:2]
    return _png(array.astype(">u2").tobytes(), height, width, depth=16, colour_type=0)


def _png(pixels: bytes, height: int, width: int, *, depth: int = 8, colour_type: int = 2) -> bytes:
    """Returns the pixels as a PNG file without filters, https://www.w3.org/TR/png-3/.

    RGB of 8 bits (colour type 2), or grey (colour type 0).
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = width * (3 if colour_type else 1) * depth // 8
    lines = b"".join(b"\0" + pixels[start : start + row] for start in range(0, len(pixels), row))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines, 1))
        + chunk(b"IEND", b"")
    )
