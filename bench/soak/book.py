"""What a soak did and what came of it: calls by outcome, jobs, versions, kills, findings.

Shared by all threads. Each call says which outcomes are right for it; any other is
a finding. Memory is bounded: outcomes are counted, findings sampled.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class JobSeen:
    """A job that the soak started."""

    tenant: str
    is_cancelled: bool = False
    """Whether its cancel was asked for, so that it may end in either way."""
    is_killed: bool = False
    """Whether its trainer was killed: once, since a second kill rightly fails the job."""
    had_result: bool = False
    """Whether its files were whole when its trainer was killed."""
    state: str = ""
    attempts: int = 0


class Book:
    """Keeps one soak's record."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.calls: dict[str, Counter[str]] = {}
        self.unexpected: set[tuple[str, str]] = set()
        self.findings: Counter[str] = Counter()
        self.samples: dict[str, list[str]] = {}
        """Of each kind of finding the first few, in words."""
        self.jobs: dict[str, JobSeen] = {}
        self.versions: dict[tuple[str, str], set[int]] = {}
        """What was published and not deleted, by tenant and model."""
        self._lock = threading.Lock()

    def now_s(self) -> float:
        """Returns the seconds since the soak began."""
        return time.monotonic() - self.begun

    def find(self, kind: str, what: str) -> None:
        """Notes a finding; the first of a kind is printed at once."""
        with self._lock:
            self.findings[kind] += 1
            kept = self.samples.setdefault(kind, [])
            is_first = not kept
            if len(kept) < _SAMPLES:
                kept.append(f"{self.now_s():.1f} s: {what}")
        if is_first:
            print(f"FINDING {kind}: {what}", flush=True)

    def expect(self, kind: str, holds: bool, what: object) -> None:
        """Notes a finding unless something holds."""
        if not holds:
            self.find(kind, str(what))

    def count(self, kind: str, outcome: str, may: set[str] | str, what: str) -> None:
        """Counts a call by its outcome; one that is not in `may` is a finding."""
        is_right = outcome in ({may} if isinstance(may, str) else may)
        with self._lock:
            self.calls.setdefault(kind, Counter())[outcome] += 1
            if not is_right:
                self.unexpected.add((kind, outcome))
        self.expect(f"{kind} answered {outcome}", is_right, what)

    def call(
        self, kind: str, may: set[str] | str, function: Callable[P, T], *args: P.args,
        **kwargs: P.kwargs,
    ) -> T | None:  # fmt: skip
        """Makes a call whose outcome must be one of `may`; returns None unless it succeeded.

        An outcome is `ok`, the error's reason, or its code where it has none.
        """
        try:
            answer = function(*args, **kwargs)
        except (GraftError, grpc.RpcError) as error:
            known = error if isinstance(error, GraftError) else from_rpc(error, "the server")
            self.count(kind, known.reason or known.code.name, may, f"{type(known)}: {known}")
            return None
        except grpc.FutureCancelledError as error:
            self.count(kind, "CANCELLED", may, repr(error))
            return None
        except Exception as error:
            self.count(kind, type(error).__name__, may, repr(error))
            return None
        self.count(kind, OK, may, "it succeeded, and must not")
        return answer

    @contextmanager
    def at_work(self, who: str) -> Iterator[None]:
        """Notes what a thread dies of as a finding."""
        try:
            yield
        except Exception as error:
            self.find(f"{who} died", repr(error))

    def job_started(self, job_id: str, tenant: str, *, is_cancelled: bool = False) -> None:
        """Notes that a job was accepted: from here on it must not be lost."""
        self.jobs[job_id] = JobSeen(tenant, is_cancelled)

    def may_kill(self, job_id: str) -> bool:
        """Whether a job is the soak's, under way, and was not killed before."""
        job = self.jobs.get(job_id)
        return job is not None and not job.is_killed and not job.state

    def job_ended(self, job_id: str, state: str, attempts: int) -> None:
        """Notes how a job ended."""
        job = self.jobs[job_id]
        job.state, job.attempts = state, attempts
        right = {"SUCCEEDED", "CANCELLED"} if job.is_cancelled else {"SUCCEEDED"}
        self.expect("a job ended badly", state in right, f"{job_id} is {state}")

    def published(self, tenant: str, model: str, version: int) -> None:
        """Notes a version, which is there until it is deleted."""
        self.versions.setdefault((tenant, model), set()).add(version)
