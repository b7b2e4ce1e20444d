"""Counts how often adapting to a domain does harm, and how often the trainer says so.

From each domain to each other with the same classes, the target whole and in parts
that make adapting dangerous: one class alone, three classes, shares that halve from
class to class. A half of a part is adapted to, the other measured on. An adaptation is
harmful where the 95 % interval of adapted less source-only accuracy lies below 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from service.engine.head import Head
from trainer import linear
from trainer.adaptation import frozen
from trainer.arrays import Floats, Ints
from trainer.reporting import comparisons

Names = npt.NDArray[np.str_]

WORTH = 0.05
"""Accuracy gained that it is a loss to forgo."""
MOST_SINGLES = 7
DRAWS = 5
"""Of three classes, and of shifted shares."""


@dataclass(frozen=True)
class Row:
    """An adaptation, measured on target images that it did not see."""

    source: str
    target: str
    part: str
    """`whole`, `one class`, `three classes` or `shifted shares`."""
    seed: int
    images: int
    """Adapted to; about as many are measured on."""
    source_only: float
    """Its accuracy."""
    adapted: float
    """The accuracy of the adapted head that looks best, kept or not."""
    low: float
    """Of the 95 % interval of the difference."""
    high: float
    is_kept_or_flagged: bool
    """Source-only is kept and a warning says why; with always_adapt it warns all the same."""

    @property
    def gain(self) -> float:
        """Returns the accuracy that adapting gains."""
        return self.adapted - self.source_only

    @property
    def served(self) -> float:
        """Returns the accuracy of what is served by default."""
        return self.source_only if self.is_kept_or_flagged else self.adapted

    @property
    def is_harmful(self) -> bool:
        """Tells whether adapting is worse beyond chance."""
        return self.high < 0


@dataclass(frozen=True)
class Summary:
    """Counts adaptations; what `make quality` bounds."""

    harmful: int
    caught: int
    """Harmful ones that were kept or flagged: to be 80 % or more."""
    gaining: int
    """Those that gain `WORTH` or more."""
    lost: int
    """Gaining ones that were kept from serving: to be 10 % or fewer."""


def run(features: Mapping[str, tuple[Floats, Names]], seeds: Iterable[int]) -> list[Row]:
    """Measures every ordered pair of domains, features [n, d] and class names [n] by name.

    Pairs whose classes differ are left out.
    """
    rows = []
    for seed in seeds:
        for source, target in permutations(features, 2):
            if set(features[source][1]) == set(features[target][1]):
                rows += of_pair((source, *features[source]), (target, *features[target]), seed)
    return rows


def of_pair(
    source: tuple[str, Floats, Names], target: tuple[str, Floats, Names], seed: int
) -> list[Row]:
    """Measures all parts of one target; either is a name, features [n, d], class names [n]."""
    from_name, known, known_names = source
    to_name, asked, asked_names = target
    classes, targets = np.unique(known_names, return_inverse=True)
    right = np.searchsorted(classes, asked_names)
    fitted = linear.fit(known, targets, len(classes), None, seed, threads=1)
    source_only = Head(
        fitted.weight.astype(np.float32),
        fitted.bias.astype(np.float32),
        tuple(classes.tolist()),
        fitted.temperature,
    )
    rng = np.random.default_rng([seed, 0xA12])
    rows = []
    for part, places in parts(right, rng):
        seen, held = halves(right, places, rng)
        if min(len(seen), len(held)) < 2:
            continue
        found = frozen.adapt(
            known, targets, asked[seen], source_only, "auto", seed, always_adapt=True
        )
        before = source_only.probabilities(asked[held]).argmax(axis=1)
        compared = comparisons.compare(
            comparisons.Measured(frozen.SOURCE_ONLY, before),
            found.logits(asked[held]).argmax(axis=1),
            right[held],
        )
        rows.append(
            Row(
                source=from_name,
                target=to_name,
                part=part,
                seed=seed,
                images=len(seen),
                source_only=compared.accuracy,
                adapted=compared.accuracy + compared.difference,
                low=compared.difference_low,
                high=compared.difference_high,
                is_kept_or_flagged=bool(found.doubt),
            )
        )
    return rows


def parts(targets: Ints, rng: np.random.Generator) -> list[tuple[str, Ints]]:
    """Draws parts of images with classes [n]: what each is called, and the images' places."""
    classes = int(targets.max()) + 1
    found = [("whole", np.arange(len(targets)))]
    singles = rng.permutation(classes)[:MOST_SINGLES] if classes > MOST_SINGLES else range(classes)
    found += [("one class", np.flatnonzero(targets == c)) for c in singles]
    if classes > 3:
        for _ in range(DRAWS):
            three = rng.choice(classes, 3, replace=False)
            found.append(("three classes", np.flatnonzero(np.isin(targets, three))))
    for _ in range(DRAWS):
        kept = []
        for rank, c in enumerate(rng.permutation(classes)):
            own = rng.permutation(np.flatnonzero(targets == c))
            kept.append(own[: int(np.ceil(len(own) / 2**rank))])
        found.append(("shifted shares", np.sort(np.concatenate(kept))))
    return found


def halves(targets: Ints, places: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Divides places into two of about the same shares of classes; a lone image falls in one."""
    side = np.zeros(len(places), dtype=np.int64)
    for c in np.unique(targets[places]):
        own = rng.permutation(np.flatnonzero(targets[places] == c))
        side[own] = (np.arange(len(own)) + rng.integers(2)) % 2
    return places[side == 0], places[side == 1]


def summary(rows: Sequence[Row]) -> Summary:
    """Counts what the trainer caught, and what its caution cost."""
    harmful = [row for row in rows if row.is_harmful]
    gaining = [row for row in rows if row.gain >= WORTH]
    return Summary(
        harmful=len(harmful),
        caught=sum(row.is_kept_or_flagged for row in harmful),
        gaining=len(gaining),
        lost=sum(row.is_kept_or_flagged for row in gaining),
    )
