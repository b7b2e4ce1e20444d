"""A job's report as JSON, for programs; `trainer.reporting.page` makes a page of it."""

from collections.abc import Sequence
from typing import Literal, get_args

import msgspec
import numpy as np

from service.contract import BackbonesRanked, EpochEnded
from service.domain import ClassCount, Manifest, MeasuredOn
from trainer import evaluate
from trainer.data import Data, Part
from trainer.evaluate import Metrics
from trainer.measuring import Measured
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
)
from trainer.reporting.label_errors import Suspect
from trainer.reporting.left_out import LeftOutTable
from trainer.reporting.measured_on import headline, how
from trainer.reporting.rules import Rules

PartName = Literal["train", "validation", "test"]

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
    """Name of the image."""
    true: str
    """Its class."""
    answered: str
    """The class that was answered."""
    probability: float
    """Of the answer."""
    place: int
    """In its set, from 0."""


class Confused(msgspec.Struct, frozen=True):
    """Two classes of which one is taken for the other."""

    true: str
    """The images' class."""
    answered: str
    """The class that was answered."""
    count: int
    """Images of the true class that were answered so."""
    support: int
    """Images of the true class."""


class SuspectShown(msgspec.Struct, frozen=True, kw_only=True):
    """An image that may be under the wrong class."""

    file: str
    """Name of the image."""
    measured_on: MeasuredOn
    """The set that it is of."""
    place: int
    """In its set, from 0."""
    given: str
    """The class that it is under."""
    suggested: str
    """The class that it looks like."""
    probability: float
    """Of the suggested class."""
    margin: float
    """Probability of the given class minus the best other's; low is suspicious."""
    chance: float
    """Estimated probability that the given class is wrong, and not the model."""


class ImageNamed(msgspec.Struct, frozen=True):
    """An image of a pair."""

    file: str
    """Name of the image."""
    part: PartName
    """The part of the data that it is in."""
    place: int
    """In its part, from 0."""
    label: str
    """Its class."""


class PairShown(msgspec.Struct, frozen=True):
    """Two images that are nearly the same, under different classes."""

    first: ImageNamed
    """One image."""
    second: ImageNamed
    """The other."""
    similarity: float
    """Cosine of centred features."""

    @property
    def images(self) -> tuple[ImageNamed, ImageNamed]:
        """Both."""
        return self.first, self.second


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """The images that the report's figures are of; none was learned from by what answered."""

    measured_on: MeasuredOn
    """The set of images; see [Figure](#figure)."""
    words: str
    """How it was measured, for people."""
    rounds: int
    """Of the cross-validation; 0 where it was none."""
    copies: int
    """Images left out: a near copy of each was learned from."""
    unanswered: int
    """Training images left out of a cross-validation: they could not be held out, as all of a
    class belong together, or had chosen the backbone."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`; whatever was not found out is null or empty."""

    format: int = 1
    """Version of this format."""
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
    """Figures of each epoch; empty unless a network was trained."""
    data: list[ClassCount]
    """Images of each class."""
    warnings: list[str]
    """Problems of the data, for people."""
    mistakes: list[Shown]
    """The most confident wrong answers that are not among `suspects`, at most 24."""
    examples: list[Shown]
    """Some right answers, spread over the classes."""
    advice: list[Advice] = []
    """Is it good enough, can it be trusted, what next: for people."""
    calibration: Calibration | None = None
    comparisons: list[Comparison] = []
    """The version against baselines and the incumbent."""
    suspects: list[SuspectShown] = []
    """Possible label errors of all sets, most suspicious first, at most 50."""
    suspect_count: int = 0
    """How many possible label errors there are in all."""
    suspects_expected_wrong: float = 0.0
    """How many of `suspect_count` are label errors, by estimate; of the others the model is
    wrong."""
    suspects_unjudged: list[str] = []
    """Classes that were not shown to be recognised well enough to doubt a label of theirs."""
    grouped: Grouped | None = None
    contradictions: list[PairShown] = []
    """Images that are nearly the same, under different classes, at most 50."""
    contradiction_count: int = 0
    """How many such pairs there are in all."""
    adaptation: Adaptation | None = None
    backbones: BackbonesRanked | None = None
    out_of_distribution: OutOfDistribution | None = None
    growth: Growth | None = None
    rules: Rules | None = None
    """What other decisions would give on the same images."""
    left_out: LeftOutTable | None = None


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
    none; `metrics` are of the headline, None where there is none.
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
        # Elsewhere each answer has the temperature that the other images chose.
        is_served = first.measured_on == "test" or (
            first.measured_on == "validation" and manifest.method == "feature_based"
        )
        temperature = manifest.temperature if is_served else 1.0
        calibrated = calibration.measure(
            first.probabilities, first.part.targets, temperature, manifest.seed, first.groups
        )
        # What is said to be a wrong label is not said to be a mistake of the model too.
        doubted = {s.place for s in findings.suspects.found.get(first.measured_on, ())}
        mistakes = _mistakes(data, first, doubted)
        examples = _examples(data, first)
    return Report(
        manifest=manifest,
        basis=None if first is None else _basis(data, first),
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
        contradictions=[
            PairShown(_named(data, twins.first), _named(data, twins.second), twins.similarity)
            for twins in findings.contradictions[:_PAIRS]
        ],
        contradiction_count=len(findings.contradictions),
        adaptation=findings.adaptation,
        backbones=findings.backbones,
        out_of_distribution=findings.out_of_distribution,
        growth=findings.growth,
        rules=findings.rules,
        left_out=out,
    )


def _basis(data: Data, measured: Measured) -> Basis:
    count, is_crossed = len(measured.part), measured.measured_on == "cross_validation"
    return Basis(
        measured_on=measured.measured_on,
        words=how(measured.measured_on, count, measured.rounds),
        rounds=measured.rounds,
        copies=measured.copies,
        unanswered=len(data.train) - count if is_crossed else 0,
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
    wrong = evaluate.mistakes(measured.probabilities, measured.part.targets, measured.answers)
    places = [place for place in wrong.tolist() if place not in doubted]
    return [_shown(data, measured, place) for place in places[:_MISTAKES]]


def _examples(data: Data, measured: Measured) -> list[Shown]:
    """Returns right answers, one of each class in turn, so that few show many classes."""
    right = np.flatnonzero(measured.answers == measured.part.targets)
    places = right[measured.part.take(right).spread(_EXAMPLES)]
    return [_shown(data, measured, place) for place in places.tolist()]


def _shown(data: Data, measured: Measured, place: int) -> Shown:
    probabilities = measured.probabilities[place]
    answered = int(measured.answers[place])
    return Shown(
        file=measured.part.names[place],
        true=data.classes[int(measured.part.targets[place])],
        answered=data.classes[answered],
        probability=float(probabilities[answered]),
        place=place,
    )


def _suspect(data: Data, measured: Measured, suspect: Suspect) -> SuspectShown:
    return SuspectShown(
        file=measured.part.names[suspect.place],
        measured_on=measured.measured_on,
        place=suspect.place,
        given=data.classes[suspect.given],
        suggested=data.classes[suspect.suggested],
        probability=suspect.probability,
        margin=suspect.margin,
        chance=suspect.chance,
    )


def _named(data: Data, place: int) -> ImageNamed:
    name: PartName
    for name in get_args(PartName):
        part: Part = getattr(data, name)
        if place < len(part):
            break
        place -= len(part)
    return ImageNamed(part.names[place], name, place, data.classes[int(part.targets[place])])
