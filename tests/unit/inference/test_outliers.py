from pathlib import Path

import numpy as np
import pytest

from service.errors import Damaged
from service.inference import head as heads
from service.inference.head import Head
from service.inference.outliers import Outliers


def made(classes: int = 3, dim: int = 8, seed: int = 0) -> Outliers:
    rng = np.random.default_rng(seed)
    return Outliers(
        rng.normal(size=(classes, dim)).astype(np.float16),
        rng.uniform(1, 5, dim).astype(np.float32),
        np.linspace(0.2, 1.2, 5).astype(np.float16),
    )


def test_a_score_is_the_distance_to_the_nearest_mean_as_the_formula_says() -> None:
    outliers = made()
    features = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    scores = outliers.scores(features)
    for row, score in zip(features.astype(np.float64), scores, strict=True):
        unit = row / np.sqrt((row**2).sum())
        distances = [
            np.sqrt(sum((u - m) ** 2 * v for u, m, v in zip(unit, mean, outliers.inverse_variance,
                                                           strict=True)))
            for mean in outliers.means.astype(np.float64)
        ]  # fmt: skip
        assert score == pytest.approx(min(distances), rel=1e-5)


def test_the_length_of_the_features_does_not_matter() -> None:
    features = np.random.default_rng(2).normal(size=(4, 8)).astype(np.float32)
    outliers = made()
    np.testing.assert_allclose(outliers.scores(features * 7), outliers.scores(features), rtol=1e-5)


def test_features_of_zeros_get_a_finite_score() -> None:
    assert np.isfinite(made().scores(np.zeros((1, 8), np.float32))).all()


def test_a_head_keeps_its_outliers_through_a_file(tmp_path: Path) -> None:
    outliers = made()
    head = Head(
        np.ones((3, 8), np.float32), np.zeros(3, np.float32), ("a", "b", "c"), 1.5, outliers
    )
    heads.save(head, tmp_path / "head")
    loaded = heads.load(tmp_path / "head").outliers
    assert loaded is not None
    np.testing.assert_array_equal(loaded.means, outliers.means)
    np.testing.assert_array_equal(loaded.inverse_variance, outliers.inverse_variance)
    np.testing.assert_array_equal(loaded.validation, outliers.validation)
    assert head.nbytes > Head(head.weight, head.bias, head.classes).nbytes


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_a_head_says_whether_it_is_calibrated_and_may_know_no_outliers(
    tmp_path: Path, is_calibrated: bool
) -> None:
    weight, bias = np.ones((2, 4), np.float32), np.zeros(2, np.float32)
    heads.save(Head(weight, bias, ("a", "b"), is_calibrated=is_calibrated), tmp_path / "head")
    loaded = heads.load(tmp_path / "head")
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
        heads.load(path)
