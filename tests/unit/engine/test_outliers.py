from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from service.engine import head as heads
from service.engine import outliers
from service.engine.head import Head
from service.engine.outliers import Outliers
from service.errors import Damaged


def made(classes: int = 3, dim: int = 8, seed: int = 0) -> Outliers:
    rng = np.random.default_rng(seed)
    return Outliers(
        rng.normal(size=(classes, dim)).astype(np.float16),
        rng.uniform(1, 5, dim).astype(np.float32),
        np.linspace(0.2, 1.2, 5).astype(np.float16),
    )


def test_a_score_is_distance_and_energy_as_the_formula_says() -> None:
    outliers = replace(made(), energy_weight=0.3, energy_floor=-4.0, offset=-0.5)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(5, 8)).astype(np.float32)
    logits = rng.normal(size=(5, 3)) * 4
    logits[0] *= 10  # surer than the floor
    said = log_softmax(logits, axis=1).astype(np.float32)
    scores = outliers.scores(features, said)
    for row, own, score in zip(features.astype(np.float64), logits, scores, strict=True):
        unit = row / np.sqrt((row**2).sum())
        distances = [
            np.sqrt(sum((u - m) ** 2 * v for u, m, v in zip(unit, mean, outliers.inverse_variance,
                                                           strict=True)))
            for mean in outliers.means.astype(np.float64)
        ]  # fmt: skip
        energy = -np.log(sum(np.exp(z - own.mean()) for z in own))
        joined = min(distances) + 0.3 * max(energy, -4.0) - 0.5
        assert score == pytest.approx(max(0, joined), rel=1e-5)


def test_the_length_of_the_features_does_not_matter() -> None:
    features = np.random.default_rng(2).normal(size=(4, 8)).astype(np.float32)
    outliers = made()
    np.testing.assert_allclose(
        outliers.distances(features * 7), outliers.distances(features), rtol=1e-5
    )


def test_what_is_sure_beyond_what_float32_holds_gets_a_finite_score() -> None:
    outliers = replace(made(), energy_weight=1.0, energy_floor=-5.0, offset=100.0)
    said = np.array([[0, -np.inf, -200.0]], np.float32)
    assert np.isfinite(outliers.scores(np.zeros((1, 8), np.float32), said)).all()


def test_what_is_kept_for_the_next_call_stays_within_its_bound_and_changes_no_answer() -> None:
    rng = np.random.default_rng(0)
    dim = outliers.KEPT_BYTES // 40  # three of them fit
    features = rng.random((1, dim), np.float32)
    made = [
        Outliers(
            rng.random((1, dim)).astype(np.float16), np.ones(dim, np.float32), np.empty(0, "<f2")
        )
        for _ in range(4)
    ]
    first = [each.distances(features) for each in made]
    kept = outliers._prepared.cache
    assert 0 < kept.currsize <= outliers.KEPT_BYTES
    assert len(kept) == 3
    for each, found in zip(made, first, strict=True):
        assert (each.distances(features) == found).all()


def test_a_head_keeps_its_outliers_through_a_file(tmp_path: Path) -> None:
    outliers = replace(made(), energy_weight=0.1 + 1e-12, energy_floor=-3.25, offset=-0.7)
    head = Head(
        np.ones((3, 8), np.float32), np.zeros(3, np.float32), ("a", "b", "c"), 1.5, outliers
    )
    heads.save(head, tmp_path / "head")
    loaded = heads.load((tmp_path / "head").read_bytes()).outliers
    assert loaded is not None
    np.testing.assert_array_equal(loaded.means, outliers.means)
    np.testing.assert_array_equal(loaded.inverse_variance, outliers.inverse_variance)
    np.testing.assert_array_equal(loaded.validation, outliers.validation)
    assert loaded.energy_weight == outliers.energy_weight
    assert (loaded.energy_floor, loaded.offset) == (-3.25, -0.7)
    assert head.nbytes > Head(head.weight, head.bias, head.classes).nbytes


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_a_head_says_whether_it_is_calibrated_and_may_know_no_outliers(
    tmp_path: Path, is_calibrated: bool
) -> None:
    weight, bias = np.ones((2, 4), np.float32), np.zeros(2, np.float32)
    heads.save(Head(weight, bias, ("a", "b"), is_calibrated=is_calibrated), tmp_path / "head")
    loaded = heads.load((tmp_path / "head").read_bytes())
    assert (loaded.outliers, loaded.is_calibrated) == (None, is_calibrated)


def test_outliers_that_do_not_fit_the_head_make_it_unloadable(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "head"
    heads.save(
        Head(np.ones((3, 8), np.float32), np.zeros(3, np.float32), ("a", "b", "c"), 1.0, made()),
        path,
    )
    tensors = load_file(path)
    tensors["outlier_inverse_variance"] = tensors["outlier_inverse_variance"][:4].copy()
    about = '{"classes": ["a", "b", "c"], "temperature": 1.0, "is_calibrated": true}'
    save_file(tensors, path, metadata={"head": about})
    with pytest.raises(Damaged):
        heads.load(path.read_bytes())
