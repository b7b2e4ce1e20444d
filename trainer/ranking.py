"""Which backbone to start from: backbones scored on a sample of the data, none trained.

The list is sorted by LogME. H-score agrees as well with accuracy after
fine-tuning where others measured both on pretrained backbones, but with fewer
images than features it nears its bound whatever the features are, shrinkage or
not: on ten images a class, a network of random weights passed for a pretrained
one. The evidence behind LogME charges for features that explain nothing. LEEP is
for information alone. What cannot be scored is listed last, with its problem,
and fails nothing else.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service import backbones as registry
from service.domain import DEFAULT_DECODING, ImageDecoding
from service.errors import GraftError, InvalidInput, Reason, Unavailable
from service.inference.providers import ProviderUnavailable, choose_provider
from service.inference.runtime import OnnxRuntime
from service.jobs.contract import (
    MOST_RANKED_IMAGES,
    BackbonesRanked,
    Note,
    PretrainedBackbone,
    Progressed,
    RankedBackbone,
    RankSpec,
)
from trainer import transferability
from trainer.data import Part, Source
from trainer.feature_cache import FeatureCache
from trainer.ranked_backbone import NO_TIME, BackboneScoring
from trainer.records import Send

Ints = npt.NDArray[np.int64]

_CHOOSE = 3
"""One training image in so many chooses the backbone of a job."""
FIRST_IMAGES = 100
"""All backbones are scored on so many, and again on more where all find time for that."""
_PLANNED = 0.7
"""Of the time that is left for more images; the rest is for what goes slower."""
_STRONG = 3.0
"""Of the log evidence of all images: less is no strong lead (Kass and Raftery 1995)."""


def rank(spec: RankSpec, send: Send) -> BackbonesRanked:
    """Scores the backbones on the training images below `spec.data_dir`, best first.

    Raises InvalidInput (DATASET_UNUSABLE) when there are none to score on. Ends
    within the time budget, but for what it is at when that runs out: reading the
    sample, an export, or a few batches.
    """
    started = time.monotonic()
    send(Progressed("preparing", 0.0, "reading a sample of the images"))
    return _ranked(spec, _sample(spec), _runtime(spec), started, send)[1]


def choosers(part: Part, seed: int) -> Part:
    """Returns the training images that are to choose a backbone: a third, in turn from each class.

    Nothing is reported of those: what chose is no measure of what was chosen.
    """
    count = max(2, len(part) // _CHOOSE)
    return _of(part, transferability.spread(part.targets, seed)[: min(MOST_RANKED_IMAGES, count)])


def choose(
    spec: RankSpec, part: Part, runtime: OnnxRuntime, send: Send
) -> tuple[PretrainedBackbone, BackbonesRanked]:
    """The backbone that ranks first on all images of a part, and the ranking.

    Where none could be scored in time, the cheapest that is here, and that is said.
    `runtime` is what serves; the spec's `data_dir` and `provider` are not looked at.
    Raises Unavailable (WEIGHTS_UNAVAILABLE) when no backbone could be had.
    """
    started = time.monotonic()
    entrants, ranked = _ranked(spec, part, runtime, started, send)
    for entrant in entrants:
        if entrant.row is ranked.ranking[0] and entrant.row.score is not None:
            return entrant.pretrained, ranked
    late = [c for c in entrants if c.row.problem == NO_TIME and c.is_available()]
    if late:
        cheapest = min(late, key=lambda entrant: (not entrant.is_exported(), *_effort(entrant)))
        text = (
            f"in {spec.time_budget_s:.3g} s no backbone could be scored: {_name(cheapest.row)} was "
            "taken as the cheapest available; give a longer time budget, or name a backbone"
        )
        send(Note("warning", text))
        return cheapest.pretrained, ranked
    raise Unavailable(
        Reason.WEIGHTS_UNAVAILABLE,
        f"no backbone could be chosen: {ranked.explanation} Name one in the request",
    )


def _ranked(
    spec: RankSpec, sample: Part, runtime: OnnxRuntime, started: float, send: Send
) -> tuple[list[BackboneScoring], BackbonesRanked]:
    """Ranks on a sample any beginning of which is a stratified one."""
    deadline = started + spec.time_budget_s
    cache = _cache(spec, send)
    everyone = [BackboneScoring(pretrained, spec, runtime, cache) for pretrained in spec.backbones]
    entrants = [c for c in everyone if not spec.only_available or c.is_available()]
    absent = [c.row.backbone for c in everyone if c not in entrants]
    images = min(FIRST_IMAGES, len(sample))
    # A trainer that is ended at once removes nothing: whose folder it is does.
    with tempfile.TemporaryDirectory(prefix="graft-rank-", dir=spec.work_dir or None) as folder:
        for index, entrant in enumerate(sorted(entrants, key=_effort)):
            send(Progressed("features", index / len(entrants), entrant.title))
            entrant.prepare(_of(sample, slice(images)), deadline, Path(folder))
    ready = [entrant for entrant in entrants if not entrant.row.problem]
    if (more := _affordable(ready, len(sample), deadline)) > images:
        send(Progressed("features", 0.0, f"{more} images instead of {images}"))
        rest = _of(sample, slice(images, more))
        # On the same images for all, or the scores could not be compared.
        if all(entrant.extend(rest, deadline) for entrant in ready):
            images = more
    targets = sample.targets[:images]
    for entrant in ready:
        entrant.score(targets)
    for entrant in ready:
        if time.monotonic() < deadline:
            entrant.add_leep(targets)
    if cache is not None:
        cache.close()
    # Stable: what ties, and what has no score, stays in the order it was named in.
    rows = sorted((entrant.row for entrant in entrants), key=_height, reverse=True)
    return entrants, BackbonesRanked(rows, _explained(rows, absent, images), images)


def _of(part: Part, places: "Ints | slice") -> Part:
    return part.take(np.arange(len(part))[places])


def _cache(spec: RankSpec, send: Send) -> FeatureCache | None:
    if not spec.feature_cache:
        return None
    return FeatureCache(
        Path(spec.feature_cache),
        spec.feature_cache_bytes,
        lambda text: send(Note("warning", text)),
        owner=spec.feature_cache_owner,
    )


def _effort(entrant: BackboneScoring) -> tuple[float, bool]:
    # The cheapest go first, so that time runs out on the dearest.
    row, known = entrant.row, registry.find(entrant.row.backbone)
    return (known and known.gflops) or math.inf, row.weights.startswith("random:")


def _height(row: RankedBackbone) -> float:
    return -math.inf if row.score is None else row.score


def _affordable(ready: Sequence[BackboneScoring], most: int, deadline: float) -> int:
    """How many images, those of the first round included, all find time for."""
    if not ready:
        return 0
    each_s = sum(entrant.image_s for entrant in ready) or 1e-9
    left_s = (deadline - time.monotonic()) * _PLANNED
    return min(most, FIRST_IMAGES + int(left_s / each_s))


def _sample(spec: RankSpec) -> Part:
    source = Source(Path(spec.data_dir), spec.data_index)
    index = source.read(spec.threads)
    images = [image for image in source.images(index) if image.part in ("", "train")]
    targets = _numbered([image.label for image in images])
    if (found := len(set(targets))) < 2:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"the images to learn from are of {found} class: backbones are ranked by how well they "
            "tell 2 classes or more apart",
        )
    places = transferability.spread(targets, spec.seed)[:MOST_RANKED_IMAGES]
    return Part(
        tuple(images[place].path for place in places),
        tuple(images[place].digest for place in places),
        targets[places],
        decoding=ImageDecoding(bit_depth=index.bit_depth or DEFAULT_DECODING.bit_depth),
    )


def _numbered(labels: Sequence[str]) -> Ints:
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _runtime(spec: RankSpec) -> OnnxRuntime:
    try:
        return OnnxRuntime(choose_provider(spec.provider), spec.threads, spec.precision)
    except ProviderUnavailable as error:
        raise GraftError(Reason.DEVICE_UNAVAILABLE, str(error)) from error


def _explained(rows: Sequence[RankedBackbone], absent: Sequence[str], images: int) -> str:
    """Why the first is first, for people."""
    scored = [row for row in rows if row.score is not None]
    text = _of_first(scored, images) if scored else "No backbone could be scored."
    unscored = [_name(row) for row in rows if row.score is None]
    if unscored:
        text += f" Not scored, each for its own problem: {', '.join(unscored)}."
    if absent:
        text += f" Left out, since their weights are not on this machine: {', '.join(absent)}."
    return text


def _of_first(scored: Sequence[RankedBackbone], images: int) -> str:
    first, *others = scored
    assert first.score is not None
    cost = f"{first.image_ms:.3g} ms an image"
    if not others:
        return (
            f"{_name(first)} is the only one that was scored (LogME {first.score:.3f}, {cost}): "
            "there is nothing to compare it with."
        )
    second = others[0]
    assert second.score is not None
    text = (
        f"{_name(first)} is first: on {images} images its features explain the classes best "
        f"(LogME {first.score:.3f}, then {_name(second)} with {second.score:.3f}), at {cost}."
    )
    if (first.score - second.score) * images < _STRONG:
        text += (
            f" The two are too close to call: choose by cost, {_name(second)} takes "
            f"{second.image_ms:.3g} ms."
        )
    return text


def _name(row: RankedBackbone) -> str:
    return f"{row.backbone} (random weights)" if row.weights.startswith("random") else row.backbone
