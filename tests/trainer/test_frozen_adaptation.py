"""Adaptation on frozen features: the formulas, the way back to raw features, the choice."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import fractional_matrix_power
from sklearn.covariance import ledoit_wolf

from service.engine.head import Head as SourceHead
from trainer import linear
from trainer.adaptation import brakes, criterion, frozen
from trainer.adaptation.alignment import Covariance, Head, correlation_alignment, standardise
from trainer.adaptation.confusion import class_confusion, classify, unconfuse

Domain = tuple[np.ndarray, np.ndarray]


def domains(
    per_class: int = 30,
    target_counts: tuple[int, ...] = (30, 30, 30, 30),
    d: int = 60,
    gap: float = 1.0,
    seed: int = 0,
) -> tuple[Domain, Domain]:
    """Four classes; the target's features are scaled, each on its own, and moved.

    They move towards one class, so that a source-only head answers it too often.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 1, (4, d))
    scale = np.exp(gap * rng.normal(0, 0.5, d))
    shift = gap * (centres[0] - centres.mean(axis=0) + rng.normal(0, 1, d))

    def draw(counts: tuple[int, ...]) -> Domain:
        targets = np.repeat(np.arange(4), counts)
        return centres[targets] + rng.normal(0, 1.6, (len(targets), d)), targets

    (source, ours), (target, theirs) = draw((per_class,) * 4), draw(target_counts)
    return (source.astype(np.float32), ours), ((target * scale + shift).astype(np.float32), theirs)


def fitted(source: Domain) -> SourceHead:
    found = linear.fit(*source, 4, None, 0, threads=1)
    weight, bias = found.weight.astype(np.float32), found.bias.astype(np.float32)
    return SourceHead(weight, bias, ("a", "b", "c", "d"), found.temperature)


def run(
    source: Domain, target: Domain, technique: str, *, always_adapt: bool = False
) -> frozen.Adapted:
    return frozen.adapt(*source, target[0], fitted(source), technique, 0, always_adapt=always_adapt)


def accuracy(head: SourceHead | frozen.Adapted, domain: Domain) -> float:
    return float((head.logits(domain[0]).argmax(axis=1) == domain[1]).mean())


def test_class_confusion_is_the_papers_formula() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (12, 4))
    p = np.exp(logits / 2.5)
    p /= p.sum(axis=1, keepdims=True)
    entropies = [-sum(x * np.log(x) for x in row) for row in p]
    raw = [1 + np.exp(-h) for h in entropies]
    weights = [12 * x / sum(raw) for x in raw]
    matrix = [
        [sum(weights[i] * p[i, a] * p[i, b] for i in range(12)) for b in range(4)] for a in range(4)
    ]
    loss = sum(matrix[a][b] / sum(matrix[a]) for a in range(4) for b in range(4) if a != b) / 4
    assert class_confusion(logits)[0] == pytest.approx(loss, abs=1e-10)


def test_the_gradient_of_class_confusion_is_that_of_finite_differences() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (8, 3))
    p = np.exp(logits / 2.5)
    p /= p.sum(axis=1, keepdims=True)
    certainty = 1 + np.exp((p * np.log(p)).sum(axis=1))
    weights = len(p) * certainty / certainty.sum()

    def loss(z: np.ndarray) -> float:  # with the weights given, as the paper has it
        q = np.exp(z / 2.5)
        q /= q.sum(axis=1, keepdims=True)
        matrix = q.T @ (weights[:, None] * q)
        return float(1 - (np.diag(matrix) / matrix.sum(axis=1)).mean())

    slow = np.empty_like(logits)
    for place in np.ndindex(*logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-5
        slow[place] = (loss(logits + step) - loss(logits - step)) / 2e-5
    np.testing.assert_allclose(class_confusion(logits)[1], slow, atol=1e-9)


def test_unconfused_heads_keep_their_bias_and_confuse_less() -> None:
    (source, targets), (target, _) = domains()
    weights = np.full(len(targets), 1 / len(targets))
    space = standardise(source.astype(np.float64), target.astype(np.float64), weights)
    plain = classify(space.source, targets, weights, 4)
    head = unconfuse(space.source, targets, weights, 4, space.target, plain)
    np.testing.assert_array_equal(head.bias, plain.bias)
    before = class_confusion(plain.logits(space.target))[0]
    assert class_confusion(head.logits(space.target))[0] < before / 2


# More images than features, and fewer.
@pytest.mark.parametrize(("n", "d"), [(80, 10), (15, 40)])
def test_covariances_are_shrunk_as_by_ledoit_and_wolf(n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 1, (n, d)) * np.linspace(0.5, 3, d) + 4
    expected, shrinkage = ledoit_wolf(rows)
    mine = Covariance(rows)
    assert mine.shrinkage == pytest.approx(shrinkage, rel=1e-9)
    np.testing.assert_allclose(mine.power(np.eye(d), 1.0), expected, atol=1e-9)
    root = fractional_matrix_power(expected, -0.5)
    np.testing.assert_allclose(mine.power(np.eye(d), -0.5), root, atol=1e-8)


def test_features_that_do_not_vary_are_aligned_without_a_warning() -> None:
    rows = np.ones((5, 8))
    for space in (
        correlation_alignment(rows, rows),
        standardise(rows, rows, np.full(5, 0.2)),
    ):
        assert np.isfinite(space.source).all() and np.isfinite(space.target).all()


def test_coral_gives_the_source_the_targets_covariance() -> None:
    (source, _), (target, _) = domains(per_class=200, target_counts=(200,) * 4, d=12)
    a, b = source.astype(np.float64), target.astype(np.float64)

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        """CORAL's: of the covariances, by Frobenius, over 4 d^2."""
        return float(((np.cov(x.T) - np.cov(y.T)) ** 2).sum() / (4 * x.shape[1] ** 2))

    space = correlation_alignment(a, b)
    scale = np.sqrt(np.trace(np.cov(b.T)))
    assert distance(space.source * scale, space.target * scale) < distance(a, b) / 100
    c, c2 = ledoit_wolf(a)[0], ledoit_wolf(b)[0]
    whitened = (a - a.mean(0)) @ fractional_matrix_power(c, -0.5)
    slow = whitened @ fractional_matrix_power(c2, 0.5)
    np.testing.assert_allclose(
        space.source / np.linalg.norm(space.source), slow / np.linalg.norm(slow), atol=1e-8
    )


@pytest.mark.parametrize("align", ["standardise", "coral"])
def test_heads_for_raw_features_answer_as_in_the_space(align: str) -> None:
    (source, targets), (target, _) = domains(per_class=8, target_counts=(9, 5, 7, 3))
    a, b = source.astype(np.float64), target.astype(np.float64)
    rng = np.random.default_rng(0)
    weights = rng.random(len(targets))
    space = (
        standardise(a, b, weights / weights.sum())
        if align == "standardise"
        else correlation_alignment(a, b)
    )
    head = Head(rng.normal(0, 1, (4, 60)), rng.normal(0, 1, 4))
    np.testing.assert_allclose(space.unaligned(head).logits(b), head.logits(space.target))


def test_standardising_with_weights_takes_the_weighted_moments() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (6, 2))
    thrice = np.concatenate([rows, np.repeat(rows[:1], 2, axis=0)])
    weights = np.array([3, 1, 1, 1, 1, 1]) / 8
    weighted = standardise(rows, rows, weights).source
    np.testing.assert_allclose(weighted, standardise(thrice, rows, np.full(8, 1 / 8)).source[:6])


def test_the_most_certain_answers_are_taken_from_each_class_alike() -> None:
    logits = np.array([[5.0, 0], [3, 0], [1, 0], [2, 0], [0, 0.2], [0, 0.1]])
    labels, kept = frozen.most_certain(logits, 0.5)
    assert labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert sorted(kept) == [0, 1, 4]


def test_the_criterion_is_kappa_of_images_and_their_nearest_neighbours() -> None:
    rng = np.random.default_rng(0)
    rows, logits = rng.normal(0, 1, (40, 6)), rng.normal(0, 1, (40, 3))
    labels = logits.argmax(axis=1)
    u = (rows - rows.mean(0)) / rows.std(0)
    mine, theirs = [], []
    for i in range(40):
        cosines = [
            -2 if i == j else u[i] @ u[j] / np.linalg.norm(u[i]) / np.linalg.norm(u[j])
            for j in range(40)
        ]
        for j in np.argsort(cosines)[-5:]:
            mine.append(labels[i])
            theirs.append(labels[j])
    observed = np.mean(np.array(mine) == np.array(theirs))
    chance = sum(np.mean(np.array(mine) == c) * np.mean(np.array(theirs) == c) for c in range(3))
    kappa = (observed - chance) / (1 - chance)
    assert criterion.Neighbourhood(rows, 0).agreement(logits) == pytest.approx(kappa)


def test_one_class_for_all_images_is_no_better_than_chance() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (10, 3))
    assert criterion.Neighbourhood(rows, 0).agreement(np.tile([0.0, 1.0], (10, 1))) == 0


def test_of_many_images_the_criterion_looks_at_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (target, theirs) = domains(target_counts=(50, 50, 50, 50))
    whole = criterion.Neighbourhood(target, 0).agreement(np.eye(4)[theirs])
    monkeypatch.setattr(criterion, "SAMPLE", 120)
    sampled = criterion.Neighbourhood(target, 0).agreement(np.eye(4)[theirs])
    assert sampled != whole
    assert sampled == pytest.approx(whole, abs=0.15)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_auto_beats_source_only_where_features_are_shifted(seed: int) -> None:
    source, target = domains(seed=seed)
    adapted = run(source, target, "auto")
    assert accuracy(adapted, target) > accuracy(fitted(source), target) + 0.1
    assert adapted.has_adapted and not adapted.doubt
    assert adapted.chosen in adapted.candidates[1:]
    assert adapted.chosen.criterion > adapted.candidates[0].criterion + criterion.MARGIN


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("counts", [(30, 30, 30, 30), (60, 15, 4, 0)])
def test_without_a_gap_auto_is_not_worse(seed: int, counts: tuple[int, ...]) -> None:
    source, target = domains(gap=0, target_counts=counts, seed=seed)
    adapted = run(source, target, "auto")
    assert accuracy(adapted, target) > accuracy(fitted(source), target) - 0.02


def test_source_only_is_kept_where_adapting_does_not_look_better_unless_asked_otherwise() -> None:
    # No gap, but shares of classes that make standardising worse.
    source, target = domains(gap=0, target_counts=(80, 20, 6, 0))
    kept, before = run(source, target, "coral"), fitted(source)
    assert kept.doubt == "not_better" and not kept.has_adapted
    served = before.logits(target[0]) / before.temperature
    np.testing.assert_allclose(kept.logits(target[0]), served, atol=1e-5)
    forced = run(source, target, "coral", always_adapt=True)
    assert forced.doubt == "not_better" and forced.chosen.technique == "coral"
    assert accuracy(forced, target) < accuracy(kept, target)


@pytest.mark.parametrize("only", [0, 1, 2, 3])
def test_source_only_is_kept_for_a_target_of_one_class(only: int) -> None:
    counts = tuple(60 if c == only else 0 for c in range(4))
    source, target = domains(target_counts=counts, gap=0.5, seed=only)
    kept = run(source, target, "auto")
    assert kept.doubt in ("one_class", "classes_unseen") and not kept.has_adapted
    assert kept.seen < brakes.LEAST_SEEN
    forced = run(source, target, "auto", always_adapt=True)
    assert forced.doubt == kept.doubt and forced.has_adapted


def test_each_brake_holds_on_its_own() -> None:
    mixed, alike = np.arange(20) % 4, np.repeat([0, 1], [17, 3])
    assert brakes.doubt(mixed, 0.5, 0.5, 0.6) == ""
    assert brakes.doubt(alike, 0.5, 0.5, 0.6) == "one_class"
    assert brakes.doubt(mixed, 0.1, 0.5, 0.6) == "classes_unseen"
    assert brakes.doubt(mixed, 0.5, 0.5, 0.52) == "not_better"
    assert brakes.doubt(mixed, 0.5, 0.1, 0.3) == "neighbours_disagree"


def test_what_labels_explain_is_the_correlation_ratio_less_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 30)
    rows = rng.normal(0, [1, 5], (30, 2)) + labels[:, None]
    ratios = []
    for x in rows.T:
        inside = sum(((x[labels == c] - x[labels == c].mean()) ** 2).sum() for c in range(3))
        ratios.append(1 - inside / 27 / (((x - x.mean()) ** 2).sum() / 29))
    assert brakes.explained(rows, labels) == pytest.approx(np.mean(ratios))
    drawn = [brakes.explained(rng.normal(0, 1, (30, 50)), labels) for _ in range(50)]
    assert np.mean(drawn) < 0.01
    assert brakes.explained(rows, np.zeros(30, np.int64)) == 0


def test_answers_are_to_images_that_were_not_adapted_to() -> None:
    source, (target, classes) = domains(per_class=15, target_counts=(15,) * 4)
    groups = np.arange(60) // 2
    head = fitted(source)

    def answered(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return frozen.cross_adapted(
            *source, rows, groups, head, "auto", 0, always_adapt=False, threads=2
        )

    logits, fold = answered(target)
    assert sorted(set(fold)) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(fold[::2], fold[1::2])
    assert (logits.argmax(axis=1) == classes).mean() > accuracy(head, (target, classes)) + 0.1
    # Images of a fold change what is answered to the others, and nothing within the fold.
    changed, held = target.copy(), fold == 2
    changed[np.flatnonzero(held)[:4]] += 3
    other, _ = answered(changed)
    rest = np.flatnonzero(held)[4:]
    np.testing.assert_array_equal(other[rest], logits[rest])
    assert not np.allclose(other[~held], logits[~held])


def test_one_group_alone_cannot_be_answered_without_having_been_adapted_to() -> None:
    source, (target, _) = domains(per_class=5, target_counts=(3, 3, 0, 0))
    logits, fold = frozen.cross_adapted(
        *source, target, np.zeros(6, np.int64), fitted(source), "auto", 0,
        always_adapt=False, threads=1,
    )  # fmt: skip
    assert np.isnan(logits).all() and (fold == -1).all()


@pytest.mark.parametrize(
    ("technique", "tried"),
    [
        ("coral", ["source_only", "coral"]),
        ("mcc", ["source_only", "mcc", "mcc"]),
        ("pseudo_labels", ["source_only", "coral", "mcc", "mcc", "pseudo_labels"]),
        ("auto", ["source_only", "coral", "mcc", "mcc", "pseudo_labels"]),
    ],
)
def test_a_named_technique_is_the_one_used(technique: str, tried: list[str]) -> None:
    source, target = domains(per_class=10, target_counts=(10,) * 4)
    adapted = run(source, target, technique, always_adapt=True)
    assert [c.technique for c in adapted.candidates] == tried
    assert adapted.chosen.technique == technique or technique == "auto"
    assert adapted.has_adapted


def test_answers_are_about_as_confident_as_they_are_right() -> None:
    source, target = domains(per_class=60, target_counts=(60,) * 4)
    adapted = run(source, target, "auto")
    logits = adapted.logits(target[0])
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = float((p.max(axis=1) / p.sum(axis=1)).mean())
    assert confidence == pytest.approx(accuracy(adapted, target), abs=0.15)


def test_the_same_seed_gives_the_same_head_and_progress_only_grows() -> None:
    source, target = domains(per_class=10, target_counts=(10,) * 4)
    seen: list[float] = []
    head = fitted(source)
    one = frozen.adapt(
        *source, target[0], head, "auto", 3, always_adapt=False, on_progress=seen.append
    )
    other = frozen.adapt(*source, target[0], head, "auto", 3, always_adapt=False)
    np.testing.assert_array_equal(one.weight, other.weight)
    assert all(a <= b for a, b in pairwise(seen)) and seen[-1] == 1


@pytest.mark.parametrize("technique", ["auto", "coral"])
def test_a_handful_of_images_is_enough(technique: str) -> None:
    source, target = domains(per_class=2, target_counts=(1, 1, 0, 0))
    adapted = run(source, target, technique, always_adapt=True)
    assert np.isfinite(adapted.weight).all() and np.isfinite(adapted.temperature)
