"""scikit-learn's cross-validated logistic regression, which the head is held against.

`LogisticRegressionCV` with ten strengths and five folds (as many as a class has images, where those
are fewer), ranked by log loss, on the last layer's features as they are and standardised:
whichever of the two is better on the images that are asked, so in its favour.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV

from bench.quality.frozen_job import Cost, Stopwatch
from bench.quality.images import ImageSet
from trainer.arrays import Doubles
from trainer.evaluate import cross_entropy

FOLDS = 5


@dataclass(frozen=True, eq=False)
class Answers:
    """Probabilities [n, classes] of images that were asked."""

    probabilities: Doubles
    cost: Cost
    """Of the fit that they come from."""


def ask(train: ImageSet, test: ImageSet) -> Answers:
    """Fits both to `train` and returns the better one's answers to `test`."""
    both = (_ask(train, test, is_standardised=standardised) for standardised in (False, True))
    return min(both, key=lambda found: cross_entropy(found.probabilities, test.targets))


def _ask(train: ImageSet, test: ImageSet, *, is_standardised: bool) -> Answers:
    stopwatch = Stopwatch()
    mean = train.features.mean(axis=0, dtype=np.float64)
    scale = train.features.std(axis=0, dtype=np.float64) if is_standardised else np.ones(len(mean))
    scale[scale == 0] = 1
    x = (train.features - mean) / scale
    # The solution lies in the span of the rows, whichever images a fold leaves out: a rotation
    # onto it changes nothing but the time.
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    folds = min(FOLDS, int(np.bincount(train.targets).min()))
    model = LogisticRegressionCV(Cs=10, cv=folds, scoring="neg_log_loss", max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model.fit(x @ axes.T, train.targets)
    cost = stopwatch.cost()
    return Answers(model.predict_proba((test.features - mean) / scale @ axes.T), cost)
