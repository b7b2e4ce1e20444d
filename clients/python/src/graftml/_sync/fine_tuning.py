# Generated from graftml/_async by clients/generate_sync.py: edit that, and `make generate`.
"""The client's methods for jobs, and handles on them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from typing import Unpack

import grpc
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from graftml import _answers, _outcomes, _requests, _uploads
from graftml import _sync_io as io
from graftml._channel import ranking_timeout_s
from graftml._data import Data
from graftml._encoding import message
from graftml._outcomes import JobCancelled, JobFailed
from graftml._sync.datasets import Datasets
from graftml._sync.models import Models
from graftml._uploads import OnProgress, Upload
from graftml._watch import Watch
from graftml.errors import GraftError, from_rpc
from graftml.types import (
    BackboneRanking,
    FineTuneOptions,
    Job,
    JobEvent,
    PretrainedBackbone,
    RankOptions,
    Version,
)

OnEvent = Callable[[JobEvent], None]


class FineTuning(Models, Datasets):
    """Starts jobs and looks after them."""

    def fine_tune(
        self,
        data: Data,
        name: str,
        *,
        on_upload: OnProgress | None = None,
        **options: Unpack[FineTuneOptions],
    ) -> "JobHandle":
        """Starts a job that makes a version of the model `name`; uploads `data` where needed.

        `data` is a folder with a folder per class, an archive of one, pairs of a
        label and an image, a `Dataset` or its id, or a `ServerPath`. The options
        are `FineTuneOptions`. The target of a domain adaptation is uploaded too.
        """
        # Bad options are found before anything is uploaded: first what the client can check,
        # then, below, what the server can.
        chosen = _requests.identified(options)
        _requests.fine_tune("", name, chosen)
        method = _requests.method(chosen)
        source = io.blocking(
            _uploads.stored,
            data,
            on_upload,
            case_sensitive_labels=options.get("case_sensitive_labels", False),
        )
        target = io.blocking(_uploads.stored_target, method, on_upload)
        invoke = self._transport.fine_tuning.FineTune
        if isinstance(source, Upload) or isinstance(target, Upload):
            there = _uploads.there(source), _uploads.there(target)
            check = _requests.fine_tune(there[0], name, chosen, there[1])
            check.validate_only = True
            self._transport.unary(invoke, check)
        data_id, target_id = self._sent(source), self._sent(target)
        request = _requests.fine_tune(data_id, name, chosen, target_id)
        answer = self._transport.unary(invoke, request)
        return JobHandle(self, _answers.job(answer.job))

    def job(self, job_id: str) -> "JobHandle":
        """Returns a handle on a job that was started before."""
        return JobHandle(self, self.get_job(job_id))

    def get_job(self, job_id: str) -> Job:
        """Describes one job."""
        request = message(pb.GetJobRequest, job_id=job_id)
        answer = self._transport.unary(self._transport.fine_tuning.GetJob, request)
        return _answers.job(answer.job)

    def list_jobs(
        self,
        *,
        states: Iterable[str] | str = (),
        model: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[Job]:
        """Iterates over jobs, newest first; those in one of `states`, of `model`, with `labels`."""
        return self._transport.pages(
            self._transport.fine_tuning.ListJobs,
            message(
                pb.ListJobsRequest, states=_requests.states(states), model=model, labels=labels
            ),
            lambda answer: map(_answers.job, answer.jobs),
        )

    def watch_job(
        self, job_id: str, *, after: int = 0, timeout_s: float | None = None
    ) -> Iterator[JobEvent]:
        """Iterates over the events after the one numbered `after`, to the job's last.

        Survives lost connections. Without `timeout_s` it watches as long as the job lives.
        """
        transport = self._transport
        watch = Watch(job_id, after, timeout_s, transport.policy)
        while True:
            limit_s = watch.remaining_s
            answers = transport.answers(transport.fine_tuning.WatchJob, watch.request(), limit_s)
            try:
                with closing(answers):
                    for answer in answers:
                        event = watch.take(answer)
                        if event is not None:
                            yield event
            except grpc.RpcError as error:
                known = from_rpc(error, transport.target, limit_s)
                try:
                    pause_s = watch.pause_s(known)
                except GraftError as last:
                    # An error that the watch itself raises needs no explanation.
                    raise (transport.explained(last) if last is known else last) from error
            else:
                if watch.is_over(self.get_job(watch.job_id)):
                    return
                pause_s = watch.idle_pause_s()
            io.sleep(pause_s)

    def cancel_job(self, job_id: str) -> Job:
        """Asks for a job's end; a running one ends soon after."""
        request = message(pb.CancelJobRequest, job_id=job_id)
        answer = self._transport.unary(self._transport.fine_tuning.CancelJob, request)
        return _answers.job(answer.job)

    def delete_job(self, job_id: str) -> None:
        """Deletes a job that has ended, with its events; its version stays."""
        request = message(pb.DeleteJobRequest, job_id=job_id)
        self._transport.unary(self._transport.fine_tuning.DeleteJob, request)

    def start_ranking(
        self,
        data: Data,
        *,
        backbones: Iterable[str | PretrainedBackbone] = (),
        time_budget_s: float | None = None,
        seed: int | None = None,
        case_sensitive_labels: bool = False,
        request_id: str = "",
        on_upload: OnProgress | None = None,
    ) -> "RankingHandle":
        """Starts a job that says which backbone to start from; `data` is as in `fine_tune`.

        Backbones are names, "NAME:WEIGHTS", or `PretrainedBackbone`s;
        none means all whose weights the server has.
        """
        given = _requests.listed(backbones)
        # Bad options are found out before anything is uploaded.
        check = _requests.rank_backbones("", given, time_budget_s, seed)
        check.validate_only = True
        source = io.blocking(
            _uploads.stored, data, on_upload, case_sensitive_labels=case_sensitive_labels
        )
        invoke = self._transport.fine_tuning.RankBackbones
        if isinstance(source, Upload):
            self._transport.unary(invoke, check)
        request = _requests.rank_backbones(
            self._sent(source),
            given,
            time_budget_s,
            seed,
            case_sensitive_labels=case_sensitive_labels,
            request_id=request_id,
        )
        answer = self._transport.unary(invoke, request)
        return RankingHandle(self, _answers.job(answer.job))

    def rank_backbones(
        self,
        data: Data,
        *,
        timeout_s: float | None = None,
        **options: Unpack[RankOptions],
    ) -> BackboneRanking:
        """Says which backbone to start from, as `start_ranking`, and waits for the answer.

        Waits two minutes longer than the time budget (60 s where none is given), or `timeout_s`;
        cancels the job when it takes longer, or the caller is interrupted.
        """
        started = self.start_ranking(data, **options)
        longest_s = timeout_s or ranking_timeout_s(options.get("time_budget_s"))
        return started.result(longest_s)


class _Handle:
    """A job that was started; `job` is how it was when last asked."""

    def __init__(self, client: FineTuning, job: Job) -> None:
        self._client = client
        self.job = job

    def __repr__(self) -> str:
        of = f" of {self.job.model}" if self.job.model else ""
        return f"<{type(self).__name__} {self.job_id}{of}: {self.job.state}>"

    def _repr_html_(self) -> str:
        return self.job._repr_html_()

    @property
    def job_id(self) -> str:
        """Its id; the client's `job` makes a handle of it again."""
        return self.job.job_id

    def refresh(self) -> Job:
        """Asks how it stands."""
        self.job = self._client.get_job(self.job_id)
        return self.job

    def events(self, after: int = 0, timeout_s: float | None = None) -> Iterator[JobEvent]:
        """Iterates over its events after the one numbered `after`, to its last."""
        return self._client.watch_job(self.job_id, after=after, timeout_s=timeout_s)

    def _wait(self, timeout_s: float | None, on_event: OnEvent | None) -> Job:
        for event in self.events(timeout_s=timeout_s):
            if on_event:
                on_event(event)
        return self.refresh()

    def cancel(self) -> Job:
        """Asks for its end; `wait` raises JobCancelled when it came."""
        self.job = self._client.cancel_job(self.job_id)
        return self.job


class JobHandle(_Handle):
    """A fine-tuning as `fine_tune` started it; `job` is how it was when last asked."""

    def wait(self, timeout_s: float | None = None, on_event: OnEvent | None = None) -> Version:
        """Waits for its end and returns the version it made, a candidate too.

        Raises JobFailed, JobCancelled, or DeadlineExceeded when it takes longer
        than `timeout_s` (it goes on). `on_event` is told of every event.
        """
        number = _outcomes.published(self._wait(timeout_s, on_event))
        return self._client.get_version(self.job.model, version=number)


class RankingHandle(_Handle):
    """A ranking as `start_ranking` started it; `job` is how it was when last asked."""

    def wait(
        self, timeout_s: float | None = None, on_event: OnEvent | None = None
    ) -> BackboneRanking:
        """Waits for its end and returns the ranking; raises as the wait for a fine-tuning."""
        return _outcomes.ranked(self._wait(timeout_s, on_event))

    def result(self, timeout_s: float) -> BackboneRanking:
        """Waits as `wait`; cancels the job when it takes longer, or is interrupted."""
        try:
            return self.wait(timeout_s)
        except (JobFailed, JobCancelled):
            raise
        except BaseException:
            with suppress(GraftError):
                self.cancel()
            raise
