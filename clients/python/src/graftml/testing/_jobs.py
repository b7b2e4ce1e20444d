"""FineTuningService, in memory: a job's events are played, by its script or by the test."""

# ruff: noqa: ARG002, N802 - a servicer has gRPC's names and takes what gRPC gives

import threading
from collections.abc import Iterable, Iterator
from typing import Any

from graftml_stubs.v1 import fine_tuning_pb2 as pb
from graftml_stubs.v1 import fine_tuning_pb2_grpc, model_pb2

from graftml.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Reason
from graftml.testing import _gate, _script
from graftml.testing._datasets import Datasets
from graftml.testing._models import Models, now
from graftml.testing._refusals import page, refuse

_FINAL = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
_METHODS = {
    "model_based": model_pb2.TRANSFER_METHOD_MODEL_BASED,
    "domain_adaptation": model_pb2.TRANSFER_METHOD_DOMAIN_ADAPTATION,
}
_WATCH_POLL_S = 1.0


class Jobs(fine_tuning_pb2_grpc.FineTuningServiceServicer):
    """Jobs by id, each with its events. All state is guarded by one condition."""

    def __init__(
        self,
        models: Models,
        datasets: Datasets,
        script: Iterable[pb.JobEvent],
        ranking_script: Iterable[pb.JobEvent],
    ) -> None:
        self._models, self._datasets = models, datasets
        self.script, self.ranking_script = tuple(script), tuple(ranking_script)
        self._changed = threading.Condition()
        self._jobs: dict[str, pb.Job] = {}
        self._count = 0
        self._events: dict[str, list[pb.JobEvent]] = {}
        self._is_stopped = False

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
        kind = event.WhichOneof("payload")
        if kind == "state_change":
            change = event.state_change
            job.state = change.state
            if change.state == pb.JOB_STATE_RUNNING:
                job.start_time.CopyFrom(event.time)
                job.attempts += 1
            if change.state in _FINAL:
                job.end_time.CopyFrom(event.time)
                job.ClearField("progress")
                job.cancel_requested = False
            if change.HasField("error"):
                job.error.CopyFrom(change.error)
        elif kind == "progress":
            job.progress.CopyFrom(event.progress)
        elif kind == "data" and not event.data.classes and job.request.dataset_id:
            dataset = self._datasets.get(job.request.dataset_id)
            event.data.classes.extend(dataset.classes)
            event.data.digest = dataset.digest
            event.data.summary.CopyFrom(dataset.summary)
            job.data_summary.CopyFrom(dataset.summary)
        elif kind == "published":
            version = self._publish(job, event.published)
            job.version = version.version
            event.published.model, event.published.version = job.model, version.version
            event.published.is_candidate = version.is_candidate
            failures = [check.detail for check in version.gate_checks if not check.passed]
            event.published.gate_failures[:] = failures

    def _publish(self, job: pb.Job, out: pb.VersionPublished) -> model_pb2.Version:
        request, labels, digest = job.request, ["negative", "positive"], ""
        if request.dataset_id:
            dataset = self._datasets.get(request.dataset_id)
            labels, digest = [count.label for count in dataset.classes], dataset.digest
        base = self._models.resolve(job.base) if job.HasField("base") else None
        if base is not None:
            labels = sorted({*base.classes, *labels})
        decision = None if base is None else base.decision
        if request.HasField("decision"):
            decision = request.decision
        return self._models.publish(
            job.model,
            labels,
            job_id=job.job_id,
            method=_METHODS.get(
                request.WhichOneof("method") or "", model_pb2.TRANSFER_METHOD_FEATURE_BASED
            ),
            accuracy=out.accuracy if out.HasField("accuracy") else None,
            count=out.measured_count,
            labels=dict(request.labels),
            digest=digest,
            gate_checks=_gate.checks(request.gate, out),
            alias=request.gate.alias,
            decision=decision,
        )

    def _base(self, request: pb.FineTuneRequest) -> model_pb2.Version | None:
        """The version that the request goes on from, or the service's error."""
        if not request.HasField("base"):
            return None
        base = pb.BaseVersion()
        base.CopyFrom(request.base)
        base.model = base.model or request.model
        return self._models.resolve(base)

    def _check(self, request: pb.FineTuneRequest) -> None:
        """Refuses a request that names what is not there, or cannot be learned from."""
        if request.WhichOneof("data") == "dataset_id":
            is_alone = not request.HasField("base")
            self._datasets.labelled(request.dataset_id, is_alone=is_alone)
        if request.WhichOneof("method") == "domain_adaptation":
            adaptation = request.domain_adaptation
            if adaptation.WhichOneof("target") is None and not request.validate_only:
                raise refuse(
                    InvalidArgument,
                    Reason.INVALID_FIELD,
                    "domain_adaptation names no target: give its images",
                    "domain_adaptation.target",
                )
            if adaptation.WhichOneof("target") == "target_dataset_id":
                self._datasets.get(
                    adaptation.target_dataset_id, "domain_adaptation.target_dataset_id"
                )
        self._base(request)
        _gate.check(request.gate, self._models.aliases_of(request.model))

    def stop(self) -> None:
        """Ends every watch."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def start(self) -> None:
        """Allows watches, at first or again."""
        with self._changed:
            self._is_stopped = False

    def _job(self, job_id: str) -> pb.Job:
        if job_id not in self._jobs:
            raise refuse(NotFound, Reason.JOB_NOT_FOUND, f"there is no job {job_id!r}")
        return self._jobs[job_id]

    def _copy(self, job: pb.Job) -> pb.Job:
        copy = pb.Job()
        copy.CopyFrom(job)
        if job.version:
            copy.is_candidate = self._models.is_candidate(job.model, job.version)
        if job.HasField("start_time"):
            until = job.end_time if job.HasField("end_time") else now()
            copy.elapsed.FromTimedelta(until.ToDatetime() - job.start_time.ToDatetime())
        return copy

    def _stored(self, given: pb.FineTuneRequest) -> pb.FineTuneRequest:
        """Copies the request with its images replaced by datasets, as the service keeps it."""
        request = pb.FineTuneRequest()
        request.CopyFrom(given)
        request.DiscardUnknownFields()
        if request.WhichOneof("data") == "inline_images":
            images = request.inline_images.images
            request.dataset_id = self._datasets.inline(images, is_unlabelled=False)
        adaptation = request.domain_adaptation
        if adaptation.WhichOneof("target") == "target_images":
            images = adaptation.target_images.images
            adaptation.target_dataset_id = self._datasets.inline(images, is_unlabelled=True)
        return request

    def FineTune(self, request: pb.FineTuneRequest, context: Any) -> pb.FineTuneResponse:
        if not request.validate_only:
            request = self._stored(request)
        with self._changed:
            for job in self._jobs.values():
                if request.request_id and job.request.request_id == request.request_id:
                    if request.validate_only:
                        return pb.FineTuneResponse()
                    if job.request != request:
                        raise refuse(
                            AlreadyExists,
                            Reason.REQUEST_ID_REUSED,
                            f"request id {request.request_id!r} was used for another request",
                        )
                    return pb.FineTuneResponse(job=self._copy(job))
            self._check(request)
            if request.validate_only:
                return pb.FineTuneResponse()
            base = self._base(request)
            job = pb.Job(kind=pb.JOB_KIND_FINE_TUNE, model=request.model, request=request)
            if base is not None:
                job.base.CopyFrom(pb.BaseVersion(model=base.model, version=base.version))
            job_id = self._add(job).job_id
            self.play(job_id, [_script.requeued()])
            answer = pb.FineTuneResponse(job=self._copy(job))
            self.play(job_id, self.script)
            return answer

    def RankBackbones(
        self, request: pb.RankBackbonesRequest, context: Any
    ) -> pb.RankBackbonesResponse:
        """Ranks the backbones in the order in which they were named; none means one."""
        count = 10
        if request.WhichOneof("data") == "dataset_id":
            count = self._datasets.labelled(request.dataset_id).image_count
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
            image_count=count,
        )
        with self._changed:
            for job in self._jobs.values():
                if request.request_id and job.ranking_request.request_id == request.request_id:
                    return pb.RankBackbonesResponse(job=self._copy(job))
            job = self._add(pb.Job(kind=pb.JOB_KIND_RANKING, ranking_request=request))
            self.play(job.job_id, [_script.requeued()])
            answer = pb.RankBackbonesResponse(job=self._copy(job))
            job.ranking.CopyFrom(ranking)
            self.play(job.job_id, self.ranking_script)
            return answer

    def _add(self, job: pb.Job) -> pb.Job:
        self._count += 1
        job.job_id = f"job-{self._count}"
        job.create_time.CopyFrom(now())
        self._jobs[job.job_id], self._events[job.job_id] = job, []
        return job

    def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        with self._changed:
            job = self._job(request.job_id)
            if job.state not in _FINAL:
                raise refuse(
                    FailedPrecondition,
                    Reason.JOB_NOT_FINISHED,
                    f"job {job.job_id} has not ended: cancel it, or wait for its end",
                )
            del self._jobs[job.job_id], self._events[job.job_id]
            return pb.DeleteJobResponse()

    def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        with self._changed:
            return pb.GetJobResponse(job=self._copy(self._job(request.job_id)))

    def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        with self._changed:
            chosen: list[Any] = [
                self._copy(job)
                for job in reversed(self._jobs.values())
                if (not request.states or job.state in request.states)
                and (not request.model or job.model == request.model)
                and (not request.kind or job.kind == request.kind)
            ]
        items, token = page(chosen, request.page_size, request.page_token)
        return pb.ListJobsResponse(jobs=items, next_page_token=token)

    def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> Iterator[pb.WatchJobResponse]:
        context.add_callback(self._wake)
        last = request.after_sequence
        while context.is_active():
            with self._changed:
                job = self._job(request.job_id)
                events = self._events[request.job_id][last:]
                if not events:
                    if self._is_stopped or job.state in _FINAL:
                        return
                    # Woken by new events, a caller that left, and `stop`.
                    self._changed.wait(_WATCH_POLL_S)
            for event in events:
                yield pb.WatchJobResponse(event=event)
                last = event.sequence

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        with self._changed:
            job = self._job(request.job_id)
            if job.state in _FINAL:
                raise refuse(
                    FailedPrecondition, Reason.JOB_FINISHED, f"job {job.job_id} has ended already"
                )
            job.cancel_requested = job.state == pb.JOB_STATE_RUNNING
            answer = self._copy(job)
            self.play(job.job_id, [_script.cancelled()])
            return pb.CancelJobResponse(job=answer if answer.cancel_requested else self._copy(job))
