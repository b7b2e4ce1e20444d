"""FineTuningService: starts, lists, watches, cancels and deletes jobs."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import msgspec
from graftml_stubs.v1 import fine_tuning_pb2 as pb
from graftml_stubs.v1 import fine_tuning_pb2_grpc
from grpc import aio

from service.auth import principal
from service.contract import DataFound, ExportedBackbone
from service.domain import JobKind, JobState, check_name
from service.errors import Expired, Reason, WrongState, bad_field
from service.ingest.labels import canonical
from service.jobs import weights
from service.jobs.lineage import Lineage
from service.jobs.request import (
    AUTO,
    JobRequest,
    allowed_path,
    check_request_id,
)
from service.jobs.settings import Settings
from service.jobs.store import JobStore
from service.jobs.uninterrupted import in_thread
from service.jobs.watcher import JobWatcher
from service.jobs.weights import WeightsCheck
from service.ops import failpoints
from service.ops.metrics import Metrics
from service.rpc.codec import jobs, requests
from service.rpc.datasets import add_image
from service.storage.dataset_rows import check_classes
from service.storage.datasets import DatasetStore

_INLINE = "inline"
"""Stands for a dataset until the images that came along are stored as one."""

Context = aio.ServicerContext[Any, Any]


class FineTuningServicer(fine_tuning_pb2_grpc.FineTuningServiceServicer):
    """Makes classifiers from labelled images. The supervisor learns of jobs from the store."""

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

    async def FineTune(  # noqa: N802
        self, request: pb.FineTuneRequest, context: Context
    ) -> pb.FineTuneResponse:
        """See fine_tuning.proto."""
        return await in_thread(partial(self._start, request))

    def _start(
        self, message: pb.FineTuneRequest, is_abandoned: threading.Event
    ) -> pb.FineTuneResponse:
        """Checks a request and starts its job; the message's images are replaced by datasets."""
        message.DiscardUnknownFields()
        requests.check_size(message)
        check_name(message.model, "model")
        check_request_id(message.request_id)
        asked = self._read(message)
        request = asked
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
        if message.WhichOneof("data") == "inline_images":
            message.dataset_id = self._store(
                message.inline_images.images,
                is_abandoned,
                case_sensitive=message.case_sensitive_labels,
                is_alone=request.base is None,
            )
        target = message.domain_adaptation
        if target.WhichOneof("target") == "target_images":
            target.target_dataset_id = self._store(
                target.target_images.images, is_abandoned, "domain_adaptation.target_images"
            )
        if is_abandoned.is_set():
            raise Expired(Reason.DEADLINE_EXCEEDED, "the caller has gone: no job is started")
        request = msgspec.structs.replace(
            request,
            dataset_id=message.dataset_id,
            target_dataset_id=target.target_dataset_id,
        )
        record, _ = self._jobs.create(
            request,
            message.request_id,
            # Deterministic, so that a retry has the same bytes.
            message.SerializeToString(deterministic=True),
            principal.current().quota.concurrent_jobs,
        )
        failpoints.reach("job.created")
        return pb.FineTuneResponse(job=jobs.job(record))

    def _read(self, message: pb.FineTuneRequest) -> JobRequest:
        target = message.domain_adaptation
        data_kind, target_kind = message.WhichOneof("data"), target.WhichOneof("target")
        return requests.job(
            message,
            principal.current().tenant,
            server_path=(
                self._path(message.server_path.path, "server_path.path")
                if data_kind == "server_path"
                else ""
            ),
            dataset_id=_INLINE if data_kind == "inline_images" else message.dataset_id,
            target_path=(
                self._path(target.target_path.path, "domain_adaptation.target_path.path")
                if target_kind == "target_path"
                else ""
            ),
            target_dataset_id=(
                _INLINE if target_kind == "target_images" else target.target_dataset_id
            ),
        )

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
            if dataset_id and dataset_id != _INLINE:
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
                backbone,
                request.weights,
                request.method,
                lambda name: self._exported(name, tenant),
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

    async def GetJob(  # noqa: N802
        self, request: pb.GetJobRequest, context: Context
    ) -> pb.GetJobResponse:
        """See fine_tuning.proto."""

        def got(tenant: str) -> pb.GetJobResponse:
            return pb.GetJobResponse(job=jobs.job(self._jobs.get(request.job_id, tenant)))

        return await asyncio.to_thread(got, principal.current().tenant)

    async def ListJobs(  # noqa: N802
        self, request: pb.ListJobsRequest, context: Context
    ) -> pb.ListJobsResponse:
        """See fine_tuning.proto."""

        def listed(tenant: str) -> pb.ListJobsResponse:
            states = {jobs.state(number) for number in set(request.states)}
            records, token = self._jobs.list(
                request.page_size,
                request.page_token,
                states,
                request.model,
                tenant,
                jobs.kind(request.kind),
                request.labels,
            )
            return pb.ListJobsResponse(
                jobs=[jobs.job(record) for record in records], next_page_token=token
            )

        return await asyncio.to_thread(listed, principal.current().tenant)

    async def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """See fine_tuning.proto."""
        if request.after_sequence < 0:
            raise bad_field(
                "after_sequence",
                f"after_sequence is {request.after_sequence}: it must be 0 (for all events) or "
                "more",
            )
        after = request.after_sequence
        async for event in self._watcher.follow(request.job_id, principal.current().tenant, after):
            if isinstance(event.payload, DataFound):  # has a row for each class
                yield pb.WatchJobResponse(event=await asyncio.to_thread(jobs.event, event))
            else:
                yield pb.WatchJobResponse(event=jobs.event(event))

    async def CancelJob(  # noqa: N802
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        """See fine_tuning.proto."""

        def cancelled(tenant: str) -> pb.CancelJobResponse:
            record = self._jobs.request_cancel(request.job_id, tenant)
            if record.state is JobState.CANCELLED:
                self._metrics.jobs_ended.labels(record.state.value).inc()
            return pb.CancelJobResponse(job=jobs.job(record))

        return await asyncio.to_thread(cancelled, principal.current().tenant)

    async def DeleteJob(  # noqa: N802
        self, request: pb.DeleteJobRequest, context: Context
    ) -> pb.DeleteJobResponse:
        """See fine_tuning.proto."""
        await asyncio.to_thread(self._jobs.delete, request.job_id, principal.current().tenant)
        return pb.DeleteJobResponse()

    async def RankBackbones(  # noqa: N802
        self, request: pb.RankBackbonesRequest, context: Context
    ) -> pb.RankBackbonesResponse:
        """See fine_tuning.proto."""
        return await in_thread(partial(self._start_ranking, request))

    def _start_ranking(
        self, message: pb.RankBackbonesRequest, is_abandoned: threading.Event
    ) -> pb.RankBackbonesResponse:
        message.DiscardUnknownFields()
        requests.check_size(message)
        check_request_id(message.request_id)
        tenant, quota = principal.current().tenant, principal.current().quota
        is_inline = message.WhichOneof("data") == "inline_images"
        request = requests.ranking(
            message,
            tenant,
            server_path=(
                self._path(message.server_path.path, "server_path.path")
                if message.WhichOneof("data") == "server_path"
                else ""
            ),
            dataset_id=_INLINE if is_inline else message.dataset_id,
        )
        # A request id is answered with the job that it started; else all is checked before an
        # image is stored.
        if not self._jobs.is_known(message.request_id, tenant):
            self._datasets.check_room(tenant, quota.stored_bytes)
            request.check(needs_images=not message.validate_only)
            for asked in request.backbones:
                weights.find_registered(self._settings, asked.backbone, tenant)
            self._jobs.check_open(tenant, JobKind.RANKING, quota.rankings)
            if request.dataset_id and not is_inline:
                self._datasets.check_usable(request.dataset_id, tenant, is_alone=True)
        if message.validate_only:
            return pb.RankBackbonesResponse()
        if is_inline:
            message.dataset_id = self._store(
                message.inline_images.images,
                is_abandoned,
                case_sensitive=message.case_sensitive_labels,
                is_alone=True,
            )
        if is_abandoned.is_set():
            raise Expired(Reason.DEADLINE_EXCEEDED, "the caller has gone: no job is started")
        record, _ = self._jobs.create(
            msgspec.structs.replace(request, dataset_id=message.dataset_id),
            message.request_id,
            message.SerializeToString(deterministic=True),
            quota.rankings,
        )
        failpoints.reach("job.created")
        return pb.RankBackbonesResponse(job=jobs.job(record))
