"""Records every call once: in Prometheus's series by model, and in counts by version.

The counts are since the process started, and bounded: versions that were not asked for longest
are dropped, and deleted ones soon after. Lives on the event loop alone.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

import msgspec

from service.domain import ModelKey
from service.engine.fair_queue import ImageBatch
from service.errors import GraftError
from service.ops.metrics import Metrics, Stages

MAX_VERSIONS = 20_000
"""Some 400 bytes each."""


class Spent(msgspec.Struct, frozen=True):
    """Counts calls, and adds up their time."""

    count: int = 0
    seconds: float = 0.0

    def plus(self, seconds: float) -> "Spent":
        """Returns the sum with one more call."""
        return Spent(self.count + 1, self.seconds + seconds)


class Counts(msgspec.Struct, frozen=True):
    """The calls of one version. Stages are of answered calls alone, each its slowest image's."""

    images: int = 0
    """Answered images."""
    success: Spent = Spent()
    fail: Spent = Spent()
    queue: Spent = Spent()
    decode: Spent = Spent()
    infer: Spent = Spent()
    rest: Spent = Spent()
    """The part of the whole time that no other stage took."""
    last_s: float = 0.0
    """Time of the last answer, in seconds since 1970; 0 for never."""


NOTHING = Counts()


class Account:
    """Records the calls of one version; after the version was dropped, in vain."""

    def __init__(self, clock: Callable[[], float], stages: Stages) -> None:
        self.counts = NOTHING
        self.stages = stages
        self._clock = clock

    def answered(self, batch: ImageBatch, place: int, head_digest: str, total_s: float) -> None:
        """Records a call whose images all have their outcomes; `place` is its model's there.

        What several models of the call shared is recorded for each: its answers took as long.
        """
        stages = self.stages
        run, head, _ = batch.asked[place]
        if head.outliers is not None:
            # Not when a head is loaded: candidates and old versions are, beside what serves.
            stages.compare_with(head_digest, head.outliers.validation)
        stages.total.observe(total_s)
        for values, histogram in (
            (batch.decode_s, stages.decode),
            (batch.queue_s, stages.queue),
            (batch.infer_s[run], stages.infer),
        ):
            for seconds in values:
                histogram.observe(seconds)
        for outcomes in batch.outcomes.values():
            outcome = outcomes[place]
            if isinstance(outcome, GraftError):
                stages.count(outcome.reason)
                continue
            stages.count("ok")
            if outcome.outlier_score is not None:
                stages.outlier_score.observe(outcome.outlier_score)
        queue_s, decode_s, infer_s = (
            max(values, default=0.0)
            for values in (batch.queue_s, batch.decode_s, batch.infer_s[run])
        )
        old = self.counts
        self.counts = Counts(
            images=old.images + len(batch.images),
            success=old.success.plus(total_s),
            fail=old.fail,
            queue=old.queue.plus(queue_s),
            decode=old.decode.plus(decode_s),
            infer=old.infer.plus(infer_s),
            rest=old.rest.plus(max(0.0, total_s - queue_s - decode_s - infer_s)),
            last_s=self._clock(),
        )

    def failed(self, total_s: float) -> None:
        """Records a call that got an error, or was left."""
        self.counts = msgspec.structs.replace(self.counts, fail=self.counts.fail.plus(total_s))


class Ledger:
    """The accounts of all versions."""

    def __init__(
        self,
        metrics: Metrics,
        max_versions: int = MAX_VERSIONS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._max_versions = max_versions
        self._clock = clock
        self._accounts: OrderedDict[tuple[ModelKey, int], Account] = OrderedDict()

    def account(self, model: ModelKey, version: int) -> Account:
        """Returns a version's account; to be taken before a call, which may outlive its version."""
        key = model, version
        # Anew for each call: the model's label may have come free.
        stages = self._metrics.stages(str(model))
        account = self._accounts.get(key)
        if account is not None:
            account.stages = stages
        else:
            account = self._accounts[key] = Account(self._clock, stages)
            if len(self._accounts) > self._max_versions:
                self._accounts.popitem(last=False)
        self._accounts.move_to_end(key)
        return account

    def recorded(self, model: ModelKey) -> dict[int, Account]:
        """Returns the accounts of a model, by version."""
        return {
            version: account for (of, version), account in self._accounts.items() if of == model
        }

    def keep_only(
        self, model: ModelKey, versions: Collection[int], recorded: Mapping[int, Account]
    ) -> None:
        """Drops those of a model's `recorded` accounts that are of no version it has.

        Its series go, too, where it has none. What was recorded must be asked before the versions
        are read: what came since may be of newer ones. Calls under way end as they would have.
        """
        for version, account in recorded.items():
            if version not in versions and self._accounts.get((model, version)) is account:
                del self._accounts[model, version]
        if not versions and not self.recorded(model):
            self._metrics.forget_model(str(model))

    @property
    def models(self) -> set[ModelKey]:
        """Returns the models of which anything is recorded."""
        return {model for model, _ in self._accounts}

    def of(self, model: ModelKey, version: int) -> Counts:
        """Returns a version's counts, which never change; zeros when nothing is known."""
        account = self._accounts.get((model, version))
        return NOTHING if account is None else account.counts

    def all(self) -> dict[tuple[ModelKey, int], Counts]:
        """Returns all counts, by model and version."""
        return {key: account.counts for key, account in self._accounts.items()}
