"""The sentences of the first screen follow from the findings."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from service.domain import ClassCount, GateCheck
from tests.trainer.sample_report import manifest
from trainer import evaluate
from trainer.reporting import calibration, comparisons
from trainer.reporting.advice import Advice, advise
from trainer.reporting.comparisons import Measured
from trainer.reporting.duplicates import NearDuplicates, Twins
from trainer.reporting.findings import Adaptation, Findings, Gap, OutOfDistribution, Suspects
from trainer.reporting.label_errors import Suspect
from trainer.reporting.left_out import LeftOut, LeftOutRow
from trainer.reporting.power_law import LearningCurve

COUNTS = [ClassCount("ant", 50, 100), ClassCount("bee", 60, 100)]
TARGETS = np.arange(200) % 2
SUSPECT = Suspect(place=3, given=0, suggested=1, probability=0.9, margin=-0.8, chance=0.6)
NOTHING = LeftOut(rows=[], seen=200, used=200)
BAR = GateCheck(name="accuracy", passed=True, value=0.95, bound=0.9, detail="0.95, at least 0.9")


def _said(
    findings: Findings | None = None,
    wrong: int = 10,
    confidence: float = 0.95,
    counts: list[ClassCount] = COUNTS,
    gate: tuple[GateCheck, ...] = (),
    n: int = 200,
    without: float | None = None,
    temperature: float = 1.0,
    left_out: LeftOut = NOTHING,
    test_wrong: int | None = None,
    **about: object,
) -> list[Advice]:
    """Returns the advice where the first `wrong` of `n` images are wrong, all equally confident."""
    targets = TARGETS[:n]

    def answered(count: int) -> np.ndarray:
        answers = targets.copy()
        answers[:count] = 1 - answers[:count]
        made = np.full((n, 2), 1 - confidence)
        made[np.arange(n), answers] = confidence
        return made

    probabilities = answered(wrong)
    metrics = evaluate.measure(probabilities, targets, ("ant", "bee"))
    test = None
    if test_wrong is not None:
        test = evaluate.measure(answered(test_wrong), targets, ("ant", "bee"))
    findings = findings or Findings()
    chance = comparisons.majority_class(targets, n, 2)
    compared = [
        *findings.comparisons,
        comparisons.compare(Measured("majority_class", chance), probabilities, targets),
    ]
    return advise(
        manifest=manifest(gate_checks=list(gate), **about),
        metrics=metrics,
        calibration=calibration.measure(probabilities, targets, temperature),
        findings=replace(findings, comparisons=compared),
        counts=counts,
        left_out=left_out,
        accuracy_without_twins=without,
        test=test,
    )


def _levels(advice: list[Advice], part: str) -> list[str]:
    return [a.level for a in advice if part in a.text]


def test_a_sound_job_gets_no_tick_for_what_nobody_asked_or_showed() -> None:
    said = _said()
    assert {a.level for a in said} == {"note"}
    assert {a.topic for a in said} == {"quality", "trust", "next"}
    assert said[0].text == (
        "95.0 % of the validation images are classified correctly (190 of 200). For new images "
        "like them expect 91 to 97 % (95 % interval). That is better than always answering the "
        "commonest class (50.0 %)."
    )
    assert said[-1].text == "Nothing was found that asks to be fixed."


def test_a_tick_stands_for_a_bar_that_somebody_set() -> None:
    assert _said(gate=(BAR,))[0].level == "good"
    missed = msgspec.structs.replace(BAR, passed=False)
    assert _said(gate=(missed,))[0].level == "warning"
    faster = msgspec.structs.replace(BAR, name="latency")
    assert _said(gate=(faster,))[0].level == "note"
    compared = msgspec.structs.replace(BAR, name="not_worse")
    assert _said(gate=(compared,), incumbent_version=3)[0].level == "good"
    # There was no version to be worse than.
    assert _said(gate=(compared,))[0].level == "note"


def test_an_accuracy_of_chance_is_no_success() -> None:
    said = _said(wrong=98, confidence=0.51)
    assert said[0].level == "warning"
    assert "no better than always answering the commonest class (50.0 %)" in said[0].text
    assert "has not learned to tell the classes apart" in said[0].text
    # A bar that is as low does not make it good.
    assert _said(wrong=98, confidence=0.51, gate=(BAR,))[0].level == "warning"


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_few_images_do_not_show_that_nothing_was_learned(wrong: int) -> None:
    said = _said(n=6, wrong=wrong, confidence=0.8)
    assert "has not learned" not in said[0].text
    assert said[0].level == "note"
    told = ["6 images are too few to show that this is better"]
    assert all(part in said[0].text for part in told)


def test_images_that_nothing_was_chosen_by_come_before_validation() -> None:
    first, second, *_ = _said(test_wrong=30, gate=(BAR,))
    assert first.text.startswith("85.0 % of the test images, which nothing was chosen by, are")
    assert first.level == "note"
    assert second.text.startswith(
        "95.0 % of the validation images, which choices were made by, are"
    )
    assert second.level == "good"


def test_confidence_is_called_too_sure_or_not_sure_enough() -> None:
    assert _levels(_said(wrong=60, confidence=0.95), "too sure; do not take them") == ["warning"]
    assert _levels(_said(wrong=2, confidence=0.7), "not sure enough; do not") == ["warning"]
    assert _levels(_said(wrong=1, confidence=0.96), "not sure enough, if slightly") == ["note"]


def test_no_fault_that_was_found_is_no_proof_of_calibration() -> None:
    (told,) = [a for a in _said() if "Probability and accuracy differ" in a.text]
    assert told.level == "note"
    assert "does not prove that there is none" in told.text


def test_too_few_images_to_tell_are_called_so() -> None:
    (told,) = [a for a in _said(n=12, wrong=3, confidence=0.7) if "too few to tell" in a.text]
    assert told.level == "note"
    assert "how far the probabilities can be trusted" in told.text


def test_a_temperature_that_made_it_worse_is_named() -> None:
    # At temperature 1 the probabilities would be 0.95, and 95 % are right.
    part = "made it worse here: 0.0 points before"
    assert len(_levels(_said(confidence=0.81339, temperature=2.0), part)) == 1
    assert _levels(_said(temperature=2.0), "made it worse") == []


def test_few_validation_images_are_a_warning() -> None:
    assert _levels(_said(n=40, wrong=2), "40 validation images are few") == ["warning"]


def test_suspects_come_with_how_many_are_expected_to_be_wrong() -> None:
    one = _said(Findings(suspects=Suspects(train=[SUSPECT])))
    assert _levels(one, "label of 1 image below: the chance that its folder is wrong is about 60 %")
    many = _said(Findings(suspects=Suspects([SUSPECT] * 4, [SUSPECT])))
    assert _levels(many, "labels of 5 images below: about 3 of them are expected") == ["warning"]
    assert _levels(_said(), "Check the label") == []


def test_near_copies_are_counted_in_plain_words() -> None:
    twins = NearDuplicates([Twins(1, 2, 0.9)], [Twins(1, 2, 0.9), Twins(4, 5, 0.9)])
    said = _said(Findings(near_duplicates=twins), without=0.931)
    assert _levels(said, "1 validation image is nearly the same") == ["warning"]
    assert _levels(said, "without them accuracy is 93.1 %") == ["warning"]
    assert _levels(said, "2 training images are nearly the same") == ["warning"]
    clean = _said(Findings(near_duplicates=NearDuplicates([], [])))
    assert _levels(clean, "No validation image was found that is nearly one") == ["good"]


def test_where_most_images_have_a_copy_the_report_begins_with_it() -> None:
    curve = LearningCurve(points=[], verdict="more_helps", words="twice would bring 2 points")
    copied = NearDuplicates([Twins(i, i, 0.9) for i in range(150)], [])
    said = _said(Findings(near_duplicates=copied, curve=curve), without=0.8, gate=(BAR,))
    assert said[0].level == "warning"
    assert said[0].text.startswith(
        "150 of 200 validation images are nearly the same as one that was learned from"
    )
    assert "accuracy is 80.0 % on the 50 left (95 % interval 67 to 89 %)" in said[0].text
    # Nothing that rests on those images is claimed.
    assert said[1].level == "note"
    assert "expect" not in said[1].text
    assert _levels(said, "Probabilit") == _levels(said, "Twice") == []
    every = NearDuplicates([Twins(i, i, 0.9) for i in range(200)], [])
    assert "No image is left to measure with" in _said(Findings(near_duplicates=every))[0].text


def test_classes_whose_images_all_look_alike_are_named_and_get_no_tick() -> None:
    some = _said(Findings(near_duplicates=NearDuplicates([], [], (1,))))
    assert _levels(some, "cannot be told for bee: their images all look alike") == ["note"]
    blind = _said(Findings(near_duplicates=NearDuplicates([], [], (0, 1), is_conclusive=False)))
    assert _levels(blind, "cannot be told for all classes") == ["note"]
    for said in (some, blind):
        assert _levels(said, "No validation image was found") == []


def test_files_left_out_are_counted_with_their_commonest_reasons() -> None:
    rows = [
        LeftOutRow(reason=reason, label=label, count=count)
        for reason, label, count in (("it is a GIF", "ant", 4), ("it is empty", "ant", 3),
                                     ("it is a GIF", "bee", 2), ("it is cut off", "bee", 2),
                                     ("it is a TIFF", "bee", 1))
    ]  # fmt: skip
    said = _said(left_out=LeftOut(rows=rows, seen=212, used=200))
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


def test_a_failed_gate_and_a_better_baseline_are_warnings() -> None:
    check = GateCheck(name="latency", passed=False, value=14, bound=10, detail="it takes 14 ms")
    said = _said(gate=(check,))
    assert _levels(said, "The gate was not passed: it takes 14 ms.") == ["warning"]
    assert said[0].text.startswith("95.0 %")
    passed = msgspec.structs.replace(check, passed=True)
    assert _levels(_said(gate=(passed,)), "Its gate was passed: it takes 14 ms.") == ["good"]
    served = np.eye(2)[np.where(np.arange(200) < 10, 1 - TARGETS, TARGETS)]
    better = comparisons.compare(Measured("full_fine_tune", np.eye(2)[TARGETS]), served, TARGETS)
    said = _said(Findings(comparisons=[better]))
    assert _levels(said, "Against all layers fine-tuned") == ["warning"]
    assert _levels(said, "Consider publishing the better one") == ["warning"]


@pytest.mark.parametrize(
    ("missed", "told"),
    [
        (40, "The weakest class is bee (60 of its 100 images are recognised; expect 50 to 69 %)."),
        (100, "Never recognised: bee (0 of its 100 images are recognised; expect 0 to 4 %)."),
    ],
)
def test_weak_classes_are_named_with_the_interval_of_their_recall(missed: int, told: str) -> None:
    targets = TARGETS.copy()
    probabilities = np.eye(2)[np.where((targets == 1) & (np.arange(200) < 2 * missed), 0, targets)]
    metrics = evaluate.measure(probabilities, targets, ("ant", "bee"))
    said = advise(
        manifest=manifest(),
        metrics=metrics,
        calibration=calibration.measure(probabilities, targets, 1.0),
        findings=Findings(),
        counts=COUNTS,
        left_out=NOTHING,
    )
    assert _levels(said, told) == ["warning"]


def test_the_learning_curve_speaks_for_itself() -> None:
    helps = LearningCurve(points=[], verdict="more_helps", words="twice would bring 2 points")
    said = _said(Findings(curve=helps))
    assert _levels(said, "Twice would bring 2 points.") == ["warning"]


@pytest.mark.parametrize(("flagged", "told"), [(5, []), (80, ["warning"])])
def test_validation_images_unlike_training_are_told_when_many(
    flagged: int, told: list[str]
) -> None:
    ood = OutOfDistribution(threshold=1, flagged=flagged, count=200, bins=[], method="m")
    assert _levels(_said(Findings(out_of_distribution=ood)), "look unlike the training") == told


def test_negative_transfer_and_a_wide_gap_are_warnings() -> None:
    adaptation = Adaptation(
        technique="auto",
        published="source_only",
        candidates=[],
        criterion="c",
        gaps=[Gap("proxy_a_distance", 1.8, None)],
        is_negative=True,
        target_images=10,
    )
    said = _said(Findings(adaptation=adaptation))
    assert _levels(said, "what serves is source-only") == ["warning"]
    assert _levels(
        said, "look very different to the backbone (proxy A-distance 1.80 of 2): label some"
    ) == ["warning"]
