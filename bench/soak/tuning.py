"""The part of the soak that makes models, serves them, moves their aliases and deletes them.

Each step is what a careful user would do, and says what it may answer.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from graftml import Client, Gate, GraftError, Version
from graftml.types import Prediction, StateChanged

from bench.soak.book import OK, REFUSALS, Book
from bench.soak.served import Tenant

STABLE = "stable"
"""The model that the steady load asks for."""
MODELS = 3
"""Names that fresh models take in turn."""
KEPT = 3
"""Versions of a fresh model."""
DELETE_EVERY = 8
"""Rounds."""
GATE_EVERY = 4
"""Rounds."""
UNREACHABLE = Gate(max_latency_ms=0.001)
SURE = 0.6
"""A probability that no noise of the numbers brings below that of another class."""
JOB_TIMEOUT_S = 300.0
_SUBSETS = 4
"""Different datasets that are learned from; the same images are one dataset."""

Pairs = list[tuple[str, Path]]


@dataclass(frozen=True)
class Pace:
    """How often things happen, seconds between them."""

    fine_tune_s: float = 20.0
    kill_s: float = 45.0
    cancel_s: float = 25.0
    dataset_s: float = 8.0
    hostile_s: float = 0.4
    abandon_s: float = 0.7
    look_s: float = 3.0
    export_s: float = 15.0
    rank_s: float = 180.0
    sample_s: float = 1.0

    def faster(self, factor: float) -> "Pace":
        """Everything so many times as often, but for the samples."""
        faster = {name: value / factor for name, value in vars(self).items()}
        return Pace(**{**faster, "sample_s": min(self.sample_s, 1.0)})


def subsets(folder: Path, per_class: int = 8) -> list[Pairs]:
    """Small sets of real images, in a folder per class, some of them shared."""
    labels = sorted(path for path in folder.iterdir() if path.is_dir())[:3]
    found = []
    for number in range(_SUBSETS):
        pairs: Pairs = []
        for label in labels:
            photos = sorted(label.rglob("*.jpg"))
            first = number * per_class // 2 % max(1, len(photos) - per_class)
            pairs += [(label.name, photo) for photo in photos[first : first + per_class]]
        found.append(pairs)
    return found


def make_stable(client: Client, book: Book, tenant: Tenant, pairs: Pairs) -> None:
    """The model of the steady load; raises GraftError when there is none."""
    handle = client.fine_tune(pairs, name=STABLE)
    book.job_started(handle.job_id, tenant.name)
    version = handle.wait(timeout_s=JOB_TIMEOUT_S)
    book.job_ended(handle.job_id, "SUCCEEDED", handle.job.attempts)
    book.published(tenant.name, STABLE, version.version)


def sure_labels(client: Client, pairs: Pairs) -> list[str]:
    """For each image its label where the stable model surely knows it, and "" elsewhere."""
    answers = client.predict([photo for _, photo in pairs], STABLE)
    return [
        label if answer.label == label and answer.probability >= SURE else ""
        for (label, _), answer in zip(pairs, answers, strict=True)
    ]


class Tuner:
    """Makes fresh models of one tenant, one after the other."""

    def __init__(
        self, client: Client, book: Book, tenant: Tenant, data: Sequence[Pairs], seed: int,
        *, has_gates: bool = True,
    ) -> None:  # fmt: skip
        self._has_gates = has_gates
        self._client = client
        self._book = book
        self._tenant = tenant
        self._data = data
        self._random = random.Random(seed)
        self._round = 0

    def step(self) -> None:
        """A model from its images to its deletion, at some point."""
        book, client, name = self._book, self._client, f"fresh-{self._round % MODELS}"
        self._round += 1
        pairs = self._random.choice(self._data)
        gate = UNREACHABLE if self._has_gates and self._round % GATE_EVERY == 0 else None
        handle = book.call(
            "FineTune", OK, client.fine_tune, pairs, name, seed=self._round, gate=gate
        )
        if handle is None:
            return
        book.job_started(handle.job_id, self._tenant.name)
        book.mark("fine-tune")
        if not follow(client, book, handle.job_id, self._random.randint(1, 6)):
            return
        version = handle.refresh().version
        if version is None:
            return
        book.published(self._tenant.name, name, version)
        if gate is not None:
            self._promote(name, version, pairs)
        self._serve(name, version, pairs)
        self._move(name, version)
        self._tidy(name, pairs[0][1])

    def _serve(self, name: str, version: int, pairs: Pairs) -> None:
        book, image = self._book, pairs[0][1]
        for alias in (None, "live"):
            if alias:
                book.call("SetAlias", OK, self._client.set_alias, name, alias, version)
            answer = book.call(
                "Predict a fresh model", {OK, *REFUSALS}, self._client.predict,
                image, name, alias=alias,
            )  # fmt: skip
            if answer is not None:
                self._expect_own(answer[0], name, version)

    def _promote(self, name: str, version: int, pairs: Pairs) -> None:
        book, client = self._book, self._client
        made = book.call("GetVersion", OK, client.get_version, name, version=version)
        if made is not None:
            book.expect("a gate let all through", _is_candidate(made), f"{made}")
        answer = book.call("Predict by a candidate", {OK, *REFUSALS}, client.predict,
                           pairs[0][1], name, version=version)  # fmt: skip
        if answer is not None:
            self._expect_own(answer[0], name, version)
        promoted = book.call("PromoteVersion", OK, client.promote_version, name, version)
        if promoted is not None:
            right = promoted.aliases.get("latest") == version
            book.expect("a promotion did not move latest", right, f"{name} {version}: {promoted}")

    def _expect_own(self, answer: Prediction, name: str, version: int) -> None:
        right = (
            answer.error is None and answer.version == version and self._tenant.owns([answer.label])
        )
        self._book.expect("a fresh model answered wrongly", right, f"{name} {version}: {answer}")

    def _move(self, name: str, version: int) -> None:
        book, client = self._book, self._client
        others = sorted(book.versions.get((self._tenant.name, name), set()) - {version})
        may = OK if others else "NO_EARLIER_VERSION"
        # Where `live` pointed before may have been deleted.
        back = book.call("RollbackAlias", {may, "NO_EARLIER_VERSION"}, client.rollback_alias,
                         name, "live")  # fmt: skip
        if back is not None:
            described = book.call("GetVersion", OK, client.get_version, name, alias="live")
            if described is not None:
                book.expect(
                    "a rollback went elsewhere",
                    described.version == back.to_version != version,
                    f"{name}: {back}, and live is {described.version}",
                )
        book.call("SetAlias", OK, client.set_alias, name, "live", version)

    def _tidy(self, name: str, image: Path) -> None:
        book, client, tenant = self._book, self._client, self._tenant.name
        listed = book.call("ListVersions", OK, lambda: list(client.list_versions(name)))
        if listed is not None:
            numbers = {each.version for each in listed}
            known = book.versions.get((tenant, name), set())
            book.expect("versions were lost", known <= numbers, f"{name}: {known} of {numbers}")
            # Those of jobs that were cancelled too late.
            for number in numbers - known:
                book.published(tenant, name, number)
            free = [each for each in listed if not each.aliases]
            for old in sorted(free, key=lambda each: each.version)[: max(0, len(listed) - KEPT)]:
                if book.call("DeleteVersion", OK, done(client.delete_version), name, old.version):
                    book.deleted(tenant, name, old.version)
        if self._round % DELETE_EVERY == 0 and book.call(
            "DeleteModel", OK, done(partial(client.delete_model, force=True)), name
        ):
            book.deleted(tenant, name)
            book.call("Predict a deleted model", "MODEL_NOT_FOUND", client.predict, image, name)


def _is_candidate(version: Version) -> bool:
    return version.is_candidate and "latest" not in version.aliases


def follow(client: Client, book: Book, job_id: str, leave_after: int) -> bool:
    """Watches a job to its end, twice: whole, and with a break after some events.

    Whether it succeeded.
    """
    whole: list[int] = []
    parts: list[int] = []

    def watch() -> None:
        with book.at_work("a watcher"):
            for event in client.watch_job(job_id, timeout_s=JOB_TIMEOUT_S):
                parts.append(event.sequence)
                if len(parts) == leave_after:
                    break
            for event in client.watch_job(job_id, after=len(parts), timeout_s=JOB_TIMEOUT_S):
                parts.append(event.sequence)

    second = threading.Thread(target=watch, name=f"watch {job_id}")
    second.start()
    state = ""
    try:
        for event in client.watch_job(job_id, timeout_s=JOB_TIMEOUT_S):
            whole.append(event.sequence)
            if isinstance(event.payload, StateChanged):
                state = event.payload.state.value
        book.count("WatchJob", OK, frozenset({OK}), "")
    except GraftError as error:
        book.count("WatchJob", error.reason or error.code.name, frozenset({OK}), str(error))
    second.join(JOB_TIMEOUT_S)
    numbered = list(range(1, len(whole) + 1))
    book.expect(
        "events with gaps", whole == numbered and parts == numbered, f"{job_id}: {whole}, {parts}"
    )
    job = book.call("GetJob", OK, client.get_job, job_id)
    book.expect(
        "a watcher and GetJob disagree",
        job is not None and job.state.value == state,
        f"{job_id}: {state or 'no state'}, {job.state if job else 'no job'}",
    )
    if job is not None:
        book.job_ended(job_id, job.state.value, job.attempts)
    return state == "SUCCEEDED"


def cancel_a_job(
    client: Client, book: Book, tenant: Tenant, pairs: Pairs, stop: threading.Event, wait_s: float
) -> None:
    """Starts a job and asks for its end a moment later; both ends are right."""
    name = "cancelled"
    handle = book.call("FineTune", OK, client.fine_tune, pairs, name)
    if handle is None:
        return
    book.job_started(handle.job_id, tenant.name, is_cancelled=True)
    stop.wait(wait_s)
    book.call("CancelJob", {OK, "JOB_FINISHED"}, client.cancel_job, handle.job_id)
    if follow(client, book, handle.job_id, 2):
        # Too late: it is there, and goes.
        book.call("DeleteModel", OK, done(partial(client.delete_model, force=True)), name)


def done(delete: Callable[..., None]) -> Callable[..., bool]:
    """Deletions answer with nothing; here with True."""

    def did(*args: object) -> bool:
        delete(*args)
        return True

    return did
