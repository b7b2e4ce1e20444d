"""Confidence intervals of figures whose images may belong together in groups.

Pictures of one burst are right or wrong together, so that a hundred of them tell less than a
hundred lone ones. A figure's standard error is linearised: each image has an influence value,
and those of a group are added up before they are squared (Liang and Zeger 1986, "Longitudinal
data analysis using generalized linear models"). It becomes a number of lone images that would
tell as much, and Wilson's interval is of that number (Korn and Graubard 1998, "Confidence
intervals for proportions with small expected number of positive counts estimated from survey
data"; Dean and Pagano 2015, "Evaluating confidence interval methods for binomial proportions in
clustered surveys"). NumPy and SciPy alone.
"""

import math

import numpy as np
from scipy.special import stdtrit

from trainer.arrays import Bools, Doubles, Floats, Ints

Z_95 = 1.959964
"""Standard errors to each side of a 95 % interval."""
Z_ONE_SIDED_95 = 1.644854


def wilson(p: float, n: float, z: float = Z_95) -> tuple[float, float]:
    """Ends of the score interval of a proportion `p` of `n`, 95 % unless told (Wilson 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Exact at the ends, where rounding would leave none of what was found inside.
    return max(0.0, centre - half) if p > 0 else 0.0, min(1.0, centre + half) if p < 1 else 1.0


def clustered_se(influence: Floats, groups: Ints | None = None) -> float:
    """Standard error of a figure with influence values [n], of mean 0, in groups [n].

    `groups` None means that each image stands alone. Infinite for one group alone, which
    tells nothing of how much groups differ.
    """
    n = len(influence)
    sums = influence if groups is None else np.bincount(numbered(groups), weights=influence)
    count = n if groups is None else group_count(groups)
    if count < 2:
        return math.inf
    return math.sqrt(count / (count - 1) * float(np.square(sums, dtype=np.float64).sum())) / n


def effective_count(value: float, se: float, groups: Ints, weights: Doubles | None = None) -> float:
    """Number of lone images that would tell a share `value` of 0 to 1 as exactly as `se`.

    At least as many as if the images [n] of a group were one image (Kish 1965, "Survey
    Sampling": n^2 over the sum of squared group sizes), and that where all or none are right,
    since then no standard error tells anything; at most n. With `weights` [n] of sum 1 the
    value is a weighted mean, whose bounds follow from them.
    """
    return _bounded(value * (1 - value), max(value, 1 - value) ** 2, se, groups, weights)


def interval(
    value: float, se: float, groups: Ints, z: float = Z_95, weights: Doubles | None = None
) -> tuple[float, float]:
    """Ends of the interval of a figure between 0 and 1: Wilson's, on the effective count."""
    return wilson(value, effective_count(value, se, groups, weights), z)


def of_share(
    right: Bools, groups: Ints | None = None, z: float = Z_95
) -> tuple[float, float, float]:
    """The share of `right` [n], n > 0, and the ends of its interval."""
    share = float(right.mean())
    if groups is None:
        return share, *wilson(share, len(right), z)
    return share, *interval(share, clustered_se(right - share, groups), groups, z)


def design_effect(values: Floats, groups: Ints | None) -> float:
    """How many times larger the groups [n] make the variance of the mean of `values` [n].

    Between 1 and its largest, that of groups in which all are alike; where no value differs
    nothing is known, and it is the largest.
    """
    if groups is None:
        return 1.0
    centred = values - values.mean()
    variance = float(np.square(centred).mean())
    return len(values) / _bounded(variance, 1.0, clustered_se(centred, groups), groups, None)


def matched_difference(
    only_a: float, only_b: float, n: float, z: float = Z_95
) -> tuple[float, float]:
    """Ends of the score interval of the difference of two proportions of the same n images.

    `only_a` and `only_b` count the images of which one alone is right (Tango 1998, "Equivalence
    test and confidence interval for the difference in proportions for the paired-sample
    design"). Effective numbers need not be whole.
    """
    found = (only_a - only_b) / n

    def end(sign: int) -> float:
        inside, outside = found, float(sign)
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(matched_score(only_a, only_b, n, middle)) < z:
                inside = middle
            else:
                outside = middle
        return outside

    return end(-1), end(1)


def matched_score(only_a: float, only_b: float, n: float, difference: float) -> float:
    """Tango's score statistic, standard normal were `difference` (of -1 to 1) the true one."""
    distance = only_a - only_b - n * difference
    if distance == 0:
        return 0.0
    variance = n * matched_variance(only_a / n, only_b / n, difference)
    return math.copysign(math.inf, distance) if variance <= 0 else distance / math.sqrt(variance)


def matched_variance(share_a: float, share_b: float, difference: float) -> float:
    """Variance of an image's difference, as likely as `difference` allows (Tango 1998)."""
    b = -share_a - share_b + (2 - share_a + share_b) * difference
    c = -share_b * difference * (1 - difference)
    alone_b = (math.sqrt(max(0.0, b * b - 8 * c)) - b) / 4
    return 2 * alone_b + difference * (1 - difference)


def points(difference: float) -> str:
    """A difference of -1 to 1 in points of a hundred, for people."""
    return f"{difference * 100:+.1f}"


def t_quantile(groups: Ints) -> float:
    """Standard errors to each side of a 95 % interval, when groups [n] tell the standard error."""
    return float(stdtrit(group_count(groups) - 1, 0.975))


def group_count(groups: Ints) -> int:
    """How many groups there are among the numbers [n]."""
    return int(np.count_nonzero(np.bincount(numbered(groups))))


def numbered(groups: Ints) -> Ints:
    """The same groups [n] by numbers from 0 on, few enough to count by."""
    if len(groups) and (groups.min() < 0 or groups.max() > 8 * len(groups) + 2**16):
        return np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return groups


def count_between(least: float, most: float, variance: float, largest: float, se: float) -> float:
    """Number of lone images that would tell a mean of such `variance` as exactly as `se`.

    Where few were wrong, how alike those of a group are can hardly be seen: one that is wholly
    wrong is added, of 1 / `least` of all and off by the root of `largest`. Then it is `least`
    where none was wrong, and hardly makes a difference where many were.
    """
    added = largest / least
    return min((variance + added) / (se * se + added / least), most)


def _bounded(
    variance: float, largest: float, se: float, groups: Ints, weights: Doubles | None
) -> float:
    groups, n = numbered(groups), len(groups)
    if weights is None:
        most = float(n)
        least = n * n / float(np.square(np.bincount(groups), dtype=np.float64).sum())
    else:
        most = 1 / float(np.square(weights).sum())
        least = 1 / float(np.square(np.bincount(groups, weights=weights)).sum())
    if not math.isfinite(se):
        return least
    # Few groups tell the standard error itself badly.
    tails = stdtrit([n - 1, group_count(groups) - 1], 0.975)
    count = count_between(least, most, variance, largest, se * float(tails[1] / tails[0]))
    # A share is never told worse than by one image of each group; a weighted mean may be, where
    # what weighs much is uncertain.
    return max(count, least if weights is None else 1.0)
