"""`python -m service.ingest.backbone_check`: checks and rewrites one file, within limits.

Its standard input brings a `Task` as one line, its standard output has one record. The file
is read, run on made-up images as its maker meant it, rewritten, and run again: what is
written gives the same features, and an image's do not depend on those beside it.
"""

import errno
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.runtime import on_one_core
from service.errors import GraftError
from service.ingest import backbone_graph
from service.ingest.backbone_graph import words_of
from service.ingest.backbone_process import MOST_FEATURES, Asked, Checked, Failed, Task, unusable
from service.ops import child, failpoints
from service.ops.cgroups import be_killed_first

_IMAGES = 3
_TOLERANCE = 1e-3
"""Of the largest feature: kernels round otherwise in other batches, about a millionth."""
_MIB = 2**20
_LOAD_FACTOR, _LOAD_BYTES = 6, 256 * _MIB
"""Memory for a file: as read, parsed, written, and by ONNX Runtime as read, parsed and packed;
and what a small one takes."""
_IMAGE_BYTES = 512 * _MIB
"""Most memory for an image on its way through: a server runs many at once."""

Array = npt.NDArray[Any]


def main() -> int:
    """Does the task; returns the exit code."""
    task = child.take_task(Task)
    child.bound(
        memory_bytes=task.memory_bytes,
        cpu_s=task.cpu_s,
        file_bytes=2 * task.file_bytes + _LOAD_BYTES,
        niceness=task.niceness,
    )
    be_killed_first()
    try:
        failpoints.reach("backbone.checking")
        child.send(_checked(task))
    except GraftError as error:
        child.send(Failed(reason=error.reason, message=error.message))
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            child.send(Failed(errno=error.errno or 0, message=error.strerror or str(error)))
        else:
            most = (_LOAD_FACTOR * task.file_bytes + _LOAD_BYTES) // _MIB
            refusal = unusable(
                f"it takes more than the {most} MiB of memory that a file of its size may: choose "
                "a smaller network, or keep its constants in the file"
            )
            child.send(Failed(reason=refusal.reason, message=refusal.message))
    return 0


def _checked(task: Task) -> Checked:
    asked, target = task.asked, Path(task.target)
    _allow(_LOAD_FACTOR * task.file_bytes + _LOAD_BYTES)
    model = backbone_graph.read(Path(task.source), asked)
    opset = int(model.opset_import[0].version)
    pixels = _images(asked.size)
    _write(model, target)
    wanted, is_map = _as_meant(_loaded(target), pixels, asked)
    backbone_graph.into_our_form(model, asked, wanted.shape[1], is_map=is_map)
    _write(model, target)
    del model
    run = _loaded(target)
    together = _ran(run, pixels)
    if not _alike(together, wanted):
        raise unusable(
            "with the normalisation inside, it gives other features than without: say the "
            "operators that it is made of to those who make Graft"
        )
    if not _alike(_ran(run, pixels[:1]), together[:1]):
        raise unusable(
            "an image's features depend on the other images of its batch: export it for "
            "inference (of PyTorch, after model.eval())"
        )
    return Checked(width=together.shape[1], opset=opset)


def _as_meant(run: Callable[[Array], Array], pixels: Pixels, asked: Asked) -> tuple[Floats, bool]:
    """Returns the features [n, d] of the file as it came, and whether it gives a map of them."""
    images = (pixels / 255 - np.array(asked.mean)) / np.array(asked.std)
    images = images.astype(np.float32)
    if asked.layout == "nchw":
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    try:
        found = _ran(run, images)
    except GraftError:
        _ran(run, images[:1])  # what goes wrong with one image is another fault
        raise unusable(
            f"it runs with one image and not with {_IMAGES}: its batch is fixed within the "
            "graph; export it with a dynamic first axis (of PyTorch, dynamic_axes or "
            "dynamic_shapes)"
        ) from None
    shape = list(found.shape)
    is_map = found.ndim == 4
    if found.ndim not in (2, 4) or shape[0] != len(pixels):
        raise unusable(
            f"its output is {shape} for {len(pixels)} images, and [n, d], or a map "
            f"{'[n, d, h, w]' if asked.layout == 'nchw' else '[n, h, w, d]'}, is needed: name "
            "another value as the output; of tokens, one in which they are pooled"
        )
    if found.dtype != np.float32:
        raise unusable(f"its output is {found.dtype}, no float32: export it in float32")
    if is_map:
        found = found.mean(axis=(2, 3) if asked.layout == "nchw" else (1, 2))
    if not 1 <= found.shape[1] <= MOST_FEATURES:
        raise unusable(
            f"it gives {found.shape[1]} features an image, and 1 to {MOST_FEATURES} are taken: "
            "name another value as the output"
        )
    if not np.isfinite(found).all():
        raise unusable(
            "some features are not finite numbers: look at the mean and the deviation that are "
            "given, and whether it was exported in half precision"
        )
    if _alike(found[:1], found[1:2]):
        raise unusable(
            "it gives the same features for different images: look at the output that is "
            "named, and at the mean and the deviation"
        )
    return found, is_map


def _loaded(path: Path) -> Callable[[Array], Array]:
    try:
        return on_one_core(path)
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        if isinstance(error, MemoryError) or _is_memory(error):
            raise MemoryError from error
        raise unusable(
            f"ONNX Runtime cannot load it ({words_of(error)}): export it again, with another "
            "opset perhaps"
        ) from error


def _ran(run: Callable[[Array], Array], images: Array) -> Array:
    _allow(len(images) * _IMAGE_BYTES)
    try:
        return run(images)
    except Exception as error:
        if _is_memory(error):
            raise unusable(
                f"an image takes more than {_IMAGE_BYTES // _MIB} MiB of memory on its way: choose "
                "a smaller network, or smaller images"
            ) from error
        raise unusable(
            f"ONNX Runtime cannot run it ({words_of(error)}): look at the size of the images and "
            "the layout, and export it for images of that size"
        ) from error


def _alike(found: Array, wanted: Array) -> bool:
    most = float(np.abs(wanted).max())
    # Written so that NaN fails.
    return bool(np.abs(found - wanted).max() <= _TOLERANCE * most)


def _images(size: int) -> Pixels:
    """Makes images uint8 [3, size, size, 3] whose spectrum is that of photographs, 1/f."""
    rng = np.random.default_rng(size)
    rows, columns = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / size)
    made = []
    for _ in range(_IMAGES):
        shape = (3, size, size // 2 + 1)
        waves = amplitude * np.exp(2j * np.pi * rng.random(shape))
        noise = np.fft.irfft2(waves, (size, size))
        noise = (noise - noise.mean()) / noise.std()
        made.append((128 + 60 * noise).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return np.stack(made)


def _write(model: Any, path: Path) -> None:
    with path.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))


def _allow(more_bytes: int) -> None:
    """Lets this process take so many bytes more than it has now, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = pages * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (min(now + more_bytes, hard), hard))


def _is_memory(error: Exception) -> bool:
    text = str(error)
    return "bad_alloc" in text or "allocate" in text


if __name__ == "__main__":
    sys.exit(main())
