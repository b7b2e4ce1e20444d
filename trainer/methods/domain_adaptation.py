"""Domain adaptation: a model for a target domain of which there are unlabelled images.

Techniques on frozen features are `trainer.adaptation.frozen`'s, those that train
the whole network `network_adaptation`'s; here is what both have in common: the
target's images, what source-only would have done, and the words of the report.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from service.domain import ImageDecoding
from service.inference.head import Floats, Head
from service.jobs.contract import DomainAdaptation, Note, Progressed
from trainer import data as datasets
from trainer.adaptation import frozen, gap
from trainer.adaptation.alignment import Doubles
from trainer.adaptation.criterion import MARGIN
from trainer.adaptation.frozen import SOURCE_ONLY
from trainer.data import Data, Ints, Part, Source, Unlabelled
from trainer.features import Features
from trainer.records import Send
from trainer.reporting import comparisons, findings
from trainer.reporting.comparisons import Measured

CRITERION = (
    "agreement of each target image's predicted class with those of its nearest neighbours, "
    "beyond chance (after Saito et al. 2021); it reads no target label"
)


@dataclass(frozen=True, eq=False)
class Target:
    """The target's images, as the job needs them."""

    images: Unlabelled
    features: Floats
    """Frozen, float32 [m, d]."""

    @property
    def labelled(self) -> Part | None:
        """Those whose class is known, for evaluation alone; None where there are none."""
        targets = self.images.targets
        if targets is None or not (known := np.flatnonzero(targets >= 0)).size:
            return None
        files = self.images.at(known.tolist())
        return Part(files.paths, files.digests, targets[known], decoding=files.decoding)


@dataclass(frozen=True, eq=False)
class AdaptedHead:
    """What adapting on frozen features gave."""

    head: Head
    """For the target's images."""
    source_head: Head
    """The same classifier for the source's."""
    source_only: Head
    adapted: frozen.Adapted
    hyperparameters: dict[str, float | int | str | bool | None]


def load_target(
    method: DomainAdaptation,
    source: Source,
    classes: Sequence[str],
    features: Features,
    learned: Collection[str],
    threads: int,
    send: Send,
    decoding: ImageDecoding,
) -> Target:
    """Reads the target's images; errors as `data.load_unlabelled`.

    `learned` are the digests of the source's training images: nothing is measured
    on those.
    """
    images = datasets.load_unlabelled(
        source,
        threads,
        classes=classes if method.evaluate_on_target else None,
        decoding=decoding,
    )
    if images.targets is not None:
        images = _without_learned(images, learned, send)
    for file in images.summary.files[:10]:
        send(Note("warning", f"left out of the target: {file.path} ({file.detail})"))
    return Target(images, features.of(images, "target images"))


def _without_learned(images: Unlabelled, learned: Collection[str], send: Send) -> Unlabelled:
    assert images.targets is not None
    known = {*learned}
    twice = np.array([digest in known for digest in images.digests])
    if not twice.any():
        return images
    text = (
        f"{int(twice.sum())} images of the target are training images of the source too: "
        "nothing is measured on them"
    )
    send(Note("warning", text))
    return replace(images, targets=np.where(twice, -1, images.targets))


def adapt_head(
    method: DomainAdaptation, data: Data, train: Floats, target: Target, seed: int, send: Send
) -> AdaptedHead:
    """Adapts a head on frozen features, float32 [n, d] of the source's training images."""
    send(Progressed("training", 0.0, f"adapting to the target: {method.technique}"))
    adapted = frozen.adapt(
        train,
        data.train.targets,
        target.features,
        len(data.classes),
        method.technique,
        seed,
        always_adapt=method.always_adapt,
        on_progress=lambda done: send(Progressed("training", done, "adapting to the target")),
    )

    def head(weight: Doubles, bias: Doubles, temperature: float) -> Head:
        return Head(weight.astype(np.float32), bias.astype(np.float32), data.classes, temperature)

    source_only = adapted.source_only
    if adapted.is_negative:
        send(Note("warning", _negative(adapted.technique)))
    return AdaptedHead(
        head=head(adapted.weight, adapted.bias, adapted.temperature),
        source_head=head(adapted.source_weight, adapted.source_bias, adapted.temperature),
        source_only=head(source_only.weight, source_only.bias, source_only.temperature),
        adapted=adapted,
        hyperparameters={
            "technique": adapted.technique,
            "setting": adapted.setting or None,
            "l2": source_only.l2,
            "criterion": next(
                tried.criterion
                for tried in adapted.candidates
                if (tried.technique, tried.setting) == (adapted.technique, adapted.setting)
            ),
            "source_only_criterion": adapted.source_only_criterion,
        },
    )


def of_frozen(method: DomainAdaptation, found: AdaptedHead, target: Target) -> findings.Adaptation:
    """The report's section, for techniques on frozen features."""
    adapted = found.adapted
    before, after = adapted.gap_before, adapted.gap_after
    has_adapted = not adapted.has_kept_source_only
    section = _section(
        method,
        adapted.technique,
        target,
        [
            findings.Adapted(
                technique=_named(tried.technique, tried.setting),
                criterion=tried.criterion,
                target_accuracy=_accuracy(answers, target),
            )
            for tried, answers in zip(adapted.candidates, adapted.answers, strict=True)
        ],
        _gaps(before, after if has_adapted else None),
        adapted.is_negative,
        found.head.probabilities,
        target.features,
        found.source_only,
    )
    return msgspec.structs.replace(
        section, chosen=_named(adapted.technique, adapted.setting), margin=MARGIN
    )


def of_network(
    method: DomainAdaptation,
    *,
    head: Head,
    has_adapted: bool,
    source_only: Head,
    target: Target,
    train: tuple[Floats, Floats],
    adapted: Floats,
    seed: int,
) -> findings.Adaptation:
    """The report's section, for techniques that train the network.

    `train` are the source's features, frozen and of the trained network; `adapted`
    the target's of the trained network, each float32 [n, d].
    """
    before = gap.measure(train[0], target.features, seed)
    after = gap.measure(train[1], adapted, seed) if has_adapted else None
    published = method.technique if has_adapted else SOURCE_ONLY
    section = _section(
        method,
        published,
        target,
        [],
        _gaps(before, after),
        not has_adapted,
        head.probabilities,
        adapted,
        source_only,
    )
    # Where adapting did not improve the network, the adapted weights are not kept.
    candidates = [
        findings.Adapted(
            technique=SOURCE_ONLY, target_accuracy=section.source_only_target_accuracy
        ),
        findings.Adapted(
            technique=method.technique,
            target_accuracy=section.target_accuracy if has_adapted else None,
        ),
    ]
    return msgspec.structs.replace(section, candidates=candidates, chosen=published)


def _section(
    method: DomainAdaptation,
    published: str,
    target: Target,
    candidates: list[findings.Adapted],
    gaps: list[findings.Gap],
    is_negative: bool,
    probabilities: Callable[[Floats], Floats],
    features: Floats,
    source_only: Head,
) -> findings.Adaptation:
    section = findings.Adaptation(
        technique=method.technique,
        published=published,
        candidates=candidates,
        criterion=CRITERION,
        gaps=gaps,
        is_negative=is_negative,
        target_images=len(target.images),
        words=_negative(published) if is_negative else "",
    )
    targets = target.images.targets
    if targets is None or not (known := np.flatnonzero(targets >= 0)).size:
        return section
    right: Ints = targets[known]
    ours = probabilities(features[known])
    theirs = source_only.probabilities(target.features[known])
    return msgspec.structs.replace(
        section,
        target_accuracy=float((ours.argmax(axis=1) == right).mean()),
        source_only_target_accuracy=float((theirs.argmax(axis=1) == right).mean()),
        comparison=comparisons.compare(Measured(SOURCE_ONLY, theirs), ours, right),
    )


def _named(technique: str, setting: str) -> str:
    return f"{technique} {setting}".strip()


def _accuracy(answers: Ints, target: Target) -> float | None:
    """Returns the fraction of the target's labelled images that are classified correctly."""
    targets = target.images.targets
    if targets is None or not (known := targets >= 0).any():
        return None
    return float((answers[known] == targets[known]).mean())


def _gaps(before: gap.Gap, after: gap.Gap | None) -> list[findings.Gap]:
    return [
        findings.Gap(name, getattr(before, name), getattr(after, name) if after else None)
        for name in gap.Gap.__struct_fields__
    ]


def _negative(published: str) -> str:
    if published == SOURCE_ONLY:
        return (
            "adapting to the target does not look better than learning from the source alone "
            "(negative transfer): the source-only model is published; say always_adapt to have "
            "the adapted one"
        )
    return (
        "the adapted model does not look better than one that learned from the source alone "
        "(negative transfer): it is published because always_adapt was asked for"
    )
