"""The first screen of a report: is it good enough, can it be trusted, what next.

Rules over the findings, each a plain sentence. A sentence that compares rests on an
interval, never on two figures alone. Knows no HTML.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
from scipy.special import ndtri

from service.domain import ClassCount, GateCheck, Manifest
from trainer.evaluate import ClassMetrics, Metrics
from trainer.intervals import wilson
from trainer.measuring import Measured
from trainer.reporting import rules
from trainer.reporting.calibration import Calibration
from trainer.reporting.findings import Findings, Grouped
from trainer.reporting.left_out import LeftOutTable
from trainer.reporting.measured_on import NOUNS, headline, how

Topic = Literal["quality", "trust", "next"]
Level = Literal["good", "note", "warning"]

FEW_IMAGES = 20
"""To learn a class from."""
_WIDE = 0.1
"""Width of the accuracy's interval from which it is known too badly."""
_VAGUE = 0.5
"""The same of a class's recall."""
_LEAST_SUPPORT = 5
"""Lone images of a class, or groups that tell as much, without which it is not called weak."""
_GUESSING = 0.1
"""Balanced accuracy above that of guessing that a model must be able to have."""
_FEW_TO_JUDGE = 30
"""Fewer groups of images cannot show that a model has learned nothing."""
_STRANGE = 0.1
"""Part of the images, above that of false alarms, that look unlike the others."""
_APART = 1.0
"""Proxy A-distance, 0 to 2, from which domains are far apart."""
_NEAR = 0.03
"""Of accuracy: where no more than so much can be between two models, the cheaper one may do."""
_LISTED = 5
_REASONS = 3
MOST = 0.5
"""Fraction of the images with a near copy from which the report begins with them."""


class Advice(msgspec.Struct, frozen=True):
    """One sentence for people."""

    topic: Topic
    """The question that it answers: is it good enough, can it be trusted, what next."""
    level: Level
    """How it is marked on the page."""
    text: str
    """The sentence."""


def advise(
    *,
    manifest: Manifest,
    measured: Sequence[Measured],
    metrics: Metrics | None,
    calibration: Calibration | None,
    findings: Findings,
    counts: Sequence[ClassCount],
    left_out: LeftOutTable,
) -> list[Advice]:
    """Writes the sentences: what the accuracy is of, the accuracy, warnings, then the rest.

    `metrics` and `calibration` are of the headline set of `measured`, None where no
    image could be measured on.
    """
    first = headline(measured)
    is_copied = is_mostly_copied(findings.grouped)
    copies = list(_copies(findings.grouped))
    found = [
        *(copies if is_copied else []),
        *_quality(manifest, first, metrics, findings),
        *_trust(manifest, metrics, calibration, findings),
        *([] if is_copied else copies),
        *_unmeasured(measured, metrics),
        *_left_out(left_out),
        *_adaptation(manifest, findings),
        *_next(findings, counts),
    ]
    if all(a.topic != "next" and a.level != "warning" for a in found):
        found.append(Advice("next", "note", "No problem was found."))
    # Whatever else there is, these stay in front.
    front = len(copies) + 1 if is_copied else 1
    return [*found[:front], *sorted(found[front:], key=lambda a: a.level != "warning")]


def is_mostly_copied(grouped: Grouped | None) -> bool:
    """Tells whether most images have a near copy, so that scenes are what counts."""
    return grouped is not None and grouped.copied > MOST * grouped.images


def _quality(
    manifest: Manifest,
    measured: Measured | None,
    metrics: Metrics | None,
    findings: Findings,
) -> Iterator[Advice]:
    if measured is None or metrics is None:
        yield Advice("quality", "warning", _unknown(findings))
    else:
        level, beside = _against_chance(metrics, findings)
        bars = [c.verdict for c in manifest.gate_checks if _is_bar(c, manifest)]
        if any(verdict != "passed" for verdict in bars):
            level = "warning"
        elif bars and level != "warning":
            level = "good"
        yield Advice("quality", level, _accuracy(measured, metrics) + beside)
    yield from _gate(manifest)
    for other in findings.comparisons:
        if other.name == "majority_class":
            continue
        level = "warning" if other.verdict == "worse" else "note"
        if other.verdict == "better":
            level = "good"
        yield Advice("quality", level, f"Against {other.title}: {other.words}.")
    if metrics is not None:
        yield from _weak_classes(metrics)


def _is_bar(check: GateCheck, manifest: Manifest) -> bool:
    """Tells whether a check judges the accuracy: against no version at all nothing was compared."""
    if check.name == "not_worse":
        return manifest.incumbent_version is not None
    return check.name in ("accuracy", "class_recall")


def _unknown(findings: Findings) -> str:
    if findings.adaptation is not None:
        return (
            "The accuracy on the target is not known, because no labelled target image was "
            "measured on. Label some of them and set evaluate_on_target."
        )
    return (
        "The accuracy is not known: no image could be held out, because each class has only one "
        "image or one group of images. Add images, or put some into val/ or test/."
    )


def _accuracy(measured: Measured, metrics: Metrics) -> str:
    right = sum(c.hits for c in metrics.classes)
    low, high = metrics.accuracy_low * 100, metrics.accuracy_high * 100
    basis = how(measured.measured_on, metrics.count, measured.rounds)
    groups = ""
    if metrics.groups < metrics.count:
        groups = f", counting {metrics.groups:,} groups of images that belong together"
    none = ""
    if metrics.unanswered:
        none = f", {metrics.unanswered:,} of the others are answered with none"
    return (
        f"{_percent(metrics.accuracy)} are classified correctly ({right:,} of {metrics.count:,}"
        f"{none}), {basis}. For new images like them expect {low:.0f} to {high:.0f} % (95 % "
        f"interval{groups})."
    )


def _against_chance(metrics: Metrics, findings: Findings) -> tuple[Level, str]:
    """Returns the level of the accuracy where no gate judges it, and what to say beside it."""
    chance = next((c for c in findings.comparisons if c.name == "majority_class"), None)
    if chance is None:
        return "note", ""
    commonest = f"always answering the most common class ({_percent(chance.accuracy)})"
    if chance.verdict == "better":
        return "note", f" That is better than {commonest}."
    guessing = 1 / max(1, sum(c.support > 0 for c in metrics.classes))
    low, high = metrics.balanced_accuracy_low, metrics.balanced_accuracy_high
    if low > guessing:
        return "note", (
            f" It is not shown that this is better than {commonest}; but the classes are told "
            f"apart: with every class counted the same it is {low * 100:.0f} to {high * 100:.0f} % "
            f"(95 % interval), and {guessing * 100:.0f} % by guessing."
        )
    if metrics.groups < _FEW_TO_JUDGE:
        return "note", (
            f" {metrics.count} images are too few to show that this is better than {commonest}."
        )
    if high < guessing + _GUESSING:
        return "warning", (
            f" The model has not learned to tell the classes apart: with every class counted the "
            f"same it is {high * 100:.0f} % at most (95 % interval), and {guessing * 100:.0f} % by "
            "guessing."
        )
    return "warning", f" It is not shown that this is better than {commonest}."


def _gate(manifest: Manifest) -> Iterator[Advice]:
    for check in manifest.gate_checks:
        if check.verdict == "failed":
            yield Advice("quality", "warning", f"The gate was not passed: {check.detail}.")
        elif check.verdict == "undecided":
            stands = " It was published anyway (when_uncertain)." if check.passed else ""
            text = f"The gate is undecided: {check.detail}.{stands}"
            yield Advice("quality", "warning", text)
    if manifest.gate_checks and all(c.verdict == "passed" for c in manifest.gate_checks):
        details = "; ".join(check.detail for check in manifest.gate_checks)
        yield Advice("quality", "good", f"The gate was passed: {details}.")


def _weak_classes(metrics: Metrics) -> Iterator[Advice]:
    """Names classes that are shown to be weak, and those of which too little is known.

    The weakest of many classes looks weak by chance, so its interval is widened by their
    number (Bonferroni) and by how much groups take from the images.
    """
    seen = [c for c in metrics.classes if c.support]
    if len(seen) < 2:
        return
    alone = metrics.effective_count / max(1, metrics.count)
    z = float(ndtri(1 - 0.025 / len(seen)))

    def is_weak(one: ClassMetrics) -> bool:
        count = one.support * alone
        most = wilson(one.recall or 0.0, count, z)[1]
        return count >= _LEAST_SUPPORT and most < metrics.balanced_accuracy_low

    weak = sorted(filter(is_weak, seen), key=lambda c: (c.recall or 0.0, -c.support))
    if missed := [_recall_of(c) for c in weak if not c.hits]:
        yield Advice("quality", "warning", f"Never classified correctly: {listed(missed)}.")
    known = [c for c in weak if c.hits]
    if known:
        which = "The weakest of the other classes" if missed else "The weakest class"
        yield Advice("quality", "warning", f"{which} is {_recall_of(known[0])}.")
    vague = [c for c in seen if (c.recall_high or 1.0) - (c.recall_low or 0.0) > _VAGUE]
    if vague:
        names = listed([f"{c.label} ({c.support})" for c in vague])
        yield Advice(
            "quality",
            "note",
            f"Too few images were measured to say how well {_classes(len(vague))} recognised: "
            f"{names}.",
        )


def _recall_of(one: ClassMetrics) -> str:
    low, high = (one.recall_low or 0.0) * 100, (one.recall_high or 0.0) * 100
    return (
        f"{one.label} ({one.hits} of its {one.support} images are classified correctly; "
        f"expect {low:.0f} to {high:.0f} %)"
    )


def _trust(
    manifest: Manifest,
    metrics: Metrics | None,
    calibration: Calibration | None,
    findings: Findings,
) -> Iterator[Advice]:
    if metrics is not None and (width := metrics.accuracy_high - metrics.accuracy_low) > _WIDE:
        of = "groups of images" if metrics.groups < metrics.count else "images"
        yield Advice(
            "trust",
            "warning",
            f"The accuracy is known only within {width * 100:.0f} points, by {metrics.groups:,} "
            f"{of}: four times as many would halve that.",
        )
    yield _probabilities(manifest, metrics, calibration)
    strange = findings.out_of_distribution
    if strange and strange.flagged > (strange.false_alarms + _STRANGE) * strange.count:
        yield Advice(
            "trust",
            "warning",
            f"{strange.flagged} of {strange.count} {strange.images} look unlike the "
            f"{strange.reference}: they may come from different places.",
        )


def _probabilities(
    manifest: Manifest, metrics: Metrics | None, calibration: Calibration | None
) -> Advice:
    off = ""
    if metrics is not None and calibration is not None:
        side = "too sure" if calibration.confidence > calibration.accuracy else "not sure enough"
        off = (
            f"on {metrics.count:,} images probability and accuracy differ by "
            f"{calibration.error * 100:.1f} points on average"
        )
        by_chance = f"{calibration.error_by_chance * 100:.1f}"
        if calibration.verdict == "off":
            off += f", more than chance explains (up to {by_chance}): the model is {side}"
        elif calibration.verdict == "too_few_images":
            off += f", and too few images were measured to tell: chance explains up to {by_chance}"
        else:
            off += f", no more than chance explains (up to {by_chance})"
    if manifest.calibrated:
        return Advice(
            "trust",
            "note",
            f"Probabilities are calibrated, as far as can be seen{off and f': {off}'}.",
        )
    why = manifest.calibration_note.rstrip(".") or off or "no image could be measured on"
    return Advice(
        "trust",
        "warning",
        f"Probabilities are not shown to be right: {why}. An answer of 90 % may be wrong more or "
        "less often than one time in ten. Use them to sort answers, and set thresholds by labelled "
        "images of your own.",
    )


def _copies(grouped: Grouped | None) -> Iterator[Advice]:
    if grouped is None or not grouped.copied:
        return
    if is_mostly_copied(grouped):
        groups = "groups" if grouped.is_given else "scenes"
        share = grouped.copied / grouped.images * 100
        yield Advice(
            "quality",
            "warning",
            f"{share:.0f} % of the images have a near copy: they are {grouped.groups:,} {groups} "
            f"rather than {grouped.images:,} images, and the intervals go by {groups}. More images "
            f"of other {groups} would show more than more of the same.",
        )
        return
    yield Advice(
        "trust",
        "note",
        f"{_images(grouped.copied, 'image')} nearly the same as another one: they are on the same "
        "side of every division, and the intervals allow for it.",
    )


def _unmeasured(measured: Sequence[Measured], metrics: Metrics | None) -> Iterator[Advice]:
    for one in measured:
        if one.copies:
            verb = "was" if one.copies == 1 else "were"
            yield Advice(
                "trust",
                "note",
                f"{one.copies} {NOUNS[one.measured_on]} {verb} left out of the figures: a near "
                "copy of each was used for training.",
            )
    absent = [] if metrics is None else [c.label for c in metrics.classes if not c.support]
    if absent:
        yield Advice(
            "trust",
            "warning",
            f"How well {_classes(len(absent))} recognised is not known, because none of their "
            f"images could be measured on: {listed(absent)}.",
        )


def _left_out(left_out: LeftOutTable) -> Iterator[Advice]:
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


def _adaptation(manifest: Manifest, findings: Findings) -> Iterator[Advice]:
    adaptation = findings.adaptation
    if adaptation is None:
        return
    words = adaptation.words
    level: Level = "warning" if adaptation.doubt else "note"
    yield Advice("trust", level, f"{words[0].upper()}{words[1:]}.")
    for gap in adaptation.gaps:
        if gap.measure == "proxy_a_distance" and gap.distance > _APART:
            yield Advice(
                "trust",
                "warning",
                "The source and the target look very different to the backbone (proxy A-distance "
                f"{gap.distance:.2f} of 2).",
            )
    if adaptation.doubt and manifest.technique != "source_only":
        yield Advice("trust", "note", "This version is only for images of the target.")
    if (other := adaptation.comparison) is not None:
        levels: dict[str, Level] = {"better": "good", "worse": "warning"}
        text = f"Against {plain(other.title)}, on the target's labelled images: {other.words}."
        yield Advice("quality", levels.get(other.verdict, "note"), text)


def _next(findings: Findings, counts: Sequence[ClassCount]) -> Iterator[Advice]:
    if suspects := len(findings.suspects):
        expected = findings.suspects.expected_wrong
        if suspects == 1:
            text = (
                "Check the label of 1 image below: the chance that its folder is wrong is about "
                f"{expected * 100:.0f} %; otherwise the model is."
            )
        else:
            text = (
                f"Check the labels of {suspects} images below: by estimate about {expected:.0f} of "
                f"them {'is' if round(expected) == 1 else 'are'} in the wrong folder; of the "
                "others the model is wrong."
            )
        yield Advice("next", "warning", text)
    if findings.contradictions:
        count = len(findings.contradictions)
        yield Advice(
            "next",
            "warning",
            f"{count} {'pair' if count == 1 else 'pairs'} of images are nearly the same "
            "but are in different classes: decide which class is right.",
        )
    few = sorted((c for c in counts if c.train < FEW_IMAGES), key=lambda c: c.train)
    if few:
        names = listed([f"{c.label} ({c.train})" for c in few])
        yield Advice("next", "warning", f"Add images of classes that have few: {names}.")
    if findings.rules is not None and (text := rules.advised(findings.rules)):
        yield Advice("next", "warning", text)
    for other in findings.comparisons:
        if other.verdict == "worse" and other.name != "majority_class":
            yield Advice("next", "warning", f"Consider publishing the better one: {other.title}.")
        elif other.name == "linear_probe" and other.difference_high < _NEAR:
            yield Advice(
                "next",
                "note",
                "Over a linear head on the frozen backbone it gains "
                f"{max(0.0, other.difference_high) * 100:.1f} points at most (95 % interval); that "
                "one shares its backbone with other models, and may be enough.",
            )


def listed(labels: Sequence[str], count: int = _LISTED) -> str:
    """Returns the first `count` labels, and how many more there are."""
    more = f" and {len(labels) - count:,} more" if len(labels) > count else ""
    return ", ".join(labels[:count]) + more


def _percent(part: float) -> str:
    return f"{part * 100:.1f} %"


def _classes(count: int) -> str:
    return "this class is" if count == 1 else f"these {count:,} classes are"


def _images(count: int, noun: str) -> str:
    return f"{count:,} {noun} is" if count == 1 else f"{count:,} {noun}s are"


def plain(name: str) -> str:
    """Writes a name as people do."""
    return name.replace("_", "-")
