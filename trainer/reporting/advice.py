"""The first screen of a report: is it good enough, can it be trusted, what next.

Rules over the findings, each a plain sentence. Knows no HTML.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from service.domain import ClassCount, Manifest
from trainer.evaluate import ClassMetrics, Metrics
from trainer.intervals import wilson
from trainer.reporting.calibration import Calibration
from trainer.reporting.findings import Findings
from trainer.reporting.left_out import LeftOut

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
_REASONS = 3
VALIDATED = {
    "": "validation images",
    "source": "validation images of the source",
    "target": "labelled images of the target",
}
"""Names the images that `Metrics` are of, by `Manifest.validated_on`."""
MOST = 0.5
"""Fraction of the validation images: where more have a near copy that was learned from, the
accuracy is void."""
_FEW_TO_JUDGE = 30
"""Fewer images cannot show that a model has learned nothing."""


class Advice(msgspec.Struct, frozen=True):
    """One sentence for people."""

    topic: Topic
    level: Level
    text: str


def advise(
    *,
    manifest: Manifest,
    metrics: Metrics,
    calibration: Calibration,
    findings: Findings,
    counts: Sequence[ClassCount],
    left_out: LeftOut,
    accuracy_without_twins: float | None = None,
    test: Metrics | None = None,
) -> list[Advice]:
    """Writes the sentences: what voids the accuracy, the accuracy, warnings, then the rest.

    `metrics` are of the validation images and `test` of images that nothing was
    chosen by, None where there are none. `accuracy_without_twins` leaves out
    validation images that nearly are training images; None where there are none,
    or none others.
    """
    is_void = _twins(findings) > MOST * metrics.count
    twins = list(_near_copies(metrics, findings, accuracy_without_twins))
    found = [
        *(twins if is_void else []),
        *_quality(manifest, metrics, findings, test, is_void),
        *_trust(metrics, None if is_void else calibration, findings, test),
        *([] if is_void else twins),
        *_left_out(left_out),
        *_adaptation(findings),
        *_next(findings, counts, is_void),
    ]
    if all(a.topic != "next" and a.level != "warning" for a in found):
        found.append(Advice("next", "note", "Nothing was found that asks to be fixed."))
    # Whatever else there is, these stay in front.
    first = len(twins) + 1 if is_void else 1
    return [*found[:first], *sorted(found[first:], key=lambda a: a.level != "warning")]


def _quality(
    manifest: Manifest, metrics: Metrics, findings: Findings, test: Metrics | None, is_void: bool
) -> Iterator[Advice]:
    bars = [
        check
        for check in manifest.gate_checks
        if check.name == "accuracy"
        # Against no version at all nothing was compared.
        or (check.name == "not_worse" and manifest.incumbent_version is not None)
    ]
    level, beside = _against_chance(metrics, findings)
    if any(not bar.passed for bar in bars):
        level = "warning"
    elif bars and level != "warning" and not is_void:
        level = "good"
    noun = VALIDATED[manifest.validated_on]
    if test is not None:
        of_test = _accuracy(test, "test images, which nothing was chosen by,")
        yield Advice("quality", "note", of_test)
        noun += ", which choices were made by,"
    yield Advice("quality", level, _accuracy(metrics, noun, is_void) + beside)
    failed = [check for check in manifest.gate_checks if not check.passed]
    for check in failed:
        yield Advice("quality", "warning", f"The gate was not passed: {check.detail}.")
    if manifest.gate_checks and not failed:
        details = "; ".join(check.detail for check in manifest.gate_checks)
        yield Advice("quality", "good", f"Its gate was passed: {details}.")
    for other in findings.comparisons:
        if other.name == "majority_class":
            continue
        if other.name == "nearest_class_mean" and other.verdict != "worse":
            # Nobody asked for it; the page has it further down.
            continue
        level = "warning" if other.verdict == "worse" else "note"
        if other.verdict == "better":
            level = "good"
        yield Advice("quality", level, f"Against {other.title}: {other.words}.")
    yield from _weak_classes(test or metrics)


def _accuracy(metrics: Metrics, noun: str, is_void: bool = False) -> str:
    right = sum(c.hits for c in metrics.classes)
    low, high = metrics.accuracy_low * 100, metrics.accuracy_high * 100
    told = (
        f"{_percent(metrics.accuracy)} of the {noun} are classified correctly ({right} of "
        f"{metrics.count})."
    )
    if is_void:
        return told
    return f"{told} For new images like them expect {low:.0f} to {high:.0f} % (95 % interval)."


def _against_chance(metrics: Metrics, findings: Findings) -> tuple[Level, str]:
    """Returns the level of the accuracy where no gate judges it, and what to say beside it."""
    chance = next((c for c in findings.comparisons if c.name == "majority_class"), None)
    if chance is None:
        return "note", ""
    commonest = f"always answering the commonest class ({_percent(chance.accuracy)})"
    if chance.verdict == "better":
        return "note", f" That is better than {commonest}."
    if metrics.count < _FEW_TO_JUDGE:
        return "note", (
            f" {metrics.count} images are too few to show that this is better than {commonest}."
        )
    seen = sum(c.support > 0 for c in metrics.classes)
    if metrics.balanced_accuracy < 1 / max(1, seen) + _WEAK:
        return "warning", (
            f" That is no better than {commonest}: the model has not learned to tell the classes "
            "apart."
        )
    return "warning", f" It is not shown that this is better than {commonest}."


def _weak_classes(metrics: Metrics) -> Iterator[Advice]:
    seen = [c for c in metrics.classes if c.support]
    if missed := [_recall_of(c) for c in seen if not c.hits]:
        yield Advice("quality", "warning", f"Never recognised: {listed(missed)}.")
    known = [c for c in seen if c.hits]
    if len(seen) > 1 and known:
        weakest = min(known, key=lambda c: c.recall or 0.0)
        if (weakest.recall or 0.0) < metrics.balanced_accuracy - _WEAK:
            which = "The weakest class" if not missed else "The weakest of the other classes"
            yield Advice("quality", "warning", f"{which} is {_recall_of(weakest)}.")


def _recall_of(one: ClassMetrics) -> str:
    low, high = (one.recall_low or 0.0) * 100, (one.recall_high or 0.0) * 100
    return (
        f"{one.label} ({one.hits} of its {one.support} images are recognised; expect {low:.0f} to "
        f"{high:.0f} %)"
    )


def _trust(
    metrics: Metrics, calibration: Calibration | None, findings: Findings, test: Metrics | None
) -> Iterator[Advice]:
    measured, noun = (metrics, "validation") if test is None else (test, "test")
    if measured.count < _FEW_VALIDATION:
        yield Advice(
            "trust",
            "warning",
            f"{measured.count} {noun} images are few: with {_FEW_VALIDATION} or more the accuracy "
            "would be known much better.",
        )
    adaptation = findings.adaptation
    if adaptation is None or adaptation.target_accuracy is not None:
        if calibration is not None:
            yield _calibration(metrics, calibration)
    else:
        yield Advice(
            "trust",
            "warning",
            "All figures are measured on images of the source; how well the target's are "
            "classified, and how far their probabilities can be trusted, is not known. Label some "
            "of the target's images and ask for evaluate_on_target.",
        )
    strange = findings.out_of_distribution
    if strange and strange.flagged > _STRANGE * strange.count:
        yield Advice(
            "trust",
            "warning",
            f"{strange.flagged} of {strange.count} {strange.images} look unlike the "
            f"{strange.reference}: they may come from different places.",
        )


def _twins(findings: Findings) -> int:
    return len(findings.near_duplicates.across_parts) if findings.near_duplicates else 0


def _near_copies(
    metrics: Metrics, findings: Findings, accuracy_without_twins: float | None
) -> Iterator[Advice]:
    near = findings.near_duplicates
    if near is None:
        return
    count = len(near.across_parts)
    labels = [c.label for c in metrics.classes]
    unclear = [labels[i] for i in near.unclear]
    if count > MOST * metrics.count:
        left = metrics.count - count
        without = "No image is left to measure with"
        if accuracy_without_twins is not None:
            low, high = wilson(accuracy_without_twins, left)
            without = (
                f"Without them accuracy is {_percent(accuracy_without_twins)} on the {left} left "
                f"(95 % interval {low * 100:.0f} to {high * 100:.0f} %)"
            )
        yield Advice(
            "quality",
            "warning",
            f"{count} of {metrics.count} validation images are nearly the same as one that was "
            f"learned from: the accuracy says little of new images. {without}. Put copies and "
            "shots of the same scene into one part: give the data as train/ and val/ folders.",
        )
    elif count:
        without = (
            ""
            if accuracy_without_twins is None
            else f"; without them accuracy is {_percent(accuracy_without_twins)}"
        )
        yield Advice(
            "trust",
            "warning",
            f"{_images(count, 'validation image')} nearly the same as one that was learned from"
            f"{without}.",
        )
    elif near.is_conclusive and not unclear:
        text = "No validation image was found that is nearly one that was learned from."
        yield Advice("trust", "good", text)
    if unclear:
        which = "all classes" if not near.is_conclusive else listed(unclear)
        yield Advice(
            "trust",
            "note",
            "Whether validation images are copies of images that were learned from cannot be told "
            f"for {which}: their images all look alike to the backbone.",
        )


def _left_out(left_out: LeftOut) -> Iterator[Advice]:
    if not left_out.count:
        return
    commonest = left_out.reasons[:_REASONS]
    reasons = "; ".join(f"{reason} ({count})" for reason, count in commonest)
    more = len(left_out.reasons) > _REASONS
    verb = "was" if left_out.count == 1 else "were"
    yield Advice(
        "trust",
        "warning",
        f"{left_out.count} of {left_out.seen} files {verb} left out"
        f"{': ' if reasons else ''}{reasons}{'; and others' if more else ''}.",
    )


def _calibration(metrics: Metrics, calibration: Calibration) -> Advice:
    off = f"{calibration.error * 100:.1f} points"
    chance = f"{calibration.error_by_chance * 100:.1f}"
    worse = (
        f" The temperature, which should bring them together, made it worse here: "
        f"{calibration.error_before * 100:.1f} points before."
        if calibration.is_worse_than_before
        else ""
    )
    if calibration.verdict == "too_few_images":
        return Advice(
            "trust",
            "note",
            f"{metrics.count} images are too few to tell how far the probabilities can be trusted: "
            f"perfect ones would be off by up to {chance} points, these are by {off}.{worse}",
        )
    if calibration.verdict == "not_shown":
        return Advice(
            "trust",
            "note",
            f"Probability and accuracy differ by {off} on average, no more than chance explains on "
            f"{metrics.count} images (up to {chance}). No fault was found, which does not prove "
            f"that there is none.{worse}",
        )
    side = "too sure" if calibration.confidence > metrics.accuracy else "not sure enough"
    told = (
        f"Probabilities are off by {off} on average, more than chance explains ({chance}): the "
        f"model is {side}"
    )
    if calibration.error < _SLIGHTLY_OFF:
        return Advice("trust", "note", f"{told}, if slightly.{worse}")
    return Advice("trust", "warning", f"{told}; do not take them at their word.{worse}")


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
            do = (
                ": label some target images to know what the accuracy there is"
                if adaptation.target_accuracy is None
                else ""
            )
            yield Advice(
                "trust",
                "warning",
                "The source and the target look very different to the backbone (proxy A-distance "
                f"{gap.before:.2f} of 2){do}.",
            )
    if adaptation.source_only_target_accuracy is not None:
        without = _percent(adaptation.source_only_target_accuracy)
        text = f"On the target's labelled images it would be {without} without adaptation."
        yield Advice("quality", "note", text)


def _next(findings: Findings, counts: Sequence[ClassCount], is_void: bool) -> Iterator[Advice]:
    if suspects := len(findings.suspects):
        expected = findings.suspects.expected_wrong
        if suspects == 1:
            text = (
                "Check the label of 1 image below: the chance that its folder is wrong is about "
                f"{expected * 100:.0f} %; otherwise the model is."
            )
        else:
            text = (
                f"Check the labels of {suspects} images below: about {expected:.0f} of them "
                f"{'is' if round(expected) == 1 else 'are'} expected to be in the wrong folder; of "
                "the others the model is wrong."
            )
        yield Advice("next", "warning", text)
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
        names = listed([f"{c.label} ({c.train})" for c in few])
        yield Advice("next", "warning", f"Add images of classes that have few: {names}.")
    if findings.curve is not None and not is_void:
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


def listed(labels: Sequence[str], count: int = _LISTED) -> str:
    """Returns the first `count` labels, and how many more there are."""
    more = f" and {len(labels) - count} more" if len(labels) > count else ""
    return ", ".join(labels[:count]) + more


def _percent(part: float) -> str:
    return f"{part * 100:.1f} %"


def _images(count: int, noun: str) -> str:
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


def _plain(name: str) -> str:
    return name.replace("_", "-")
