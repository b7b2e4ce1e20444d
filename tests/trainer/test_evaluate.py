"""The figures of a report, against values worked out by hand."""

import numpy as np
import pytest

from trainer import evaluate

PROBABILITIES = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.2, 0.8]])
TARGETS = np.array([0, 0, 0, 1, 1])


def test_accuracy_loss_and_confusion_are_counted() -> None:
    metrics = evaluate.measure(PROBABILITIES, TARGETS, ("a", "b"))
    assert metrics.accuracy == pytest.approx(0.8)
    assert metrics.confusion == [[2, 1], [0, 2]]
    expected = -np.log([0.9, 0.8, 0.3, 0.6, 0.8]).mean()
    assert metrics.loss == pytest.approx(expected)
    assert metrics.accuracy_low < 0.8 < metrics.accuracy_high


def test_each_class_has_its_precision_recall_and_f1() -> None:
    a, b = evaluate.measure(PROBABILITIES, TARGETS, ("a", "b")).classes
    assert (a.precision, a.recall, a.support) == (1.0, pytest.approx(2 / 3), 3)
    assert (b.precision, b.recall, b.support) == (pytest.approx(2 / 3), 1.0, 2)
    assert a.f1 == pytest.approx(0.8)


def test_a_class_without_images_has_no_recall() -> None:
    metrics = evaluate.measure(np.array([[0.6, 0.3, 0.1]]), np.array([0]), ("a", "b", "c"))
    assert metrics.classes[2].recall is None
    assert metrics.classes[2].f1 is None


def test_calibration_error_is_zero_when_confidence_is_accuracy() -> None:
    right_half_of_the_time = np.array([[0.5 + 1e-9, 0.5 - 1e-9]] * 10)
    targets = np.array([0, 1] * 5)
    metrics = evaluate.measure(right_half_of_the_time, targets, ("a", "b"))
    assert metrics.calibration_error == pytest.approx(0, abs=1e-6)
    overconfident = evaluate.measure(np.array([[1.0, 0.0]] * 10), targets, ("a", "b"))
    assert overconfident.calibration_error == pytest.approx(0.5)


def test_mistakes_come_most_confident_first() -> None:
    probabilities = np.array([[0.4, 0.6], [0.1, 0.9], [0.9, 0.1]])
    found = evaluate.worst_mistakes(probabilities, np.array([0, 0, 0]), 5)
    assert [(m.place, m.answered) for m in found] == [(1, 1), (0, 1)]


def test_balanced_accuracy_weighs_every_class_alike() -> None:
    probabilities = np.array([[0.9, 0.1]] * 9 + [[0.9, 0.1]])
    metrics = evaluate.measure(probabilities, np.array([0] * 9 + [1]), ("many", "one"))
    assert metrics.accuracy == pytest.approx(0.9)
    assert metrics.balanced_accuracy == pytest.approx(0.5)
    absent = evaluate.measure(probabilities[:9], np.zeros(9, dtype=np.int64), ("many", "none"))
    assert absent.balanced_accuracy == pytest.approx(1.0)


def test_wilsons_interval_has_his_values() -> None:
    # 0.5 of 10: 0.2366 to 0.7634 (Newcombe 1998 gives the same formula).
    assert evaluate.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert evaluate.wilson(1.0, 10) == pytest.approx((10 / (10 + 1.959964**2), 1.0))
