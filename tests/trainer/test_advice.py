"""The sentences of the first screen follow from the findings."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from service.domain import ClassCount, GateCheck
from tests.trainer.sample_report import manifest
from trainer import evaluate
from trainer.adaptation.brakes import Doubt
from trainer.data import Part
from trainer.evaluate import Metrics
from trainer.measuring import Measured
from trainer.reporting import calibration, comparisons
from trainer.reporting.advice import Advice, advise
from trainer.reporting.findings import (
    Adaptation,
    Findings,
    Gap,
    Grouped,
    OutOfDistribution,
    Suspects,
    Twins,
)
from trainer.reporting.label_errors import Suspect
from trainer.reporting.left_out import LeftOutRow, LeftOutTable

COUNTS = [ClassCount("ant", 50, 100), ClassCount("bee", 60, 100)]
SUSPECT = Suspect(place=3, given=0, suggested=1, probability=0.9, margin=-0.8, chance=0.6)
NOTHING = LeftOutTable(rows=[], seen=200, used=200)
BAR = GateCheck(
    name="accuracy",
    verdict="passed",
    passed=True,
    value=0.95,
    bound=0.9,
    detail="0.95, at least 0.9",
)
NOT_TOLD = msgspec.structs.replace(BAR, verdict="undecided", passed=False)


def _answered(targets: np.ndarray, wrong: int, confidence: float) -> np.ndarray:
    """Probabilities of which the first `wrong` are wrong, all equally confident."""
    answers = targets.copy()
    answers[:wrong] = 1 - answers[:wrong]
    made = np.full((len(targets), 2), 1 - confidence)
    made[np.arange(len(targets)), answers] = confidence
    return made


def _set(probabilities: np.ndarray, targets: np.ndarray, **about: object) -> Measured:
    nameless = ("",) * len(targets)
    made = Measured(
        "cross_validation",
        Part((), nameless, targets),
        np.arange(len(targets)),
        probabilities,
        rounds=5,
    )
    return replace(made, **about)  # type: ignore[arg-type]


def _said(
    findings: Findings | None = None,
    wrong: int = 10,
    confidence: float = 0.95,
    counts: list[ClassCount] = COUNTS,
    gate: tuple[GateCheck, ...] = (),
    n: int = 200,
    left_out: LeftOutTable = NOTHING,
    in_groups_of: int = 1,
    copies: int = 0,
    **about: object,
) -> list[Advice]:
    """Returns the advice where the first `wrong` of `n` images are wrong."""
    targets = np.arange(n) % 2
    probabilities = _answered(targets, wrong, confidence)
    groups = np.arange(n) // in_groups_of
    findings = findings or Findings()
    chance = comparisons.Measured("majority_class", comparisons.majority_class(targets, n))
    compared = comparisons.compare(chance, probabilities.argmax(axis=1), targets, groups)
    return advise(
        manifest=manifest(gate_checks=list(gate), **about),  # type: ignore[arg-type]
        measured=[_set(probabilities, targets, groups=groups, copies=copies)],
        metrics=evaluate.measure(probabilities, targets, ("ant", "bee"), groups),
        calibration=calibration.measure(probabilities, targets, 1.0, 0, groups),
        findings=replace(findings, comparisons=[*findings.comparisons, compared]),
        counts=counts,
        left_out=left_out,
    )


def _of(metrics: Metrics, measured: Measured) -> list[Advice]:
    return advise(
        manifest=manifest(),
        measured=[measured],
        metrics=metrics,
        calibration=None,
        findings=Findings(),
        counts=COUNTS,
        left_out=NOTHING,
    )


def _unmeasured(findings: Findings | None = None, **about: object) -> list[Advice]:
    return advise(
        manifest=manifest(calibrated=False, **about),  # type: ignore[arg-type]
        measured=[],
        metrics=None,
        calibration=None,
        findings=findings or Findings(),
        counts=COUNTS,
        left_out=NOTHING,
    )


def _levels(advice: list[Advice], part: str) -> list[str]:
    return [a.level for a in advice if part in a.text]


def test_a_sound_job_gets_no_tick_for_what_nobody_asked_or_showed() -> None:
    said = _said()
    assert {a.level for a in said} == {"note"}
    assert {a.topic for a in said} == {"quality", "trust", "next"}
    assert said[0].text == (
        "95.0 % are classified correctly (190 of 200), measured on 200 images in 5 rounds, each "
        "time on images that were held out. For new images like them expect 91 to 97 % (95 % "
        "interval). That is better than always answering the most common class (50.0 %)."
    )
    assert said[-1].text == "No problem was found."


def test_the_interval_counts_groups_and_says_so() -> None:
    (lone, *_), (grouped, *_) = _said(), _said(in_groups_of=10)
    assert "(95 % interval)" in lone.text
    assert "(95 % interval, counting 20 groups of images that belong together)" in grouped.text
    assert "expect 91 to 97 %" not in grouped.text


def test_a_tick_stands_for_a_bar_that_somebody_set() -> None:
    assert _said(gate=(BAR,))[0].level == "good"
    missed = msgspec.structs.replace(BAR, verdict="failed", passed=False)
    assert _said(gate=(missed,))[0].level == "warning"
    faster = msgspec.structs.replace(BAR, name="latency")
    assert _said(gate=(faster,))[0].level == "note"
    compared = msgspec.structs.replace(BAR, name="not_worse")
    assert _said(gate=(compared,), incumbent_version=3)[0].level == "good"
    # There was no version to be worse than.
    assert _said(gate=(compared,))[0].level == "note"


def test_what_cannot_be_told_is_neither_passed_nor_failed() -> None:
    said = _said(gate=(BAR, NOT_TOLD))
    assert said[0].level == "warning"
    assert _levels(said, "The gate is undecided: 0.95, at least") == ["warning"]
    assert _levels(said, "gate was passed") == _levels(said, "gate was not passed") == []
    let_pass = msgspec.structs.replace(NOT_TOLD, passed=True)
    assert _levels(_said(gate=(let_pass,)), "It was published anyway") == ["warning"]


def test_nothing_is_claimed_where_no_image_was_measured() -> None:
    said = _unmeasured()
    assert said[0].level == "warning"
    assert "no image could be held out" in said[0].text
    assert _levels(said, "Probabilities are not shown to be right: no image could be measured on")
    assert _levels(said, "%") == ["warning"]


def _adaptation(doubt: Doubt = "", distance: float = 0.5) -> Adaptation:
    return Adaptation(
        technique="auto",
        published="mcc",
        chosen="mcc",
        margin=0.03,
        candidates=[],
        criterion="c",
        gaps=[Gap("proxy_a_distance", distance)],
        doubt=doubt,
        seen=0.8,
        target_images=10,
        words="it is as it is",
    )


def test_an_adapted_version_without_labels_asks_for_some() -> None:
    said = _unmeasured(Findings(adaptation=_adaptation()), technique="mcc")
    assert "Label some of them and set evaluate_on_target" in said[0].text
    assert _levels(said, "It is as it is.") == ["note"]


def test_doubt_about_an_adaptation_and_a_wide_gap_are_warnings() -> None:
    said = _said(Findings(adaptation=_adaptation("not_better", 1.8)), technique="mcc")
    assert _levels(said, "It is as it is.") == ["warning"]
    assert _levels(said, "only for images of the target") == ["note"]
    assert _levels(said, "look very different to the backbone (proxy A-distance 1.80 of 2)") == [
        "warning"
    ]


def test_an_adaptation_that_is_shown_to_do_harm_is_a_warning() -> None:
    targets = np.arange(200) % 2
    served, before = (_answered(targets, wrong, 0.9).argmax(axis=1) for wrong in (60, 20))
    compared = comparisons.compare(comparisons.Measured("source_only", before), served, targets)
    harmful = msgspec.structs.replace(_adaptation(), comparison=compared)
    said = _said(Findings(adaptation=harmful), technique="mcc")
    part = "Against source-only, on the target's labelled images: the served model is worse"
    assert _levels(said, part) == ["warning"]


def test_an_accuracy_of_chance_is_no_success() -> None:
    said = _said(wrong=98, confidence=0.51)
    assert said[0].level == "warning"
    assert "has not learned to tell the classes apart" in said[0].text
    assert "58 % at most (95 % interval), and 50 % by guessing" in said[0].text
    # A bar that is as low does not make it good.
    assert _said(wrong=98, confidence=0.51, gate=(BAR,))[0].level == "warning"


def test_classes_told_apart_count_where_the_commonest_class_is_hard_to_beat() -> None:
    targets = (np.arange(200) < 20).astype(np.int64)
    answers = targets.copy()
    answers[[0, 1, 2, 3, 4, 5, *range(100, 112)]] ^= 1
    probabilities = np.eye(2)[answers] * 0.9 + 0.05
    chance = comparisons.Measured("majority_class", comparisons.majority_class(targets, 200))
    said = advise(
        manifest=manifest(),
        measured=[_set(probabilities, targets)],
        metrics=evaluate.measure(probabilities, targets, ("ant", "bee")),
        calibration=None,
        findings=Findings(comparisons=[comparisons.compare(chance, answers, targets)]),
        counts=COUNTS,
        left_out=NOTHING,
    )
    assert said[0].level == "note"
    assert "not shown that this is better than always answering the most common" in said[0].text
    assert "but the classes are told apart" in said[0].text


@pytest.mark.parametrize("wrong", [1, 3])
def test_few_images_do_not_show_that_nothing_was_learned(wrong: int) -> None:
    said = _said(n=6, wrong=wrong, confidence=0.8)
    assert "has not learned" not in said[0].text
    assert said[0].level == "note"
    assert "6 images are too few to show that this is better" in said[0].text


@pytest.mark.parametrize(
    ("wrong", "confidence", "told"),
    [
        (60, 0.95, ": the model is too sure"),
        (2, 0.7, "the model is not sure enough"),
        (10, 0.95, "no more than chance explains"),
    ],
)
def test_how_far_probabilities_are_off_is_held_against_chance(
    wrong: int, confidence: float, told: str
) -> None:
    said = _said(wrong=wrong, confidence=confidence, calibrated=False)
    (one,) = [a for a in said if a.text.startswith("Probabilities are not shown to be right")]
    assert told in one.text
    assert one.level == "warning"
    assert "set thresholds by labelled images of your own" in one.text


def test_a_version_says_why_its_probabilities_are_not_calibrated() -> None:
    said = _said(calibrated=False, calibration_note="the target has no labels")
    assert _levels(said, "not shown to be right: the target has no labels.") == ["warning"]
    assert _levels(
        _said(), "Probabilities are calibrated, as far as can be seen: on 200 images probability"
    ) == ["note"]


def test_a_wide_interval_is_a_warning() -> None:
    assert _levels(_said(n=40, wrong=4), "points, by 40 images: four times as many")
    assert _levels(_said(in_groups_of=20), "by 10 groups of images: four times") == ["warning"]
    assert _levels(_said(), "known only within") == []


def test_suspects_come_with_how_many_are_expected_to_be_wrong() -> None:
    one = _said(Findings(suspects=Suspects({"test": [SUSPECT]})))
    assert _levels(one, "label of 1 image below: the chance that its folder is wrong is about 60 %")
    many = _said(Findings(suspects=Suspects({"test": [SUSPECT] * 4, "validation": [SUSPECT]})))
    assert _levels(many, "labels of 5 images below: by estimate about 3 of them are") == ["warning"]
    assert _levels(_said(), "Check the label") == []


def test_near_copies_are_counted_in_plain_words() -> None:
    few = _said(Findings(grouped=Grouped(images=200, groups=199, copied=2)))
    assert _levels(few, "2 images are nearly the same as another one: they are on the same side")
    none = _said(Findings(grouped=Grouped(images=200, groups=200, copied=0)))
    assert _levels(none, "same") == []
    pair = _said(Findings(contradictions=[Twins(1, 2, 0.9)]))
    assert _levels(pair, "1 pair of images are nearly the same but are in") == ["warning"]
    assert _levels(_said(copies=12), "12 training images were left out of the figures") == ["note"]


@pytest.mark.parametrize(("is_given", "noun"), [(False, "scenes"), (True, "groups")])
def test_where_most_images_have_a_copy_the_report_begins_with_it(is_given: bool, noun: str) -> None:
    grouped = Grouped(images=240, groups=41, copied=149, is_given=is_given)
    said = _said(Findings(grouped=grouped))
    assert said[0].level == "warning"
    assert said[0].text.startswith(
        f"62 % of the images have a near copy: they are 41 {noun} rather than 240 images, and the "
        f"intervals go by {noun}."
    )
    assert said[1].text.startswith("95.0 % are classified correctly")


def test_files_left_out_are_counted_with_their_commonest_reasons() -> None:
    rows = [
        LeftOutRow(reason=reason, label=label, count=count)
        for reason, label, count in (("it is a GIF", "ant", 4), ("it is empty", "ant", 3),
                                     ("it is a GIF", "bee", 2), ("it is cut off", "bee", 2),
                                     ("it is a TIFF", "bee", 1))
    ]  # fmt: skip
    said = _said(left_out=LeftOutTable(rows=rows, seen=212, used=200))
    assert _levels(
        said,
        "12 of 212 files were left out: it is a GIF (6); it is empty (3); it is cut off (2); and "
        "others.",
    ) == ["warning"]
    assert _levels(_said(), "left out") == []


def test_classes_with_few_images_are_named_fewest_first() -> None:
    counts = [ClassCount(f"c{i}", 20 - i, 5) for i in range(8)]
    (told,) = [a.text for a in _said(counts=counts) if a.text.startswith("Add images")]
    assert "c7 (13), c6 (14), c5 (15), c4 (16), c3 (17) and 2 more" in told


def test_a_failed_gate_is_a_warning_and_a_passed_one_good() -> None:
    check = msgspec.structs.replace(BAR, name="latency", detail="it takes 14 ms")
    failed = msgspec.structs.replace(check, verdict="failed", passed=False)
    said = _said(gate=(failed,))
    assert _levels(said, "The gate was not passed: it takes 14 ms.") == ["warning"]
    assert said[0].text.startswith("95.0 %")
    assert _levels(_said(gate=(check,)), "The gate was passed: it takes 14 ms.") == ["good"]


def _against(name: str, wrong: int, other_wrong: int) -> list[Advice]:
    targets = np.arange(200) % 2
    served, other = (
        _answered(targets, count, 0.9).argmax(axis=1) for count in (wrong, other_wrong)
    )
    compared = comparisons.compare(comparisons.Measured(name, other), served, targets)
    return _said(Findings(comparisons=[compared]))


def test_a_better_baseline_is_a_warning() -> None:
    said = _against("full_fine_tune", 10, 0)
    assert _levels(said, "Against all layers fine-tuned") == ["warning"]
    assert _levels(said, "Consider publishing the better one") == ["warning"]


def test_a_linear_head_is_enough_only_where_an_interval_says_so() -> None:
    part = "Over a linear head on the frozen backbone it gains 1.9 points at most (95 % interval)"
    assert _levels(_against("linear_probe", 10, 10), part) == ["note"]
    # Not told apart, which does not show that they are alike.
    unclear = _against("linear_probe", 10, 15)
    assert _levels(unclear, "Over a linear head") == []


@pytest.mark.parametrize(
    ("missed", "told"),
    [
        (
            40,
            "The weakest class is bee (60 of its 100 images are classified correctly; "
            "expect 50 to 69 %).",
        ),
        (
            100,
            "Never classified correctly: bee (0 of its 100 images are classified correctly; "
            "expect 0 to 4 %).",
        ),
    ],
)
def test_weak_classes_are_named_with_the_interval_of_their_recall(missed: int, told: str) -> None:
    targets = np.arange(200) % 2
    probabilities = np.eye(2)[np.where((targets == 1) & (np.arange(200) < 2 * missed), 0, targets)]
    metrics = evaluate.measure(probabilities, targets, ("ant", "bee"))
    assert _levels(_of(metrics, _set(probabilities, targets)), told) == ["warning"]


def test_no_class_is_called_weak_by_few_images() -> None:
    # Of two of a hundred classes neither of two images is recognised, as happens by chance.
    targets = np.arange(200) % 100
    answers = targets.copy()
    answers[[7, 107, 8, 108]] = 0
    probabilities = np.eye(100)[answers] * 0.9 + 0.001
    metrics = evaluate.measure(probabilities, targets, tuple(f"c{n:02}" for n in range(100)))
    said = _of(metrics, _set(probabilities, targets))
    assert _levels(said, "weakest") == _levels(said, "Never classified") == []
    (vague,) = [a for a in said if a.text.startswith("Too few images were measured")]
    assert "these 100 classes are recognised: c00 (2)," in vague.text
    assert vague.level == "note"


def test_classes_of_which_no_image_could_be_measured_are_named() -> None:
    targets = np.zeros(40, dtype=np.int64)
    probabilities = np.eye(2)[targets] * 0.8 + 0.1
    metrics = evaluate.measure(probabilities, targets, ("ant", "bee"))
    said = _of(metrics, _set(probabilities, targets))
    assert _levels(said, "How well this class is recognised is not known") == ["warning"]
    assert _levels(said, "could be measured on: bee.") == ["warning"]


@pytest.mark.parametrize(("flagged", "told"), [(5, []), (80, ["warning"])])
def test_images_unlike_training_are_told_when_many(flagged: int, told: list[str]) -> None:
    ood = OutOfDistribution(
        threshold=1,
        false_alarms=0.05,
        flagged=flagged,
        count=200,
        bins=[],
        method="m",
        images="held-out images",
        reference="training images",
    )
    assert _levels(_said(Findings(out_of_distribution=ood)), "look unlike the training") == told
