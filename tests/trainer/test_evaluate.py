"""The figures of a report, against values worked out by hand and scikit-learn's."""

import msgspec
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from trainer import evaluate
from trainer.evaluate import Metrics

PROBABILITIES = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.2, 0.8]])
TARGETS = np.array([0, 0, 0, 1, 1])
FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "loss")


def _drawn(
    groups: int, size: int, shares: list[float], seed: object, alike: float = 0.7
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, true classes and groups of images that are alike within groups."""
    rng = np.random.default_rng(seed)  # type: ignore[arg-type]
    numbers, k = np.repeat(np.arange(groups), size), len(shares)
    targets = rng.choice(k, groups, p=shares)[numbers]
    logits = np.sqrt(alike) * rng.normal(size=(groups, k))[numbers]
    logits += np.sqrt(1 - alike) * rng.normal(size=(groups * size, k))
    logits[np.arange(len(targets)), targets] += 1.8
    raised = np.exp(2 * logits)
    return raised / raised.sum(axis=1, keepdims=True), targets, numbers


def test_accuracy_loss_and_confusion_are_counted() -> None:
    metrics = evaluate.measure(PROBABILITIES, TARGETS, ("a", "b"))
    assert metrics.accuracy == pytest.approx(0.8)
    assert metrics.confusion == [[2, 1], [0, 2]]
    expected = -np.log([0.9, 0.8, 0.3, 0.6, 0.8]).mean()
    assert metrics.loss == pytest.approx(expected)
    assert metrics.loss_low < expected < metrics.loss_high
    assert metrics.accuracy_low < 0.8 < metrics.accuracy_high
    assert (metrics.count, metrics.groups) == (5, 5)
    assert metrics.effective_count == pytest.approx(5)


def test_each_class_has_its_precision_recall_and_f1() -> None:
    a, b = evaluate.measure(PROBABILITIES, TARGETS, ("a", "b")).classes
    assert (a.precision, a.recall, a.support) == (1.0, pytest.approx(2 / 3), 3)
    assert (b.precision, b.recall, b.support) == (pytest.approx(2 / 3), 1.0, 2)
    assert a.f1 == pytest.approx(0.8)
    assert a.f1_low < 0.8 < a.f1_high
    assert (b.answered, b.hits) == (3, 2)


def test_a_class_without_images_has_no_recall() -> None:
    metrics = evaluate.measure(np.array([[0.6, 0.3, 0.1]]), np.array([0]), ("a", "b", "c"))
    assert metrics.classes[2].recall is metrics.classes[2].f1 is None
    # All images are of one class, so that none can be told from the rest.
    assert metrics.macro_auroc is metrics.classes[0].auroc is None
    assert metrics.loss_low is None
    assert metrics.balanced_accuracy == 1.0


def test_figures_over_classes_are_scikit_learns_also_among_equal_scores() -> None:
    probabilities, targets, _ = _drawn(150, 1, [0.2, 0.3, 0.5], 0)
    probabilities = np.round(probabilities, 1)
    metrics = evaluate.measure(probabilities, targets, ("a", "b", "c"))
    answers = probabilities.argmax(axis=1)
    assert metrics.macro_f1 == pytest.approx(f1_score(targets, answers, average="macro"))
    assert metrics.balanced_accuracy == pytest.approx(balanced_accuracy_score(targets, answers))
    for i, one in enumerate(metrics.classes):
        assert one.auroc == pytest.approx(roc_auc_score(targets == i, probabilities[:, i]))


@pytest.mark.parametrize(
    ("groups", "size", "shares"), [(120, 1, [0.1, 0.9]), (50, 4, [0.2, 0.3, 0.5])]
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(
    groups: int, size: int, shares: list[float]
) -> None:
    labels = tuple(map(str, range(len(shares))))
    truth = evaluate.measure(*_drawn(20_000, size, shares, 1)[:2], labels)
    held = dict.fromkeys(FIGURES, 0)
    for draw in range(150):
        probabilities, targets, numbers = _drawn(groups, size, shares, [2, draw])
        metrics = evaluate.measure(probabilities, targets, labels, numbers)
        for name in FIGURES:
            low, high = getattr(metrics, f"{name}_low"), getattr(metrics, f"{name}_high")
            held[name] += low <= getattr(truth, name) <= high
    assert all(times >= 0.88 * 150 for times in held.values()), held
    # What would be the interval of lone images is too narrow for groups.
    assert size == 1 or metrics.effective_count < 0.8 * metrics.count


def test_only_what_has_an_answer_is_measured_on() -> None:
    with pytest.raises(ValueError, match="without an answer"):
        evaluate.measure(np.array([[np.nan, np.nan], [0.9, 0.1]]), np.array([0, 0]), ("a", "b"))
    with pytest.raises(ValueError, match="no image"):
        evaluate.measure(np.empty((0, 2)), np.empty(0, np.int64), ("a", "b"))


def test_the_coverage_table_counts_answers_from_each_probability_on() -> None:
    top = np.array([0.55, 0.65, 0.65, 0.92, 0.97, 0.985])
    probabilities = np.stack([top, 1 - top], axis=1)
    targets = np.array([1, 0, 1, 0, 0, 0])
    rows = evaluate.measure(probabilities, targets, ("a", "b")).coverage
    # Half and 0.5 are the same, as are 0.7, 0.8 and 0.9; nothing is as sure as 0.99.
    assert [(r.threshold, r.answered, r.right) for r in rows] == [
        (0.0, 6, 4), (0.6, 5, 4), (0.7, 3, 3), (0.95, 2, 2),
    ]  # fmt: skip
    assert rows[1].coverage == pytest.approx(5 / 6)
    assert rows[1].precision == pytest.approx(0.8)
    assert rows[1].precision_low < 0.8 < rows[1].precision_high


def test_a_figure_tells_the_same_as_the_metrics() -> None:
    probabilities, targets, numbers = _drawn(30, 3, [0.5, 0.5], 3)
    metrics = evaluate.measure(probabilities, targets, ("a", "b"), numbers)
    figure = evaluate.figure("test", probabilities, targets, numbers)
    for name in ("accuracy", "accuracy_low", "accuracy_high", "loss", "count", "groups"):
        assert getattr(figure, name) == pytest.approx(getattr(metrics, name)), name
    assert msgspec.json.decode(msgspec.json.encode(metrics), type=Metrics) == metrics


def test_mistakes_come_most_confident_first() -> None:
    probabilities = np.array([[0.4, 0.6], [0.1, 0.9], [0.9, 0.1]])
    targets = np.array([0, 0, 0])
    assert evaluate.mistakes(probabilities, targets, probabilities.argmax(axis=1)).tolist() == [
        1,
        0,
    ]
    # By a decision that answers the last one otherwise, and the second with none.
    assert evaluate.mistakes(probabilities, targets, np.array([1, -1, 1])).tolist() == [0, 2]


def test_balanced_accuracy_weighs_every_class_alike() -> None:
    probabilities = np.array([[0.9, 0.1]] * 9 + [[0.9, 0.1]])
    metrics = evaluate.measure(probabilities, np.array([0] * 9 + [1]), ("many", "one"))
    assert metrics.accuracy == pytest.approx(0.9)
    assert metrics.balanced_accuracy == pytest.approx(0.5)
