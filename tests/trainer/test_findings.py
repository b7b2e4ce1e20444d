"""What is worked out from features and probabilities, with everything and with little."""

import numpy as np

from trainer.reporting import findings
from trainer.reporting.comparisons import Measured


def _job(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(9).normal(size=(3, 50))
    train_targets, targets = np.arange(120) % 3, np.arange(60) % 3
    logits = np.eye(3)[targets] * 3 + rng.normal(0, 1, (60, 3))
    raised = np.exp(logits)
    return {
        "train_features": (middles[train_targets] + rng.normal(0, 1, (120, 50))).astype("f4"),
        "features": (middles[targets] + rng.normal(0, 1, (60, 50))).astype("f4"),
        "train_targets": train_targets,
        "targets": targets,
        "probabilities": (raised / raised.sum(axis=1, keepdims=True)).astype("f4"),
    }


def test_with_features_there_is_all_that_is_free() -> None:
    found = findings.examine(**_job(), classes=3)
    assert [c.name for c in found.comparisons] == ["nearest_class_mean", "majority_class"]
    assert found.curve is not None
    assert found.near_duplicates is not None
    assert found.suspects.train == []


def test_without_features_there_is_what_probabilities_tell() -> None:
    job = _job()
    del job["train_features"], job["features"]
    found = findings.examine(**job, classes=3)
    assert [c.name for c in found.comparisons] == ["majority_class"]
    assert found.curve is None
    assert found.near_duplicates is None


def test_baselines_come_first_and_a_measured_class_mean_is_kept() -> None:
    job = _job()
    given = Measured("nearest_class_mean", job["probabilities"], seconds=1.0)
    probe = Measured("linear_probe", job["probabilities"], seconds=2.0)
    found = findings.examine(**job, classes=3, baselines=[probe, given])
    assert [(c.name, c.seconds) for c in found.comparisons] == [
        ("linear_probe", 2.0),
        ("nearest_class_mean", 1.0),
        ("majority_class", None),
    ]


def test_out_of_fold_probabilities_tell_training_suspects() -> None:
    job = _job()
    out_of_fold = np.eye(3)[job["train_targets"]] * 0.9 + 0.1 / 3
    out_of_fold[5] = np.roll(out_of_fold[5], 1)
    found = findings.examine(**job, classes=3, out_of_fold=out_of_fold)
    assert [s.place for s in found.suspects.train] == [5]


def test_scores_are_binned_with_the_threshold_inside() -> None:
    scores = np.array([0.2, 0.4, 0.6, 1.4, np.nan])
    found = findings.out_of_distribution(scores, 1.0, "method", "target images", "others")
    assert (found.flagged, found.count) == (1, 5)
    assert (found.images, found.reference) == ("target images", "others")
    assert sum(b.count for b in found.bins) == 4
    assert found.bins[0].low <= 0.2
    assert found.bins[-1].high >= 1.4
    none = findings.out_of_distribution(np.array([0.1, 0.2]), 1.0, "method")
    assert none.bins[-1].high > 1.0


def test_no_label_is_doubted_where_the_model_was_adapted_or_knows_a_class_too_badly() -> None:
    job = _job()
    out_of_fold = np.eye(3)[job["train_targets"]] * 0.9 + 0.1 / 3
    out_of_fold[5] = np.roll(out_of_fold[5], 1)
    adapted = findings.examine(**job, classes=3, out_of_fold=out_of_fold, is_adapted=True)
    assert len(adapted.suspects) == 0
    # Image 5 is of class 2, of which hardly another one is recognised now.
    of_class = np.flatnonzero(job["train_targets"] == 2)
    out_of_fold[of_class[1:]] = np.roll(out_of_fold[of_class[1:]], 1, axis=1)
    found = findings.examine(**job, classes=3, out_of_fold=out_of_fold)
    assert found.suspects.unjudged == (2,)
    assert len(found.suspects) == 0


def test_the_curve_knows_what_serves() -> None:
    job = _job()
    right = (job["probabilities"].argmax(axis=1) == job["targets"]).mean()
    curve = findings.examine(**job, classes=3).curve
    assert curve is not None
    assert curve.served_accuracy == right
