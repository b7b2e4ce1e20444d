"""The head's fit minimises what the contract says it does."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from trainer import linear, logistic, penalty
from trainer.folds import deal


def problem(n: int, d: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = np.arange(n) % classes
    centres = rng.normal(0, 1, (classes, d))
    return (centres[targets] + rng.normal(0, 2, (n, d)) + 5).astype(np.float32), targets


def probabilities(fitted: linear.Fitted, features: np.ndarray) -> np.ndarray:
    logits = (features @ fitted.weight.T + fitted.bias) / fitted.temperature
    p: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p


# More images than features, and fewer: the second is solved in a rotated space.
@pytest.mark.parametrize(("n", "d"), [(120, 10), (60, 200)])
def test_the_fit_is_the_penalised_minimum(n: int, d: int) -> None:
    features, targets = problem(n, d)
    l2 = 0.05
    fitted = linear.fit(features, targets, 3, l2, seed=0)
    # scikit-learn minimises C * sum of losses + |w|^2 / 2.
    reference = LogisticRegression(C=1 / (l2 * n), tol=1e-10, max_iter=10_000)
    reference.fit(features.astype(np.float64), targets)
    mine = features @ fitted.weight.T + fitted.bias
    theirs = reference.decision_function(features.astype(np.float64))
    difference = (mine - mine.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))
    assert np.abs(difference).max() < 1e-2
    assert fitted.l2 == pytest.approx(l2)


def test_cross_validation_prefers_a_weaker_penalty_where_few_features_matter() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(300) % 3
    # Loud features that tell nothing: the nearest class mean hears little else.
    loud = 10 * rng.normal(0, 1, (300, 50))
    quiet = np.hstack([np.eye(3)[targets] + rng.normal(0, 0.2, (300, 3)), loud])
    fitted = linear.fit(quiet.astype(np.float32), targets, 3, None, seed=0)
    assert fitted.l2 / np.square(quiet).sum(axis=1).mean() < 0.01
    assert fitted.out_of_fold is not None
    assert (fitted.out_of_fold.argmax(axis=1) == targets).mean() > 0.9


def test_the_temperature_cools_what_is_overconfident() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(90) % 3
    features = rng.normal(0, 1, (90, 100)).astype(np.float32)
    features[:, :3] += np.eye(3)[targets]
    overfitted = linear.fit(features, targets, 3, 1e-6, seed=0)
    assert overfitted.temperature > 1.5
    assert overfitted.cross_validated_loss is not None
    # No worse than saying nothing, which a tenth of the temperature would be.
    assert overfitted.cross_validated_loss < np.log(3) + 0.01


def test_folds_that_are_all_right_do_not_ask_for_endless_confidence() -> None:
    targets = np.arange(30) % 3
    features = np.eye(3, dtype=np.float32)[targets] * 10
    fitted = linear.fit(features, targets, 3, None, seed=0)
    logits = (features @ fitted.weight.T + fitted.bias) / fitted.temperature
    confidence = np.exp(logits).max(1) / np.exp(logits).sum(1)
    assert 0.9 < confidence.max() < 0.99


def test_a_class_of_one_image_is_learned_and_not_measured() -> None:
    features, _ = problem(13, 5)
    targets = np.array([0] * 6 + [1] * 6 + [2])
    fitted = linear.fit(features, targets, 3, None, seed=0)
    assert fitted.out_of_fold is not None
    assert np.isnan(fitted.out_of_fold[12]).all()
    assert fitted.out_of_fold[:12].sum(axis=1) == pytest.approx(1)


def test_classes_of_one_image_go_unmeasured_and_are_classified_by_the_nearest() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (8, 100))
    fitted = linear.fit(centres.astype(np.float32), np.arange(8), 8, None, seed=0)
    assert fitted.out_of_fold is None
    assert fitted.cross_validated_loss is None
    asked = np.repeat(np.arange(8), 50)
    p = probabilities(fitted, centres[asked] + rng.normal(0, 1, (400, 100)))
    assert (p.argmax(axis=1) == asked).mean() > 0.95
    assert 0.3 < p.max(axis=1).mean() < 0.95


def test_two_images_a_class_are_each_answered_by_the_other() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(40) % 20
    centres = rng.normal(0, 1, (20, 100))
    features = (centres[targets] + rng.normal(0, 0.7, (40, 100))).astype(np.float32)
    fitted = linear.fit(features, targets, 20, None, seed=0)
    assert fitted.out_of_fold is not None
    assert (fitted.out_of_fold.argmax(axis=1) == targets).mean() > 0.9
    asked = np.repeat(np.arange(20), 20)
    p = probabilities(fitted, centres[asked] + rng.normal(0, 0.7, (400, 100)))
    right = (p.argmax(axis=1) == asked).mean()
    assert right > 0.95
    assert p.max(axis=1).mean() == pytest.approx(right, abs=0.25)


def test_many_classes_get_probabilities_that_are_right() -> None:
    rng = np.random.default_rng(0)
    classes = 250
    centres = rng.normal(0, 1, (classes, 64))
    targets = np.repeat(np.arange(classes), 4)
    # A fifth of the variance lies between the classes.
    features = (centres[targets] + rng.normal(0, 2, (len(targets), 64))).astype(np.float32)
    fitted = linear.fit(features, targets, classes, None, seed=0)
    asked = np.repeat(np.arange(classes), 4)
    p = probabilities(fitted, centres[asked] + rng.normal(0, 2, (len(asked), 64)))
    right = (p.argmax(axis=1) == asked).mean()
    assert right > 0.2
    assert p.max(axis=1).mean() == pytest.approx(right, abs=0.06)
    assert -np.log(p[np.arange(len(asked)), asked]).mean() < np.log(classes) / 1.5
    assert fitted.cross_validated_loss is not None
    assert fitted.cross_validated_loss < np.log(classes) / 1.5


def test_labels_that_mean_nothing_are_answered_at_chance() -> None:
    rng = np.random.default_rng(0)
    losses, right = [], []
    for seed in range(20):
        targets = rng.permutation(np.arange(40) % 2)
        features = rng.normal(0, 1, (40, 10)).astype(np.float32)
        fitted = linear.fit(features, targets, 2, None, seed=seed)
        assert fitted.out_of_fold is not None
        assert fitted.cross_validated_loss is not None
        losses.append(fitted.cross_validated_loss)
        right.append((fitted.out_of_fold.argmax(axis=1) == targets).mean())
    # 0.011 above; by a penalty and a temperature that the same answers chose, 0.001.
    assert np.mean(losses) > np.log(2) + 0.004
    assert np.mean(right) == pytest.approx(1 / 2, abs=0.05)


def test_images_of_a_group_never_answer_for_each_other() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 4)
    targets = rng.permutation(np.arange(30) % 2)[groups]
    # Copies within a group, and nothing that a class has in common.
    features = rng.normal(0, 1, (30, 200))[groups].astype(np.float32)
    alone = linear.fit(features, targets, 2, None, seed=0).out_of_fold
    grouped = linear.fit(features, targets, 2, None, seed=0, folds=deal(targets, groups))
    assert alone is not None
    assert grouped.out_of_fold is not None
    assert (alone.argmax(axis=1) == targets).mean() > 0.95
    assert (grouped.out_of_fold.argmax(axis=1) == targets).mean() < 0.75


def test_a_fold_that_leaves_a_class_nothing_is_refused() -> None:
    features, targets = problem(12, 5)
    with pytest.raises(ValueError, match="nothing is left to learn"):
        linear.fit(features, targets, 3, None, seed=0, folds=targets)


def test_every_image_is_answered_by_weights_that_did_not_see_it() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(60) % 2
    # More noise than images: whoever saw an image knows its class by heart.
    features = rng.normal(0, 1, (60, 400)).astype(np.float32)
    fitted = linear.fit(features, targets, 2, 1e-4, seed=0)
    seen = (features @ fitted.weight.T + fitted.bias).argmax(axis=1)
    assert (seen == targets).mean() == 1.0
    assert fitted.out_of_fold is not None
    assert (fitted.out_of_fold.argmax(axis=1) == targets).mean() < 0.75
    assert fitted.out_of_fold.sum(axis=1) == pytest.approx(1)
    loss = -np.log(fitted.out_of_fold[np.arange(60), targets]).mean()
    assert loss == pytest.approx(fitted.cross_validated_loss)


def test_many_images_are_ranked_by_a_part_and_all_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, targets = problem(400, 20)
    everything = linear.fit(features, targets, 3, None, seed=0)
    monkeypatch.setattr(penalty, "RANKED_IMAGES", 80)
    part = linear.fit(features, targets, 3, None, seed=0)
    assert part.out_of_fold is not None
    assert everything.out_of_fold is not None
    assert (part.out_of_fold > 0).all()
    right = (part.out_of_fold.argmax(axis=1) == targets).mean()
    assert right == pytest.approx(
        (everything.out_of_fold.argmax(axis=1) == targets).mean(), abs=0.02
    )


def test_folds_that_are_solved_together_answer_as_each_does_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, targets = problem(150, 40)
    # Few of a class, so that folds weigh classes otherwise.
    some = np.flatnonzero((targets < 2) | (np.arange(150) < 25))
    features, targets = features[some], targets[some]
    together = linear.fit(features, targets, 3, None, seed=0)
    monkeypatch.setattr(penalty, "_AT_ONCE", 1)
    alone = linear.fit(features, targets, 3, None, seed=0)
    assert together.l2 == alone.l2
    assert together.out_of_fold is not None
    assert alone.out_of_fold is not None
    np.testing.assert_allclose(together.out_of_fold, alone.out_of_fold, atol=1e-3)
    np.testing.assert_allclose(together.weight, alone.weight, atol=1e-4)


def test_many_rows_on_many_cores_give_the_fit_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = problem(1300, 40)
    alone = linear.fit(features, targets, 3, 1e-3, seed=0, threads=1)
    monkeypatch.setattr(logistic, "_THREADED", 0)
    together = linear.fit(features, targets, 3, 1e-3, seed=0, threads=3)
    np.testing.assert_array_equal(alone.weight, together.weight)


def test_views_are_learned_from_but_never_measured_on() -> None:
    features, targets = problem(60, 30)
    plain = linear.fit(features, targets, 3, 0.05, seed=0)
    # Views that are the images themselves change nothing: neither the fit, nor what
    # held-out images say, as long as no image's view is learned while it is held out.
    doubled = linear.fit(features, targets, 3, 0.05, seed=0, views=features[None])
    np.testing.assert_allclose(doubled.weight, plain.weight, atol=1e-4)
    assert doubled.out_of_fold is not None
    assert plain.out_of_fold is not None
    np.testing.assert_allclose(doubled.out_of_fold, plain.out_of_fold, atol=0.02)
    moved = features[None] + np.random.default_rng(1).normal(0, 1, (2, 60, 30)).astype(np.float32)
    other = linear.fit(features, targets, 3, 0.05, seed=0, views=moved)
    assert other.out_of_fold is not None
    assert other.out_of_fold.shape == (60, 3)
    assert np.abs(other.weight - plain.weight).max() > 1e-3


def test_features_that_are_all_alike_leave_the_classes_shares() -> None:
    targets = np.array([0] * 8 + [1] * 4)
    fitted = linear.fit(np.full((12, 6), 3.0, np.float32), targets, 2, None, seed=0)
    odds = np.exp(fitted.bias - fitted.bias.max()) + 0 * fitted.weight.sum()
    assert odds[0] / odds.sum() == pytest.approx(2 / 3, abs=0.01)


def test_the_temperature_is_the_one_of_least_loss() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(300) % 3
    logits = (4 * (np.eye(3)[targets] + rng.normal(0, 1, (300, 3)))).astype(np.float32)
    found = penalty.temperature_of(logits, targets)

    def loss(temperature: float) -> float:
        z = logits / temperature
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        soft = np.full((300, 3), 1 / 301 / 3)
        soft[np.arange(300), targets] = 1 - 2 / 301 / 3
        return float(-(soft * log_p).sum(axis=1).mean())

    assert loss(found) <= min(loss(found * 1.05), loss(found / 1.05))
    # In whatever units the logits are.
    assert penalty.temperature_of(logits * 1000, targets) == pytest.approx(1000 * found, rel=1e-3)


def test_a_loud_feature_that_says_nothing_does_not_drown_the_others() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(120) % 3
    features = rng.normal(size=(120, 30))
    features[np.arange(120), targets] += 2
    features[:, 10:25] = 8 * rng.normal(size=(120, 15))
    fitted = linear.fit(features.astype(np.float32), targets, 3, None, seed=0)
    assert fitted.chosen == 1
    # As they were given.
    logits = features @ fitted.weight.T + fitted.bias
    assert (logits.argmax(axis=1) == targets).mean() > 0.8
    assert fitted.out_of_fold is not None
    told = -np.log(fitted.out_of_fold[np.arange(120), targets]).mean()
    assert fitted.cross_validated_loss == pytest.approx(told, rel=1e-5)
    plain = linear.fit(features.astype(np.float32), targets, 3, fitted.l2, seed=0)
    assert plain.chosen == 0


def test_quick_answers_are_near_those_of_the_fit_and_of_heads_that_did_not_see_the_image() -> None:
    features, targets = problem(200, 20)
    dealt = deal(targets, count=5)
    dealt[7] = -1
    quick = linear.cross_validated(features, targets, 3, dealt)
    fitted = linear.fit(features, targets, 3, None, seed=0, folds=dealt)
    assert fitted.out_of_fold is not None
    assert np.isnan(quick[7]).all()
    held = dealt >= 0
    assert quick[held].sum(axis=1) == pytest.approx(1, abs=1e-5)
    losses = [-float(np.log(p[held, targets[held]]).mean()) for p in (quick, fitted.out_of_fold)]
    assert losses[0] == pytest.approx(losses[1], abs=0.03)
    # Of features that say nothing it says so, though there are more of them than images.
    rng = np.random.default_rng(1)
    noise = linear.cross_validated(
        rng.normal(0, 1, (200, 300)).astype(np.float32), targets, 3, dealt
    )
    assert -float(np.log(noise[held, targets[held]]).mean()) > 1.05


def test_quick_answers_are_none_where_nothing_is_held_out() -> None:
    features, targets = problem(6, 4)
    nobody = linear.cross_validated(features, targets, 3, np.full(6, -1))
    assert nobody.shape == (6, 3)
    assert np.isnan(nobody).all()
