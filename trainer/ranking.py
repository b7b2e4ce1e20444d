"""Which backbone to start from: backbones scored on the data, none trained.

Each is scored twice on the same images: by the cross-validated log loss of a quick head on its
features, which is what a head will be measured by, and by LogME, which learns from all images
at once and charges for features that explain nothing. The loss sorts; among those within one
standard error of the least, where it hardly tells, LogME does. What is too close to the first to
call (within a standard error of its loss, and less than a strong lead of LogME) is decided by
cost, unless images are few. How often that is right and what it costs: `docs/explanation/log.md`.
What cannot be scored is listed last, with its problem, and fails nothing else.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from service import backbones as registry
from service.contract import (
    MOST_RANKED_IMAGES,
    BackbonesRanked,
    Note,
    PretrainedBackbone,
    Progressed,
    RankedBackbone,
    RankSpec,
)
from service.domain import DEFAULT_DECODING, ImageDecoding
from service.engine.feature_cache import FeatureCache
from service.engine.runtime import OnnxRuntime
from service.errors import InvalidInput, Reason, WrongState
from trainer import folds, transferability
from trainer.arrays import Doubles, Ints
from trainer.backbone_file import runtime_of
from trainer.data import Part, Source
from trainer.ranked_backbone import NO_TIME, BackboneScoring
from trainer.records import Send

_CHOOSE = 3
"""One training image in so many chooses the backbone of a job."""
ROUND_IMAGES = 100
"""All backbones see so many more, in turn, as long as all find time for them."""
_FEATURES_PART = 0.7
"""Of the time that computing features may take; the rest is for scoring."""
_STRONG = 3.0
"""Nats of LogME, of all images: less is no strong lead (Kass and Raftery 1995)."""
_FEW_IMAGES = 30
"""Fewer show no difference where there is one, and let cost decide nothing."""
_LEVEL_COST = 1.1
"""Costs that differ by less are the same."""
_TINY = 1e-12


def rank(spec: RankSpec, send: Send) -> BackbonesRanked:
    """Scores the backbones on the training images of `spec.data`, best first.

    Raises InvalidInput (DATASET_UNUSABLE) when there are none to score on. Ends
    within the time budget, but for what it is at when that runs out: reading the
    sample, an export, or a few batches.
    """
    started = time.monotonic()
    send(Progressed("preparing", 0.0, "reading a sample of the images"))
    return _ranked(spec, _sample(spec), runtime_of(spec, is_narrow=False), started, send)[1]


def choosers(part: Part, seed: int) -> Part:
    """Returns the training images that are to choose a backbone: a third, in turn from each class.

    Nothing is reported of those: what chose is no measure of what was chosen.
    """
    count = max(2, len(part) // _CHOOSE)
    return _of(part, transferability.spread(part.targets, seed)[: min(MOST_RANKED_IMAGES, count)])


def choose(
    spec: RankSpec, part: Part, runtime: OnnxRuntime, send: Send
) -> tuple[PretrainedBackbone, BackbonesRanked]:
    """The backbone that ranks first on the images of a part, and the ranking.

    Where none could be scored in time, the cheapest that is here, and that is said.
    `runtime` is what serves; the spec's `data` and `provider` are not looked at.
    Raises WrongState (WEIGHTS_UNAVAILABLE) when no backbone could be had.
    """
    started = time.monotonic()
    entrants, ranked = _ranked(spec, part, runtime, started, send)
    for entrant in entrants:
        if entrant.row is ranked.ranking[0] and entrant.row.log_me is not None:
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
    raise WrongState(
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
    images = min(ROUND_IMAGES, len(sample))
    # A trainer that is ended at once removes nothing: whose folder it is does.
    with tempfile.TemporaryDirectory(prefix="graft-rank-", dir=spec.work_dir or None) as folder:
        # The cheapest go first, so that time runs out on the dearest.
        for index, entrant in enumerate(sorted(entrants, key=_effort)):
            send(Progressed("features", index / len(entrants), entrant.title))
            entrant.prepare(_of(sample, slice(images)), deadline, Path(folder))
    ready = [entrant for entrant in entrants if not entrant.row.problem]
    planned = started + _FEATURES_PART * spec.time_budget_s
    round_s = ROUND_IMAGES * sum(entrant.image_s for entrant in ready)
    while ready and images < len(sample) and time.monotonic() + round_s <= planned:
        send(Progressed("features", images / len(sample), f"{images} of {len(sample)} images"))
        more = _of(sample, slice(images, images + ROUND_IMAGES))
        # On the same images for all, or the scores could not be compared.
        if not all(entrant.extend(more, deadline) for entrant in ready):
            break
        images += len(more)
    targets = sample.targets[:images]
    dealt = folds.deal(targets)
    for entrant in ready:
        entrant.score(targets, dealt)
    if cache is not None:
        cache.close()
    order, why = ordered([entrant for entrant in ready if not entrant.row.problem], images)
    # What has no score stays in the order it was named in.
    rest = [entrant for entrant in entrants if entrant not in order]
    rows = [entrant.row for entrant in [*order, *rest]]
    return entrants, BackbonesRanked(rows, _explained(why, rows, absent), images)


class Scored(Protocol):
    """A backbone that was scored."""

    @property
    def row(self) -> RankedBackbone:
        """Its scores and its cost."""

    @property
    def losses(self) -> Doubles:
        """Nats [n], of the images in their order by a head that did not see them, or NaN."""


S = TypeVar("S", bound=Scored)


def ordered(scored: Sequence[S], images: int) -> tuple[list[S], str]:
    """Returns the backbones, the one to take first and the others by their loss, and why."""
    if not scored:
        return [], "No backbone could be scored."
    by_score = sorted(scored, key=_score)
    best = by_score[0]
    level = [each for each in scored if _lead(best, each) <= 1]
    # Where scores do not tell, having learned from images does.
    level = [each for each in level if not _is_random(each)] or level
    leader = max(level, key=lambda each: each.row.log_me or -math.inf)
    close = [each for each in by_score if each is leader or _is_close(leader, each, images)]
    if images < _FEW_IMAGES:
        close = [leader]
    least_ms = min(each.row.image_ms or 0.0 for each in close)
    cheap = [each for each in close if (each.row.image_ms or 0.0) <= _LEVEL_COST * least_ms]
    first = leader if leader in cheap else cheap[0]
    rest = [each for each in by_score if each is not first]
    return [first, *rest], _why(first, leader, close, rest, images)


def _score(entrant: Scored) -> tuple[float, float]:
    row = entrant.row
    return math.inf if row.log_loss is None else row.log_loss, -(row.log_me or 0.0)


def _lead(first: Scored, other: Scored) -> float:
    """How much less the loss of the first is, in standard errors, by the same images.

    0 where nothing was held out.
    """
    difference = other.losses - first.losses
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        return 0.0
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return float(difference.mean()) / max(error, _TINY)


def _is_close(leader: Scored, other: Scored, images: int) -> bool:
    """Whether neither score tells the other from the leader.

    Within a 95 % interval instead of one standard error more would be saved, and more lost: see
    the log.
    """
    assert leader.row.log_me is not None
    assert other.row.log_me is not None
    # However little it costs, what never learned from an image is no bargain.
    if _is_random(other) and not _is_random(leader):
        return False
    lead = (leader.row.log_me - other.row.log_me) * images
    return lead < _STRONG and _lead(leader, other) <= 1


def _is_random(entrant: Scored) -> bool:
    return entrant.row.weights.startswith("random:")


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


def _sample(spec: RankSpec) -> Part:
    source = Source.of(spec.data, spec.files)
    index = source.read(spec.threads)
    images = [image for image in source.images(index) if image.part in ("", "train")]
    targets = np.unique([image.label for image in images], return_inverse=True)[1]
    if (found := len(set(targets))) < 2:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"the images to learn from are of {found} class: backbones are ranked by how well they "
            "tell 2 classes or more apart",
        )
    places = transferability.spread(targets, spec.seed)[:MOST_RANKED_IMAGES]
    return Part(
        tuple(images[place].location for place in places),
        tuple(images[place].digest for place in places),
        targets[places],
        decoding=ImageDecoding(bit_depth=index.bit_depth or DEFAULT_DECODING.bit_depth),
    )


def _explained(why: str, rows: Sequence[RankedBackbone], absent: Sequence[str]) -> str:
    """Why the first is first, and what was not scored, for people."""
    unscored = [_name(row) for row in rows if row.log_me is None]
    if unscored:
        why += f" Not scored, each for its own problem: {', '.join(unscored)}."
    if absent:
        why += f" Left out, since their weights are not on this machine: {', '.join(absent)}."
    return why


def _why(
    first: Scored,
    leader: Scored,
    close: Sequence[Scored],
    rest: Sequence[Scored],
    images: int,
) -> str:
    name, cost = _name(first.row), f"{first.row.image_ms:.3g} ms an image"
    if not rest:
        return (
            f"{name} is the only one that was scored ({_figures(first.row)}, {cost}): there is "
            "nothing to compare it with."
        )
    others = [each for each in close if each is not first]
    if not others:
        few = " So few images let cost decide nothing." if images < _FEW_IMAGES else ""
        return (
            f"{name} is first: on {images} images a head on its features does best "
            f"({_figures(first.row)}; then {_name(rest[0].row)}, {_figures(rest[0].row)}), at "
            f"{cost}.{few}"
        )
    told = ", ".join(
        f"{_name(each.row)} ({_figures(each.row)}, {each.row.image_ms:.3g} ms)" for each in others
    )
    why = (
        "the best by its scores, and none is clearly cheaper"
        if first is leader
        else f"the cheapest; {_name(leader.row)} scores best, by no more than chance explains"
    )
    return (
        f"{name} is first ({_figures(first.row)}, {cost}): {images} images do not tell it from "
        f"{told}, and it is {why}."
    )


def _figures(row: RankedBackbone) -> str:
    assert row.log_me is not None
    loss = "no log loss" if row.log_loss is None else f"log loss {row.log_loss:.3f}"
    return f"{loss}, LogME {row.log_me:.3f}"


def _name(row: RankedBackbone) -> str:
    return f"{row.backbone} (random weights)" if row.weights.startswith("random") else row.backbone
