"""What a network's frozen stages make of views of images: computed once, learned from often.

Each image gets a few views: as it is served, mirrored, and random ones. They go through the
frozen stages in what serves, one worker a core, and their maps are kept in float16; every
epoch takes one of them for each image, at random. Which views these are depends on the seed
and the image alone, which of them an epoch takes on the seed, the epoch and the image's place.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from service.contract import JobSpec, ModelBased
from service.engine import preprocess
from service.engine.preprocess import Pixels
from service.engine.runtime import Session
from service.ops.cpus import available_cores
from trainer import compute, export, tails
from trainer.arrays import Ints
from trainer.backbone_file import runtime_of
from trainer.backbones import Backbone
from trainer.crops import Views, random_view
from trainer.data import Files, open_again
from trainer.images import compact, starts
from trainer.kept import Kept, memory_share
from trainer.recipes import VIEWS, Settings, settings
from trainer.tails import Split

MOST_BYTES = 16 * 2**30
"""Of all maps, most of them on disk: of more, images are learned from."""
_SIDE_PART = 2
"""Of the shorter side of an image that views are cut from, over the side of a view."""
_EVALUATION_BATCH = 32

Halves = npt.NDArray[np.float16]


class Frozen:
    """The stages that stay as they are, in what serves; errors of making one as `Runtime.load`."""

    def __init__(self, split: Split, spec: JobSpec) -> None:
        folder = spec.out_dir if Path(spec.out_dir).is_dir() else None
        with tempfile.TemporaryDirectory(dir=folder) as made:
            path = Path(made) / "trunk.onnx"
            export.to_onnx(split.trunk, path)
            self._session: Session = runtime_of(spec).load(path.read_bytes)
        self.shape = split.shape
        """Of an image's maps."""

    def maps(self, views: Pixels) -> Halves:
        """From uint8 [n, size, size, 3] to maps float16 [n, c, h, w]; on one core."""
        flat = self._session.run(views, cores=1)
        maps: Halves = flat.astype(np.float16).reshape(-1, *self.shape)
        return maps


def parted(
    method: ModelBased, backbone: Backbone, spec: JobSpec, images: int
) -> tuple[Settings, Split | None]:
    """Returns the recipe, and the network in two parts where so many images' maps are kept."""
    is_pretrained = spec.weights != "random"
    stage = method.train_from_stage or backbone.tuned_from
    split = None
    if method.recipe == "auto" and is_pretrained and stage not in ("", *backbone.stage_names[:1]):
        split = tails.split(backbone, stage)
    if split is not None and images * VIEWS * 2 * int(np.prod(split.shape)) > MOST_BYTES:
        split = None
    kept_from = stage if split is not None else ""
    return settings(method, is_pretrained=is_pretrained, kept_from=kept_from), split


class Maps:
    """The maps of images' views, to learn from as batches, and to judge by as served.

    Without `drawn` there is one view of each, the served one. `kinds` share the memory.
    """

    def __init__(
        self,
        files: Files,
        frozen: Frozen,
        drawn: Views | None,
        seed: int,
        threads: int,
        folder: Path | None = None,
        kinds: int = 1,
    ) -> None:
        self._files, self._frozen, self._drawn = files, frozen, drawn
        self._views = 1 if drawn is None else VIEWS
        self._seed = seed % 2**64
        self._threads = threads or available_cores()
        self._kept = Kept(memory_share(kinds), folder)
        self._places: Ints = np.arange(len(files))
        self._is_made = False

    def prepare(self, on_done: Callable[[float], None] = lambda _: None) -> None:
        """Computes all maps once; tells how much is done, 0 to 1. Errors as `open_again`."""
        if self._is_made:
            return
        self._is_made, count = True, len(self._files)

        def compute(place: int) -> None:
            for view, maps in enumerate(self._made(place)):
                self._kept.put((place, view), maps)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="maps") as pool:
            for done, _ in enumerate(pool.map(compute, range(count)), 1):
                on_done(done / count)

    def at(self, places: Ints) -> "Maps":
        """Returns those of some images, kept in the same place."""
        some = copy.copy(self)
        some._places = self._places[places]
        return some

    def batches(
        self, epoch: int, size: int, steps: int | None = None
    ) -> Iterator[tuple[Tensor, Ints]]:
        """Maps float16 [n, c, h, w] of a view of each image, in a new order, and their places."""
        assert steps is None, "one pass is all there is"
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self._places))
        views = rng.integers(self._views, size=len(order))
        for start in starts(len(order), size):
            some = slice(start, start + size)
            yield self._batch(self._places[order[some]], views[some]), order[some]

    def steps(self, size: int) -> int:
        """Counts the batches of one pass."""
        return len(starts(len(self._places), size))

    def blank(self, size: int) -> Tensor:
        """Returns a batch of nothing, to measure a step by."""
        return torch.zeros(size, *self._frozen.shape, dtype=torch.float16)

    def outputs(self, network: nn.Module, device: torch.device) -> Tensor:
        """Computes what a tail makes of the images as served, in 32 bits; lies on the CPU."""
        network.to(device).eval()
        as_served = np.zeros(len(self._places), np.int64)
        with torch.inference_mode():
            parts = [
                network(compute.as_input(self._batch(places, as_served[: len(places)]).to(device)))
                for places in np.split(
                    self._places, range(_EVALUATION_BATCH, len(self._places), _EVALUATION_BATCH)
                )
            ]
        return torch.cat(parts).cpu()

    def close(self) -> None:
        """Gives the space back, for those of some images too."""
        self._kept.close()

    def _batch(self, places: Ints, views: Ints) -> Tensor:
        maps = [
            self._map(place, view)
            for place, view in zip(places.tolist(), views.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(maps))

    def _map(self, place: int, view: int) -> Halves:
        known: Halves | None = self._kept.get((place, view))
        return self._made(place)[view] if known is None else known

    def _made(self, place: int) -> Halves:
        files, decoding = self._files, self._files.decoding
        digest = files.digests[place]
        image = open_again(files.locations[place], digest, decoding)
        views = [preprocess.fit(image, decoding)]
        if (drawn := self._drawn) is not None:
            if drawn.mirror:
                views.append(views[0][:, ::-1])
            is_squeezed = decoding.framing == "whole"
            image = compact(image, _SIDE_PART * decoding.size, is_squeezed=is_squeezed)
            for i in range(len(views), self._views):
                rng = np.random.default_rng([self._seed, i, int(digest[:16], 16)])
                views.append(random_view(image, decoding, drawn, rng))
        return self._frozen.maps(np.stack(views))
