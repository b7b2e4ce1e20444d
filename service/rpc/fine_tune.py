"""FineTuningService: starts, lists, watches, cancels and deletes jobs."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import msgspec
from graftml_stubs.v1 import fine_tuning_pb2 as pb
from graftml_stubs.v1 import fine_tuning_pb2_grpc

from service.auth import principal
from service.contract import DataFound, ExportedBackbone
from service.domain import JobKind, JobState, check_name
from service.errors import Expired, Reason, WrongState
from service.ingest.labels import canonical
from service.jobs import weights
from service.jobs.lineage import Lineage
from service.jobs.request import AUTO, JobRequest, RankRequest, allowed_path, check_request_id
from service.jobs.settings import Settings
from service.jobs.store import JobStore
from service.jobs.uninterrupted import in_thread
from service.jobs.watcher import JobWatcher
from service.jobs.weights import WeightsCheck
from service.ops import failpoints
from service.ops.metrics import Metrics
from service.rpc.codec import jobs, requests
from service.rpc.datasets import add_image
from service.rpc.handlers import Context, in_store_thread
from service.storage.dataset_rows import check_classes
from service.storage.datasets import DatasetStore

_Message = pb.FineTuneRequest | pb.RankBackbonesRequest

_INLINE = "inline"
"""Stands for a dataset until the images that came along are stored as one."""


class FineTuningServicer(fine_tuning_pb2_grpc.FineTuningServiceServicer):
    """Makes classifiers from labelled images, as fine_tuning.proto says.

    The supervisor learns of jobs from the store.
    """

    def __init__(
        self,
        job_store: JobStore,
        datasets: DatasetStore,
        watcher: JobWatcher,
        lineage: Lineage,
        *,
        metrics: Metrics,
        settings: Settings,
        weights: WeightsCheck,
        exported: Callable[[str, str], list[ExportedBackbone]],
    ) -> None:
        self._jobs = job_store
        self._datasets = datasets
        self._watcher = watcher
        self._lineage = lineage
        self._metrics = metrics
        self._settings = settings
        self._weights = weights
        self._exported = exported

    async def FineTune(self, request: pb.FineTuneRequest, context: Context) -> pb.FineTuneResponse:
        return await in_thread(partial(self._start, request))

    def _start(
        self, message: pb.FineTuneRequest, is_abandoned: threading.Event
    ) -> pb.FineTuneResponse:
        """Checks a request and starts its job; the message's images are replaced by datasets."""
        message.DiscardUnknownFields()
        requests.check_size(message)
        check_name(message.model, "model")
        check_request_id(message.request_id)
        request = asked = self._read(message)
        # A request id is answered with the job that it started, whatever became of the base.
        if not self._jobs.is_known(message.request_id, principal.current().tenant):
            self._datasets.check_room(
                principal.current().tenant, principal.current().quota.stored_bytes
            )
            asked.check_augments()
            request = self._grown(asked, message)
            # All of it before an image is stored, so that a bad field stores nothing.
            self._check(request, message)
        if message.validate_only:
            return pb.FineTuneResponse()
        self._store_data(message, is_abandoned, is_alone=request.base is None)
        target = message.domain_adaptation
        if target.WhichOneof("target") == "target_images":
            target.target_dataset_id = self._store(
                target.target_images.images, is_abandoned, "domain_adaptation.target_images"
            )
        request = msgspec.structs.replace(
            request, dataset_id=message.dataset_id, target_dataset_id=target.target_dataset_id
        )
        most = principal.current().quota.concurrent_jobs
        return pb.FineTuneResponse(job=self._create(request, message, is_abandoned, most))

    def _create(
        self,
        request: JobRequest | RankRequest,
        message: _Message,
        is_abandoned: threading.Event,
        max_open_jobs: int | None,
    ) -> pb.Job:
        if is_abandoned.is_set():
            raise Expired(Reason.DEADLINE_EXCEEDED, "the caller has gone: no job is started")
        # Deterministic, so that a retry has the same bytes.
        came = message.SerializeToString(deterministic=True)
        record, _ = self._jobs.create(request, message.request_id, came, max_open_jobs)
        failpoints.reach("job.created")
        return jobs.job(record)

    def _read(self, message: pb.FineTuneRequest) -> JobRequest:
        places, target = self._places(message), message.domain_adaptation
        match target.WhichOneof("target"):
            case "target_path":
                at = "domain_adaptation.target_path.path"
                places["target_path"] = self._path(target.target_path.path, at)
            case "target_images":
                places["target_dataset_id"] = _INLINE
            case _:
                places["target_dataset_id"] = target.target_dataset_id
        return requests.job(message, principal.current().tenant, **places)

    def _places(self, message: _Message) -> dict[str, str]:
        """Returns the fields of a request that say where its images lie."""
        match message.WhichOneof("data"):
            case "server_path":
                return {"server_path": self._path(message.server_path.path, "server_path.path")}
            case "inline_images":
                return {"dataset_id": _INLINE}
        return {"dataset_id": message.dataset_id}

    def _check(self, request: JobRequest, message: pb.FineTuneRequest) -> None:
        tenant, settings = principal.current().tenant, self._settings
        request.check(settings.default_backbone, needs_images=not message.validate_only)
        if problem := settings.device_problem(request.device):
            raise WrongState(Reason.DEVICE_UNAVAILABLE, problem, field="device")
        self._lineage.check_incumbent(request)
        self._jobs.check_open(tenant, JobKind.FINE_TUNE, principal.current().quota.concurrent_jobs)
        for field, dataset_id in (
            ("dataset_id", request.dataset_id),
            ("domain_adaptation.target_dataset_id", request.target_dataset_id),
        ):
            if dataset_id not in ("", _INLINE):
                is_target = field != "dataset_id"
                self._datasets.check_usable(
                    dataset_id,
                    tenant,
                    field,
                    is_target=is_target,
                    is_alone=not is_target and request.base is None,
                )
        backbone = request.backbone_or(settings.default_backbone)
        weights.find_registered(settings, backbone, tenant)
        if backbone != AUTO:
            self._weights.check(
                backbone, request.weights, request.method, lambda name: self._exported(name, tenant)
            )

    def _path(self, path: str, field: str) -> str:
        return str(
            allowed_path(path, self._settings.allowed_dirs_of(principal.current().tenant), field)
        )

    def _grown(self, asked: JobRequest, message: pb.FineTuneRequest) -> JobRequest:
        if not message.HasField("base"):
            return asked
        base = message.base
        which = base.WhichOneof("which")
        return self._lineage.grow(
            asked,
            base.model,
            base.version if which == "version" else None,
            base.alias if which == "alias" else None,
        )

    def _store_data(
        self, message: _Message, is_abandoned: threading.Event, *, is_alone: bool
    ) -> None:
        """Replaces the images that came with a request by a dataset of them."""
        if message.WhichOneof("data") == "inline_images":
            message.dataset_id = self._store(
                message.inline_images.images,
                is_abandoned,
                case_sensitive=message.case_sensitive_labels,
                is_alone=is_alone,
            )

    def _store(
        self,
        images: Any,
        is_abandoned: threading.Event,
        target: str = "",
        *,
        case_sensitive: bool = False,
        is_alone: bool = False,
    ) -> str:
        upload = self._datasets.begin_upload(
            "",
            "",
            is_unlabelled=bool(target),
            case_sensitive=case_sensitive,
            tenant=principal.current().tenant,
            max_stored_bytes=principal.current().quota.stored_bytes,
            # A request that is sent again brings what it brought before.
            may_be_stored=True,
            is_abandoned=is_abandoned,
        )
        try:
            for index, image in enumerate(images):
                add_image(upload, image, f"{target or 'inline_images'}.images[{index}]")
            if is_alone and images:
                # So that a call that is refused stores nothing.
                check_classes({canonical(image.label) for image in images}, "inline_images")
            return upload.finish().dataset_id
        except BaseException:
            # Not after a success: it abandons what else the call stores, too.
            upload.abort()
            raise

    @in_store_thread
    def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        record = self._jobs.get(request.job_id, principal.current().tenant)
        return pb.GetJobResponse(job=jobs.job(record))

    @in_store_thread
    def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        records, token = self._jobs.list(
            request.page_size,
            request.page_token,
            {jobs.state(number) for number in set(request.states)},
            request.model,
            principal.current().tenant,
            jobs.kind(request.kind),
            request.labels,
        )
        return pb.ListJobsResponse(jobs=map(jobs.job, records), next_page_token=token)

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        after = request.after_sequence
        async for event in self._watcher.follow(request.job_id, principal.current().tenant, after):
            if isinstance(event.payload, DataFound):  # has a row for each class
                yield pb.WatchJobResponse(event=await asyncio.to_thread(jobs.event, event))
            else:
                yield pb.WatchJobResponse(event=jobs.event(event))

    @in_store_thread
    def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:
        record = self._jobs.request_cancel(request.job_id, principal.current().tenant)
        if record.state is JobState.CANCELLED:
            self._metrics.jobs_ended.labels(record.state.value).inc()
        return pb.CancelJobResponse(job=jobs.job(record))

    @in_store_thread
    def DeleteJob(self, request: pb.DeleteJobRequest, context: Context) -> pb.DeleteJobResponse:
        self._jobs.delete(request.job_id, principal.current().tenant)
        return pb.DeleteJobResponse()

    async def RankBackbones(
        self, request: pb.RankBackbonesRequest, context: Context
    ) -> pb.RankBackbonesResponse:
        return await in_thread(partial(self._start_ranking, request))

    def _start_ranking(
        self, message: pb.RankBackbonesRequest, is_abandoned: threading.Event
    ) -> pb.RankBackbonesResponse:
        message.DiscardUnknownFields()
        requests.check_size(message)
        check_request_id(message.request_id)
        tenant, quota = principal.current().tenant, principal.current().quota
        request = requests.ranking(message, tenant, **self._places(message))
        # A request id is answered with the job that it started; else all is checked before an
        # image is stored.
        if not self._jobs.is_known(message.request_id, tenant):
            self._datasets.check_room(tenant, quota.stored_bytes)
            request.check(needs_images=not message.validate_only)
            for asked in request.backbones:
                weights.find_registered(self._settings, asked.backbone, tenant)
            self._jobs.check_open(tenant, JobKind.RANKING, quota.rankings)
            if request.dataset_id not in ("", _INLINE):
                self._datasets.check_usable(request.dataset_id, tenant, is_alone=True)
        if message.validate_only:
            return pb.RankBackbonesResponse()
        self._store_data(message, is_abandoned, is_alone=True)
        request = msgspec.structs.replace(request, dataset_id=message.dataset_id)
        job = self._create(request, message, is_abandoned, quota.rankings)
        return pb.RankBackbonesResponse(job=job)
