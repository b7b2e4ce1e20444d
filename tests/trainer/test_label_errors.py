"""Confident learning finds labels that were changed, and no others."""

import numpy as np
import pytest

from trainer.reporting import label_errors

ALL = np.ones(2, dtype=bool)


def _answers(
    n: int, k: int, sharpness: float, seed: int = 0
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float64]], np.ndarray]:
    """Probabilities of a model that is sharper the higher `sharpness`, and the true classes."""
    rng = np.random.default_rng(seed)
    true = np.arange(n) % k
    logits = rng.normal(0, 1, (n, k))
    logits[np.arange(n), true] += sharpness
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), true


def test_confident_answers_against_the_label_are_found_and_ranked_by_margin() -> None:
    probabilities, given = _answers(100, 2, 9.0)
    given[[4, 7]] = 1 - given[[4, 7]]
    probabilities[4] = (0.002, 0.998) if given[4] == 0 else (0.998, 0.002)
    probabilities[7] = (0.001, 0.999) if given[7] == 0 else (0.999, 0.001)
    found = label_errors.find(probabilities, given, ALL)
    assert [(s.place, s.given, s.suggested) for s in found] == [(7, 0, 1), (4, 1, 0)]
    assert found[0].margin < found[1].margin < 0
    assert found[0].probability == 0.999
    assert found[0].chance > found[1].chance >= label_errors.MIN_CHANCE


def test_a_doubtful_image_stays_where_it_is() -> None:
    # Wrong, but less confident than class 0 is of its own.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.55, 0.45]])
    assert label_errors.find(probabilities, np.array([0, 0, 1, 1]), ALL) == []


def test_changed_labels_are_found_among_many_classes() -> None:
    probabilities, true = _answers(600, 6, 5.0)
    changed = np.random.default_rng(0).choice(600, 30, replace=False)
    given = true.copy()
    given[changed] = (true[changed] + 1) % 6
    found = label_errors.find(probabilities, given, np.ones(6, dtype=bool))
    hits = {s.place for s in found} & set(changed.tolist())
    assert len(hits) >= 24
    assert len(found) - len(hits) <= 6
    assert all(s.suggested == true[s.place] for s in found if s.place in hits)
    # What is said of how many are wrong is about true.
    assert sum(s.chance for s in found) == pytest.approx(len(hits), abs=6)


def test_the_mistakes_of_a_model_that_knows_its_doubts_are_no_wrong_labels() -> None:
    rng = np.random.default_rng(1)
    probabilities, _ = _answers(600, 4, 2.0)
    drawn = np.array([rng.choice(4, p=row) for row in probabilities])
    assert (probabilities.argmax(axis=1) != drawn).mean() > 0.2
    found = label_errors.find(probabilities, drawn, np.ones(4, dtype=bool))
    assert len(found) <= 6


def test_a_class_that_is_hardly_recognised_is_not_doubted() -> None:
    targets = np.repeat([0, 1, 2], (20, 5, 4))
    answers = targets.copy()
    answers[20:25] = 0
    probabilities = np.eye(3)[answers] * 0.97 + 0.01
    lone = (probabilities, targets, np.arange(len(targets)))
    trusted = label_errors.recognised([lone], 3)
    # Of class 2 four of four are right, and the interval begins at 0.51.
    assert trusted.tolist() == [True, False, True]
    assert label_errors.find(probabilities, targets, trusted) == []
    # Pooled with images that show the same, four more of which are wrong.
    worse = (probabilities[25:], np.zeros(4, dtype=np.int64), np.arange(4))
    assert label_errors.recognised([lone, worse], 4)[2:].tolist() == [True, False]
    # Four frames of one scene show as little as one.
    scenes = np.where(targets == 2, 100, np.arange(len(targets)))
    frames = (probabilities, targets, scenes)
    assert label_errors.recognised([frames], 3).tolist() == [True, False, False]


def test_hardly_a_right_label_is_doubted_among_a_thousand_classes() -> None:
    # Images differ in how hard they are, which no temperature makes up for.
    rng = np.random.default_rng(0)
    k, n = 1000, 4000
    middles, true = rng.normal(0, 2, (k, 64)), np.arange(n) % k
    images = middles[true] + rng.normal(0, 1, (n, 64)) * np.exp(rng.normal(0, 1, n))[:, None]
    scores = images @ middles.T - (middles**2).sum(axis=1) / 2
    for sharpness in (0.02, 0.1, 1.0):
        raised = np.exp(sharpness * (scores - scores.max(axis=1, keepdims=True)))
        probabilities = raised / raised.sum(axis=1, keepdims=True)
        assert 200 < (probabilities.argmax(axis=1) != true).sum() < 900
        trusted = label_errors.recognised([(probabilities, true, np.arange(n))], k)
        assert trusted.sum() > 400
        assert len(label_errors.find(probabilities, true, trusted)) < 20


def test_no_more_than_a_tenth_is_listed() -> None:
    probabilities, given = _answers(200, 2, 12.0)
    given[:60] = 1 - given[:60]
    assert len(label_errors.find(probabilities, given, ALL)) == 20


def test_a_class_without_images_is_never_suggested() -> None:
    probabilities = np.array([[0.1, 0.2, 0.7], [0.2, 0.7, 0.1], [0.7, 0.2, 0.1]])
    found = label_errors.find(probabilities, np.array([0, 1, 0]), np.ones(3, dtype=bool))
    assert all(s.suggested != 2 for s in found)
