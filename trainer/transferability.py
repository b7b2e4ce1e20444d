"""How well features fit labels, without training anything: NumPy alone, float64.

A score compares backbones on the same images; higher is better. Knows no images and no backbones.
"""

import numpy as np
from threadpoolctl import threadpool_limits

from trainer.arrays import Doubles, Floats, Ints

_ROUNDS = 2000
_TOLERANCE = 1e-7
"""Of the log evidence of one image, nats, between two rounds."""
_LEAST_NOISE = 1e-10
"""Of the mean square norm: less noise than that is rounding."""


def log_me(features: Floats, targets: Ints) -> float:
    """The log evidence of a Bayesian linear model, nats an image, mean over classes.

    You et al. 2021, LogME: Practical Assessment of Pre-trained Models for
    Transfer Learning. Each class against the rest is regressed on 0 and 1, with
    weights of variance 1/alpha and noise of variance 1/beta, both at the evidence's
    maximum, found by the paper's fixed-point iteration, all classes at once.
    """
    n = len(features)
    if not np.isfinite(features).all():
        raise ValueError("the features are not finite")
    _, index = np.unique(targets, return_inverse=True)
    one_hot = np.eye(index.max() + 1)[index]
    squares, labels = _spectrum(features.astype(np.float64), one_hot)
    # Features' scale goes into alpha alone; 1 keeps the numbers in range.
    squares = squares / (squares.sum() / n or 1.0)
    ratio = np.ones((len(labels), 1))  # alpha / beta
    before = np.full(len(labels), -np.inf)
    for _ in range(_ROUNDS):
        shares = squares / (squares + ratio)
        gamma = shares.sum(axis=1)
        weight = (shares * labels / (squares + ratio)).sum(axis=1)
        residual = ((1 - shares) ** 2 * labels).sum(axis=1)
        found = gamma * residual / np.maximum((n - gamma) * weight, np.finfo(float).tiny)
        ratio = np.clip(found, _LEAST_NOISE, 1 / _LEAST_NOISE)[:, None]
        evidence = _evidence(squares, labels, ratio)
        if np.abs(evidence - before).max() < _TOLERANCE:
            break
        before = evidence
    return float(evidence.mean())


def spread(targets: Ints, seed: int) -> Ints:
    """An order of the images, any beginning of which is a stratified sample.

    Two images of every class come first, then all classes in their shares.
    """
    rng = np.random.default_rng([seed % 2**64, 0x57A7])
    order = rng.permutation(len(targets))
    labels = targets[order]
    by_label = np.argsort(labels, kind="stable")
    _, begins, counts = np.unique(labels[by_label], return_index=True, return_counts=True)
    place = np.empty(len(targets))
    place[by_label] = np.arange(len(targets)) - np.repeat(begins, counts)
    size = np.empty(len(targets))
    size[by_label] = np.repeat(counts, counts)
    # The part of its class that came before an image; the first two of each at once.
    part = np.where(place < 2, -1.0, (place + 0.5) / size)
    return order[np.argsort(part, kind="stable")]


def _spectrum(x: Doubles, one_hot: Doubles) -> tuple[Doubles, Doubles]:
    """Of x x': its eigenvalues [n], none below 0, and how much of each class's labels lies along.

    The latter are squares [classes, n]. Where images outnumber features they are found by x' x,
    and what lies outside x is shared among the directions without a width, which are all alike.
    """
    n, d = x.shape
    # Small matrices: more threads would cost more than they bring.
    with threadpool_limits(1):
        squares, basis = np.linalg.eigh(x @ x.T if n <= d else x.T @ x)
    squares = np.maximum(squares, 0.0)
    if n <= d:
        return squares, (one_hot.T @ basis) ** 2
    has_width = squares > squares[-1] * n * np.finfo(float).eps
    squares = squares[has_width]
    along = (one_hot.T @ x @ basis[:, has_width]) ** 2 / squares
    outside = n - len(squares)
    left = np.maximum(one_hot.sum(axis=0) - along.sum(axis=1), 0.0) / outside
    labels = np.concatenate([along, np.repeat(left[:, None], outside, axis=1)], axis=1)
    return np.concatenate([squares, np.zeros(outside)]), labels


def _evidence(squares: Doubles, labels: Doubles, ratio: Doubles) -> Doubles:
    """Of each class, nats an image, at the best alpha for this alpha / beta."""
    # The labels' covariance is (x x' + ratio I) / alpha.
    total = squares + ratio
    alpha = 1 / (labels / total).mean(axis=1)
    evidence: Doubles = 0.5 * (np.log(alpha) - 1 - np.log(2 * np.pi) - np.log(total).mean(axis=1))
    return evidence
