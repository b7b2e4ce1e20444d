"""The queue before the workers: fair between tenants, their models, and backbones.

Images leave in turn, one of each tenant, and of a tenant's models in turn, so that
a flood for one model delays another by an image a round and no more, and nobody gets
more by having more models. A batch is of one backbone; backbones take turns too. Not
thread-safe: `workers` holds the lock. Knows nothing of sessions and computes nothing.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.domain import DEFAULT_DECODING, Decision, ImageDecoding, tenant_of
from service.engine.head import Floats, Head
from service.engine.preprocess import Pixels
from service.engine.runtime import Session
from service.errors import GraftError

Decode = Callable[[ImageDecoding], Pixels]
"""Makes one image's pixels, as its version decodes them; runs in a thread; raises InvalidInput
for a bad image."""


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
    """Above 1 is out of distribution; None for heads that do not know."""
    is_calibrated: bool = True
    """See `Head.is_calibrated`."""


Outcome = Classified | GraftError

Finish = Callable[[list[Outcome]], Any]
"""Makes what a caller gets of its outcomes; runs in a worker's thread; may raise."""


@dataclass(eq=False)
class Backbone:
    """A session, and what an image costs on it."""

    session: Session
    image_s: float
    """Seconds that one worker spends on an image, decoding included; a running mean."""
    waiting: int = 0
    """Images that wait for it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the session, about."""
        return self.session.nbytes


@dataclass(eq=False)
class Call:
    """Images that were sent together for one model."""

    model: str
    """Its key, which tells the tenant."""
    backbone: Backbone
    head: Head
    images: Sequence[Decode]
    arrived: float
    """Of time.monotonic, as is the deadline."""
    deadline: float
    answer: "asyncio.Future[Any]"
    """Gets what `finish` returns."""
    decoding: ImageDecoding = DEFAULT_DECODING
    decision: Decision | None = None
    """Instead of the head's own."""
    finish: Finish = list
    tenant: str = field(init=False)
    image_s: float = field(init=False)
    """What an image was thought to cost when the call arrived."""
    taken: int = 0
    """How many images left the queue; all of them once the call has ended."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    decode_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    infer_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tenant = tenant_of(self.model)
        self.image_s = self.backbone.image_s

    @property
    def waiting(self) -> int:
        """How many of its images are in the queue."""
        return len(self.images) - self.taken

    @property
    def in_order(self) -> list[Outcome]:
        """Its outcomes as its images were given, once it has all of them."""
        return [self.outcomes[place] for place in range(len(self.images))]


Item = tuple[Call, int]
"""An image: its call, and which of the call's it is."""


_Models = OrderedDict[str, deque[Call]]


class FairQueue:
    """Calls whose images wait, by backbone, tenant and model."""

    def __init__(self) -> None:
        self._backbones: OrderedDict[Backbone, OrderedDict[str, _Models]] = OrderedDict()
        self._waiting_of: dict[str, dict[str, int]] = {}
        """Images by tenant and model; no zeros."""
        self.waiting = 0
        """Images that wait."""
        self.backlog_s = 0.0
        """What they cost one worker."""

    def put(self, call: Call) -> None:
        """Adds a call's images."""
        tenants = self._backbones.setdefault(call.backbone, OrderedDict())
        models = tenants.setdefault(call.tenant, OrderedDict())
        models.setdefault(call.model, deque()).append(call)
        self._count(call, call.waiting)

    def leave(self, call: Call) -> None:
        """Takes a call's images out, if any wait; the shell is dropped on its turn."""
        self._count(call, -call.waiting)
        call.taken = len(call.images)

    def ahead_s(self, model: str, count: int) -> float:
        """What goes before the last of `count` more images of a model, for one worker."""
        if not self.waiting:
            return 0.0
        tenant = tenant_of(model)
        own = self._waiting_of.get(tenant, {})
        rounds = own.get(model, 0) + count
        ahead = sum(min(waiting, rounds) for waiting in own.values())
        rounds = ahead + count
        ahead += sum(
            min(sum(models.values()), rounds)
            for other, models in self._waiting_of.items()
            if other != tenant
        )
        return self.backlog_s * ahead / self.waiting

    def newest_of_longest(self, model: str, count: int) -> Call | None:
        """The call to refuse so that `count` images of a model find room, if that is fairer.

        It is of the tenant with most images waiting, if that has more of them than
        the model's own tenant would have; else of its own tenant. There it is the newest
        of the model with most, if that has more than `model` would have.
        """
        tenant = tenant_of(model)
        own = self._waiting_of.get(tenant, {})
        if len(self._waiting_of) > 1:
            found = self._of_another(tenant, sum(own.values()) + count)
            if found is not None:
                return found
        longest = max(own, key=own.__getitem__, default=model)
        if longest == model or own[longest] <= own.get(model, 0) + count:
            return None
        return self._newest(tenant, longest)

    def _of_another(self, tenant: str, mine: int) -> Call | None:
        totals = {other: sum(models.values()) for other, models in self._waiting_of.items()}
        other = max(totals, key=totals.__getitem__)
        if other == tenant or totals[other] <= mine:
            return None
        models = self._waiting_of[other]
        # The first of them may all have begun.
        by_length = sorted(models, key=models.__getitem__, reverse=True)
        newest = (self._newest(other, model) for model in by_length)
        return next((call for call in newest if call is not None), None)

    def _newest(self, tenant: str, model: str) -> Call | None:
        calls = (
            call
            for tenants in self._backbones.values()
            if tenant in tenants
            for call in tenants[tenant].get(model, ())
            # One that has begun would waste what was done for it.
            if call.taken == 0
        )
        return max(calls, key=lambda call: call.arrived, default=None)

    def take(self, most: Callable[[Backbone], int], now: float) -> tuple[list[Item], list[Call]]:
        """The next batch, all of one backbone, and the calls that it is too late for.

        `most` says how many images to take for a backbone.
        """
        late: list[Call] = []
        while self.waiting:
            backbone, tenants = self._backbones.popitem(last=False)
            count = most(backbone)
            batch = self._take_in_turn(tenants, count, now + backbone.image_s, late)
            if tenants:
                self._backbones[backbone] = tenants
            if batch:
                return batch, late
        self._backbones.clear()
        return [], late

    def _take_in_turn(
        self,
        tenants: OrderedDict[str, _Models],
        count: int,
        soonest: float,
        late: list[Call],
    ) -> list[Item]:
        batch: list[Item] = []
        while tenants and len(batch) < count:
            # One that is alone need not wait for its turn.
            share = 1 if len(tenants) > 1 else count - len(batch)
            tenant, models = tenants.popitem(last=False)
            batch += self._take(models, share, soonest, late)
            if models:
                tenants[tenant] = models
        return batch

    def _take(self, models: _Models, count: int, soonest: float, late: list[Call]) -> list[Item]:
        batch: list[Item] = []
        while models and len(batch) < count:
            model, calls = models.popitem(last=False)
            while calls:
                call = calls[0]
                if call.waiting and call.deadline < soonest:
                    self.leave(call)
                    late.append(call)
                if call.waiting:
                    batch.append((call, call.taken))
                    self._count(call, -1)
                    call.taken += 1
                    break
                calls.popleft()
            if calls:
                models[model] = calls
        return batch

    def _count(self, call: Call, images: int) -> None:
        self.waiting += images
        call.backbone.waiting += images
        # Begun anew at zero, so that no rounding stays.
        self.backlog_s = self.backlog_s + images * call.image_s if self.waiting else 0.0
        models = self._waiting_of.get(call.tenant)
        if models is None:
            models = self._waiting_of[call.tenant] = {}
        waiting = models.get(call.model, 0) + images
        if waiting:
            models[call.model] = waiting
        else:
            models.pop(call.model, None)
            if not models:
                del self._waiting_of[call.tenant]
