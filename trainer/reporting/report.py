"""A job's report as JSON, for programs; `trainer.reporting.page` makes a page of it."""

from collections.abc import Sequence

import msgspec
import numpy as np

from service.domain import ClassCount, Manifest
from service.inference.head import Floats
from service.jobs.contract import BackbonesRanked, EpochEnded
from trainer import evaluate
from trainer.data import Data, Ints
from trainer.evaluate import Metrics
from trainer.reporting import calibration, left_out
from trainer.reporting.advice import Advice, advise
from trainer.reporting.calibration import Calibration
from trainer.reporting.comparisons import Comparison
from trainer.reporting.duplicates import NearDuplicates, Twins
from trainer.reporting.findings import Adaptation, Findings, Growth, OutOfDistribution, PartName
from trainer.reporting.label_errors import Suspect
from trainer.reporting.left_out import LeftOut
from trainer.reporting.power_law import LearningCurve

_MISTAKES = 24
_EXAMPLES = 12
_SUSPECTS = 50
_PAIRS = 50


class Shown(msgspec.Struct, frozen=True):
    """A validation image and its answer."""

    file: str
    true: str
    answered: str
    probability: float
    place: int
    """Among the validation images, from 0."""


class SuspectShown(msgspec.Struct, frozen=True, kw_only=True):
    """An image that may be under the wrong class."""

    file: str
    part: PartName
    place: int
    given: str
    suggested: str
    probability: float
    """Of the suggested class."""
    margin: float
    """Probability of the given class minus the best other's; low is suspicious."""
    chance: float
    """Estimated probability that the given class is wrong, and not the model."""


class ImageNamed(msgspec.Struct, frozen=True):
    """An image of a pair."""

    file: str
    part: PartName
    place: int
    label: str


class PairShown(msgspec.Struct, frozen=True):
    """Two images that are nearly the same."""

    first: ImageNamed
    second: ImageNamed
    similarity: float
    """Cosine of centred features."""

    @property
    def images(self) -> tuple[ImageNamed, ImageNamed]:
        """Both."""
        return self.first, self.second


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`; whatever was not found out is null or empty."""

    format: int = 1
    version: int | None = None
    """The version's number, which the service fills in when the report is asked for."""
    is_candidate: bool | None = None
    """Whether the version is a candidate then; filled in with `version`."""
    gate_failures: list[str] = []
    """What of its gate the version did not reach, for people; filled in with `version`."""
    manifest: Manifest
    metrics: Metrics
    """Of the validation images."""
    test: Metrics | None = None
    """Of images that were measured on and that nothing was chosen by; None where there are none."""
    epochs: list[EpochEnded]
    data: list[ClassCount]
    warnings: list[str]
    mistakes: list[Shown]
    """The most confident wrong answers that are not among `suspects`, at most 24."""
    examples: list[Shown]
    """Some right answers, spread over the classes."""
    advice: list[Advice] = []
    """Is it good enough, can it be trusted, what next: for people."""
    calibration: Calibration | None = None
    comparisons: list[Comparison] = []
    learning_curve: LearningCurve | None = None
    suspects: list[SuspectShown] = []
    """Possible label errors, most suspicious first, at most 50."""
    suspect_count: int = 0
    suspects_expected_wrong: float = 0.0
    """How many of `suspect_count` are expected to be label errors; of the others the model is
    wrong."""
    suspects_unjudged: list[str] = []
    """Classes that the model recognises too badly to suspect a label of theirs."""
    leaked: list[PairShown] = []
    """Validation images with nearly the same training image, at most 50."""
    leaked_count: int = 0
    contradictions: list[PairShown] = []
    """Training images that are nearly the same, under different classes, at most 50."""
    contradiction_count: int = 0
    accuracy_without_leaked: float | None = None
    """None where there are none, or none others."""
    near_copies_unclear: list[str] = []
    """Classes whose images all look alike to the backbone: nothing is said of copies of theirs."""
    adaptation: Adaptation | None = None
    backbones: BackbonesRanked | None = None
    out_of_distribution: OutOfDistribution | None = None
    growth: Growth | None = None
    left_out: LeftOut | None = None


def collect(
    manifest: Manifest,
    metrics: Metrics,
    data: Data,
    probabilities: Floats,
    epochs: Sequence[EpochEnded],
    findings: Findings | None = None,
    test: Metrics | None = None,
) -> Report:
    """Puts the findings together.

    `probabilities` [m, classes] and `metrics` are of the validation images, `test` of
    images that nothing was chosen by, which comes first in the report where it is given.
    """
    findings = findings or Findings()
    targets = data.validation.targets
    doubted = {s.place for s in findings.suspects.validation}
    wrong = evaluate.worst_mistakes(probabilities, targets, _MISTAKES + len(doubted))
    # What is said to be a wrong label is not said to be a mistake of the model too.
    wrong = [m for m in wrong if m.place not in doubted][:_MISTAKES]
    calibrated = calibration.measure(probabilities, targets, manifest.temperature, manifest.seed)
    near = findings.near_duplicates or NearDuplicates([], [])
    without_leaked = _accuracy_without(probabilities, targets, near.across_parts)
    suspects = [
        *(_suspect(data, "train", s) for s in findings.suspects.train),
        *(_suspect(data, "validation", s) for s in findings.suspects.validation),
    ]
    suspects.sort(key=lambda s: s.margin)
    counts = data.counts()
    out = left_out.of(data.summary)
    return Report(
        manifest=manifest,
        metrics=metrics,
        test=test,
        epochs=list(epochs),
        data=counts,
        warnings=[*data.summary.warnings, *data.warnings],
        mistakes=[_shown(data, m.place, probabilities) for m in wrong],
        examples=[_shown(data, place, probabilities) for place in _right(data, probabilities)],
        advice=advise(
            manifest=manifest,
            metrics=metrics,
            calibration=calibrated,
            findings=findings,
            counts=counts,
            left_out=out,
            accuracy_without_twins=without_leaked,
            test=test,
        ),
        calibration=calibrated,
        comparisons=findings.comparisons,
        learning_curve=findings.curve,
        suspects=suspects[:_SUSPECTS],
        suspect_count=len(suspects),
        suspects_expected_wrong=findings.suspects.expected_wrong,
        suspects_unjudged=[data.classes[i] for i in findings.suspects.unjudged],
        leaked=[_pair(data, "validation", t) for t in near.across_parts[:_PAIRS]],
        leaked_count=len(near.across_parts),
        contradictions=[_pair(data, "train", t) for t in near.across_classes[:_PAIRS]],
        contradiction_count=len(near.across_classes),
        accuracy_without_leaked=without_leaked,
        near_copies_unclear=[data.classes[i] for i in near.unclear],
        adaptation=findings.adaptation,
        backbones=findings.backbones,
        out_of_distribution=findings.out_of_distribution,
        growth=findings.growth,
        left_out=out,
    )


def _shown(data: Data, place: int, probabilities: Floats) -> Shown:
    answered = int(probabilities[place].argmax())
    return Shown(
        file=_file(data, "validation", place),
        true=data.classes[int(data.validation.targets[place])],
        answered=data.classes[answered],
        probability=float(probabilities[place, answered]),
        place=place,
    )


def _suspect(data: Data, part: PartName, suspect: Suspect) -> SuspectShown:
    return SuspectShown(
        file=_file(data, part, suspect.place),
        part=part,
        place=suspect.place,
        given=data.classes[suspect.given],
        suggested=data.classes[suspect.suggested],
        probability=suspect.probability,
        margin=suspect.margin,
        chance=suspect.chance,
    )


def _pair(data: Data, part: PartName, twins: Twins) -> PairShown:
    def named(of: PartName, place: int) -> ImageNamed:
        targets = data.train.targets if of == "train" else data.validation.targets
        return ImageNamed(_file(data, of, place), of, place, data.classes[int(targets[place])])

    return PairShown(named(part, twins.place), named("train", twins.train_place), twins.similarity)


def _file(data: Data, part: PartName, place: int) -> str:
    return data.names[(data.train if part == "train" else data.validation).paths[place]]


def _right(data: Data, probabilities: Floats) -> list[int]:
    right = np.flatnonzero(probabilities.argmax(axis=1) == data.validation.targets)
    # One of each class in turn, so that a small page shows many classes.
    turn: dict[int, int] = {}
    keyed = []
    for place in right.tolist():
        label = int(data.validation.targets[place])
        turn[label] = turn.get(label, 0) + 1
        keyed.append((turn[label], label, place))
    return [place for _, _, place in sorted(keyed)[:_EXAMPLES]]


def _accuracy_without(
    probabilities: Floats, targets: Ints, leaked: Sequence[Twins]
) -> float | None:
    kept = np.ones(len(targets), dtype=bool)
    kept[[twins.place for twins in leaked]] = False
    if kept.all() or not kept.any():
        return None
    return float((probabilities[kept].argmax(axis=1) == targets[kept]).mean())
