"""Following a job across lost connections: what to ask for next, and when to give up.

Pure: the transports carry it out. No event is handed on twice, none is missed,
since each stream asks for what follows the last event seen. A stream ends with
the job's last event; one that ends or breaks before is taken up again.
"""

import random
import time

import grpc
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from graftml import _answers, types
from graftml._encoding import encoding
from graftml.errors import CannotConnect, DeadlineExceeded, GraftError
from graftml.retry import Clock, RetryPolicy, is_passing

STREAM_TIMEOUT_S = 600.0
"""Of one stream; a silent one is opened anew after so long, in case its server forgot it."""


class Watch:
    """One job being watched, from `after` on."""

    def __init__(
        self,
        job_id: str,
        after: int,
        timeout_s: float | None,
        policy: RetryPolicy,
        *,
        clock: Clock = time.monotonic,
        jitter: Clock = random.random,
    ) -> None:
        self.job_id = job_id
        self.last_sequence = after
        self._timeout_s, self._policy = timeout_s, policy
        self._clock, self._jitter = clock, jitter
        self._started = self._opened = self._lost = clock()
        self._failed = 0

    def request(self) -> pb.WatchJobRequest:
        """Asks for what was not seen yet."""
        self._opened = self._clock()
        return _request(self.job_id, self.last_sequence)

    @property
    def remaining_s(self) -> float:
        """Until the watcher's own deadline, or the end of one stream."""
        if self._timeout_s is None:
            return STREAM_TIMEOUT_S
        left = self._started + self._timeout_s - self._clock()
        if left <= 0:
            raise DeadlineExceeded(
                f"job {self.job_id} did not end within {self._timeout_s:g} s; it goes on without "
                "being watched",
                code=grpc.StatusCode.DEADLINE_EXCEEDED,
            )
        return min(STREAM_TIMEOUT_S, left)

    def take(self, answer: pb.WatchJobResponse) -> types.JobEvent | None:
        """The event, or None where it was seen before."""
        self._failed = 0
        if answer.event.sequence <= self.last_sequence:
            return None
        self.last_sequence = answer.event.sequence
        return _answers.event(answer.event)

    def pause_s(self, error: GraftError) -> float:
        """How long to wait before the stream is opened again; raises `error` to give up."""
        if isinstance(error, DeadlineExceeded):
            return 0.0
        if not is_passing(error):
            raise error
        now = self._clock()
        # A stream that was silent for long and then broke was healthy until then.
        had_lived = now - self._opened > self._policy.max_delay_s
        if self._failed == 0 or (had_lived and not isinstance(error, CannotConnect)):
            self._lost, self._failed = now, 0
        self._failed += 1
        pause = self._policy.backoff_s(self._failed, self._jitter(), error.retry_after_s)
        if now + pause > self._lost + self._policy.reconnect_for_s:
            raise error
        return min(pause, self.remaining_s)

    def is_over(self, job: types.Job) -> bool:
        """Whether a stream that ended was the last: `job` is how things stand after it."""
        return job.state.is_final and job.last_sequence <= self.last_sequence

    def idle_pause_s(self) -> float:
        """How long to wait after a stream that ended too early, though nothing broke."""
        self._failed += 1
        return min(self._policy.backoff_s(self._failed, self._jitter(), None), self.remaining_s)


@encoding
def _request(job_id: str, after: int) -> pb.WatchJobRequest:
    return pb.WatchJobRequest(job_id=job_id, after_sequence=after)
