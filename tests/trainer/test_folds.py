"""Folds keep groups whole, classes evenly spread and something to learn of each class."""

import numpy as np
import pytest

from trainer.folds import FOLDS, FOLDS_OF_FEW, deal


def assert_each_class_is_learned(fold: np.ndarray, targets: np.ndarray) -> None:
    for held in np.unique(fold[fold >= 0]):
        assert set(targets[fold != held]) == set(targets)


@pytest.mark.parametrize("seed", range(200))
def test_no_group_is_divided_and_no_class_goes_unlearned(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 80))
    # Groups of several classes too, and classes that one or two groups hold alone.
    _, targets = np.unique(rng.integers(0, rng.integers(1, 12), n), return_inverse=True)
    groups = rng.integers(0, rng.integers(1, n + 1), n) * 7
    count = int(rng.integers(2, 11))
    fold = deal(targets, groups, rng.random(n), count)
    assert fold.dtype == np.int64
    assert fold.min() >= -1
    assert fold.max() < count
    for group in np.unique(groups):
        assert len(np.unique(fold[groups == group])) == 1
    assert_each_class_is_learned(fold, targets)
    for label in np.unique(targets):
        if len(np.unique(groups[targets == label])) == 1:
            assert (fold[targets == label] == -1).all()


@pytest.mark.parametrize("seed", range(50))
def test_images_of_their_own_are_spread_to_within_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 40, int(rng.integers(2, 30)))
    targets = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    fold = deal(targets, order=rng.random(len(targets)), count=5)
    held = np.array([np.bincount(fold[targets == c], minlength=5) for c in range(len(sizes))])
    assert np.ptp(held, axis=1).max() <= 1
    assert np.ptp(held.sum(axis=0)) <= 1


def test_large_groups_are_weighed_up_by_small_ones() -> None:
    groups = np.repeat(np.arange(26), [20, *[1] * 25])
    fold = deal(np.zeros(45, np.int64), groups, count=2)
    assert np.bincount(fold).tolist() == [22, 23] or np.bincount(fold).tolist() == [23, 22]


def test_the_order_decides_and_not_the_place() -> None:
    rng = np.random.default_rng(0)
    targets, order = rng.integers(0, 3, 60), rng.random(60)
    moved = rng.permutation(60)
    np.testing.assert_array_equal(
        deal(targets[moved], order=order[moved]), deal(targets, order=order)[moved]
    )
    assert (deal(targets, order=order) != deal(targets, order=1 - order)).any()


def test_two_groups_of_a_class_are_each_held_out_once() -> None:
    targets = np.array([0] * 50 + [1] * 4)
    groups = np.array([*range(50), 50, 50, 51, 51])
    fold = deal(targets, groups)
    assert fold[50] == fold[51] != fold[52] == fold[53]
    assert fold.min() == 0


def test_a_rare_class_does_not_make_folds_fewer() -> None:
    targets = np.array([0] * 2000 + [1] * 2000 + [2] * 2)
    assert np.unique(deal(targets)).tolist() == list(range(FOLDS))


@pytest.mark.parametrize(
    ("images", "classes", "count"),
    [(2, 7, 2), (3, 7, 3), (8, 3, 8), (20, 3, FOLDS_OF_FEW), (400, 3, FOLDS)],
)
def test_small_classes_are_held_out_evenly(images: int, classes: int, count: int) -> None:
    targets = np.repeat(np.arange(classes), images)
    assert deal(targets).max() + 1 == count


def test_a_group_that_holds_a_class_alone_is_always_learned() -> None:
    targets = np.array([0, 0, 0, 0, 1])
    assert deal(targets, np.array([0, 1, 2, 3, 3])).tolist()[3:] == [-1, -1]
