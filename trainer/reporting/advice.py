"""The first screen of a report: is it good enough, can it be trusted, what next.

Rules over the findings, each a plain sentence. Knows no HTML.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from service.domain import ClassCount, GateCheck
from trainer.evaluate import Metrics
from trainer.reporting.calibration import Calibration
from trainer.reporting.findings import Findings

Topic = Literal["quality", "trust", "next"]
Level = Literal["good", "note", "warning"]

FEW_IMAGES = 20
"""To learn a class from."""
_FEW_VALIDATION = 100
_WEAK = 0.1
"""Recall below the balanced accuracy that makes a class weak."""
_SLIGHTLY_OFF = 0.05
_STRANGE = 0.15
_APART = 1.0
"""Proxy A-distance, 0 to 2, from which domains are far apart."""
_LISTED = 5


class Advice(msgspec.Struct, frozen=True):
    """One sentence for people."""

    topic: Topic
    level: Level
    text: str


def advise(
    metrics: Metrics,
    calibration: Calibration,
    findings: Findings,
    counts: Sequence[ClassCount],
    gate: Sequence[GateCheck],
    accuracy_without_twins: float | None,
) -> list[Advice]:
    """The sentences: the accuracy, then warnings, then the rest.

    `accuracy_without_twins` leaves out validation images that nearly are training
    images; None where there are none.
    """
    found = [
        *_quality(metrics, findings, gate),
        *_trust(metrics, calibration, findings, accuracy_without_twins),
        *_next(findings, counts),
    ]
    if all(a.topic != "next" for a in found):
        found.append(Advice("next", "good", "Nothing that needs mending was found."))
    # The accuracy stays in front, whatever else there is.
    return [found[0], *sorted(found[1:], key=lambda a: a.level != "warning")]


def _quality(metrics: Metrics, findings: Findings, gate: Sequence[GateCheck]) -> Iterator[Advice]:
    low, high = metrics.accuracy_low, metrics.accuracy_high
    chance = next((c for c in findings.comparisons if c.name == "majority_class"), None)
    told = (
        f"{_percent(metrics.accuracy)} of {metrics.count} validation images are answered right "
        f"(95 % interval {low * 100:.1f} to {high * 100:.1f})"
    )
    if chance is None:
        yield Advice("quality", "note", told + ".")
    elif chance.verdict == "better":
        beside = f"; always the commonest class would be right for {_percent(chance.accuracy)}."
        yield Advice("quality", "good", told + beside)
    else:
        yield Advice(
            "quality",
            "warning",
            f"{told}, no better than always the commonest class "
            f"({_percent(chance.accuracy)}): it has not learned to tell the classes.",
        )
    for check in gate:
        if not check.passed:
            yield Advice("quality", "warning", f"The gate was not passed: {check.detail}.")
    if gate and all(check.passed for check in gate):
        yield Advice("quality", "good", "Every condition of its gate was met.")
    for other in findings.comparisons:
        if other.name == "majority_class":
            continue
        if other.name == "nearest_class_mean" and other.verdict != "worse":
            # Nobody asked for it; the page has it further down.
            continue
        level: Level = "warning" if other.verdict == "worse" else "note"
        if other.verdict == "better":
            level = "good"
        yield Advice("quality", level, f"Against {other.title}: {other.words}.")
    seen = [c for c in metrics.classes if c.recall is not None]
    if len(seen) > 1:
        weakest = min(seen, key=lambda c: c.recall or 0.0)
        if (recall := weakest.recall or 0.0) < metrics.balanced_accuracy - _WEAK:
            yield Advice(
                "quality",
                "warning",
                f"The weakest class is {weakest.label}: {_percent(recall)} of its "
                f"{weakest.support} images are recognised.",
            )


def _trust(
    metrics: Metrics,
    calibration: Calibration,
    findings: Findings,
    accuracy_without_twins: float | None,
) -> Iterator[Advice]:
    if metrics.count < _FEW_VALIDATION:
        width = (metrics.accuracy_high - metrics.accuracy_low) * 100
        yield Advice(
            "trust",
            "warning",
            f"{metrics.count} validation images are few: the accuracy is known to within "
            f"{width:.0f} points only.",
        )
    adaptation = findings.adaptation
    if adaptation is None or adaptation.target_accuracy is not None:
        yield _calibration(metrics, calibration)
    else:
        yield Advice(
            "trust",
            "warning",
            "All validation figures are of the source's images; how well the target's are told, "
            "and how far their probabilities can be trusted, is not known. Label some and ask for "
            "evaluate_on_target.",
        )
    near = findings.near_duplicates
    if near and near.across_parts:
        without = (
            ""
            if accuracy_without_twins is None
            else f"; without them accuracy is {_percent(accuracy_without_twins)}"
        )
        yield Advice(
            "trust",
            "warning",
            f"{_images(len(near.across_parts), 'validation image')} nearly the same as one "
            f"that was learned from{without}.",
        )
    elif near and near.is_conclusive:
        yield Advice("trust", "good", "No validation image nearly is one that was learned from.")
    strange = findings.out_of_distribution
    if strange and strange.flagged > _STRANGE * strange.count:
        yield Advice(
            "trust",
            "warning",
            f"{strange.flagged} of {strange.count} validation images look unlike the training "
            "images: the two parts may come from different places.",
        )
    yield from _adaptation(findings)


def _calibration(metrics: Metrics, calibration: Calibration) -> Advice:
    off = f"off by {calibration.error * 100:.1f} points on average"
    chance = f"{calibration.error_by_chance * 100:.1f}"
    if not calibration.is_off:
        return Advice(
            "trust",
            "good",
            f"Probabilities can be taken at their word: {off}, within chance ({chance}).",
        )
    side = "too sure" if calibration.confidence > metrics.accuracy else "not sure enough"
    told = f"Probabilities are {off}, more than chance explains ({chance}): the model is {side}"
    if calibration.error < _SLIGHTLY_OFF:
        return Advice("trust", "note", f"{told}, if slightly.")
    return Advice("trust", "warning", f"{told}; do not take them at their word.")


def _adaptation(findings: Findings) -> Iterator[Advice]:
    adaptation = findings.adaptation
    if adaptation is None:
        return
    if adaptation.is_negative:
        yield Advice(
            "trust",
            "warning",
            "Adapting to the target looked worse than not adapting; what serves is "
            f"{_plain(adaptation.published)}.",
        )
    for gap in adaptation.gaps:
        if gap.measure == "proxy_a_distance" and gap.before > _APART:
            yield Advice(
                "trust",
                "warning",
                "The source and the target lie far apart (proxy A-distance "
                f"{gap.before:.2f} of 2): label some target images to know what "
                "the accuracy there is."
                if adaptation.target_accuracy is None
                else "The source and the target lie far apart (proxy A-distance "
                f"{gap.before:.2f} of 2).",
            )
    if adaptation.target_accuracy is not None:
        yield Advice(
            "quality",
            "note",
            f"On the target {_percent(adaptation.target_accuracy)} of its labelled images are "
            "answered right"
            + (
                f"; without adaptation {_percent(adaptation.source_only_target_accuracy)}."
                if adaptation.source_only_target_accuracy is not None
                else "."
            ),
        )


def _next(findings: Findings, counts: Sequence[ClassCount]) -> Iterator[Advice]:
    suspects = len(findings.suspects.train) + len(findings.suspects.validation)
    if suspects:
        yield Advice(
            "next",
            "warning",
            f"Check the labels of {suspects} image{'s' * (suspects > 1)} below: "
            f"{'they look' if suspects > 1 else 'it looks'} like another class.",
        )
    near = findings.near_duplicates
    if near and near.across_classes:
        yield Advice(
            "next",
            "warning",
            f"{_images(len(near.across_classes), 'training image')} nearly the same as one "
            "under another class: decide which class is right.",
        )
    few = sorted((c for c in counts if c.train < FEW_IMAGES), key=lambda c: c.train)
    if few:
        listed = ", ".join(f"{c.label} ({c.train})" for c in few[:_LISTED])
        more = f" and {len(few) - _LISTED} more" if len(few) > _LISTED else ""
        yield Advice("next", "warning", f"Add images of classes that have few: {listed}{more}.")
    if findings.curve is not None:
        level: Level = "warning" if findings.curve.verdict == "more_helps" else "note"
        words = findings.curve.words
        yield Advice("next", level, f"{words[0].upper()}{words[1:]}.")
    for other in findings.comparisons:
        if other.verdict == "worse" and other.name != "majority_class":
            yield Advice("next", "warning", f"Consider publishing the better one: {other.title}.")
        elif other.name == "linear_probe" and other.verdict == "no_difference":
            yield Advice(
                "next",
                "note",
                "A linear head on the frozen backbone does as well here and shares its backbone "
                "with other models: feature-based transfer may be enough.",
            )


def _percent(part: float) -> str:
    return f"{part * 100:.1f} %"


def _images(count: int, noun: str) -> str:
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


def _plain(name: str) -> str:
    return name.replace("_", "-")
