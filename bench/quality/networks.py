"""Networks that are trained, for the section of probabilities: whole jobs, which take minutes."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.quality import probabilities
from bench.quality.images import BACKBONE, ImageSet, LabelledFile
from bench.quality.probabilities import Asked
from service.contract import BACKBONE_FILE, HEAD_FILE, ImageSource, JobSpec, ModelBased
from service.engine import head as heads
from service.engine import preprocess
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from trainer import train

_BATCH = 8


def ask(images: ImageSet, files: Sequence[LabelledFile], keep: Path, epochs: int | None) -> Asked:
    """Trains a network on a third of the set's images, and asks it for the others.

    `files` are the set's, in the same order. `epochs` None means as many as the recipe says.
    """
    order, block = probabilities.blocks(images, 0)
    learned, asked = order[block == 0], order[block != 0]
    with tempfile.TemporaryDirectory(prefix="graft-quality-") as temporary:
        folder = Path(temporary).resolve()
        for place in learned:
            data = files[place].read()
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            path = folder / "data" / files[place].label / f"{place:06}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        spec = JobSpec(
            job_id="quality",
            model="quality",
            data=ImageSource(folder=str(folder / "data")),
            out_dir=str(folder / "out"),
            method=ModelBased(epochs=epochs),
            backbone=BACKBONE,
            weights_dir=str(keep.resolve()),
            provider="cpu",
            # Nothing is held out: what is asked for tells.
            validation_fraction=0.0,
        )
        manifest = train.run(spec, lambda _: None)
        runtime = OnnxRuntime(Provider("cpu", "the same everywhere"), 1)
        session = runtime.load((folder / "out" / BACKBONE_FILE).read_bytes)
        head = heads.load((folder / "out" / HEAD_FILE).read_bytes())
        rows = []
        for start in range(0, len(asked), _BATCH):
            some = [files[place].read() for place in asked[start : start + _BATCH]]
            pixels = np.stack([preprocess.decode(data, manifest.decoding) for data in some])
            rows.append(head.probabilities(session.run(pixels)))
    p = np.concatenate(rows).astype(np.float64)
    answered = np.array([images.classes.index(head.classes[k]) for k in p.argmax(axis=1)])
    right = (answered == images.targets[asked]).astype(np.float64)
    return Asked(images.name, None, p.max(axis=1), right, manifest.calibrated)
