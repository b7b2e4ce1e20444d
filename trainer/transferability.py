"""How well features fit labels, without training anything: NumPy alone, float64.

Scores compare backbones on the same images; higher is better. Each is computed
on at most `MOST` images, a stratified subsample drawn from a fixed seed, so
that 5000 images cost what 1000 do. Knows no images and no backbones.
"""

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST = 1000
"""Images that a score is computed on; more are subsampled."""
_SEED = 0x7A5
_ROUNDS = 2000
_TOLERANCE = 1e-7
"""Of the log evidence of one image, nats, between two rounds."""
_LEAST_NOISE = 1e-10
"""Of the mean square norm: less noise than that is rounding."""


def h_score(features: Floats, targets: Ints, *, shrinks: bool | None = None) -> float:
    """tr(cov(f)^-1 cov(E[f|y])): how far classes lie apart, measured by their spread.

    Bao et al. 2019, An Information-Theoretic Approach to Transferability in Task
    Transfer Learning. Between 0 and classes - 1. With `shrinks` the covariance is
    Ledoit and Wolf's (2004) and the class means shrink with it: Ibrahim et al.
    2021, Newer is not always better. None shrinks where features outnumber
    images, where the plain score is classes - 1 whatever the features are;
    scores of the two kinds cannot be compared.
    """
    x, targets = _prepared(features, targets)
    n, d = x.shape
    x = x - x.mean(axis=0)
    shrinks = d > n if shrinks is None else shrinks
    # All happens in the images' space: the trace is the same, and n is bounded.
    basis, squares = _spectrum(x)
    variances = squares / n
    mean = variances.sum() / d
    shrinkage = _shrinkage(x, variances, mean) if shrinks else 0.0
    shrunk = (1 - shrinkage) * variances + shrinkage * mean
    one_hot, counts = _one_hot(targets)
    # Class means [classes, n] in the basis in which the covariance is diagonal.
    means = (one_hot.T @ basis) / counts[:, None] * np.sqrt(squares)
    between = (counts[:, None] / n * means**2).sum(axis=0)
    has_spread = variances > n * np.finfo(float).eps * variances.max()
    return float((1 - shrinkage) * (between[has_spread] / shrunk[has_spread]).sum())


def log_me(features: Floats, targets: Ints) -> float:
    """The log evidence of a Bayesian linear model, nats an image, mean over classes.

    You et al. 2021, LogME: Practical Assessment of Pre-trained Models for
    Transfer Learning. Each class against the rest is regressed on 0 and 1, with
    weights of variance 1/alpha and noise of variance 1/beta, both at the evidence's
    maximum, found by the paper's fixed-point iteration, all classes at once.
    """
    x, targets = _prepared(features, targets)
    n = len(x)
    basis, squares = _spectrum(x)
    # Features' scale goes into alpha alone; 1 keeps the numbers in range.
    squares = squares / (squares.sum() / n or 1.0)
    one_hot, _ = _one_hot(targets)
    labels = (one_hot.T @ basis) ** 2  # [classes, n]
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


def leep(source_probabilities: Floats, targets: Ints) -> float:
    """The mean log-likelihood of labels that are guessed from source classes, nats.

    Nguyen et al. 2020, LEEP: A New Measure to Evaluate Transferability of Learned
    Representations. From the pretrained head's probabilities [n, source classes];
    at most 0.
    """
    theta, targets = _prepared(source_probabilities, targets)
    one_hot, _ = _one_hot(targets)
    joint = one_hot.T @ theta / len(theta)  # [classes, source classes]
    marginal = joint.sum(axis=0)
    conditional = joint / np.where(marginal > 0, marginal, 1.0)
    likelihood = (theta @ conditional.T)[one_hot.astype(bool)]
    return float(np.log(likelihood).mean())


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


def _prepared(features: Floats, targets: Ints) -> tuple[Doubles, Ints]:
    if len(features) != len(targets) or not len(targets):
        raise ValueError(f"{len(features)} rows of features, {len(targets)} targets")
    places = spread(targets, _SEED)[:MOST]
    x = np.asarray(features, dtype=np.float64)[places]
    if not np.isfinite(x).all():
        raise ValueError("the features are not finite")
    return x, targets[places]


def _one_hot(targets: Ints) -> tuple[Doubles, Doubles]:
    """[n, classes that are there], and how many images each has."""
    _, index = np.unique(targets, return_inverse=True)
    one_hot = np.eye(index.max() + 1)[index]
    return one_hot, one_hot.sum(axis=0)


def _spectrum(x: Doubles) -> tuple[Doubles, Doubles]:
    """Of x x': its orthonormal basis, columns [n, n], and its eigenvalues [n], none below 0."""
    # Small matrices: more threads would cost more than they bring.
    with threadpool_limits(1):
        eigenvalues, basis = np.linalg.eigh(x @ x.T)
    return basis, np.maximum(eigenvalues, 0.0)


def _shrinkage(x: Doubles, variances: Doubles, mean: float) -> float:
    """Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance."""
    n, d = x.shape
    size = float((variances**2).sum())
    distance = size - d * mean**2
    spread = (float(((x * x).sum(axis=1) ** 2).sum()) / n - size) / n
    return 1.0 if distance <= 0 else float(np.clip(spread / distance, 0.0, 1.0))


def _evidence(squares: Doubles, labels: Doubles, ratio: Doubles) -> Doubles:
    """Of each class, nats an image, at the best alpha for this alpha / beta."""
    # The labels' covariance is (x x' + ratio I) / alpha.
    total = squares + ratio
    alpha = 1 / (labels / total).mean(axis=1)
    evidence: Doubles = 0.5 * (np.log(alpha) - 1 - np.log(2 * np.pi) - np.log(total).mean(axis=1))
    return evidence
