"""What more images would bring: accuracy over the amount of data, and its extrapolation.

Heads are fitted to seeded, stratified, nested subsets of the training features
and measured on the validation images. Each is a ridge classifier, in closed
form, with a fixed relative penalty: it follows the served logistic regression
within the noise and costs a hundredth. NumPy alone. Knows no images, no files.
"""

import numpy as np
import numpy.typing as npt

from trainer.reporting.power_law import LearningCurve, extrapolate

Floats = npt.NDArray[np.floating]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

FRACTIONS = (0.1, 0.2, 0.4, 0.7, 1.0)
_RELATIVE_L2 = 0.01
_MAX_REPEATS, _MIN_REPEATS = 10, 2
_BUDGET = 2e10
"""Multiply-adds of all fits: half a second of one core."""


def measure(
    train: Floats,
    targets: Ints,
    validation: Floats,
    validation_targets: Ints,
    classes: int,
    seed: int,
    served_accuracy: float | None = None,
) -> LearningCurve:
    """Measures with features [n, d] and [m, d]; the last point is all n images.

    The points are the ridge classifier's; differences between them are what counts.
    `served_accuracy`, of what serves, is kept beside them.
    """
    x, asked = _rotated(train, validation)
    n, d = x.shape
    one_hot = np.eye(classes, dtype=np.float32)[targets]
    cost = d * d * (n + len(FRACTIONS) * d / 3)
    repeats = int(np.clip(_BUDGET / cost, _MIN_REPEATS, _MAX_REPEATS))
    right: dict[int, list[Flags]] = {}
    for repeat in range(repeats):
        rng = np.random.default_rng([seed % 2**64, 0xC0E5, repeat])
        steps = _nested(targets, rng)
        # All of the data is the same each time.
        used = steps if repeat == 0 else steps[:-1]
        for size, answered in _answers(x, one_hot, asked, used):
            right.setdefault(size, []).append(answered == validation_targets)
    return extrapolate(
        {size: np.stack(rows) for size, rows in right.items()}, seed, served_accuracy
    )


def _rotated(train: Floats, validation: Floats) -> tuple[Singles, Singles]:
    """Centred and scaled, and where images are fewer than features in the images' own space.

    Inner products, and so what a ridge classifier answers, stay what they are.
    """
    mean = train.mean(axis=0, dtype=np.float64)
    x = (train - mean).astype(np.float32)
    asked = (validation - mean).astype(np.float32)
    scale = np.float32(np.sqrt((x.astype(np.float64) ** 2).sum(axis=1).mean()) or 1.0)
    x /= scale
    asked /= scale
    n, d = x.shape
    if n >= d:
        return x, asked
    # In double, or rounding would cost the matrix its root.
    doubles = x.astype(np.float64)
    inner = doubles @ doubles.T
    # Centred rows depend on each other; far below the penalty.
    inner[np.diag_indices(n)] += 1e-6
    root = np.linalg.cholesky(inner)
    cross = asked @ doubles.T
    return (
        root.astype(np.float32),
        np.linalg.solve(root, cross.T).T.astype(np.float32),
    )


def _nested(targets: Ints, rng: np.random.Generator) -> list[Ints]:
    """Places that each fraction adds to the one before; of each class its share, at least one."""
    added: list[list[Ints]] = [[] for _ in FRACTIONS]
    for label in np.unique(targets):
        own = rng.permutation(np.flatnonzero(targets == label))
        ends = [max(1, round(fraction * len(own))) for fraction in FRACTIONS]
        for step, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            added[step].append(own[start:end])
    return [np.concatenate(parts) for parts in added]


def _answers(
    x: Singles, one_hot: Singles, asked: Singles, steps: list[Ints]
) -> list[tuple[int, Ints]]:
    """Size and answers [m] after each step: moments grow by what a step adds."""
    d = x.shape[1]
    second = np.zeros((d, d), dtype=np.float32)
    cross = np.zeros((d, one_hot.shape[1]), dtype=np.float32)
    first, counts, size = np.zeros(d, np.float32), np.zeros(one_hot.shape[1], np.float32), 0
    found = []
    for places in steps:
        if len(places):
            rows, wanted = x[places], one_hot[places]
            second += rows.T @ rows
            cross += rows.T @ wanted
            first += rows.sum(axis=0)
            counts += wanted.sum(axis=0)
            size += len(places)
        normal = second - np.outer(first, first) / size
        normal[np.diag_indices(d)] += _RELATIVE_L2 * size
        weight = np.linalg.solve(normal, cross - np.outer(first, counts) / size)
        scores = asked @ weight + (counts - first @ weight) / size
        found.append((size, scores.argmax(axis=1)))
    return found
