"""Domain adaptation: a model for a target domain of which there are unlabelled images.

Techniques on frozen features are `trainer.adaptation.frozen`'s, the one that trains the
whole network `network_adaptation`'s; here is what both have in common: the target's
images, whether adapting is in doubt, what is measured, and the words of the report.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import softmax

from service.contract import DomainAdaptation, Grouping, Note, Progressed
from service.domain import ImageDecoding
from service.engine.head import Floats, Head
from trainer import data as datasets
from trainer import folds, measuring
from trainer.adaptation import brakes, frozen, gap
from trainer.adaptation.brakes import Doubt
from trainer.adaptation.criterion import MARGIN, Neighbourhood
from trainer.adaptation.frozen import SOURCE_ONLY, Tried
from trainer.arrays import Bools, Doubles, Ints
from trainer.data import Part, Source, Unlabelled
from trainer.features import Features
from trainer.measuring import Decide, Measured
from trainer.records import Send
from trainer.reporting import comparisons, findings

CRITERION = (
    "agreement of each target image's predicted class with those of its nearest neighbours, "
    "beyond chance (after Saito et al. 2021); it reads no target label"
)
_ADAPTING_PART = 0.5
"""Of the progress, where the target's labels are measured with; five adaptations follow."""


@dataclass(frozen=True, eq=False)
class Target:
    """The target's images, as the job needs them."""

    images: Unlabelled
    features: Floats
    """Frozen, float32 [m, d]."""

    @property
    def is_labelled(self) -> Bools:
        """Marks the images [m] whose class is known, for evaluation alone."""
        targets = self.images.targets
        return np.zeros(len(self.images), np.bool_) if targets is None else targets >= 0

    def labelled(self, places: Ints) -> Part:
        """Returns images at places that are labelled, with their classes."""
        assert self.images.targets is not None
        files = self.images.at(places.tolist())
        return Part(
            files.locations,
            files.digests,
            self.images.targets[places],
            decoding=files.decoding,
            names=files.names,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptedHead:
    """An adapted head, and what is known of it."""

    head: Head
    """For the target's images alone."""
    has_adapted: bool
    """The head is another than source-only's."""
    measured: list[Measured]
    """Labelled target images that were not adapted to; empty where there are none."""
    adaptation: findings.Adaptation
    hyperparameters: dict[str, float | int | str | bool | None]


def load_target(
    method: DomainAdaptation,
    source: Source,
    classes: Sequence[str],
    features: Features,
    threads: int,
    send: Send,
    decoding: ImageDecoding,
    grouping: Grouping | None,
) -> Target:
    """Reads the target's images; errors as `data.load_unlabelled`."""
    images = datasets.load_unlabelled(
        source,
        threads,
        classes=classes if method.evaluate_on_target else None,
        decoding=decoding,
        grouping=grouping,
    )
    for file in images.summary.files[:10]:
        send(Note("warning", f"left out of the target: {file.path} ({file.detail})"))
    if images.erased_count:
        send(Note("warning", f"of the target, {datasets.erased_note(images.erased_count)}"))
    return Target(images, features.of(images, "target images"))


def without_learned(target: Target, learned: Bools, send: Send) -> Target:
    """Forgets the classes of target images [m] that are learned from as images of the source."""
    images = target.images
    if images.targets is None or not (count := int((learned & target.is_labelled).sum())):
        return target
    text = (
        f"{count} images of the target are training images of the source too, or near copies of "
        "them: nothing is measured on them"
    )
    send(Note("warning", text))
    return replace(target, images=replace(images, targets=np.where(learned, -1, images.targets)))


def adapt_head(
    method: DomainAdaptation,
    source: tuple[Floats, Ints],
    source_only: Head,
    target: Target,
    groups: Ints,
    seed: int,
    threads: int,
    send: Send,
) -> AdaptedHead:
    """Adapts a head on frozen features; warns where that is in doubt.

    `source` are the features float32 [n, d] and classes [n] of the images that
    `source_only` was fitted to. What is served is adapted to all of the target; where
    some of it is labelled, it is measured by adaptations to other images of the target,
    `groups` [m] of which belong together, and its temperature fitted to their answers.
    """
    detail = f"adapting to the target: {method.technique}"
    part = _ADAPTING_PART if target.is_labelled.any() else 1.0
    send(Progressed("training", 0.0, detail))
    found = frozen.adapt(
        *source,
        target.features,
        source_only,
        method.technique,
        seed,
        always_adapt=method.always_adapt,
        on_progress=lambda done: send(Progressed("training", part * done, detail)),
    )
    head = Head(
        found.weight.astype(np.float32),
        found.bias.astype(np.float32),
        source_only.classes,
        found.temperature,
    )
    measured: list[Measured] = []
    comparison = None
    if part < 1:
        answers, fold = frozen.cross_adapted(
            *source,
            target.features,
            groups,
            source_only,
            method.technique,
            seed,
            always_adapt=method.always_adapt,
            threads=threads,
            on_progress=lambda done: send(
                Progressed("training", part + (1 - part) * done, "measuring the adaptation")
            ),
        )
        asked, rounds = target.is_labelled & (fold >= 0), len(np.unique(fold[fold >= 0]))
        head, measured = _measured(head, answers, source_only.decide, target, groups, asked, rounds)
        comparison = _compared(source_only, target, measured, asked)
    adaptation = _findings(
        method, found.chosen, found.candidates, found.doubt, found.seen, source[0], target, seed,
        comparison,
    )  # fmt: skip
    _tell(adaptation, send)
    return AdaptedHead(
        head=head,
        has_adapted=found.has_adapted,
        measured=measured,
        adaptation=adaptation,
        hyperparameters={
            "technique": found.chosen.technique,
            "setting": found.chosen.setting or None,
            "criterion": found.chosen.criterion,
            "source_only_criterion": found.candidates[0].criterion,
            "seen": found.seen,
        },
    )


def held_out(target: Target, groups: Ints, fraction: float, seed: int) -> Bools:
    """Marks labelled target images [m] that a network is to be measured on, and not adapted to.

    Images of one group, `groups` [m], stay together. None are marked without labels.
    """
    if not target.is_labelled.any():
        return target.is_labelled
    order = np.random.default_rng([seed % 2**64, 0x7E1]).random(len(groups))
    count = max(2, round(1 / fraction))
    aside: Bools = folds.deal(np.zeros_like(groups), groups, order, count) == 0
    aside &= target.is_labelled
    return aside


def judge_network(
    method: DomainAdaptation,
    source: tuple[Floats, Ints],
    source_only: Head,
    target: Target,
    groups: Ints,
    held: Bools,
    trained: tuple[Head, Floats],
    seed: int,
    send: Send,
) -> AdaptedHead:
    """Decides by the criterion and the brakes whether a trained network or source-only serves.

    As `adapt_head`; `trained` are the network's head and the target's features [m, d] as
    the network gives them, `held` marks the images [m] that it was not adapted to: nothing
    is decided by them.
    """
    head, features = trained
    before, after = source_only.logits(target.features), head.logits(features)
    neighbourhood = Neighbourhood(target.features[~held], seed)
    candidates = tuple(
        Tried(name, "", neighbourhood.agreement(logits[~held].astype(np.float64)))
        for name, logits in ((SOURCE_ONLY, before), (method.technique, after))
    )
    answers = before[~held].argmax(axis=1)
    seen = brakes.seen(*source, target.features[~held], answers)
    doubt = brakes.doubt(answers, seen, *(tried.criterion for tried in candidates))
    has_adapted = not doubt or method.always_adapt
    served, logits = source_only, before / np.float32(source_only.temperature)
    if has_adapted:
        temperature = neighbourhood.temperature(after[~held].astype(np.float64))
        served, logits = replace(head, temperature=temperature), after / np.float32(temperature)
    served, measured = _measured(
        served, logits.astype(np.float64), source_only.decide, target, groups, held
    )
    adaptation = _findings(
        method, candidates[has_adapted], candidates, doubt, seen, source[0], target, seed,
        _compared(source_only, target, measured, held),
    )  # fmt: skip
    _tell(adaptation, send)
    return AdaptedHead(
        head=served,
        has_adapted=has_adapted,
        measured=measured,
        adaptation=adaptation,
        hyperparameters={
            "technique": candidates[has_adapted].technique,
            "criterion": candidates[has_adapted].criterion,
            "source_only_criterion": candidates[0].criterion,
            "seen": seen,
        },
    )


def _measured(
    head: Head,
    answers: Doubles,
    decide: Decide,
    target: Target,
    groups: Ints,
    asked: Bools,
    rounds: int = 0,
) -> tuple[Head, list[Measured]]:
    """Fits the temperature to answers [m, classes], over the head's own, where asked for."""
    if not (places := np.flatnonzero(asked)).size:
        return head, []
    part, logits = target.labelled(places), answers[places]
    own = Measured(
        "target", part, groups[places], softmax(logits, axis=1), rounds=rounds, decide=decide
    )
    plain, own = measuring.tempered(replace(head, temperature=1.0), own, logits)
    return replace(head, temperature=head.temperature * plain.temperature), [own]


def _compared(
    source_only: Head, target: Target, measured: list[Measured], asked: Bools
) -> comparisons.Comparison | None:
    if not measured:
        return None
    own = measured[0]
    answers = source_only.decide(source_only.probabilities(target.features[asked]))
    before = comparisons.Measured(SOURCE_ONLY, answers)
    return comparisons.compare(before, own.answers, own.part.targets, own.groups)


def _findings(
    method: DomainAdaptation,
    chosen: Tried,
    candidates: Sequence[Tried],
    doubt: Doubt,
    seen: float,
    source: Floats,
    target: Target,
    seed: int,
    comparison: comparisons.Comparison | None,
) -> findings.Adaptation:
    return findings.Adaptation(
        technique=method.technique,
        published=chosen.technique,
        chosen=chosen.name,
        margin=MARGIN,
        candidates=[
            findings.Adapted(technique=tried.name, criterion=tried.criterion)
            for tried in candidates
        ],
        criterion=CRITERION,
        gaps=[
            findings.Gap(measure, distance)
            for measure, distance in gap.measure(source, target.features, seed).items()
        ],
        doubt=doubt,
        seen=seen,
        target_images=len(target.images),
        comparison=comparison,
        words=_words(doubt, seen, chosen),
    )


def _words(doubt: Doubt, seen: float, chosen: Tried) -> str:
    few = "It may hold one class alone, or few, and adapting would spread those over all"
    why = {
        "": "",
        "not_better": "adapting to the target does not look better than learning from the source "
        "alone (negative transfer)",
        "one_class": "the model that learned from the source alone puts more than "
        f"{brakes.MOST_ALIKE:.0%} of the target's images into one class. {few} (negative "
        "transfer)",
        "classes_unseen": "the target hardly shows the source's classes: the answers of the model "
        f"that learned from the source alone explain {seen:.0%} of what classes explain in the "
        f"source, less than {brakes.LEAST_SEEN:.0%}. {few} (negative transfer)",
        "neighbours_disagree": "target images that lie next to each other hardly share an answer "
        f"of the adapted model. The target may have too few images. {few} (negative transfer)",
    }[doubt]
    if not why:
        return (
            f"adapted to the target by {chosen.name}: for images of the target alone, what it "
            "answers to those of the source was not asked"
        )
    if chosen.technique != SOURCE_ONLY:
        return f"{why}: the adapted model is published because always_adapt was asked for"
    return f"{why}: the source-only model is published; say always_adapt to have the adapted one"


def _tell(adaptation: findings.Adaptation, send: Send) -> None:
    send(Note("warning" if adaptation.doubt else "info", adaptation.words))
