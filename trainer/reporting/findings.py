"""What a job found out beyond its metrics, all of it optional; the report shows what is there.

Adaptation, growth, comparisons and out-of-distribution scores come from those who made
them. An image is a place in its part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from threadpoolctl import threadpool_limits

from service.contract import BackbonesRanked
from service.domain import MeasuredOn
from trainer.adaptation.brakes import Doubt
from trainer.arrays import Floats, Ints
from trainer.groups import Groups
from trainer.measuring import Measured
from trainer.reporting import label_errors
from trainer.reporting.comparisons import Comparison
from trainer.reporting.label_errors import Suspect
from trainer.reporting.rules import Rules

_SCORE_BINS = 24


class Gap(msgspec.Struct, frozen=True):
    """How far apart the domains' features lie as the backbone gives them; 0 is together."""

    measure: str
    """`proxy_a_distance`, `mmd` or `frechet_distance`."""
    distance: float
    """In the units of the measure."""


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
    """What is published, by its name in `candidates`."""
    margin: float
    """The least by which a candidate's criterion must exceed that of a simpler one to be chosen."""
    candidates: list[Adapted]
    """Simplest first, source-only among them."""
    criterion: str
    """Names what the candidates were judged by, for people."""
    gaps: list[Gap]
    """Distance between the domains, by several measures."""
    doubt: Doubt
    """Why source-only is to be preferred; "" where it is not."""
    seen: float
    """How much of the source's class structure the target shows, about 0 to 1."""
    target_images: int
    """Unlabelled images of the target."""
    comparison: Comparison | None = None
    """Of what is published with source-only, on labelled target images that were not adapted to."""
    words: str
    """Which is published, why, and what for."""


class ScoreBin(msgspec.Struct, frozen=True):
    """Images with about the same score."""

    low: float
    """Least score."""
    high: float
    """Largest score."""
    count: int
    """Images."""


class OutOfDistribution(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of images by how unlike those learned from they look; a higher score is stranger."""

    threshold: float
    """Scores above it are out of distribution."""
    false_alarms: float
    """The part of the model's own kind of images that is meant to lie above it."""
    flagged: int
    """Images above it."""
    count: int
    """Images that were scored."""
    bins: list[ScoreBin]
    """A histogram of the scores."""
    method: str
    """Name of the method."""
    images: str
    """Which images were scored, for people."""
    reference: str
    """Which they were compared with, for people."""


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """What came on top of the version that the job grew from."""

    base_model: str
    """Model of the version."""
    base_version: int
    """Its number."""
    base_images: int
    """Images of the version."""
    added_images: int
    """Images that were added."""
    added_classes: list[str] = []
    """Classes that the version did not have."""


class Grouped(msgspec.Struct, frozen=True, kw_only=True):
    """Images that belong together, among all that were learned from or measured on."""

    images: int
    """Images in all."""
    groups: int
    """A lone image is one."""
    copied: int
    """Images that have a near copy by how they look."""
    is_given: bool = False
    """Whether the data says which images belong together; near copies count besides."""


@dataclass(frozen=True)
class Twins:
    """Two images that are nearly the same, under different classes.

    Places among all images of a job: those of training, then of validation, then of test.
    """

    first: int
    second: int
    similarity: float
    """Cosine of centred features."""


@dataclass(frozen=True)
class Suspects:
    """Images that may be under the wrong class, most suspicious first."""

    found: dict[MeasuredOn, list[Suspect]] = field(default_factory=dict)
    """By the set that the image is of."""
    unjudged: tuple[int, ...] = ()
    """Classes that were not shown to be recognised well enough to doubt a label of theirs."""

    def __len__(self) -> int:
        return sum(len(some) for some in self.found.values())

    @property
    def expected_wrong(self) -> float:
        """Estimates how many of them are under the wrong class."""
        return sum(s.chance for some in self.found.values() for s in some)


@dataclass(frozen=True)
class Findings:
    """What the report adds to the metrics."""

    comparisons: list[Comparison] = field(default_factory=list)
    suspects: Suspects = field(default_factory=Suspects)
    grouped: Grouped | None = None
    contradictions: list[Twins] = field(default_factory=list)
    """Nearest first."""
    adaptation: Adaptation | None = None
    backbones: BackbonesRanked | None = None
    out_of_distribution: OutOfDistribution | None = None
    growth: Growth | None = None
    rules: Rules | None = None
    """None where no image could be measured on."""


def suspects(measured: Sequence[Measured], classes: int) -> Suspects:
    """Finds images that may be under the wrong class, in all sets that were measured on.

    Of an adapted version there are none to be looked for: outside the domain that it
    learned from, its own mistakes would be listed.
    """
    # The matrices are small: more threads would cost more than they bring.
    with threadpool_limits(1):
        answers = [(m.probabilities, m.part.targets, m.groups) for m in measured]
        trusted = label_errors.recognised(answers, classes)
        found = {
            m.measured_on: label_errors.find(m.probabilities, m.part.targets, trusted)
            for m in measured
        }
    return Suspects(found, tuple(np.flatnonzero(~trusted).tolist()) if measured else ())


def grouped(found: Groups, targets: Ints, is_given: bool) -> tuple[Grouped, list[Twins]]:
    """Counts the groups of all images, with classes [n], and lists twins under two classes.

    `is_given` says whether the data names groups.
    """
    pairs, similarities = found.pairs, found.similarities
    is_across = targets[pairs[:, 0]] != targets[pairs[:, 1]]
    across = [
        Twins(int(first), int(second), float(similarity))
        for (first, second), similarity in zip(
            pairs[is_across], similarities[is_across], strict=True
        )
    ]
    count = len(found.of)
    told = Grouped(
        images=count,
        groups=found.count,
        copied=round(found.twin_share * count),
        is_given=is_given,
    )
    return told, across


def out_of_distribution(
    scores: Floats, threshold: float, false_alarms: float, method: str, images: str, reference: str
) -> OutOfDistribution:
    """Counts scores [n]; above the threshold is out of distribution.

    `images` and `reference` say for people which images were scored, and which they
    were compared with.
    """
    finite = scores[np.isfinite(scores)].astype(np.float64)
    end = max(float(finite.max(initial=0)), threshold * 1.1)
    start = min(float(finite.min(initial=end)), threshold * 0.9)
    counts, edges = np.histogram(finite, bins=_SCORE_BINS, range=(start, end))
    return OutOfDistribution(
        threshold=threshold,
        false_alarms=false_alarms,
        flagged=int((scores > threshold).sum()),
        count=len(scores),
        bins=[ScoreBin(float(edges[i]), float(edges[i + 1]), int(c)) for i, c in enumerate(counts)],
        method=method,
        images=images,
        reference=reference,
    )
