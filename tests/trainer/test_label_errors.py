"""Confident learning finds labels that were changed, and no others."""

import numpy as np

from trainer.reporting import label_errors


def test_a_confident_answer_against_the_label_is_found_and_ranked_by_margin() -> None:
    probabilities = np.array(
        [[0.9, 0.1], [0.8, 0.2], [0.85, 0.15], [0.1, 0.9], [0.2, 0.8], [0.95, 0.05], [0.08, 0.92]]
    )
    targets = np.array([0, 0, 0, 1, 1, 1, 0])
    found = label_errors.find(probabilities, targets)
    assert [(s.place, s.given, s.suggested) for s in found] == [(5, 1, 0), (6, 0, 1)]
    assert found[0].margin < found[1].margin < 0
    assert found[0].probability == 0.95


def test_a_doubtful_image_stays_where_it_is() -> None:
    # Wrong, but less confident than class 0 is of its own.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.55, 0.45]])
    assert label_errors.find(probabilities, np.array([0, 0, 1, 1])) == []


def test_changed_labels_are_found_among_many_classes() -> None:
    rng = np.random.default_rng(0)
    n, k = 600, 6
    true = np.arange(n) % k
    logits = rng.normal(0, 1, (n, k))
    logits[np.arange(n), true] += 5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    changed = rng.choice(n, 30, replace=False)
    given = true.copy()
    given[changed] = (true[changed] + 1) % k
    found = label_errors.find(probabilities, given)
    hits = {s.place for s in found} & set(changed.tolist())
    assert len(hits) >= 24
    assert len(found) - len(hits) <= 6
    assert all(s.suggested == true[s.place] for s in found if s.place in hits)


def test_a_class_without_images_is_never_suggested() -> None:
    probabilities = np.array([[0.1, 0.2, 0.7], [0.2, 0.7, 0.1], [0.7, 0.2, 0.1]])
    found = label_errors.find(probabilities, np.array([0, 1, 0]))
    assert all(s.suggested != 2 for s in found)
