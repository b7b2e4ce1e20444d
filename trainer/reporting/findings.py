"""What a job found out beyond its metrics, all of it optional; the report shows what is there.

`examine` works out what follows from features and probabilities; adaptation,
growth and out-of-distribution scores come from those who made them. Knows no files and
no images: an image is a place in the training or the validation part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from service.jobs.contract import BackbonesRanked
from trainer.adaptation.brakes import Doubt
from trainer.reporting import comparisons, duplicates, label_errors, learning_curve
from trainer.reporting.comparisons import Comparison, Measured
from trainer.reporting.duplicates import NearDuplicates
from trainer.reporting.label_errors import Suspect
from trainer.reporting.power_law import LearningCurve

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

_SCORE_BINS = 24


class Gap(msgspec.Struct, frozen=True):
    """How far apart the domains' features lie as the backbone gives them; 0 is together."""

    measure: str
    """`proxy_a_distance`, `mmd` or `frechet_distance`."""
    distance: float


class Adapted(msgspec.Struct, frozen=True, kw_only=True):
    """A technique that was tried."""

    technique: str
    """The technique and its setting, as `mcc classes equally frequent`."""
    criterion: float
    """What it was judged by, without target labels."""


class Adaptation(msgspec.Struct, frozen=True, kw_only=True):
    """What adapting to the target domain did."""

    technique: str
    """Asked for."""
    published: str
    """What serves; `source_only` where adapting is in doubt."""
    chosen: str
    """The same, named as in `candidates`."""
    margin: float
    """The least by which a candidate's criterion must exceed that of a simpler one to be chosen."""
    candidates: list[Adapted]
    """Simplest first, source-only among them."""
    criterion: str
    """Names what the candidates were judged by, for people."""
    gaps: list[Gap]
    doubt: Doubt
    """Why source-only is to be preferred; "" where it is not."""
    seen: float
    """How much of the source's class structure the target shows, about 0 to 1."""
    target_images: int
    comparison: Comparison | None = None
    """Of what is published with source-only, on labelled target images that were not adapted to."""
    words: str
    """Which is published, why, and what for."""


class ScoreBin(msgspec.Struct, frozen=True):
    """Images with about the same score."""

    low: float
    high: float
    count: int


class OutOfDistribution(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of images by how unlike those learned from they look; a higher score is stranger."""

    threshold: float
    flagged: int
    """Images above it."""
    count: int
    bins: list[ScoreBin]
    method: str
    images: str = "validation images"
    """Which images were scored, for people."""
    reference: str = "training images"
    """Which they were held against, for people."""


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """What came on top of the version that the job grew from."""

    base_model: str
    base_version: int
    base_images: int
    added_images: int
    added_classes: list[str] = []
    comparison: Comparison | None = None
    """With the base version, on the validation images."""


@dataclass(frozen=True)
class Suspects:
    """Images that may be under the wrong class, most suspicious first."""

    train: list[Suspect] = field(default_factory=list)
    validation: list[Suspect] = field(default_factory=list)
    unjudged: tuple[int, ...] = ()
    """Classes that the model recognises too badly to doubt a label of theirs."""

    def __len__(self) -> int:
        return len(self.train) + len(self.validation)

    @property
    def expected_wrong(self) -> float:
        """Counts how many of them are expected to be under the wrong class."""
        return sum(s.chance for s in (*self.train, *self.validation))


@dataclass(frozen=True)
class Findings:
    """What the report adds to the metrics."""

    comparisons: list[Comparison] = field(default_factory=list)
    curve: LearningCurve | None = None
    suspects: Suspects = field(default_factory=Suspects)
    near_duplicates: NearDuplicates | None = None
    adaptation: Adaptation | None = None
    backbones: BackbonesRanked | None = None
    out_of_distribution: OutOfDistribution | None = None
    growth: Growth | None = None


def examine(
    *,
    probabilities: Floats,
    targets: Ints,
    train_targets: Ints,
    classes: int,
    train_features: Floats | None = None,
    features: Floats | None = None,
    out_of_fold: Floats | None = None,
    baselines: Sequence[Measured] = (),
    seed: int = 0,
    is_adapted: bool = False,
) -> Findings:
    """Works out findings from what was served [m, classes] on images with classes [m].

    With features of both parts, [n, d] and [m, d], there are the nearest class mean,
    the learning curve and near-duplicates too; with out-of-fold probabilities
    [n, classes] of the training images suspects among them. `is_adapted` says that the
    model is for another domain than it learned from: no label is suspected then. About
    50 ms for 400 images on one core, half a second for 5,000.
    """
    # The matrices are small: more threads would cost more than they bring.
    with threadpool_limits(1):
        return _examine(
            probabilities,
            targets,
            train_targets,
            classes,
            None if train_features is None or features is None else (train_features, features),
            out_of_fold,
            baselines,
            seed,
            is_adapted,
        )


def _examine(
    probabilities: Floats,
    targets: Ints,
    train_targets: Ints,
    classes: int,
    both: tuple[Floats, Floats] | None,
    out_of_fold: Floats | None,
    baselines: Sequence[Measured],
    seed: int,
    is_adapted: bool,
) -> Findings:
    measured = list(baselines)
    curve, near = None, None
    if both is not None:
        train, asked = both
        # Another's answer to the same name is not replaced.
        if all(m.name != "nearest_class_mean" for m in measured):
            means = comparisons.nearest_class_mean(train, train_targets, asked, classes)
            measured.append(Measured("nearest_class_mean", means))
        accuracy = float((probabilities.argmax(axis=1) == targets).mean())
        curve = learning_curve.measure(
            train, train_targets, asked, targets, classes, seed, served_accuracy=accuracy
        )
        near = duplicates.find(train, train_targets, asked)
    shares = comparisons.majority_class(train_targets, len(targets), classes)
    measured.append(Measured("majority_class", shares))
    return Findings(
        comparisons=[comparisons.compare(m, probabilities, targets) for m in measured],
        curve=curve,
        suspects=_suspects(
            (probabilities, targets),
            None if out_of_fold is None else (out_of_fold, train_targets),
            classes,
            is_adapted,
        ),
        near_duplicates=near,
    )


def _suspects(
    validation: tuple[Floats, Ints],
    train: tuple[Floats, Ints] | None,
    classes: int,
    is_adapted: bool,
) -> Suspects:
    if is_adapted:
        # Outside the domain that it learned from, the model's own mistakes would be listed.
        return Suspects()
    parts = [validation] if train is None else [validation, train]
    trusted = label_errors.recognised(parts, classes)
    return Suspects(
        train=[] if train is None else label_errors.find(*train, trusted),
        validation=label_errors.find(*validation, trusted),
        unjudged=tuple(np.flatnonzero(~trusted).tolist()),
    )


def out_of_distribution(
    scores: Floats,
    threshold: float,
    method: str,
    images: str = "validation images",
    reference: str = "training images",
) -> OutOfDistribution:
    """Counts scores [n]; above the threshold is out of distribution.

    `images` and `reference` say for people which images were scored, and which they
    were held against.
    """
    finite = scores[np.isfinite(scores)].astype(np.float64)
    end = max(float(finite.max(initial=0)), threshold * 1.1)
    start = min(float(finite.min(initial=end)), threshold * 0.9)
    counts, edges = np.histogram(finite, bins=_SCORE_BINS, range=(start, end))
    return OutOfDistribution(
        threshold=threshold,
        flagged=int((scores > threshold).sum()),
        count=len(scores),
        bins=[ScoreBin(float(edges[i]), float(edges[i + 1]), int(c)) for i, c in enumerate(counts)],
        method=method,
        images=images,
        reference=reference,
    )


PartName = Literal["train", "validation"]
