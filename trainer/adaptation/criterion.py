"""How good labels of unlabelled images look: what chooses among techniques.

The criterion is the chance-corrected agreement (Cohen's kappa, Cohen 1960, A
Coefficient of Agreement for Nominal Scales) between each target image's
predicted class and those of its nearest neighbours among the target images.
That neighbours should share a class is the idea of Saito et al. 2021, Tune it the
Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood
Density; here neighbours are found in the features, which no technique changes,
and not in a technique's own outputs, and chance is taken out, so neither a
technique that is merely confident nor one that gives all images one class
looks good.

Over pairs of domains with and without gap and label shift it told source-only
from a better or a worse adaptation where entropy, mutual information, batch
nuclear norm and the original density favour whatever minimises confusion, and
where reverse validation goes against the true accuracy. What it cannot see is a target
of few classes: `trainer.adaptation.brakes`.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from trainer.arrays import Doubles, Floats, Ints

NEIGHBOURS = 5
MARGIN = 0.03
"""What looks better by less is taken for equal, and the simpler technique kept."""
SAMPLE = 2000
"""Target images at most; of more, so many are drawn with the seed."""
_TEMPERATURE = (0.1, 10.0)
_TINY = 1e-12


class Neighbourhood:
    """Knows the target's images and who is whose neighbour, by the cosine.

    Features float [m, d], of two images or more, are standardised first.
    """

    def __init__(self, target: Floats, seed: int) -> None:
        m = len(target)
        self._places: Ints = np.arange(m)
        if m > SAMPLE:
            rng = np.random.default_rng([seed % 2**64, 0x4E16])
            self._places = np.sort(rng.choice(m, SAMPLE, replace=False))
        rows = target[self._places].astype(np.float32)
        rows -= rows.mean(axis=0)
        rows /= np.maximum(rows.std(axis=0), _TINY)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)
        similarity = rows @ rows.T
        np.fill_diagonal(similarity, -np.inf)
        count = min(NEIGHBOURS, len(rows) - 1)
        last = len(rows) - count
        self._neighbours: Ints = np.argpartition(similarity, last, axis=1)[:, last:]

    def agreement(self, logits: Doubles) -> float:
        """Computes the criterion for logits [m, classes] of all target images, from -1 to 1.

        0 is what chance gives, and what one class for all images is taken for.
        """
        votes = self._votes(logits)
        own = np.zeros_like(votes)
        own[np.arange(len(own)), logits[self._places].argmax(axis=1)] = 1
        observed = float((own * votes).sum(axis=1).mean())
        expected = float(own.mean(axis=0) @ votes.mean(axis=0))
        return (observed - expected) / (1 - expected) if expected < 1 - _TINY else 0.0

    def temperature(self, logits: Doubles) -> float:
        """Fits one (Guo et al. 2017) to the neighbours' classes in place of true ones.

        It measures how smooth answers are, not how right: probabilities come nearer to
        the truth by it than by other candidates' answers or the source's temperature, but
        calibrated they are not. Source images cannot give it: the head is right about all.
        """
        votes, own = self._votes(logits), logits[self._places]

        def loss(log_t: float) -> float:
            return float(-(votes * log_softmax(own / np.exp(log_t), axis=1)).sum(axis=1).mean())

        found = minimize_scalar(loss, bounds=tuple(np.log(_TEMPERATURE)), method="bounded")
        return float(np.exp(found.x))

    def _votes(self, logits: Doubles) -> Doubles:
        """Counts which part of the neighbours has which class, [sample, classes]."""
        labels = logits[self._places].argmax(axis=1)
        votes: Doubles = np.eye(logits.shape[1])[labels[self._neighbours]].mean(axis=1)
        return votes
