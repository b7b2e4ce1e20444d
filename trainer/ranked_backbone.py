"""One backbone of a ranking: its file, what it costs, its scores, or its problem.

Knows no order and no other backbone. Torch is imported only where a backbone has to
be exported.
"""

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from service.backbones import is_registered
from service.contract import (
    ExportedBackbone,
    PretrainedBackbone,
    RankedBackbone,
    RankSpec,
    form_name,
)
from service.engine import preprocess
from service.engine.feature_cache import FeatureCache
from service.engine.head import Floats
from service.engine.runtime import OnnxRuntime, Session
from service.errors import GraftError, NotFound, Reason
from trainer import linear, transferability
from trainer.arrays import Doubles, Ints
from trainer.backbone_file import BackboneFile, narrowest
from trainer.data import Files
from trainer.evaluate import losses
from trainer.features import Features
from trainer.weights import Weights

NO_TIME = "no time was left for it: give a longer time budget, or fewer backbones"
_RUNS = 8
"""Of one image each, the first of which is not counted."""
_SLICE = 32
"""Images between two looks at the clock."""


class BackboneScoring:
    """One backbone on its way through a ranking; every step may become its problem."""

    def __init__(
        self,
        pretrained: PretrainedBackbone,
        spec: RankSpec,
        runtime: OnnxRuntime,
        cache: FeatureCache | None,
    ) -> None:
        self.pretrained = pretrained
        self.image_s = 0.0
        """Of one among many."""
        self._spec = spec
        self._runtime = runtime
        self._cache = cache
        self._weights_dir = Path(spec.weights_dir)
        self._source: Features | None = None
        self._features: Floats = np.empty((0, 0), np.float32)
        self.losses: Doubles = np.empty(0)
        """Nats [n], of each image by a quick head that did not see it; NaN where there is none."""
        self._row = RankedBackbone(backbone=pretrained.backbone, weights=pretrained.weights)
        try:
            self._name()
        except GraftError as error:
            self.fail(error.message)

    @property
    def row(self) -> RankedBackbone:
        """What is known of it."""
        return self._row

    @property
    def title(self) -> str:
        """For people."""
        return f"{self._row.backbone} {self._row.weights}"

    def is_available(self) -> bool:
        """Whether it can be had without a download; so far as is known, for bad weights."""
        try:
            return self._exported() is not None or self._asked().is_available()
        except GraftError:
            return True

    def is_exported(self) -> bool:
        """Whether the file that serves is there already."""
        return self._exported() is not None

    def fail(self, problem: str) -> None:
        """Says why it is not scored."""
        self._note(problem=problem)

    def prepare(self, files: Files, deadline: float, folder: Path) -> None:
        """Gets its file, into `folder` where it was never exported; measures its cost.

        The features of `files` are known afterwards.
        """
        self._try(deadline, lambda: self._prepare(files, deadline, folder))

    def extend(self, files: Files, deadline: float) -> bool:
        """Adds the features of more images; False when there was no time for them all."""
        try:
            more = self._computed(files, deadline)
        except TimeoutError:
            return False
        self._features = np.concatenate([self._features, more])
        return True

    def score(self, targets: Ints, folds: Ints) -> None:
        """Scores it on the images that it first saw, by their classes [n], dealt to folds [n]."""
        features = self._features[: len(targets)]
        self._try(math.inf, lambda: self._score(features, targets, folds))

    def _prepare(self, files: Files, deadline: float, folder: Path) -> None:
        known = self._exported()
        stored = known and Path(self._spec.files[known.digest])
        path = stored or self._export(deadline, folder)
        file = BackboneFile(path, self._runtime, known.digest if known else "")
        self._source = Features(file, self._cache, self._spec.threads)
        session = self._source.session
        served_s = _served_s(session, _sized(files, session), deadline)
        self._note(image_ms=served_s * 1000, feature_dim=self._source.blocks[0])
        begun = time.monotonic()
        self._features = self._computed(files, deadline)
        self.image_s = (time.monotonic() - begun) / len(files)

    def _computed(self, files: Files, deadline: float) -> Floats:
        assert self._source is not None, "it was prepared"
        files = _sized(files, self._source.session)
        parts = []
        for start in range(0, len(files), _SLICE):
            _check(deadline)
            end = min(start + _SLICE, len(files))
            parts.append(self._source.of(files.at(range(start, end))))
        return np.concatenate(parts)

    def _exported(self) -> ExportedBackbone | None:
        """What serves: the form for the precision that is asked for, where that is known."""
        name, asked = self._row.weights, self._spec.precision
        form = "int8" if asked == "int8" else narrowest(asked, self._runtime)
        for wanted in (form_name(name, form), name):
            for known in self.pretrained.exported:
                if known.weights == wanted and known.digest in self._spec.files:
                    return known
        return None

    def _export(self, deadline: float, folder: Path) -> Path:
        backbone, weights = self.pretrained.backbone, self.pretrained.weights
        if is_registered(backbone):
            raise NotFound(
                Reason.BACKBONE_NOT_FOUND,
                f"the file of {backbone} is not on this server: register it again",
            )
        from trainer import backbones, export
        from trainer.download import within

        asked = self._asked()
        if not asked.is_available():
            within(max(0.0, deadline - time.monotonic()), asked.fetch)
        self._name()  # which may hold the digest of what was downloaded
        network = backbones.load(backbone, weights, self._spec.seed, self._weights_dir)
        path = folder / f"{len(list(folder.iterdir()))}.onnx"
        export.to_onnx(network, path)
        return path

    def _asked(self) -> Weights:
        named = self.pretrained
        return Weights(named.backbone, named.weights, self._spec.seed, self._weights_dir)

    def _name(self) -> None:
        asked = self._asked()
        # Of a registered one its file tells.
        licence = next((each.licence for each in self.pretrained.exported), "") or asked.licence
        self._note(weights=asked.name, weights_licence=licence)

    def _score(self, features: Floats, targets: Ints, folds: Ints) -> None:
        evidence = transferability.log_me(features, targets)
        _, own = np.unique(targets, return_inverse=True)
        answered = linear.cross_validated(
            features, own, int(own.max()) + 1, folds, self._spec.threads
        )
        self.losses = losses(answered, own)
        held = self.losses[~np.isnan(self.losses)]
        self._note(log_me=evidence, log_loss=float(held.mean()) if len(held) else None)

    def _try(self, deadline: float, step: Callable[[], None]) -> None:
        if self._row.problem:
            return
        try:
            _check(deadline)
            step()
        except TimeoutError:
            self.fail(NO_TIME)
        except GraftError as error:
            self.fail(error.message)
        except Exception as error:  # whatever it is, the others can still be scored
            traceback.print_exc()
            self.fail(f"it could not be scored: {type(error).__name__}: {error}")

    def _note(self, **changes: object) -> None:
        self._row = msgspec.structs.replace(self._row, **changes)


def _sized(files: Files, session: Session) -> Files:
    """Returns the same images, which become pixels as a backbone takes them."""
    return replace(files, decoding=msgspec.structs.replace(files.decoding, size=session.size))


def _served_s(session: Session, files: Files, deadline: float) -> float:
    """Seconds from a file's bytes to features, one at a time; the median."""
    times = []
    for turn in range(_RUNS):
        _check(deadline)
        encoded = files.encoded(turn % len(files))
        begun = time.monotonic()
        session.run(preprocess.decode(encoded, files.decoding)[None])
        times.append(time.monotonic() - begun)
    return median(times[1:])


def _check(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError
