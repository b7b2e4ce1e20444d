"""What the benches of rankings and of outliers say of sets whose truth is known."""

from pathlib import Path

import numpy as np
import pytest

from bench.quality import outliers, ranking
from bench.quality.images import ImageSet, find
from bench.quality.ranking import Entrant, Row, Seen
from tests.trainer.small_network import small_backbone
from trainer import backbones


def made(name: str, classes: int, seed: int, noise: float = 0.5) -> ImageSet:
    """Features that tell classes apart, of a place of their own."""
    rng = np.random.default_rng(seed)
    targets = np.arange(20 * classes) % classes
    centres = rng.normal(0, 1, 40) + rng.normal(0, 1, (classes, 40))
    features = (centres[targets] + rng.normal(0, noise, (len(targets), 40))).astype(np.float32)
    n = len(targets)
    names = tuple(str(k) for k in range(classes))
    return ImageSet(name, features, targets, names, np.zeros(n, np.uint64), np.arange(n))


def test_areas_are_the_chance_that_a_strange_image_scores_above_a_familiar_one() -> None:
    assert outliers.auroc(np.array([0.0, 0.5]), np.array([1.0, 2.0])) == 1
    assert outliers.auroc(np.array([0.0, 2.0]), np.array([1.0, 1.0])) == 0.5
    assert outliers.auroc(np.array([1.0]), np.array([1.0, 0.0])) == 0.25


def test_classes_that_were_left_out_and_other_sets_are_told_from_familiar_images() -> None:
    sets = {name: made(name, 6, seed) for seed, name in enumerate(("a/one", "a/two", "b"))}
    row = outliers.measure(sets, "a/one", 10, 0)
    assert row is not None
    assert row.far > 0.99
    assert row.near > 0.9
    assert all(alarm <= 0.5 for alarm in row.alarms)
    # Half of three classes is one: there is no head of one class.
    assert outliers.measure({"c": made("c", 3, 0), "b": sets["b"]}, "c", 10, 0) is None
    text = outliers.section([row]).markdown()
    assert "| a/one, 10 a class | 1 |" in text
    assert "kept: near at least 0.75" in text


def test_the_backbone_whose_features_tell_most_is_first_and_its_choice_loses_nothing() -> None:
    good, bad = made("set", 3, 0), made("set", 3, 0, noise=20.0)
    seen = [
        Seen("bad", "random", 1.0, bad.features),
        Seen("good", "", 2.0, good.features),
        Seen("worse", "random", 3.0, bad.features[::-1]),
    ]
    rows = [
        row for seed in range(2) for row in ranking.measure("set", seen, good.targets, 10, seed)
    ]
    rows = [row for row in rows if row.pool == "pretrained"]
    assert [row.first["as served"] for row in rows] == [1, 1]
    assert [row.first["cheapest"] for row in rows] == [0, 0]
    assert ranking.regret(rows, "as served") == [0, 0]
    assert min(ranking.regret(rows, "cheapest")) > 20
    assert "| pretrained | 10 | as served | 100.0 %" in ranking.section(rows).markdown()
    assert ranking.measure("set", seen, good.targets, 50, 0) == []


def test_what_is_lost_is_against_the_best_over_all_draws_not_the_luckiest_of_one() -> None:
    def row(first: float, second: float) -> Row:
        entrants = (Entrant("a", 1.0, first, 0.0), Entrant("b", 1.0, second, 0.0))
        return Row("set", 5, "pretrained", entrants, {"rule": 0})

    # The first is better on average, though the second was in one draw.
    assert ranking.regret([row(0.9, 0.5), row(0.6, 0.7)], "rule") == [0, 0]


@pytest.mark.parametrize("size", [96, 240])
def test_each_backbone_sees_images_as_large_as_it_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    backbone = small_backbone()
    backbone.size = size
    monkeypatch.setattr(backbones, "load", lambda *_: backbone)
    files = find(tmp_path)["digits"][:3]
    seen = ranking.see("resnet18", "random", files, tmp_path / "kept")
    # Its file takes images of one size alone.
    assert seen.features.shape == (3, backbone.feature_dim)
    again = ranking.see("resnet18", "random", files, tmp_path / "kept")
    assert again.image_ms == seen.image_ms > 0
    np.testing.assert_array_equal(again.features, seen.features)
