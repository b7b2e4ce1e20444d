"""What a finished model is held against: its gate, the version before it, the baselines."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt

from service.contract import Incumbent, Note
from service.domain import GateCheck, Parity
from service.engine import head as heads
from service.engine import preprocess
from service.engine.head import NONE, Head
from service.engine.preprocess import Pixels
from service.errors import GraftError
from trainer import answers as kept
from trainer import baselines as others
from trainer import gate, stored_file
from trainer.answers import Role
from trainer.arrays import Bools, Floats, Ints
from trainer.backbone_file import BackboneFile, runtime_of
from trainer.data import Part
from trainer.evaluate import Metrics
from trainer.gate import Paired
from trainer.job import Job
from trainer.measuring import Measured
from trainer.reporting import comparisons
from trainer.reporting.comparisons import Comparison
from trainer.transfer import Transferred

_LATENCY_IMAGES = 8
_IDENTICAL = 2e-3
"""Probabilities that differ by no more are taken for the same: kept ones are rounded, and sums on
another machine differ in their last digits."""
_BUDGET_PART = 0.8
"""Of what is left of the job's time that baselines may take."""


def gate_checks(
    job: Job,
    found: Transferred,
    sets: Sequence[Measured],
    metrics: Metrics | None,
    parity: Parity,
) -> list[GateCheck]:
    """How the version does at the conditions that its request named.

    `sets` are what it was measured on, and `metrics` those of the headline.
    """
    asked = job.spec.gate
    if asked is None:
        return []
    paired, problem = None, ""
    if job.spec.incumbent is not None and asked.not_worse_than:
        try:
            paired = _paired(job, found, job.spec.incumbent, sets)
        except (GraftError, KeyError, OSError, ValueError) as error:
            problem = f"version {job.spec.incumbent.version} may be gone or damaged ({error})"
            job.send(Note("warning", problem))
    return gate.checks(asked, metrics, parity, paired, partial(_latency_ms, job, found), problem)


def _paired(job: Job, found: Transferred, incumbent: Incumbent, sets: Sequence[Measured]) -> Paired:
    """Pairs the answers of both versions to images that neither learned from.

    Of an image that the incumbent learned from its kept out-of-fold answer counts; one that it
    never saw is asked of it now, unless it learned from a copy. Raises what loading it raises.
    """
    digest = incumbent.head_digest
    head = heads.load(stored_file.read(job.file(digest), digest, "head"))
    known = kept.load(job.file(incumbent.answers_digest))
    learned, adapted = _groups_learned(found, known)
    right, theirs, groups, new, left_out = [], [], [], [], 0
    is_identical, relabelled = head.classes == found.served.head.classes, 0
    for each in sets:
        if each.measured_on == "source":
            continue
        classes = np.array(found.served.head.classes, dtype=object)
        true = classes[each.part.targets]
        ours = each.answers == each.part.targets
        is_known = np.isin(true, head.classes)
        new.append(ours[~is_known])
        named, shares = np.full(len(true), "", dtype=object), np.zeros(len(true))
        is_asked, unseen = np.zeros((2, len(true)), np.bool_)
        for i, digest in enumerate(each.part.digests):
            if (answer := known.get(digest)) is None:
                theirs_too = adapted if each.measured_on == "target" else learned
                unseen[i] = is_known[i] and each.groups[i] not in theirs_too
            elif answer.label in ("", true[i]):
                is_asked[i] = answer.answered is not None
                named[i], shares[i] = answer.answered, answer.probability
            else:
                # It was taught another class, or measured by one.
                relabelled += 1
        if unseen.any():
            named[unseen], shares[unseen] = _answered(job, incumbent, head, each.part.take(unseen))
            is_asked |= unseen
        is_paired = is_known & is_asked
        left_out += int((is_known & ~is_paired).sum())
        right.append(ours[is_paired])
        theirs.append((named == true)[is_paired])
        groups.append(each.groups[is_paired])
        own = _named(classes, each.answers) == named
        own &= np.abs(each.probabilities.max(axis=1) - shares) <= _IDENTICAL
        is_identical &= bool(own[is_paired].all())
    if relabelled:
        text = (
            f"{relabelled} images are in another class than in version {incumbent.version}: the "
            "two are not compared on them; see that the classes are not mixed up"
        )
        job.send(Note("warning", text))
    none, no_groups = np.zeros(0, np.bool_), np.zeros(0, np.int64)
    return Paired(
        right=np.concatenate([none, *right]).astype(np.bool_),
        incumbent_right=np.concatenate([none, *theirs]).astype(np.bool_),
        groups=np.concatenate([no_groups, *groups]),
        left_out=left_out,
        new_class_right=np.concatenate([none, *new]).astype(np.bool_),
        chance=1 / len(head.classes),
        is_identical=is_identical,
    )


def _groups_learned(found: Transferred, known: dict[str, kept.Answer]) -> tuple[set[int], set[int]]:
    """Returns the groups of which the incumbent learned from an image: of the data, the target."""
    data = found.divided.data
    digests = (*data.train.digests, *data.validation.digests, *data.test.digests)

    def learned(digests: Sequence[str], groups: Ints) -> set[int]:
        return {
            int(group)
            for digest, group in zip(digests, groups, strict=True)
            if (answer := known.get(digest)) is not None and answer.role != Role.HELD_OUT
        }

    adapted = set[int]()
    if found.target is not None and found.target_groups is not None:
        adapted = learned(found.target.images.digests, found.target_groups)
    return learned(digests, found.divided.found.of), adapted


def _answered(
    job: Job, incumbent: Incumbent, head: Head, part: Part
) -> tuple[npt.NDArray[np.object_], Floats]:
    """Returns the incumbent's answers [n], by its own decision, and its largest probabilities."""
    digest = incumbent.backbone_digest
    seen = replace(part, decoding=incumbent.decoding)
    features = job.features_of_file(job.file(digest), digest).of(seen, "the version before")
    probabilities = head.probabilities(features)
    names = np.array(head.classes, dtype=object)
    return _named(names, head.decide(probabilities)), probabilities.max(axis=1)


def _named(classes: npt.NDArray[np.object_], answers: Ints) -> npt.NDArray[np.object_]:
    """Returns the names [n] of answers [n], "" for none."""
    return np.where(answers == NONE, "", classes[answers])


def compared(job: Job, found: Transferred, headline: Measured | None) -> list[Comparison]:
    """Compares the version with simpler and dearer ones, on the images of the headline."""
    if headline is None:
        return []
    part, groups, served = headline.part, headline.groups, headline.answers
    classes = len(found.served.head.classes)
    train = found.divided.data.train
    measured = []
    if headline.measured_on == "cross_validation":
        measured.append(_nearest_mean_by_folds(job, found, part))
    elif found.target is None:
        learned = train.take(~found.held)
        means = comparisons.nearest_class_mean(
            job.frozen.of(learned), learned.targets, job.frozen.of(part), classes
        )
        measured.append(comparisons.Measured("nearest_class_mean", means))
    commonest = comparisons.majority_class(train.targets, len(part))
    measured.append(comparisons.Measured("majority_class", commonest))
    told = [comparisons.compare(each, served, part.targets, groups) for each in measured]
    learned_mask, asked = _parted(job, found, headline)
    if not asked.any():
        if job.spec.baselines:
            text = "too few images are there to hold some out: baselines that train are left out"
            job.send(Note("warning", text))
        return told
    bench = others.Bench(
        spec=job.spec,
        divided=found.divided,
        learned=learned_mask,
        measured=part.take(asked),
        frozen=job.frozen,
        linear_probe=lambda: job.linear_probe(*found.divided.dealt(learned_mask)),
        decide=found.served.head.decide,
        budget_s=_budget_s(job),
        send=job.send,
    )
    fitted = f", fitted to {int(learned_mask.sum())} of {len(train)} images"
    is_probe = found.method == "feature_based" and found.used.get("features") == "last layer"
    for each in others.measure(bench, "linear_probe" if is_probe else ""):
        one = comparisons.compare(each, served[asked], part.targets[asked], groups[asked])
        if headline.measured_on == "cross_validation":
            # The heads that answered for the version saw more.
            one = msgspec.structs.replace(one, title=one.title + fitted)
        told.append(one)
    return told


def _nearest_mean_by_folds(job: Job, found: Transferred, part: Part) -> comparisons.Measured:
    """Answers by the nearest class mean, each fold's images by the means of the others."""
    train = found.divided.data.train
    place = {digest: i for i, digest in enumerate(train.digests)}
    rows = np.array([place[digest] for digest in part.digests], dtype=np.int64)
    features, folds = job.frozen.of(train), found.divided.folds
    classes = len(found.served.head.classes)
    answers = np.zeros(len(part), np.int64)
    for fold in np.unique(folds[rows]):
        learned = folds != fold
        own = folds[rows] == fold
        answers[own] = comparisons.nearest_class_mean(
            features[learned], train.targets[learned], features[rows[own]], classes
        )
    return comparisons.Measured("nearest_class_mean", answers)


def _parted(job: Job, found: Transferred, headline: Measured) -> tuple[Bools, Bools]:
    """Marks what a baseline learns from, and which images of the headline it is measured on.

    Where the headline is of cross-validation, a baseline trains once, on what a network would.
    """
    if headline.measured_on != "cross_validation":
        return ~found.held, np.ones(len(headline.part), np.bool_)
    held = found.divided.held_out(job.spec.validation_fraction)
    digests = {d for d, is_held in zip(found.divided.data.train.digests, held, strict=True)
               if is_held}  # fmt: skip
    return ~held, np.array([digest in digests for digest in headline.part.digests])


def _budget_s(job: Job) -> float | None:
    if job.spec.time_budget_s is None:
        return None
    left_s = job.spec.time_budget_s - (time.monotonic() - job.started)
    return max(1.0, left_s * _BUDGET_PART)


def _latency_ms(job: Job, found: Transferred) -> float:
    spec, part = job.spec, found.divided.data.train
    # As the engine runs a lone image: on all cores.
    runtime = runtime_of(spec, is_narrow=False)
    session = BackboneFile(found.served.file, runtime).load()
    places = part.spread(_LATENCY_IMAGES)
    decode: list[Callable[[], Pixels]] = [
        partial(preprocess.decode, part.encoded(place), part.decoding) for place in places
    ]
    return gate.measure_latency_ms(decode, session, found.served.head.probabilities)
