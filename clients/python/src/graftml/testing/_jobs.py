"""Jobs, whose events are played: by a script, or by the test."""

# ruff: noqa: N802 - a method is named as the call that it answers

from collections.abc import Iterable, Iterator
from threading import Condition
from typing import Any

from graftml_stubs.v1 import fine_tuning_pb2 as pb
from graftml_stubs.v1 import model_pb2

from graftml.errors import FailedPrecondition, NotFound, Reason
from graftml.testing import _script
from graftml.testing._records import Records, now
from graftml.testing._refusals import page, refuse

_FINAL = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
_WATCH_POLL_S = 1.0
_METHODS = {
    "model_based": model_pb2.TRANSFER_METHOD_MODEL_BASED,
    "domain_adaptation": model_pb2.TRANSFER_METHOD_DOMAIN_ADAPTATION,
}


class Jobs:
    """Answers the calls about jobs; every method but `WatchJob` is called under the lock."""

    def __init__(
        self,
        records: Records,
        lock: Condition,
        script: Iterable[pb.JobEvent],
        ranking_script: Iterable[pb.JobEvent],
    ) -> None:
        self._records, self._changed = records, lock
        self._script, self._ranking_script = tuple(script), tuple(ranking_script)
        self._jobs: dict[str, pb.Job] = {}
        self._events: dict[str, list[pb.JobEvent]] = {}
        self._count = 0
        self.is_stopped = False
        """Ends every watch."""

    def play(self, job_id: str, events: Iterable[pb.JobEvent]) -> None:
        """Lets the events happen, one after the other."""
        with self._changed:
            job = self._job(job_id)
            for given in events:
                event = pb.JobEvent()
                event.CopyFrom(given)
                event.sequence = job.last_sequence + 1
                event.time.CopyFrom(now())
                self._happen(job, event)
                job.last_sequence = event.sequence
                self._events[job_id].append(event)
            self._changed.notify_all()

    def _happen(self, job: pb.Job, event: pb.JobEvent) -> None:
        match event.WhichOneof("payload"):
            case "state_change":
                job.state = event.state_change.state
                if job.state == pb.JOB_STATE_RUNNING:
                    job.start_time.CopyFrom(event.time)
                    job.attempts += 1
                if job.state in _FINAL:
                    job.end_time.CopyFrom(event.time)
                    job.ClearField("progress")
                    job.cancel_requested = False
                if event.state_change.HasField("error"):
                    job.error.CopyFrom(event.state_change.error)
            case "progress":
                job.progress.CopyFrom(event.progress)
            case "data":
                job.data_summary.CopyFrom(event.data.summary)
            case "published":
                out = event.published
                version = self._published(job, out)
                job.version, job.is_candidate = version.version, version.is_candidate
                out.model, out.version, out.is_candidate = (
                    job.model, version.version, version.is_candidate
                )  # fmt: skip

    def _published(self, job: pb.Job, out: pb.VersionPublished) -> model_pb2.Version:
        request = job.request
        return self._records.publish(
            job.model,
            job_id=job.job_id,
            method=_METHODS.get(
                request.WhichOneof("method") or "", model_pb2.TRANSFER_METHOD_FEATURE_BASED
            ),
            accuracy=out.accuracy if out.HasField("accuracy") else None,
            count=out.measured_count,
            labels=request.labels,
            gate_failures=out.gate_failures,
            decision=request.decision if request.HasField("decision") else None,
        )

    def _job(self, job_id: str) -> pb.Job:
        if job_id not in self._jobs:
            raise refuse(NotFound, Reason.JOB_NOT_FOUND, f"there is no job {job_id!r}")
        return self._jobs[job_id]

    def _shown(self, job: pb.Job) -> pb.Job:
        shown = pb.Job()
        shown.CopyFrom(job)
        if job.HasField("start_time"):
            until = job.end_time if job.HasField("end_time") else now()
            shown.elapsed.FromTimedelta(until.ToDatetime() - job.start_time.ToDatetime())
        return shown

    def _started(self, job: pb.Job, request_id: str, script: Iterable[pb.JobEvent]) -> pb.Job:
        """Starts a job and plays its script; returns it as it was before that.

        Returns the job that has the request id already, where one has.
        """
        for known in self._jobs.values():
            if request_id and request_id in (
                known.request.request_id, known.ranking_request.request_id
            ):  # fmt: skip
                return self._shown(known)
        self._count += 1
        job.job_id = f"job-{self._count}"
        job.create_time.CopyFrom(now())
        self._jobs[job.job_id], self._events[job.job_id] = job, []
        self.play(job.job_id, [_script.requeued()])
        queued = self._shown(job)
        self.play(job.job_id, script)
        return queued

    def FineTune(self, request: pb.FineTuneRequest) -> pb.FineTuneResponse:
        if request.dataset_id:
            self._records.dataset(request.dataset_id, "dataset_id")
        target = request.domain_adaptation.target_dataset_id
        if target:
            self._records.dataset(target, "domain_adaptation.target_dataset_id")
        job = pb.Job(kind=pb.JOB_KIND_FINE_TUNE, model=request.model, request=request)
        if request.HasField("base"):
            named = pb.BaseVersion()
            named.CopyFrom(request.base)
            named.model = named.model or request.model
            base = self._records.find(named, "base")
            job.base.CopyFrom(pb.BaseVersion(model=base.model, version=base.version))
        if request.validate_only:
            return pb.FineTuneResponse()
        return pb.FineTuneResponse(job=self._started(job, request.request_id, self._script))

    def RankBackbones(self, request: pb.RankBackbonesRequest) -> pb.RankBackbonesResponse:
        """Ranks the backbones in the order in which they were named; none means one."""
        if request.dataset_id:
            self._records.dataset(request.dataset_id, "dataset_id")
        if request.validate_only:
            return pb.RankBackbonesResponse()
        named = list(request.backbones) or [pb.PretrainedBackbone(backbone="efficientnet_lite0")]
        ranking = pb.Ranking(
            backbones=[
                pb.RankedBackbone(
                    backbone=pretrained.backbone,
                    weights=pretrained.weights or "fake",
                    weights_licence="not known",
                    log_loss=0.1 * place,
                    log_me=-0.1 * place,
                    image_ms=5.0 * place,
                    feature_dim=1280,
                )
                for place, pretrained in enumerate(named, 1)
            ],
            explanation=f"{named[0].backbone} was named first.",
            image_count=6,
        )
        job = pb.Job(kind=pb.JOB_KIND_RANKING, ranking_request=request)
        queued = self._started(job, request.request_id, self._ranking_script)
        if job.state == pb.JOB_STATE_SUCCEEDED:
            job.ranking.CopyFrom(ranking)
        return pb.RankBackbonesResponse(job=queued)

    def GetJob(self, request: pb.GetJobRequest) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=self._shown(self._job(request.job_id)))

    def ListJobs(self, request: pb.ListJobsRequest) -> pb.ListJobsResponse:
        chosen = [
            self._shown(job)
            for job in reversed(self._jobs.values())
            if (not request.states or job.state in request.states)
            and request.model in ("", job.model)
            and (not request.kind or job.kind == request.kind)
            and dict(request.labels).items() <= dict(job.request.labels).items()
        ]
        jobs, token = page(chosen, request)
        return pb.ListJobsResponse(jobs=jobs, next_page_token=token)

    def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> Iterator[pb.WatchJobResponse]:
        context.add_callback(self._wake)
        last = request.after_sequence
        while context.is_active():
            with self._changed:
                job = self._job(request.job_id)
                events = self._events[request.job_id][last:]
                if not events:
                    if self.is_stopped or job.state in _FINAL:
                        return
                    # Woken by new events, a caller that left, and `stop`.
                    self._changed.wait(_WATCH_POLL_S)
            for event in events:
                yield pb.WatchJobResponse(event=event)
                last = event.sequence

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def CancelJob(self, request: pb.CancelJobRequest) -> pb.CancelJobResponse:
        """Answers a running job as it is, and ends it after that."""
        job = self._job(request.job_id)
        if job.state in _FINAL:
            raise refuse(
                FailedPrecondition, Reason.JOB_FINISHED, f"job {job.job_id} has ended already"
            )
        job.cancel_requested = job.state == pb.JOB_STATE_RUNNING
        answer = self._shown(job)
        self.play(job.job_id, [_script.cancelled()])
        return pb.CancelJobResponse(job=answer if answer.cancel_requested else self._shown(job))

    def DeleteJob(self, request: pb.DeleteJobRequest) -> pb.DeleteJobResponse:
        job = self._job(request.job_id)
        del self._jobs[job.job_id], self._events[job.job_id]
        return pb.DeleteJobResponse()
