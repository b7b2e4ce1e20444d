"""The sentences of the first screen follow from the findings."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from service.domain import ClassCount, GateCheck
from trainer import evaluate
from trainer.reporting import calibration, comparisons
from trainer.reporting.advice import Advice, advise
from trainer.reporting.comparisons import Measured
from trainer.reporting.duplicates import NearDuplicates, Twins
from trainer.reporting.findings import Adaptation, Findings, Gap, OutOfDistribution, Suspects
from trainer.reporting.label_errors import Suspect
from trainer.reporting.power_law import LearningCurve

COUNTS = [ClassCount("ant", 50, 100), ClassCount("bee", 60, 100)]
TARGETS = np.arange(200) % 2
SUSPECT = Suspect(place=3, given=0, suggested=1, probability=0.9, margin=-0.8)


def _said(
    findings: Findings | None = None,
    wrong: int = 10,
    confidence: float = 0.95,
    counts: list[ClassCount] = COUNTS,
    gate: tuple[GateCheck, ...] = (),
    n: int = 200,
    without: float | None = None,
) -> list[Advice]:
    targets = TARGETS[:n]
    answers = targets.copy()
    answers[:wrong] = 1 - answers[:wrong]
    probabilities = np.full((n, 2), 1 - confidence)
    probabilities[np.arange(n), answers] = confidence
    metrics = evaluate.measure(probabilities, targets, ("ant", "bee"))
    findings = findings or Findings()
    chance = comparisons.majority_class(targets, n, 2)
    compared = [
        *findings.comparisons,
        comparisons.compare(Measured("majority_class", chance), probabilities, targets),
    ]
    return advise(
        metrics,
        calibration.measure(probabilities, targets, 1.0),
        replace(findings, comparisons=compared),
        counts,
        gate,
        without,
    )


def _levels(advice: list[Advice], part: str) -> list[str]:
    return [a.level for a in advice if part in a.text]


def test_a_sound_job_is_told_so_in_every_topic() -> None:
    said = _said()
    assert all(a.level == "good" for a in said)
    assert {a.topic for a in said} == {"quality", "trust", "next"}
    assert said[0].text.startswith("95.0 % of 200 validation images are answered right")
    assert said[-1].text == "Nothing that needs mending was found."


def test_an_accuracy_of_chance_is_no_success() -> None:
    said = _said(wrong=98, confidence=0.51)
    assert said[0].level == "warning"
    assert "no better than always the commonest class" in said[0].text


def test_confidence_is_called_too_sure_or_not_sure_enough() -> None:
    assert _levels(_said(wrong=60, confidence=0.95), "too sure; do not take them") == ["warning"]
    assert _levels(_said(wrong=2, confidence=0.7), "not sure enough; do not") == ["warning"]
    assert _levels(_said(wrong=1, confidence=0.96), "not sure enough, if slightly") == ["note"]


def test_few_validation_images_are_a_warning() -> None:
    assert _levels(_said(n=40, wrong=2), "40 validation images are few") == ["warning"]


def test_suspects_and_twins_are_counted_in_plain_words() -> None:
    one = _said(Findings(suspects=Suspects(train=[SUSPECT])))
    assert _levels(one, "Check the labels of 1 image below: it looks like") == ["warning"]
    both = _said(Findings(suspects=Suspects([SUSPECT], [SUSPECT])))
    assert _levels(both, "Check the labels of 2 images below: they look like") == ["warning"]
    twins = NearDuplicates([Twins(1, 2, 0.9)], [Twins(1, 2, 0.9), Twins(4, 5, 0.9)])
    said = _said(Findings(near_duplicates=twins), without=0.931)
    assert _levels(said, "1 validation image is nearly the same") == ["warning"]
    assert _levels(said, "without them accuracy is 93.1 %") == ["warning"]
    assert _levels(said, "2 training images are nearly the same") == ["warning"]
    clean = _said(Findings(near_duplicates=NearDuplicates([], [])))
    assert _levels(clean, "No validation image nearly is one") == ["good"]
    blind = NearDuplicates([], [], is_conclusive=False)
    assert _levels(_said(Findings(near_duplicates=blind)), "No validation image nearly") == []


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
    assert _levels(_said(gate=(passed,)), "Every condition of its gate was met.") == ["good"]
    served = np.eye(2)[np.where(np.arange(200) < 10, 1 - TARGETS, TARGETS)]
    better = comparisons.compare(Measured("full_fine_tune", np.eye(2)[TARGETS]), served, TARGETS)
    said = _said(Findings(comparisons=[better]))
    assert _levels(said, "Against all layers fine-tuned") == ["warning"]
    assert _levels(said, "Consider publishing the better one") == ["warning"]


def test_the_weakest_class_is_named() -> None:
    targets = TARGETS.copy()
    probabilities = np.eye(2)[np.where((targets == 1) & (np.arange(200) < 80), 0, targets)]
    metrics = evaluate.measure(probabilities, targets, ("ant", "bee"))
    said = advise(
        metrics, calibration.measure(probabilities, targets, 1.0), Findings(), COUNTS, (), None
    )
    assert _levels(said, "The weakest class is bee: 60.0 % of its 100 images") == ["warning"]


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
    assert _levels(said, "lie far apart (proxy A-distance 1.80 of 2): label some") == ["warning"]
