"""A job's report as JSON, for programs; `trainer.reporting.page` makes a page of it."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from service.domain import ClassCount, Manifest, MeasuredOn
from service.jobs.contract import BackbonesRanked, EpochEnded
from trainer import evaluate
from trainer.data import Data
from trainer.evaluate import Metrics
from trainer.reporting import calibration, left_out
from trainer.reporting.advice import Advice, advise
from trainer.reporting.calibration import Calibration
from trainer.reporting.comparisons import Comparison
from trainer.reporting.findings import (
    Adaptation,
    Findings,
    Grouped,
    Growth,
    OutOfDistribution,
    Twins,
)
from trainer.reporting.label_errors import Suspect
from trainer.reporting.left_out import LeftOut
from trainer.reporting.measured import Measured, headline, how

MAX_MATRIX = 50
"""Up to how many classes the report has the whole confusion matrix; its cells grow with the
square of the classes."""
_MISTAKES = 24
_EXAMPLES = 12
_SUSPECTS = 50
_PAIRS = 50
_CONFUSED = 200


class Shown(msgspec.Struct, frozen=True):
    """An image of the headline set and its answer."""

    file: str
    true: str
    answered: str
    probability: float
    place: int
    """In its set, from 0."""


class Confused(msgspec.Struct, frozen=True):
    """Two classes of which one is taken for the other."""

    true: str
    answered: str
    count: int
    support: int
    """Images of the true class."""


class SuspectShown(msgspec.Struct, frozen=True, kw_only=True):
    """An image that may be under the wrong class."""

    file: str
    measured_on: MeasuredOn
    """The set that it is of."""
    place: int
    """In its set, from 0."""
    given: str
    suggested: str
    probability: float
    """Of the suggested class."""
    margin: float
    """Probability of the given class minus the best other's; low is suspicious."""
    chance: float
    """Estimated probability that the given class is wrong, and not the model."""


class ImageNamed(msgspec.Struct, frozen=True):
    """A training image of a pair."""

    file: str
    place: int
    label: str


class PairShown(msgspec.Struct, frozen=True):
    """Two training images that are nearly the same, under different classes."""

    first: ImageNamed
    second: ImageNamed
    similarity: float
    """Cosine of centred features."""

    @property
    def images(self) -> tuple[ImageNamed, ImageNamed]:
        """Both."""
        return self.first, self.second


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """The images that the report's figures are of; none was learned from by what answered."""

    measured_on: MeasuredOn
    words: str
    """How it was measured, for people."""
    rounds: int
    """Of the cross-validation; 0 where it was none."""
    excluded: int
    """Images left out: a near copy of each was learned from."""
    unanswered: int
    """Images left out: they could not be held out, as all of their class belong together."""


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
    """With the figures of every set that was measured on; what follows is of the first."""
    basis: Basis | None
    metrics: Metrics | None
    """None where no image could be measured on. Above 50 classes without the confusion matrix."""
    confused: list[Confused] = []
    """The classes most often taken for another, at most 200 pairs."""
    decisions: list[str] = []
    """What the job decided of itself, and why, for people."""
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
    suspects: list[SuspectShown] = []
    """Possible label errors of all sets, most suspicious first, at most 50."""
    suspect_count: int = 0
    suspects_expected_wrong: float = 0.0
    """How many of `suspect_count` are label errors, by estimate; of the others the model is
    wrong."""
    suspects_unjudged: list[str] = []
    """Classes that the model recognises too badly to suspect a label of theirs."""
    grouped: Grouped | None = None
    contradictions: list[PairShown] = []
    """Training images that are nearly the same, under different classes, at most 50."""
    contradiction_count: int = 0
    adaptation: Adaptation | None = None
    backbones: BackbonesRanked | None = None
    out_of_distribution: OutOfDistribution | None = None
    growth: Growth | None = None
    left_out: LeftOut | None = None


def collect(
    manifest: Manifest,
    data: Data,
    measured: Sequence[Measured],
    metrics: Metrics | None,
    epochs: Sequence[EpochEnded],
    findings: Findings | None = None,
    decisions: Sequence[str] = (),
) -> Report:
    """Puts the findings together.

    `measured` are the sets that the version was measured on, the headline first, maybe
    none; `metrics` are of the headline's answered images, None where there are none.
    """
    findings = findings or Findings()
    first = headline(measured)
    suspects = [
        _suspect(data, one, suspect)
        for one in measured
        for suspect in findings.suspects.found.get(one.measured_on, ())
    ]
    suspects.sort(key=lambda s: s.margin)
    counts, out = data.counts(), left_out.of(data.summary)
    calibrated, mistakes, examples = None, [], []
    if first is not None:
        probabilities, targets, groups = first.answers
        # Elsewhere each answer has the temperature that the other images chose.
        is_served = first.measured_on in ("validation", "test")
        temperature = manifest.temperature if is_served else 1.0
        calibrated = calibration.measure(probabilities, targets, temperature, manifest.seed, groups)
        # What is said to be a wrong label is not said to be a mistake of the model too.
        doubted = {s.place for s in findings.suspects.found.get(first.measured_on, ())}
        mistakes = _mistakes(data, first, doubted)
        examples = _examples(data, first)
    return Report(
        manifest=manifest,
        basis=None if first is None else _basis(first),
        metrics=metrics and _without_matrix(metrics),
        confused=[] if metrics is None else _confused(metrics),
        decisions=list(decisions),
        epochs=list(epochs),
        data=counts,
        warnings=[*data.summary.warnings, *data.warnings],
        mistakes=mistakes,
        examples=examples,
        advice=advise(
            manifest=manifest,
            measured=measured,
            metrics=metrics,
            calibration=calibrated,
            findings=findings,
            counts=counts,
            left_out=out,
        ),
        calibration=calibrated,
        comparisons=findings.comparisons,
        suspects=suspects[:_SUSPECTS],
        suspect_count=len(suspects),
        suspects_expected_wrong=findings.suspects.expected_wrong,
        suspects_unjudged=[data.classes[i] for i in findings.suspects.unjudged],
        grouped=findings.grouped,
        contradictions=[_pair(data, twins) for twins in findings.contradictions[:_PAIRS]],
        contradiction_count=len(findings.contradictions),
        adaptation=findings.adaptation,
        backbones=findings.backbones,
        out_of_distribution=findings.out_of_distribution,
        growth=findings.growth,
        left_out=out,
    )


def _basis(measured: Measured) -> Basis:
    answered = len(measured.places)
    return Basis(
        measured_on=measured.measured_on,
        words=how(measured.measured_on, answered, measured.rounds),
        rounds=measured.rounds,
        excluded=measured.excluded,
        unanswered=len(measured.part) - answered,
    )


def _without_matrix(metrics: Metrics) -> Metrics:
    if len(metrics.classes) <= MAX_MATRIX:
        return metrics
    return msgspec.structs.replace(metrics, confusion=[])


def _confused(metrics: Metrics) -> list[Confused]:
    matrix = np.array(metrics.confusion)
    np.fill_diagonal(matrix, 0)
    cells = np.argwhere(matrix)
    order = np.argsort(-matrix[tuple(cells.T)], kind="stable")[:_CONFUSED]
    return [
        Confused(
            true=metrics.classes[i].label,
            answered=metrics.classes[j].label,
            count=int(matrix[i, j]),
            support=metrics.classes[i].support,
        )
        for i, j in cells[order].tolist()
    ]


def _mistakes(data: Data, measured: Measured, doubted: set[int]) -> list[Shown]:
    probabilities, targets, _ = measured.answers
    wrong = evaluate.worst_mistakes(probabilities, targets, _MISTAKES + len(doubted))
    places = [int(measured.places[mistake.place]) for mistake in wrong]
    return [_shown(data, measured, place) for place in places if place not in doubted][:_MISTAKES]


def _examples(data: Data, measured: Measured) -> list[Shown]:
    """Returns right answers, one of each class in turn, so that few show many classes."""
    probabilities, targets, _ = measured.answers
    right = measured.places[probabilities.argmax(axis=1) == targets]
    turn: dict[int, int] = {}
    keyed = []
    for place in right.tolist():
        label = int(measured.part.targets[place])
        turn[label] = turn.get(label, 0) + 1
        keyed.append((turn[label], label, place))
    return [_shown(data, measured, place) for _, _, place in sorted(keyed)[:_EXAMPLES]]


def _shown(data: Data, measured: Measured, place: int) -> Shown:
    probabilities = measured.probabilities[place]
    answered = int(probabilities.argmax())
    return Shown(
        file=_file(data, measured, place),
        true=data.classes[int(measured.part.targets[place])],
        answered=data.classes[answered],
        probability=float(probabilities[answered]),
        place=place,
    )


def _suspect(data: Data, measured: Measured, suspect: Suspect) -> SuspectShown:
    return SuspectShown(
        file=_file(data, measured, suspect.place),
        measured_on=measured.measured_on,
        place=suspect.place,
        given=data.classes[suspect.given],
        suggested=data.classes[suspect.suggested],
        probability=suspect.probability,
        margin=suspect.margin,
        chance=suspect.chance,
    )


def _pair(data: Data, twins: Twins) -> PairShown:
    def named(place: int) -> ImageNamed:
        label = data.classes[int(data.train.targets[place])]
        return ImageNamed(data.names[data.train.paths[place]], place, label)

    return PairShown(named(twins.first), named(twins.second), twins.similarity)


def _file(data: Data, measured: Measured, place: int) -> str:
    path: Path = measured.part.paths[place]
    return measured.names[path] if path in measured.names else data.names[path]
