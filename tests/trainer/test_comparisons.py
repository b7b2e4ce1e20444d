"""Paired comparisons against published examples and by hand."""

import numpy as np
import pytest

from trainer.reporting import comparisons
from trainer.reporting.comparisons import Measured


def test_mcnemars_mid_p_has_the_value_of_its_paper() -> None:
    # Fagerland et al. 2013, table 3: 1 and 7 discordant pairs, mid-p 0.039.
    assert comparisons.mcnemar(1, 7) == pytest.approx(0.039, abs=5e-4)
    assert comparisons.mcnemar(7, 1) == comparisons.mcnemar(1, 7)
    # Six heads of six, by hand: 2 / 64 - 1 / 64.
    assert comparisons.mcnemar(6, 0) == pytest.approx(1 / 64)


def test_models_that_never_disagree_are_no_different() -> None:
    assert comparisons.mcnemar(0, 0) == 1.0
    same = np.array([0, 1, 1, 0])
    found = comparisons.compare(Measured("linear_probe", same), same, np.array([0, 1, 0, 0]))
    assert (found.difference, found.verdict) == (0.0, "no_difference")
    assert found.words == "both classify the same images correctly"


def test_thousands_of_disagreements_do_not_overflow() -> None:
    assert comparisons.mcnemar(5000, 5000) == pytest.approx(1, abs=0.01)
    assert comparisons.mcnemar(5200, 4800) == pytest.approx(6.3e-5, rel=0.05)


def test_a_difference_beyond_chance_is_told_from_one_that_is_not() -> None:
    targets = np.zeros(40, dtype=np.int64)
    served = np.array([0] * 38 + [1] * 2)
    little = comparisons.compare(
        Measured("from_scratch", np.array([0] * 37 + [1] * 3)), served, targets
    )
    assert little.verdict == "no_difference"
    assert little.words.startswith("no significant difference: between -")
    assert (little.only_served, little.only_other) == (1, 0)
    much = comparisons.compare(
        Measured("from_scratch", np.array([0] * 25 + [1] * 15), seconds=3.0), served, targets
    )
    assert much.verdict == "better"
    assert much.difference == pytest.approx(13 / 40)
    assert much.difference_low > 0
    assert much.seconds == 3.0
    other_way = comparisons.compare(
        Measured("served", served), np.array([0] * 25 + [1] * 15), targets
    )
    assert other_way.verdict == "worse"
    assert other_way.difference_high < 0


def test_changes_within_one_group_count_as_one() -> None:
    targets = np.zeros(200, dtype=np.int64)
    groups = np.arange(200) // 10
    served = np.array([0] * 200)
    # All images of two groups, or one image of each of twenty.
    bursts = Measured("other", np.array([1] * 20 + [0] * 180))
    spread = Measured("other", np.array([1 if i % 10 == 0 else 0 for i in range(200)]))
    alone = comparisons.compare(bursts, served, targets)
    assert alone.verdict == "better"
    together = comparisons.compare(bursts, served, targets, groups)
    assert together.difference == alone.difference
    assert together.verdict == "no_difference"
    # Two images of twenty.
    assert together.p_value > 0.2
    assert together.difference_low < 0 < together.difference_high
    assert together.accuracy_low < alone.accuracy_low
    assert comparisons.compare(spread, served, targets, groups).verdict == "better"


def test_a_difference_in_groups_is_found_by_chance_no_oftener_than_it_says() -> None:
    rng = np.random.default_rng(0)
    groups, found = np.repeat(np.arange(40), 5), 0
    targets = np.zeros(200, dtype=np.int64)
    for _ in range(300):
        u = rng.random(40)[groups]
        served, other = (u < 0.1) * 1, ((u > 0.05) & (u < 0.15)) * 1
        one = comparisons.compare(Measured("other", other), served, targets, groups)
        found += one.verdict != "no_difference"
    assert found <= 0.08 * 300


def test_the_nearest_class_mean_answers_the_class_in_whose_direction_a_feature_lies() -> None:
    rng = np.random.default_rng(0)
    middles = np.eye(3, 8) * 5
    targets = np.arange(60) % 3
    train = middles[targets] + rng.normal(0, 0.5, (60, 8))
    # Length does not matter.
    asked = 7 * middles[[2, 0, 1]]
    assert comparisons.nearest_class_mean(train, targets, asked, 3).tolist() == [2, 0, 1]


def test_a_class_without_training_images_does_not_break_the_class_means() -> None:
    train = np.array([[1.0, 0.0], [0.0, 1.0]])
    answers = comparisons.nearest_class_mean(train, np.array([0, 2]), train, 3)
    assert answers.tolist() == [0, 2]


def test_the_majority_class_is_the_commonest_of_training() -> None:
    assert comparisons.majority_class(np.array([1, 1, 0]), 2).tolist() == [1, 1]
