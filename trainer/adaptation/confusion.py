"""A linear head that fits the source and does not mix classes up on the target."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from trainer.adaptation.alignment import Head
from trainer.arrays import Doubles, Ints

L2 = 1e-5
"""Of rows with a mean square norm of 1; the results hardly depend on it."""
TEMPERATURE = 2.5
"""The one of the paper's experiments."""
_TINY = 1e-12
_CLASSIFY = {"maxiter": 100, "ftol": 1e-7, "gtol": 1e-5}
_UNCONFUSE = {"maxiter": 150, "ftol": 1e-6, "gtol": 1e-5}


def class_confusion(logits: Doubles, temperature: float = TEMPERATURE) -> tuple[float, Doubles]:
    """Computes the minimum class confusion loss of logits [m, classes], and its gradient.

    Jin, Wang, Long and Wang 2020, Minimum Class Confusion for Versatile Domain
    Adaptation: with softened probabilities Y and weights w of mean 1, larger for
    images of low entropy, it is the mean over classes of what lies off the
    diagonal in the row-normalised Y' diag(w) Y. As in the paper, the gradient
    takes the weights as given.
    """
    m, k = logits.shape
    p = softmax(logits / temperature, axis=1)
    certainty = 1 + np.exp((p * np.log(p + _TINY)).sum(axis=1))
    weighted = p * (m * certainty / certainty.sum())[:, None]
    confusion = weighted.T @ p
    mass = confusion.sum(axis=1, keepdims=True)
    loss = 1 - float((np.diag(confusion) / mass[:, 0]).mean())
    # Of each entry: 1 / mass off the diagonal, less what the entry adds to its row's mass.
    off = 1 - np.eye(k)
    slope = (off - (off * confusion).sum(axis=1, keepdims=True) / mass) / mass / k
    by_p = weighted @ (slope + slope.T)
    gradient = p * (by_p - (by_p * p).sum(axis=1, keepdims=True)) / temperature
    return loss, gradient


def classify(
    rows: Doubles, targets: Ints, weights: Doubles, classes: int, start: Head | None = None
) -> Head:
    """Minimises `sum of weight * cross-entropy + l2 / 2 |weight|^2`, weights [n] of sum 1."""
    return _minimise(rows, targets, weights, classes, start, None)


def unconfuse(
    rows: Doubles, targets: Ints, weights: Doubles, classes: int, target: Doubles, start: Head
) -> Head:
    """Minimises the same plus the target's class confusion, from `start`, whose bias stays.

    With a free bias the confusion is least where large classes swallow small ones:
    a bias costs no penalty and moves every image at once. Held, the mean of the
    standardised target stays where the source's is.
    """
    return _minimise(rows, targets, weights, classes, start, target)


def _minimise(
    rows: Doubles,
    targets: Ints,
    weights: Doubles,
    classes: int,
    start: Head | None,
    target: Doubles | None,
) -> Head:
    n, d = rows.shape
    one_hot = np.zeros((n, classes))
    one_hot[np.arange(n), targets] = 1

    def objective(flat: Doubles) -> tuple[float, Doubles]:
        w = flat.reshape(classes, d + 1)
        logits = rows @ w[:, :-1].T + w[:, -1]
        normaliser = logsumexp(logits, axis=1, keepdims=True)
        loss = float(weights @ (normaliser[:, 0] - (logits * one_hot).sum(axis=1)))
        residual = (np.exp(logits - normaliser) - one_hot) * weights[:, None]
        gradient = np.empty_like(w)
        gradient[:, :-1] = residual.T @ rows + L2 * w[:, :-1]
        gradient[:, -1] = residual.sum(axis=0)
        if target is not None:
            confusion, by_logits = class_confusion(target @ w[:, :-1].T + w[:, -1])
            loss += confusion
            gradient[:, :-1] += by_logits.T @ target
            gradient[:, -1] = 0
        return loss + L2 / 2 * float((w[:, :-1] ** 2).sum()), gradient.ravel()

    first = np.zeros((classes, d + 1))
    if start is not None:
        first[:, :-1], first[:, -1] = start.weight, start.bias
    options = _CLASSIFY if target is None else _UNCONFUSE
    found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    solution: Doubles = found.x.reshape(classes, d + 1)
    return Head(solution[:, :-1], solution[:, -1])
