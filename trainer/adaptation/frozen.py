"""Domain adaptation on frozen features: a linear head for the target's images.

Source features come with classes, target features without. Every technique ends
in a head for raw target features, and one for raw source features that answers
alike, to measure it fairly where classes are known. Must not know of images,
backbones or torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from trainer import linear
from trainer.adaptation import gap
from trainer.adaptation.alignment import Head, Space, correlation_alignment, standardise
from trainer.adaptation.confusion import classify, unconfuse
from trainer.adaptation.criterion import MARGIN, Neighbourhood

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SOURCE_ONLY = "source_only"
TECHNIQUES = ("auto", "coral", "mcc", "pseudo_labels")
SHARES = (0.4, 0.6, 0.8)
"""Of each predicted class, the most certain, in the rounds of self-training."""
PRIOR_ROUNDS = 2
_PRIOR_SMOOTHING = 0.1


@dataclass(frozen=True)
class Tried:
    """A candidate and what the criterion said of it, see `trainer.adaptation.criterion`."""

    technique: str
    setting: str
    """What it differs in from others of the technique; for people, "" where nothing."""
    criterion: float


@dataclass(frozen=True, eq=False)
class Adapted:
    """A head for raw target features: weight float64 [classes, d], bias [classes]."""

    weight: Doubles
    bias: Doubles
    temperature: float
    source_weight: Doubles
    """The same classifier for raw source features."""
    source_bias: Doubles
    source_only: linear.Fitted
    """What there would be without adaptation."""
    technique: str
    """The one that made the head; `source_only` where that was kept."""
    setting: str
    candidates: tuple[Tried, ...]
    """Simplest first, source-only the first of all."""
    answers: tuple[Ints, ...]
    """The target's images as each candidate classifies them, int64 [m] each."""
    source_only_criterion: float
    is_negative: bool
    """No adaptation that was asked for looks better than source-only, by the margin."""
    has_kept_source_only: bool
    """So source-only was taken; never with `always_adapt`."""
    gap_before: gap.Gap
    gap_after: gap.Gap
    """In the space in which the head works; of source-only the same as before.

    Both domains have the mean 0 there, so a linear domain classifier finds nothing.
    """


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
    classes: int,
    technique: str,
    seed: int,
    *,
    always_adapt: bool,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Adapted:
    """From source features [n, d] with classes [n] to a head for the target's [m, d].

    `auto` takes the technique that the criterion prefers. Where none looks better
    than source-only, source-only is the result, unless `always_adapt`. Raises
    ValueError for an unknown technique and below two images in a domain.
    """
    if technique not in TECHNIQUES:
        raise ValueError(
            f"technique {technique!r} does not work on frozen features: "
            f"take one of {', '.join(TECHNIQUES)}"
        )
    if min(len(source), len(target)) < 2:
        raise ValueError("adaptation needs two images or more of each domain: add images")
    # As in `linear.fit`: the matrices are small, and torch waits for the same cores.
    with threadpool_limits(1):
        fitted = linear.fit(source, targets, classes, None, seed, lambda p: on_progress(p / 2))
        xs, xt = source.astype(np.float64), target.astype(np.float64)
        work = _Work(xs, targets, xt, classes, Neighbourhood(target, seed))
        tried = [work.source_only(fitted)]
        on_progress(0.5)
        if technique != "mcc":
            tried.append(work.coral())
        on_progress(0.6)
        if technique != "coral":
            tried.extend(work.minimum_confusion())
        on_progress(0.8)
        if technique in ("auto", "pseudo_labels"):
            tried.append(work.pseudo_labels(preferred(tried)))
        on_progress(0.9)
        asked = [c for c in tried[1:] if technique in ("auto", c.tried.technique)]
        looks_best = preferred([tried[0], *asked])
        is_negative = looks_best is tried[0]
        chosen = preferred(asked) if is_negative and always_adapt else looks_best
        adapted = _adapted(chosen, tried, fitted, work, is_negative, seed)
        on_progress(1.0)
        return adapted


def preferred(candidates: list[_Candidate]) -> _Candidate:
    """The one with the best criterion; from simple to refined, each must pay by the margin."""
    best = candidates[0]
    for candidate in candidates[1:]:
        if candidate.tried.criterion > best.tried.criterion + MARGIN:
            best = candidate
    return best


def _adapted(
    chosen: _Candidate,
    tried: list[_Candidate],
    fitted: linear.Fitted,
    work: "_Work",
    is_negative: bool,
    seed: int,
) -> Adapted:
    before = after = gap.measure(work.source, work.target, seed)
    ours = theirs = Head(fitted.weight, fitted.bias)
    temperature = fitted.temperature
    if has_adapted := chosen is not tried[0]:
        after = gap.measure(chosen.space.source, chosen.space.target, seed)
        ours = chosen.space.for_source(chosen.head)
        theirs = chosen.space.for_target(chosen.head)
        temperature = work.neighbourhood.temperature(chosen.logits)
    return Adapted(
        weight=theirs.weight,
        bias=theirs.bias,
        temperature=temperature,
        source_weight=ours.weight,
        source_bias=ours.bias,
        source_only=fitted,
        technique=chosen.tried.technique,
        setting=chosen.tried.setting,
        candidates=tuple(c.tried for c in tried),
        answers=tuple(c.logits.argmax(axis=1) for c in tried),
        source_only_criterion=tried[0].tried.criterion,
        is_negative=is_negative,
        has_kept_source_only=not has_adapted,
        gap_before=before,
        gap_after=after,
    )


@dataclass(frozen=True, eq=False)
class _Work:
    """The techniques, over one pair of domains."""

    source: Doubles
    targets: Ints
    target: Doubles
    classes: int
    neighbourhood: Neighbourhood

    def source_only(self, fitted: linear.Fitted) -> _Candidate:
        mean = self.source.mean(axis=0)
        scale = float(np.sqrt(((self.source - mean) ** 2).sum(axis=1).mean())) or 1.0

        def raw(head: Head) -> Head:
            weight = head.weight / scale
            return Head(weight, head.bias - weight @ mean)

        space = Space((self.source - mean) / scale, (self.target - mean) / scale, raw, raw)
        head = Head(fitted.weight * scale, fitted.bias + fitted.weight @ mean)
        return self._candidate(SOURCE_ONLY, "", space, head)

    def coral(self) -> _Candidate:
        space = correlation_alignment(self.source, self.target)
        weights = self._weights(self.targets)
        return self._candidate(
            "coral", "", space, classify(space.source, self.targets, weights, self.classes)
        )

    def minimum_confusion(self) -> list[_Candidate]:
        """Twice: the source's classes equally frequent, and as frequent as in the target.

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
        """Self-training: the base's most certain answers join the source as if true.

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
        """Of sum 1, so that classes weigh as in the prior, or the same."""
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
    """The answers [m], and the places of those that lead the runner-up by most.

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
