"""How far apart two domains' features lie, as the backbone gives them: three measures.

After an alignment they say nothing: it makes means and covariances equal by
construction, which is what they measure. Of more images than `SAMPLE` in a domain, so
many are drawn with the seed.
"""

import numpy as np

from trainer.arrays import Doubles, Floats

SAMPLE = 1000
"""Images of a domain at most: the cost grows with their square and cube."""
FOLDS = 5
_RELATIVE_L2 = 1e-2
_TINY = 1e-12


def measure(source: Floats, target: Floats, seed: int) -> dict[str, float]:
    """Takes all three, of features [n, d] and [m, d] with two images or more each.

    Each is larger the further apart the domains are.

    Features are divided by one number, so that their mean square norm about the
    domains' common mean is 1: distances of different backbones then compare.
    """
    rng = np.random.default_rng([seed % 2**64, 0x6A9])
    ours, theirs = _drawn(source, rng), _drawn(target, rng)
    centre = (ours.mean(axis=0) + theirs.mean(axis=0)) / 2
    ours, theirs = ours - centre, theirs - centre
    size = float((ours**2).sum(axis=1).mean() + (theirs**2).sum(axis=1).mean()) / 2
    scale = np.sqrt(size) or 1.0
    ours, theirs = ours / scale, theirs / scale
    return {
        "proxy_a_distance": proxy_a_distance(ours, theirs, seed),
        "mmd": mmd(ours, theirs),
        "frechet_distance": frechet_distance(ours, theirs),
    }


def proxy_a_distance(source: Doubles, target: Doubles, seed: int) -> float:
    """Returns 2 (1 - 2 e), from 0 to 2, e being how often a domain classifier errs.

    Ben-David, Blitzer, Crammer and Pereira 2007, Analysis of Representations for
    Domain Adaptation. The classifier is ridge regression to -1 and 1 in which both
    domains weigh the same; e is the mean of both domains' errors in a 5-fold
    cross-validation. Below 0, which chance gives, it is 0.
    """
    rows = np.concatenate([source, target])
    sign = np.repeat([-1.0, 1.0], [len(source), len(target)])
    weights = np.where(sign < 0, 0.5 / len(source), 0.5 / len(target))
    rng = np.random.default_rng([seed % 2**64, 0xAD])
    # Each domain on its own, so that every fold has images of both.
    order = np.concatenate([rng.permutation(len(source)), rng.permutation(len(target))])
    fold = order % min(FOLDS, len(source), len(target))
    products = rows @ rows.T
    scores = np.empty(len(rows))
    for f in np.unique(fold):
        held = fold == f
        w = weights[~held] / weights[~held].sum()
        inside, across = products[np.ix_(~held, ~held)], products[np.ix_(held, ~held)]
        # About the training rows' weighted mean, through products alone.
        to_mean = inside @ w
        of_mean = float(w @ to_mean)
        centred = inside - to_mean[:, None] - to_mean + of_mean
        root = np.sqrt(w)
        matrix = root[:, None] * centred * root
        matrix[np.diag_indices_from(matrix)] += _RELATIVE_L2 * np.trace(matrix) / len(w) + _TINY
        answer = root * np.linalg.solve(matrix, root * (sign[~held] - w @ sign[~held]))
        beside = across - (across @ w)[:, None] - to_mean + of_mean
        scores[held] = beside @ answer + w @ sign[~held]
    wrong = np.where(sign < 0, scores >= 0, scores < 0)
    error = (wrong[sign < 0].mean() + wrong[sign > 0].mean()) / 2
    return max(0.0, float(2 * (1 - 2 * error)))


def mmd(source: Doubles, target: Doubles) -> float:
    """Returns the squared maximum mean discrepancy, unbiased, so it may be just below 0.

    Gretton et al. 2012, A Kernel Two-Sample Test, with k(x, y) =
    exp(-|x - y|^2 / (2 s^2)), s being the median distance among all images.
    """
    n, m = len(source), len(target)
    rows = np.concatenate([source, target])
    norms = (rows**2).sum(axis=1)
    squares = np.maximum(norms[:, None] + norms - 2 * rows @ rows.T, 0)
    median = float(np.median(squares[np.triu_indices(n + m, 1)]))
    kernel = np.exp(-squares / (2 * median or 1.0))
    np.fill_diagonal(kernel, 0)
    inside = kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1))
    return float(inside - 2 * kernel[:n, n:].mean())


def frechet_distance(source: Doubles, target: Doubles) -> float:
    """Returns |mean - mean'|^2 + trace(C + C' - 2 (C C')^(1/2)), of normal distributions.

    Dowson and Landau 1982, The Fréchet Distance between Multivariate Normal
    Distributions; squared, as Heusel et al. 2017, GANs Trained by a Two Time-Scale
    Update Rule, use it. With centred rows A and B, C = A'A / (n - 1) and C' =
    B'B / (m - 1), the trace of the root is the sum of the singular values of A B',
    over the root of (n - 1) (m - 1): exact also where features outnumber images,
    and no root of a singular matrix is taken. It grows as images get fewer, so
    only distances of about the same number of images compare.
    """
    ours, theirs = source.mean(axis=0), target.mean(axis=0)
    a = (source - ours) / np.sqrt(len(source) - 1)
    b = (target - theirs) / np.sqrt(len(target) - 1)
    root = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    spread = float((a**2).sum() + (b**2).sum())
    return max(0.0, float(((ours - theirs) ** 2).sum()) + spread - 2 * root)


def _drawn(rows: Floats, rng: np.random.Generator) -> Doubles:
    if len(rows) > SAMPLE:
        rows = rows[np.sort(rng.choice(len(rows), SAMPLE, replace=False))]
    return rows.astype(np.float64)
