"""The queue before the workers: fair between models, and between backbones.

Pictures leave in turn, one of each model, so that a flood for one model delays
another by a picture a round and no more. A batch is of one backbone; backbones
take turns too. Not thread-safe: `workers` holds the lock. Knows nothing of
sessions and computes nothing.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.errors import GraftError
from service.inference.head import Floats, Head
from service.inference.preprocess import Pixels
from service.inference.runtime import Session

Decode = Callable[[], Pixels]
"""Makes one picture's pixels; runs in a thread; raises InvalidInput for a bad picture."""


@dataclass(frozen=True, eq=False)
class Classified:
    """One picture's answer."""

    probabilities: Floats
    """float32 [classes], adding up to 1."""
    features: Floats
    """float32 [d], as the backbone gave them."""
    classes: tuple[str, ...]
    outlier_score: float | None = None
    """Above 1 is out of distribution; None for heads that do not know."""


Outcome = Classified | GraftError


@dataclass(eq=False)
class Backbone:
    """A session, and what a picture costs on it."""

    session: Session
    picture_s: float
    """Seconds that one worker spends on a picture, decoding included; a running mean."""
    waiting: int = 0
    """Pictures that wait for it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the session, about."""
        return self.session.nbytes


@dataclass(eq=False)
class Call:
    """Pictures that were sent together for one model."""

    model: str
    backbone: Backbone
    head: Head
    pictures: Sequence[Decode]
    arrived: float
    """Of time.monotonic, as is the deadline."""
    deadline: float
    answer: "asyncio.Future[list[Outcome]]"
    picture_s: float = field(init=False)
    """What a picture was thought to cost when the call arrived."""
    taken: int = 0
    """How many pictures left the queue; all of them once the call has ended."""
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    decode_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    infer_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.picture_s = self.backbone.picture_s

    @property
    def waiting(self) -> int:
        """How many of its pictures are in the queue."""
        return len(self.pictures) - self.taken


Item = tuple[Call, int]
"""A picture: its call, and which of the call's it is."""


class FairQueue:
    """Calls whose pictures wait, by backbone and model."""

    def __init__(self) -> None:
        self._backbones: OrderedDict[Backbone, OrderedDict[str, deque[Call]]] = OrderedDict()
        self._waiting_of: dict[str, int] = {}
        self.waiting = 0
        """Pictures that wait."""
        self.backlog_s = 0.0
        """What they cost one worker."""

    def put(self, call: Call) -> None:
        """Adds a call's pictures."""
        models = self._backbones.setdefault(call.backbone, OrderedDict())
        models.setdefault(call.model, deque()).append(call)
        self._count(call, call.waiting)

    def leave(self, call: Call) -> None:
        """Takes a call's pictures out, if any wait; the shell is dropped on its turn."""
        self._count(call, -call.waiting)
        call.taken = len(call.pictures)

    def ahead_s(self, model: str, count: int) -> float:
        """What goes before the last of `count` more pictures of a model, for one worker."""
        if not self.waiting:
            return 0.0
        rounds = self._waiting_of.get(model, 0) + count
        ahead = sum(min(waiting, rounds) for waiting in self._waiting_of.values())
        return self.backlog_s * ahead / self.waiting

    def newest_of_longest(self, model: str, count: int) -> Call | None:
        """The call to refuse so that `count` pictures of a model find room, if that is fairer.

        It is the newest of the model with most pictures waiting, if that has
        more of them than `model` would have.
        """
        longest = max(self._waiting_of, key=self._waiting_of.__getitem__, default=model)
        mine = self._waiting_of.get(model, 0) + count
        if longest == model or self._waiting_of[longest] <= mine:
            return None
        calls = (
            call
            for models in self._backbones.values()
            for call in models.get(longest, ())
            # One that has begun would waste what was done for it.
            if call.taken == 0
        )
        return max(calls, key=lambda call: call.arrived, default=None)

    def take(self, most: Callable[[Backbone], int], now: float) -> tuple[list[Item], list[Call]]:
        """The next batch, all of one backbone, and the calls that it is too late for.

        `most` says how many pictures to take for a backbone.
        """
        late: list[Call] = []
        while self.waiting:
            backbone, models = self._backbones.popitem(last=False)
            count = most(backbone)
            batch = self._take(models, count, now + backbone.picture_s, late)
            if models:
                self._backbones[backbone] = models
            if batch:
                return batch, late
        self._backbones.clear()
        return [], late

    def _take(
        self,
        models: OrderedDict[str, deque[Call]],
        count: int,
        soonest: float,
        late: list[Call],
    ) -> list[Item]:
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

    def _count(self, call: Call, pictures: int) -> None:
        self.waiting += pictures
        call.backbone.waiting += pictures
        # Begun anew at zero, so that no rounding stays.
        self.backlog_s = self.backlog_s + pictures * call.picture_s if self.waiting else 0.0
        waiting = self._waiting_of.get(call.model, 0) + pictures
        if waiting:
            self._waiting_of[call.model] = waiting
        else:
            self._waiting_of.pop(call.model, None)
