"""The bench tells heads in int8 that are as good from those that are not."""

from dataclasses import replace

import numpy as np
import pytest

from bench.quality import quantised
from bench.quality.quantised import Answered
from tests.bench.test_quality import made


def answered(count: int, lost: int, won: int, rise: float = 0.0, name: str = "a") -> Answered:
    """Answers of which int8 alone is wrong on `lost`, and alone is right on `won`."""
    right, float_right = np.ones(count, np.bool_), np.ones(count, np.bool_)
    right[:lost] = False
    float_right[lost : lost + won] = False
    loss = np.full(count, 0.1)
    return Answered(name, right, float_right, loss + rise, loss, np.arange(count), 0.1)


@pytest.mark.parametrize(
    ("lost", "won", "rise", "holds"),
    [
        (0, 0, 0.0, True),
        (40, 40, 0.0, True),
        (10, 0, 0.0, True),
        # A point of 4,000 images; half of one, but of many answers that differ.
        (40, 0, 0.0, False),
        (120, 100, 0.0, False),
        (0, 0, 0.0199, True),
        (0, 0, 0.021, False),
    ],
)
def test_int8_holds_where_little_is_lost_for_certain(
    lost: int, won: int, rise: float, holds: bool
) -> None:
    sets = [answered(3000, lost, won, rise), answered(1000, 0, 0, rise, "b")]
    assert quantised.holds(sets) is holds
    assert [is_kept for _, is_kept in quantised.section(sets).bounds] == [holds]


def test_images_of_a_group_count_as_one() -> None:
    few = replace(answered(4000, 30, 10), groups=np.arange(4000) // 40)
    assert quantised.holds([answered(4000, 30, 10)])
    assert not quantised.holds([few])


def test_the_table_has_each_set_and_both_units() -> None:
    found = quantised.section([answered(3000, 9, 3), answered(1000, 0, 4, 0.01, "b")])
    text = found.markdown()
    assert "| a | 3000 (3000) | 0.100 | 99.70 | 99.90 | -0.20 [-0.48, +0.03] |" in text
    assert "| b | 1000 (1000) | 0.100 | 100.00 | 99.60 | +0.40 [" in text
    assert "| *all images* | 4000 (4000) |" in text
    assert "| *mean, sets as the unit* | 2 sets |" in text


def test_both_heads_answer_the_same_images_in_the_same_folds() -> None:
    images = made(3, 40, 1, 1.5, 0)
    same = quantised.answer(images, {"crop": images.features})
    assert len(same.right) == len(images)
    assert (same.right == same.float_right).all()
    assert (same.loss == same.float_loss).all()
    assert same.features_error == 0
    noisy = images.features + np.random.default_rng(0).normal(0, 3, images.features.shape)
    worse = quantised.answer(images, {"crop": noisy.astype(np.float32)})
    assert worse.right.mean() < worse.float_right.mean()
    assert worse.features_error > 0.5
    assert (worse.float_loss == same.float_loss).all()
