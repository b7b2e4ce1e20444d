"""Served probabilities of trained networks: whole jobs, which take minutes each."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.quality import probabilities
from bench.quality.images import BACKBONE, ImageSet, Ints, LabelledFile
from bench.quality.probabilities import Asked
from service.inference import head as heads
from service.inference import preprocess
from service.inference.providers import Provider
from service.inference.runtime import OnnxRuntime
from service.jobs.contract import BACKBONE_FILE, HEAD_FILE, JobSpec, ModelBased
from trainer import train

_BATCH = 8


def ask(
    images: ImageSet, files: Sequence[LabelledFile], keep: Path, epochs: int | None = None
) -> Asked:
    """Trains a network on a third of the set's images, and asks it for the others.

    `files` are the set's, in the same order. `epochs` None means as many as the recipe says.
    """
    order, block = probabilities.blocks(images, 0)
    with tempfile.TemporaryDirectory(prefix="graft-quality-") as temporary:
        folder = Path(temporary).resolve()
        for place in order[block == 0]:
            path = folder / "data" / files[place].label / f"{place:06}.{_suffix(files[place])}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[place].read())
        (folder / "out").mkdir()
        spec = JobSpec(
            job_id="quality",
            model="quality",
            data_dir=str(folder / "data"),
            out_dir=str(folder / "out"),
            method=ModelBased(epochs=epochs),
            backbone=BACKBONE,
            weights_dir=str(keep.resolve()),
            provider="cpu",
        )
        manifest = train.run(spec, lambda _: None)
        return _asked(images, files, order[block != 0], folder / "out", manifest.calibrated)


def _asked(
    images: ImageSet,
    files: Sequence[LabelledFile],
    places: Ints,
    folder: Path,
    is_calibrated: bool,
) -> Asked:
    session = OnnxRuntime(Provider("cpu", "the same everywhere"), 1).load(folder / BACKBONE_FILE)
    head = heads.load(folder / HEAD_FILE)
    served = []
    for start in range(0, len(places), _BATCH):
        some = [files[place].read() for place in places[start : start + _BATCH]]
        pixels = np.stack([preprocess.decode(data) for data in some])
        served.append(head.probabilities(session.run(pixels)))
    p = np.concatenate(served).astype(np.float64)
    answered = np.array([images.classes.index(head.classes[k]) for k in p.argmax(axis=1)])
    right = (answered == images.targets[places]).astype(np.float64)
    return Asked(images.name, None, p.max(axis=1), right, is_calibrated)


def _suffix(file: LabelledFile) -> str:
    return "png" if file.read()[:4] == b"\x89PNG" else "jpg"
