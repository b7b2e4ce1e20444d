"""Images that are nearly the same, by made-up features."""

import numpy as np

from trainer.reporting import duplicates


def _apart(n: int, d: int = 64, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(n, d)) + 3).astype(np.float32)


def test_a_validation_image_that_nearly_was_learned_from_is_found_with_its_twin() -> None:
    train, validation = _apart(50), _apart(20, seed=1)
    validation[7] = train[31] + 0.1 * _apart(1, seed=2)[0] - 0.3
    validation[3] = train[4]
    found = duplicates.find(train, np.zeros(50, dtype=np.int64), validation)
    assert [(t.place, t.train_place) for t in found.across_parts] == [(3, 4), (7, 31)]
    assert found.across_parts[0].similarity > found.across_parts[1].similarity > 0.85
    assert found.across_classes == []
    assert found.is_conclusive


def test_twins_under_two_classes_are_found_and_twins_of_one_class_are_not() -> None:
    train = _apart(60)
    train[10] = train[50]
    train[20] = train[30]
    targets = np.zeros(60, dtype=np.int64)
    targets[50] = 1
    found = duplicates.find(train, targets, _apart(20, seed=1))
    assert [(t.place, t.train_place) for t in found.across_classes] == [(10, 50)]


def test_blocks_end_where_the_images_do() -> None:
    train, validation = _apart(2500, 16), _apart(2100, 16, seed=1)
    targets = np.arange(2500) % 2
    validation[2099] = train[2499]
    train[1023] = train[2400]
    found = duplicates.find(train, targets, validation, alike=0.999)
    assert [(t.place, t.train_place) for t in found.across_parts] == [(2099, 2499)]
    assert [(t.place, t.train_place) for t in found.across_classes] == [(1023, 2400)]


def test_features_that_are_all_alike_say_nothing() -> None:
    direction = np.random.default_rng(0).normal(size=32)
    train = np.outer(np.linspace(1, 2, 40), direction).astype(np.float32)
    found = duplicates.find(train, np.arange(40) % 2, train[:10] * np.float32(1.01))
    assert not found.is_conclusive
    assert found.unclear == (0, 1)
    assert found.across_parts == found.across_classes == []


def test_a_class_of_which_all_images_are_alike_says_nothing_of_copies() -> None:
    train, validation = _apart(60), _apart(20, seed=1)
    targets = np.repeat([0, 1], 30)
    train[30:] = train[30] + 0.3 * _apart(30, seed=2)
    validation[10:] = train[30] + 0.3 * _apart(10, seed=3)
    validation[2] = train[7]
    found = duplicates.find(train, targets, validation)
    assert found.unclear == (1,)
    assert found.is_conclusive
    assert [(t.place, t.train_place) for t in found.across_parts] == [(2, 7)]


def test_copies_of_nearly_all_images_are_found_and_not_taken_for_a_likeness_of_all() -> None:
    originals = _apart(40)
    copies = [originals + 0.2 * (_apart(40, seed=seed) - 3) for seed in (1, 2, 3)]
    targets = np.arange(40) % 2
    train, validation = np.concatenate(copies[:2]), copies[2]
    found = duplicates.find(train, np.concatenate([targets, targets]), validation)
    assert len(found.across_parts) == 40
    assert found.is_conclusive
    assert found.unclear == ()


def test_more_training_images_than_the_bound_are_thinned_evenly() -> None:
    train = _apart(duplicates.MAX_TRAIN + 500)
    validation = np.concatenate([_apart(3, seed=1), train[-1:]])
    found = duplicates.find(train, np.zeros(len(train), dtype=np.int64), validation)
    assert [(t.place, t.train_place) for t in found.across_parts] == [(3, len(train) - 1)]
