"""Intervals against published values, and by how often they hold in simulations."""

from collections import Counter

import numpy as np
import pytest

from trainer import intervals

DRAWS = 600


def test_wilsons_interval_has_his_values() -> None:
    # 0.5 of 10: 0.2366 to 0.7634 (Newcombe 1998 gives the same formula).
    assert intervals.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert intervals.wilson(1.0, 10) == pytest.approx((10 / (10 + 1.959964**2), 1.0))


def test_tangos_interval_has_its_published_values() -> None:
    # Fagerland, Lydersen and Laake 2014, children's airways: 1 and 7 changed of 21.
    assert intervals.matched_difference(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    low, high = intervals.matched_difference(0, 0, 30)
    # Nothing changed: the score interval of none of n, to both sides.
    assert (low, high) == pytest.approx((-high, high))
    assert high == pytest.approx(intervals.wilson(0, 30)[1])


@pytest.mark.parametrize("share", [0.7, 0.95, 1.0])
@pytest.mark.parametrize(("groups", "size"), [(100, 1), (50, 4), (30, 10)])
def test_the_interval_of_a_share_holds_as_often_as_it_says(
    share: float, groups: int, size: int
) -> None:
    """Images of a group are right together in four groups of five, at most."""
    rng = np.random.default_rng([groups, size])
    numbers = np.repeat(np.arange(groups), size)
    for alike in (0.0, 0.8, 1.0):
        together = (rng.random((DRAWS, groups)) < alike)[:, numbers]
        fate = np.where(
            together, rng.random((DRAWS, groups))[:, numbers], rng.random((DRAWS, len(numbers)))
        )
        ends = [intervals.of_share(right, numbers)[1:] for right in fate < share]
        held = np.mean([low <= share <= high for low, high in ends])
        assert held >= 0.915, alike


def test_groups_of_one_are_lone_images() -> None:
    right = np.arange(40) % 5 > 0
    told = intervals.of_share(right, np.arange(40) * 10**12)
    assert told == pytest.approx(intervals.of_share(right))
    assert told[1:] == pytest.approx(intervals.wilson(0.8, 40))


def test_groups_that_are_right_together_count_as_one_image_each() -> None:
    numbers = np.repeat(np.arange(20), 5)
    right = np.repeat(np.arange(20) % 4 > 0, 5)
    se = intervals.clustered_se(right - 0.75, numbers)
    # As 20 images alone would have it.
    assert se == pytest.approx(np.sqrt(0.75 * 0.25 / 19))
    assert intervals.effective_count(0.75, se, numbers) == pytest.approx(20)
    assert intervals.design_effect(right.astype(float), numbers) == pytest.approx(5)


def test_where_all_are_right_each_group_counts_as_one_image() -> None:
    assert intervals.effective_count(1.0, 0.0, np.repeat(np.arange(6), 7)) == pytest.approx(6)
    # Kish's count of uneven groups: 10 squared over 64 + 4.
    assert intervals.effective_count(1.0, 0.0, np.array([0] * 8 + [1] * 2)) == pytest.approx(
        100 / 68
    )


def test_one_group_alone_tells_as_much_as_one_image() -> None:
    right = np.array([True] * 7 + [False])
    assert intervals.of_share(right, np.zeros(8, np.int64))[1:] == intervals.wilson(7 / 8, 1)


def test_the_score_interval_of_matched_proportions_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = rng.multinomial(80, [0.06, 0.02, 0.92], 5000)[:, :2]
    held = 0
    for (a, b), times in Counter(map(tuple, draws.tolist())).items():
        low, high = intervals.matched_difference(a, b, 80)
        held += times * (low <= 0.04 <= high)
    assert 0.93 < held / 5000 < 0.975
