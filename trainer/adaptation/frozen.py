"""Domain adaptation on frozen features: a linear head for the target's images alone.

Source features come with classes, target features without. Every technique ends in a
head for raw target features; what comes of source images in it was never asked. Must
not know of images, backbones or torch.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from service.engine.head import Head as SourceHead
from service.ops.cpus import available_cores
from trainer.adaptation.alignment import Head, Space, correlation_alignment, standardise, unscaled
from trainer.adaptation.brakes import Doubt, doubt, seen
from trainer.adaptation.confusion import classify, unconfuse
from trainer.adaptation.criterion import MARGIN, Neighbourhood
from trainer.arrays import Doubles, Floats, Ints
from trainer.folds import deal

SOURCE_ONLY = "source_only"
SHARES = (0.4, 0.6, 0.8)
"""Of each predicted class, the most certain, in the rounds of self-training."""
PRIOR_ROUNDS = 2
FOLDS = 5
"""Of the target, where it is measured: each is an adaptation of its own."""
_PRIOR_SMOOTHING = 0.1


@dataclass(frozen=True)
class Tried:
    """A candidate and what the criterion said of it, see `trainer.adaptation.criterion`."""

    technique: str
    setting: str
    """What it differs in from others of the technique; for people, "" where nothing."""
    criterion: float

    @property
    def name(self) -> str:
        """Names it for people."""
        return f"{self.technique} {self.setting}".strip()


@dataclass(frozen=True, eq=False)
class Adapted:
    """A head for raw target features: weight float64 [classes, d], bias [classes]."""

    weight: Doubles
    bias: Doubles
    temperature: float
    """Of an adapted head a guess: no label of the target could tell it."""
    chosen: Tried
    candidates: tuple[Tried, ...]
    """Simplest first, source-only the first of all."""
    doubt: Doubt
    """Why source-only is to be preferred; it is the head then, unless `always_adapt`."""
    seen: float
    """How much of the source's class structure the target shows, see `brakes.seen`."""

    @property
    def has_adapted(self) -> bool:
        """Tells whether the head is another than source-only's."""
        return self.chosen.technique != SOURCE_ONLY

    def logits(self, features: Floats) -> Doubles:
        """Returns those of raw target features [m, d] over the temperature, [m, classes]."""
        logits: Doubles = features.astype(np.float64) @ self.weight.T + self.bias
        logits /= self.temperature
        return logits


@dataclass(frozen=True, eq=False)
class _Candidate:
    tried: Tried
    space: Space
    head: Head
    """Of the space."""
    logits: Doubles
    """Of the target's images."""


def adapt(
    source: Floats,
    targets: Ints,
    target: Floats,
    source_only: SourceHead,
    technique: str,
    seed: int,
    *,
    always_adapt: bool,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Adapted:
    """Adapts from source features [n, d] with classes [n] to the target's [m, d].

    `source_only` is the head that serves without adaptation. `auto` takes the technique
    that the criterion prefers. Where that is in doubt, source-only is the result, unless
    `always_adapt`. There are two images or more in each domain.
    """
    # As in `linear.fit`: the matrices are small, and torch waits for the same cores.
    with threadpool_limits(1):
        work = _Work(source, targets, target, len(source_only.bias), seed)
        tried = [work.source_only(source_only)]
        before = tried[0].logits.argmax(axis=1)
        shown = seen(source, targets, target, before)
        if technique != "mcc":
            tried.append(work.coral())
        on_progress(0.2)
        if technique != "coral":
            tried.extend(work.minimum_confusion())
        on_progress(0.7)
        if technique in ("auto", "pseudo_labels"):
            tried.append(work.pseudo_labels(preferred(tried)))
        asked = [c for c in tried[1:] if technique in ("auto", c.tried.technique)]
        chosen = preferred([tried[0], *asked])
        found = doubt(before, shown, tried[0].tried.criterion, chosen.tried.criterion)
        if found:
            chosen = preferred(asked) if always_adapt else tried[0]
        head, temperature = chosen.space.unaligned(chosen.head), source_only.temperature
        if chosen is not tried[0]:
            temperature = work.neighbourhood.temperature(chosen.logits)
        on_progress(1.0)
        return Adapted(
            weight=head.weight,
            bias=head.bias,
            temperature=temperature,
            chosen=chosen.tried,
            candidates=tuple(c.tried for c in tried),
            doubt=found,
            seen=shown,
        )


def cross_adapted(
    source: Floats,
    targets: Ints,
    target: Floats,
    groups: Ints,
    source_only: SourceHead,
    technique: str,
    seed: int,
    *,
    always_adapt: bool,
    threads: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> tuple[Doubles, Ints]:
    """Returns what `adapt` answers to target images that it was not adapted to.

    That is logits over the temperature [m, classes] and the fold [m] of each, from five
    adaptations to the other folds, in each of which technique and brakes are chosen
    anew. Images of one group, `groups` int64 [m], share a fold. NaN and -1 stand for
    images that no fold could hold out: where all are of one group. No class of the
    target is read.
    """
    order = np.random.default_rng([seed % 2**64, 0xCA]).random(len(target))
    folds = deal(np.zeros(len(target), dtype=np.int64), groups, order, FOLDS)
    answers = np.full((len(target), len(source_only.bias)), np.nan)
    # An adaptation needs two images of the target.
    places = [f for f in np.unique(folds) if f >= 0 and (folds != f).sum() >= 2]
    folds[~np.isin(folds, places)] = -1

    def hold_out(fold: int) -> None:
        held = folds == fold
        head = adapt(
            source, targets, target[~held], source_only, technique, seed, always_adapt=always_adapt
        )
        answers[held] = head.logits(target[held])

    cores = threads or available_cores()
    with threadpool_limits(1), ThreadPoolExecutor(cores, thread_name_prefix="adaptation") as pool:
        for done, _ in enumerate(pool.map(hold_out, places), 1):
            on_progress(done / len(places))
    return answers, folds


def preferred(candidates: list[_Candidate]) -> _Candidate:
    """Picks what has the best criterion; from simple to refined, each must pay by the margin."""
    best = candidates[0]
    for candidate in candidates[1:]:
        if candidate.tried.criterion > best.tried.criterion + MARGIN:
            best = candidate
    return best


class _Work:
    """Tries the techniques, over one pair of domains."""

    def __init__(
        self, source: Floats, targets: Ints, target: Floats, classes: int, seed: int
    ) -> None:
        self.source: Doubles = source.astype(np.float64)
        self.targets = targets
        self.target: Doubles = target.astype(np.float64)
        self.classes = classes
        self.neighbourhood = Neighbourhood(target, seed)

    def source_only(self, fitted: SourceHead) -> _Candidate:
        mean = self.source.mean(axis=0)
        scale = float(np.sqrt(((self.source - mean) ** 2).sum(axis=1).mean())) or 1.0
        space = Space(
            (self.source - mean) / scale,
            (self.target - mean) / scale,
            lambda head: unscaled(head, mean, scale),
        )
        weight = fitted.matrix.astype(np.float64)
        head = Head(weight * scale, fitted.bias + weight @ mean)
        return self._candidate(SOURCE_ONLY, "", space, head)

    def coral(self) -> _Candidate:
        space = correlation_alignment(self.source, self.target)
        weights = self._weights(self.targets)
        return self._candidate(
            "coral", "", space, classify(space.source, self.targets, weights, self.classes)
        )

    def minimum_confusion(self) -> list[_Candidate]:
        """Tries it twice: the source's classes equally frequent, and as frequent as in the target.

        The second estimates the target's frequencies from the first's answers, as
        in Saerens, Latinne and Decaestecker 2002, Adjusting the outputs of a
        classifier to new a priori probabilities, and repeats it. Without it,
        standardising makes the domains differ where their classes' shares do.
        """
        found = []
        prior = np.full(self.classes, 1 / self.classes)
        plain = None
        for round_ in range(PRIOR_ROUNDS + 1):
            weights = self._weights(self.targets, prior)
            space = standardise(self.source, self.target, weights)
            plain = classify(space.source, self.targets, weights, self.classes, plain)
            head = unconfuse(space.source, self.targets, weights, self.classes, space.target, plain)
            answered = np.bincount(head.logits(space.target).argmax(axis=1), minlength=self.classes)
            share = answered / len(self.target)
            prior = (1 - _PRIOR_SMOOTHING) * share + _PRIOR_SMOOTHING / self.classes
            if round_ == 0:
                found.append(self._candidate("mcc", "classes equally frequent", space, head))
        found.append(self._candidate("mcc", "classes as frequent as in the target", space, head))
        return found

    def pseudo_labels(self, base: _Candidate) -> _Candidate:
        """Trains on itself: the base's most certain answers join the source as if true.

        Lee 2013, Pseudo-Label: The Simple and Efficient Semi-Supervised Learning
        Method, in rounds of more and more images, the same share of each class,
        as in Zou et al. 2018, Unsupervised Domain Adaptation for Semantic
        Segmentation via Class-Balanced Self-Training. Source and target weigh the
        same, and so do the classes within each.
        """
        space, head, logits = base.space, base.head, base.logits
        ours = self._weights(self.targets)
        for share in SHARES:
            labels, kept = most_certain(logits, share)
            rows = np.concatenate([space.source, space.target[kept]])
            joined = np.concatenate([self.targets, labels[kept]])
            weights = np.concatenate([ours, self._weights(labels[kept])]) / 2
            head = classify(rows, joined, weights, self.classes, head)
            logits = head.logits(space.target)
        return self._candidate("pseudo_labels", f"on {base.tried.technique}", space, head)

    def _weights(self, labels: Ints, prior: Doubles | None = None) -> Doubles:
        """Returns those of sum 1 by which classes weigh as in the prior, or the same."""
        count = np.bincount(labels, minlength=self.classes)
        share = np.ones(self.classes) if prior is None else prior
        weights: Doubles = (share / np.maximum(count, 1))[labels]
        weights /= weights.sum()
        return weights

    def _candidate(self, technique: str, setting: str, space: Space, head: Head) -> _Candidate:
        logits = head.logits(space.target)
        tried = Tried(technique, setting, self.neighbourhood.agreement(logits))
        return _Candidate(tried, space, head, logits)


def most_certain(logits: Doubles, share: float) -> tuple[Ints, Ints]:
    """Returns the answers [m], and the places of those that lead the runner-up by most.

    Of each answered class the same share, rounded up.
    """
    labels = logits.argmax(axis=1)
    two = np.partition(logits, -2, axis=1)[:, -2:]
    lead = two[:, 1] - two[:, 0]
    kept = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        kept.append(own[np.argsort(-lead[own], kind="stable")[: int(np.ceil(share * len(own)))]])
    return labels, np.concatenate(kept)
