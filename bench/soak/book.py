"""What the soak did and what came of it: calls by outcome, jobs, versions, findings.

Shared by all threads. Each call says which outcomes are right for it; any other is
a finding. Memory is bounded: outcomes are counted, findings sampled.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import grpc
from graftml.errors import GraftError, from_rpc

P = ParamSpec("P")
T = TypeVar("T")

OK = "ok"
REFUSALS = frozenset({"QUEUE_FULL", "DEADLINE_EXCEEDED"})
"""What an honest server may answer when more is asked of it than it can carry."""
_SAMPLES = 5
"""Kept of each kind of finding."""


@dataclass(frozen=True)
class Kill:
    """A trainer that the soak killed."""

    pid: int
    job_id: str
    """"" of one that waited."""
    at: float
    """The clock's time, as in the server's log."""
    had_result: bool
    """Whether its files were whole, so that it may have told its result already."""


@dataclass
class JobSeen:
    """A job that the soak started."""

    tenant: str
    is_cancelled: bool
    """Whether its cancel was asked for, so that it may end in either way."""
    is_doomed: bool = False
    """Whether it was chosen for a kill."""
    state: str = ""
    attempts: int = 0


@dataclass
class Findings:
    """By kind: how many, and the first few in words."""

    counts: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """Something to show on the image's axis of time."""

    at_s: float
    what: str


class Book:
    """One soak's."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.calls: dict[str, Counter[str]] = {}
        self.unexpected: set[tuple[str, str]] = set()
        self.findings = Findings()
        self.jobs: dict[str, JobSeen] = {}
        self.versions: dict[tuple[str, str], set[int]] = {}
        """What was published and not deleted, by tenant and model."""
        self.marks: list[Mark] = []
        self.kills: list[Kill] = []
        self._lock = threading.Lock()

    def begin(self) -> None:
        """The clock begins: what is before is preparation."""
        self.begun = time.monotonic()

    def now_s(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self.begun

    def mark(self, what: str) -> None:
        """Notes something for the image."""
        with self._lock:
            self.marks.append(Mark(self.now_s(), what))

    def find(self, kind: str, what: str) -> None:
        """Notes a finding; the first of a kind is told at once."""
        with self._lock:
            self.findings.counts[kind] += 1
            kept = self.findings.samples.setdefault(kind, [])
            is_first = not kept
            if len(kept) < _SAMPLES:
                kept.append(f"{self.now_s():.1f} s: {what}")
        if is_first:
            print(f"FINDING {kind}: {what}", flush=True)

    def count(self, kind: str, outcome: str, may: frozenset[str], what: str, n: int = 1) -> None:
        """Counts outcomes of calls; what is not in `may` is a finding."""
        with self._lock:
            self.calls.setdefault(kind, Counter())[outcome] += n
        if outcome not in may:
            with self._lock:
                self.unexpected.add((kind, outcome))
            self.find(f"{kind} answered {outcome}", what)

    def call(
        self, kind: str, may: set[str] | str, function: Callable[P, T], *args: P.args,
        **kwargs: P.kwargs,
    ) -> T | None:  # fmt: skip
        """Makes a call whose outcome must be one of `may`; None where it did not succeed.

        An outcome is `ok`, the error's reason, or its code where it has none.
        """
        allowed = frozenset({may} if isinstance(may, str) else may)
        try:
            answer = function(*args, **kwargs)
        except (GraftError, grpc.RpcError) as error:
            told = error if isinstance(error, GraftError) else from_rpc(error, "the server")
            self.count(
                kind, told.reason or told.code.name, allowed, f"{type(told).__name__}: {told}"
            )
            return None
        except Exception as error:
            self.count(kind, type(error).__name__, allowed, repr(error))
            return None
        self.count(kind, OK, allowed, "it succeeded, and must not")
        return answer

    def expect(self, kind: str, holds: bool, what: str) -> None:
        """An answer was right, or that is a finding."""
        if not holds:
            self.find(kind, what)

    def job_started(self, job_id: str, tenant: str, *, is_cancelled: bool = False) -> None:
        """A job was accepted: from here on it must not be lost."""
        with self._lock:
            self.jobs[job_id] = JobSeen(tenant, is_cancelled)

    def doom(self, job_id: str) -> bool:
        """Whether the job's trainer may be killed: once, since a second time fails the job."""
        with self._lock:
            job = self.jobs.get(job_id)
            if job is None or job.is_doomed or job.state:
                return False
            job.is_doomed = True
            return True

    def killed(self, kill: Kill) -> None:
        """What this leads to is no finding."""
        with self._lock:
            self.kills.append(kill)
        self.mark("kill")

    def job_ended(self, job_id: str, state: str, attempts: int) -> None:
        """Its last event was seen."""
        with self._lock:
            job = self.jobs[job_id]
            job.state, job.attempts = state, attempts
        right = {"SUCCEEDED", "CANCELLED"} if job.is_cancelled else {"SUCCEEDED"}
        self.expect("a job ended badly", state in right, f"{job_id} is {state}")

    def published(self, tenant: str, model: str, version: int) -> None:
        """A version is there until it is deleted."""
        with self._lock:
            self.versions.setdefault((tenant, model), set()).add(version)

    def deleted(self, tenant: str, model: str, version: int | None = None) -> None:
        """A version is gone, or a model with all of its versions."""
        with self._lock:
            if version is None:
                self.versions.pop((tenant, model), None)
            else:
                self.versions[tenant, model].discard(version)

    @contextmanager
    def at_work(self, who: str) -> Iterator[None]:
        """A thread's work; what it dies of is a finding."""
        try:
            yield
        except Exception as error:
            self.find(f"{who} died", repr(error))
