"""Backbones: what the server has of them, and an ONNX file on its way to become one."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, TypeAlias

from graftml_stubs.v1 import backbone_pb2 as pb

from graftml._encoding import encoding
from graftml._files import opening
from graftml.errors import invalid

CHUNK_BYTES: Final = 256 * 2**10

Layout: TypeAlias = Literal["nchw", "nhwc"]
"""The order of the axes of what a file takes: as PyTorch exports, or as TensorFlow does."""
_LAYOUTS: Final[dict[Layout, pb.ImageLayout]] = {
    "nchw": pb.IMAGE_LAYOUT_NCHW,
    "nhwc": pb.IMAGE_LAYOUT_NHWC,
}

BackboneSource: TypeAlias = Literal["registered", "package", "torchvision", "timm", "unknown"]
"""Where a backbone comes from; "unknown" to a client that is too old."""


@dataclass(frozen=True)
class Backbone:
    """A backbone that jobs can start from."""

    name: str
    """As `fine_tune` takes it: "onnx/NAME" for a registered one."""
    source: BackboneSource
    size: int
    """Side of the images that it takes, pixels; 0 where its first use tells."""
    feature_dim: int
    """Features of an image; 0 where its first use tells."""
    licence: str
    """Of its weights; empty where nobody said."""
    digest: str
    """sha256 of the file that computes its features; empty where no job has exported one yet."""
    weights: str
    source_digest: str = ""
    """Of a registered one: sha256 of the file as it was sent."""
    size_bytes: int = 0
    """Of a registered one: what is kept, and counts as stored."""
    create_time: datetime | None = None
    """Of a registered one."""


@dataclass(frozen=True)
class Registration:
    """An ONNX file that is to be registered."""

    path: Path
    description: pb.BackboneDescription
    on_progress: Callable[[int, int | None], None] | None

    def messages(self) -> Iterator[pb.RegisterBackboneRequest]:
        """Yields what is sent; starts from the beginning. Errors of the disk come out of it."""
        yield pb.RegisterBackboneRequest(description=self.description)
        sent = count = 0
        with self.path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            while chunk := file.read(CHUNK_BYTES):
                yield pb.RegisterBackboneRequest(chunk=chunk)
                sent += len(chunk)
                count += 1
                if self.on_progress:
                    self.on_progress(sent, total)
        yield pb.RegisterBackboneRequest(end=pb.RegisterBackboneEnd(message_count=count))


def registration(
    path: str | os.PathLike[str],
    description: pb.BackboneDescription,
    on_progress: Callable[[int, int | None], None] | None,
) -> Registration:
    """Finds the file, and reads nothing of it yet."""
    with opening(path, "path"):
        if not Path(path).is_file():
            Path(path).stat()
            raise invalid(f"{path} is a folder: give the path of one ONNX file", "path")
    return Registration(Path(path), description, on_progress)


@encoding
def described(
    name: str,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    layout: Layout,
    output: str,
    licence: str,
    sha256: str,
) -> pb.BackboneDescription:
    """Returns how a file is to be used, as the server is told."""
    if layout not in _LAYOUTS:
        raise invalid(f"layout is {layout!r}: it must be one of {', '.join(_LAYOUTS)}", "layout")
    return pb.BackboneDescription(
        name=name,
        size=size,
        mean=mean,
        std=std,
        layout=_LAYOUTS[layout],
        output=output,
        licence=licence,
        sha256=sha256,
    )
