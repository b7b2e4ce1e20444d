"""CDAN+E against its formula, written out in float64 with loops."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trainer.adaptation import losses

Doubles = NDArray[np.float64]


def drawn(n: int, d: int, seed: int, shift: float = 0.0) -> Doubles:
    return np.random.default_rng(seed).normal(shift, 1.5, (n, d))


def tensor(values: Doubles) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def softmax(logits: Doubles) -> Doubles:
    powers: Doubles = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def entropy(p: Doubles) -> Doubles:
    found: Doubles = -(p * np.log(p)).sum(axis=1)
    return found


def test_the_reversal_passes_values_on_and_turns_gradients_round() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = losses.reversed_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([3.0, 4.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [-0.75, -1.0]


def test_the_adversary_comes_in_by_the_papers_schedule() -> None:
    assert losses.adversarial_weight(0.0) == 0.0
    for done in (0.1, 0.5, 1.0):
        assert losses.adversarial_weight(done) == pytest.approx(2 / (1 + np.exp(-10 * done)) - 1)


def test_cdan_tells_domains_apart_by_features_times_classes_weighed_by_sureness() -> None:
    own, other = drawn(5, 4, 0), drawn(3, 4, 1)
    own_logits, other_logits = drawn(5, 2, 2), drawn(3, 2, 3)
    weight = drawn(1, 8, 4)[0]

    def terms(features: Doubles, logits: Doubles, sign: int) -> float:
        p = softmax(logits)
        sure = 1 + np.exp(-entropy(p))
        sure /= sure.sum()
        z = [np.outer(p[i], features[i]).ravel() @ weight for i in range(len(p))]
        return float(sum(s * np.log(1 + np.exp(-sign * v)) for s, v in zip(sure, z, strict=True)))

    expected = (terms(own, own_logits, 1) + terms(other, other_logits, -1)) / 2
    multilinear = losses.Multilinear(4, 2)
    assert (multilinear.dim, multilinear.is_random) == (8, False)
    asked = tensor(own_logits).requires_grad_()
    features = tensor(own).requires_grad_()
    loss = losses.cdan(
        lambda x: x @ tensor(weight),  # type: ignore[arg-type]
        multilinear,
        (features, asked),
        (tensor(other), tensor(other_logits)),
        1.0,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert asked.grad is None
    assert features.grad is not None


def test_a_wide_product_is_taken_at_random_with_the_same_inner_products() -> None:
    torch.manual_seed(0)
    multilinear = losses.Multilinear(600, 10)
    assert (multilinear.dim, multilinear.is_random) == (losses.MAX_MULTILINEAR, True)
    f, p = tensor(drawn(2, 600, 0, 1.0)), tensor(softmax(drawn(2, 10, 1)))
    a, b = multilinear(f, p)
    exact = float((f[0] @ f[1]) * (p[0] @ p[1]))
    norm = float(f[0].norm() * f[1].norm() * p[0].norm() * p[1].norm())
    assert float(a @ b) == pytest.approx(exact, abs=0.1 * norm)
