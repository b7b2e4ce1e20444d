"""Queues images before the workers, fairly between tenants in seconds of work.

Images leave one by one. The next is of the tenant that has used the least of the workers'
time since it began to wait, and a tenant's models take turns: neither many calls, nor many
models or backbones, nor costly images get a tenant more than the others. What an image costs
is estimated when it leaves, and set right (`charge`) when it was measured. Not thread-safe:
`workers` holds the lock. Computes nothing.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from service.domain import DEFAULT_DECODING, Decision, ImageDecoding, ModelKey
from service.engine.head import Floats, Head
from service.engine.preprocess import Pixels
from service.engine.runtime import Session
from service.errors import GraftError

Decode = Callable[[ImageDecoding], Pixels]
"""Makes one image's pixels as its version decodes them; runs in a thread; raises InvalidInput
for a bad image. A `preprocess.Encoded` also reports its size before it is decoded."""

_NEW = 0.1
"""Weight of the newest sample in a mean."""
_MOST_TIMES = 4
"""A sample counts as at most this many times the mean: one slow image says little of the next."""
_HALF_LIFE_S = 10.0
"""Time in which a mean returns half the way to its first value."""


@dataclass(frozen=True, eq=False)
class Classified:
    """One image's answer."""

    probabilities: Floats
    """float32 [classes], adding up to 1."""
    features: Floats
    """float32 [d], those that the head takes."""
    classes: tuple[str, ...]
    answer: int
    """The class by the call's decision, or by the head's own; see `Head.decide`."""
    outlier_score: float | None = None
    """Above 1 is out of distribution; None for heads without an `Outliers`."""
    is_calibrated: bool = True
    """See `Head.is_calibrated`."""


Outcome = Classified | GraftError

Finish = Callable[[list[list[Outcome]]], Any]
"""Makes what a caller gets of its outcomes: a list for each model, of one for each image. Runs in
a worker's thread; may raise."""


class Estimate:
    """A running mean of seconds that returns to its first value when nothing is measured."""

    def __init__(self, initial_s: float) -> None:
        self._initial_s = self._mean_s = initial_s
        self._updated = 0.0

    def at(self, now: float) -> float:
        """Reads the mean at a time of the clock."""
        kept: float = 0.5 ** (max(0.0, now - self._updated) / _HALF_LIFE_S)
        return self._initial_s + kept * (self._mean_s - self._initial_s)

    def add(self, seconds: float, now: float) -> None:
        """Adds a sample that was measured until now."""
        # While it was measured nothing was forgotten.
        mean_s = self.at(now - seconds)
        self._mean_s = mean_s + _NEW * (min(seconds, _MOST_TIMES * mean_s) - mean_s)
        self._updated = now


@dataclass(eq=False)
class Backbone:
    """A session, and what inference costs on it."""

    session: Session
    digest: str = ""
    """The sha256 of its file."""
    infer_s: Estimate = field(init=False)
    """Seconds that one core computes for an image."""
    waiting: int = 0
    """Images that wait for it."""

    def __post_init__(self) -> None:
        self.infer_s = Estimate(self.session.infer_s)

    @property
    def nbytes(self) -> int:
        """Bytes of the session, about."""
        return self.session.nbytes


class Run(NamedTuple):
    """A run of a backbone on each image of a call, for all of the call's models that share it."""

    backbone: Backbone
    decoding: ImageDecoding = DEFAULT_DECODING


class AskedHead(NamedTuple):
    """The head of a model that a call asks, and which of the call's runs gives its features."""

    run: int
    head: Head
    decision: Decision | None = None
    """Replaces the head's own."""


@dataclass(eq=False)
class ImageBatch:
    """The images of one call, for one or more models.

    An image is popped once, for all of them: whoever decodes it makes all runs on it.
    """

    model: ModelKey
    """The first of the models, whose turn the images wait for."""
    runs: Sequence[Run]
    """Of the first one's backbone the images are popped."""
    asked: Sequence[AskedHead]
    """One for each model."""
    images: Sequence[Decode]
    arrived: float
    """By the engine's clock, as is the deadline."""
    deadline: float
    answer: "asyncio.Future[Any]"
    """Gets what `finish` returns."""
    finish: Finish
    image_s: float = 0.0
    """Seconds that one worker is expected to spend on an image; set when the images are queued."""
    popped: int = 0
    """How many images have left the queue."""
    is_withdrawn: bool = False
    """Nobody waits for the answer any more."""
    outcomes: dict[int, Sequence[Outcome]] = field(default_factory=dict)
    """By image, one for each model."""
    decode_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    infer_s: list[list[float]] = field(default_factory=list)
    """For each run."""

    def __post_init__(self) -> None:
        self.infer_s = [[] for _ in self.runs]

    @property
    def backbone(self) -> Backbone:
        """Returns the backbone by which its images are popped."""
        return self.runs[0].backbone

    def runs_s(self, now: float) -> float:
        """Estimates the seconds that one core computes for all runs on an image."""
        return sum(run.backbone.infer_s.at(now) for run in self.runs)

    @property
    def tenant(self) -> str:
        """Returns the tenant whose turn the images wait for."""
        return self.model.tenant

    @property
    def waiting(self) -> int:
        """How many of its images are in the queue."""
        return 0 if self.is_withdrawn else len(self.images) - self.popped

    @property
    def by_model(self) -> list[list[Outcome]]:
        """Its outcomes by model, each as its images were given, once it has all of them."""
        images = [self.outcomes[place] for place in range(len(self.images))]
        return [list(of_one) for of_one in zip(*images, strict=True)]


Item = tuple[ImageBatch, int]
"""An image: its batch, and its place in the batch."""

_Line = tuple[ModelKey, Backbone]
"""Batches of one model on one backbone (its versions may be on several)."""


@dataclass(eq=False)
class _Tenant:
    """What one tenant has waiting; every line has an image at least."""

    lines: OrderedDict[_Line, deque[ImageBatch]] = field(default_factory=OrderedDict)
    images: dict[ModelKey, int] = field(default_factory=dict)
    """Images by model; no zeros."""
    seconds: float = 0.0
    """What they are expected to cost one worker."""

    @property
    def waiting(self) -> int:
        return sum(self.images.values())

    def next_line(self, backbone: Backbone | None) -> _Line | None:
        """Finds the line whose turn it is, of any backbone for None."""
        return next((line for line in self.lines if backbone in (None, line[1])), None)


class FairQueue:
    """Batches whose images wait, by tenant and model."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        """Those with images waiting."""
        self._used_s: dict[str, float] = {}
        """Seconds of work by tenant. Start-time fair queueing (Goyal, Vin and Cheng 1996): a
        tenant that begins to wait is set to `_virtual_s`, so that time that nobody else wanted is
        neither owed nor saved up."""
        self._virtual_s = 0.0
        """What the tenant had used whose image left last."""
        self.waiting = 0
        """Images that wait."""

    def put(self, batch: ImageBatch) -> None:
        """Adds a batch."""
        name = batch.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant()
            self._used_s[name] = max(self._used_s.get(name, 0.0), self._virtual_s)
        tenant.lines.setdefault((batch.model, batch.backbone), deque()).append(batch)
        self._count(batch, batch.waiting)

    def withdraw(self, batch: ImageBatch) -> None:
        """Takes a batch's images out, if any wait."""
        waiting = batch.waiting
        batch.is_withdrawn = True
        if waiting:
            self._remove(batch)
            self._count(batch, -waiting)

    def pop(self, now: float, backbone: Backbone | None = None) -> Item | None:
        """Takes out the next image, of one backbone where it is given; None where none waits.

        Withdraws the batches that it is too late for.
        """
        while (found := self._next(backbone)) is not None:
            name, line = found
            tenant = self._tenants[name]
            batch = tenant.lines[line][0]
            if self._is_too_late(batch, now):
                self.withdraw(batch)
                continue
            self._virtual_s = max(self._virtual_s, self._used_s[name])
            self._used_s[name] += batch.image_s
            # For those of equal use, such as the first images of all.
            self._tenants.move_to_end(name)
            tenant.lines.move_to_end(line)
            place = batch.popped
            batch.popped += 1
            if not batch.waiting:
                self._remove(batch)
            self._count(batch, -1)
            return batch, place
        return None

    def charge(self, tenant: str, seconds: float) -> None:
        """Adds to what a tenant has used, where more or less was spent than estimated."""
        self._used_s[tenant] += seconds

    def queued_ahead_s(self, batch: ImageBatch) -> float:
        """Estimates what is done before the last image of a new batch, for one worker.

        Of its own tenant's models each has a turn for every image of its own model; of another
        tenant as many seconds are done as of its own, at most.
        """
        own = self._tenants.get(batch.tenant)
        own_s = batch.image_s * len(batch.images)
        ahead_s = 0.0
        if own is not None:
            turns = own.images.get(batch.model, 0) + len(batch.images)
            ahead = sum(min(waiting, turns) for waiting in own.images.values())
            ahead_s = own.seconds * ahead / own.waiting
        return ahead_s + sum(
            min(other.seconds, ahead_s + own_s)
            for name, other in self._tenants.items()
            if name != batch.tenant
        )

    def batch_to_shed(self, model: ModelKey, count: int) -> ImageBatch | None:
        """Finds the batch to refuse so that `count` images of a model find room, if it is fairer.

        It is of the tenant with most images waiting, if that has more of them than
        the model's own tenant would have; else of its own tenant. There it is the newest
        of the model with most, if that has more than `model` would have.
        """
        name = model.tenant
        own = self._tenants.get(name)
        mine = (own.waiting if own else 0) + count
        others = {key: other.waiting for key, other in self._tenants.items() if key != name}
        most = max(others, key=others.__getitem__, default="")
        if others and others[most] > mine:
            images = self._tenants[most].images
            # All batches of the first of them may have begun.
            by_length = sorted(images, key=images.__getitem__, reverse=True)
            found = (self._newest(most, longest) for longest in by_length)
            if (batch := next((each for each in found if each is not None), None)) is not None:
                return batch
        if own is None:
            return None
        longest = max(own.images, key=own.images.__getitem__)
        if longest == model or own.images[longest] <= own.images.get(model, 0) + count:
            return None
        return self._newest(name, longest)

    def _newest(self, tenant: str, model: ModelKey) -> ImageBatch | None:
        batches = (
            batch
            for line, batches in self._tenants[tenant].lines.items()
            if line[0] == model
            for batch in batches
            # One that has begun would waste what was done for it.
            if batch.popped == 0
        )
        return max(batches, key=lambda batch: batch.arrived, default=None)

    def _next(self, backbone: Backbone | None) -> tuple[str, _Line] | None:
        eligible = (
            (name, line)
            for name, tenant in self._tenants.items()
            if (line := tenant.next_line(backbone)) is not None
        )
        return min(eligible, key=lambda found: self._used_s[found[0]], default=None)

    def _is_too_late(self, batch: ImageBatch, now: float) -> bool:
        # An estimate takes nothing from the last that wait: running them is what corrects it.
        is_alone = self.waiting == batch.waiting
        needed_s = 0.0 if is_alone else batch.runs_s(now)
        return batch.deadline <= now + needed_s

    def _remove(self, batch: ImageBatch) -> None:
        lines = self._tenants[batch.tenant].lines
        line = batch.model, batch.backbone
        lines[line].remove(batch)
        if not lines[line]:
            del lines[line]

    def _count(self, batch: ImageBatch, images: int) -> None:
        self.waiting += images
        batch.backbone.waiting += images
        tenant = self._tenants[batch.tenant]
        tenant.seconds += images * batch.image_s
        if waiting := tenant.images.get(batch.model, 0) + images:
            tenant.images[batch.model] = waiting
        else:
            del tenant.images[batch.model]
            if not tenant.images:
                del self._tenants[batch.tenant]
