"""FineTuningService: jobs started, watched and cancelled."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from graft.v1 import fine_tuning_pb2 as pb
from graft.v1 import fine_tuning_pb2_grpc
from grpc import aio

from service.domain import check_name
from service.errors import InvalidInput, Reason
from service.jobs.request import JobRequest, allowed_path, check_request_id
from service.jobs.store import JobStore
from service.jobs.watch import Watch
from service.rpc import convert_jobs
from service.rpc.datasets import add_picture
from service.storage.datasets import DatasetStore

Context = aio.ServicerContext[Any, Any]


class FineTuningServicer(fine_tuning_pb2_grpc.FineTuningServiceServicer):
    """Makes classifiers from labelled pictures. The supervisor hears of jobs from the store."""

    def __init__(
        self,
        jobs: JobStore,
        datasets: DatasetStore,
        watch: Watch,
        *,
        allowed_dirs: tuple[Path, ...],
        default_backbone: str,
    ) -> None:
        self._jobs = jobs
        self._datasets = datasets
        self._watch = watch
        self._allowed_dirs = allowed_dirs
        self._default_backbone = default_backbone

    async def FineTune(  # noqa: N802
        self, request: pb.FineTuneRequest, context: Context
    ) -> pb.FineTuneResponse:
        """See fine_tuning.proto."""
        return pb.FineTuneResponse(job=await asyncio.to_thread(self._start, request))

    def _start(self, message: pb.FineTuneRequest) -> pb.Job:
        check_name(message.model, "model")
        check_request_id(message.request_id)
        data = message.WhichOneof("data")
        server_path = dataset_id = ""
        if data == "server_path":
            server_path = str(allowed_path(message.server_path.path, self._allowed_dirs))
        elif data == "dataset_id":
            dataset_id = message.dataset_id
        elif data == "inline_pictures":
            # Everything else is checked first, so that a bad field stores nothing.
            self._request(message, dataset_id="inline")
            dataset_id = self._store(message.inline_pictures.pictures)
        request = self._request(message, server_path=server_path, dataset_id=dataset_id)
        # What counts is what was asked, not how it was written down.
        asked = msgspec.json.encode(request, order="deterministic")
        fingerprint = hashlib.sha256(asked).hexdigest()
        record, _ = self._jobs.create(request, message.request_id, fingerprint)
        return convert_jobs.job(record)

    def _request(
        self, message: pb.FineTuneRequest, *, server_path: str = "", dataset_id: str = ""
    ) -> JobRequest:
        request = convert_jobs.request(message, server_path=server_path, dataset_id=dataset_id)
        request.check(self._default_backbone)
        return request

    def _store(self, pictures: Any) -> str:
        upload = self._datasets.begin_upload("", "")
        try:
            for index, picture in enumerate(pictures):
                add_picture(upload, picture, f"inline_pictures.pictures[{index}]")
            return upload.finish().dataset_id
        finally:
            upload.abort()

    async def GetJob(  # noqa: N802
        self, request: pb.GetJobRequest, context: Context
    ) -> pb.GetJobResponse:
        """See fine_tuning.proto."""
        record = await asyncio.to_thread(self._jobs.get, request.job_id)
        return pb.GetJobResponse(job=convert_jobs.job(record))

    async def ListJobs(  # noqa: N802
        self, request: pb.ListJobsRequest, context: Context
    ) -> pb.ListJobsResponse:
        """See fine_tuning.proto."""
        states = [convert_jobs.state(number) for number in request.states]
        records, token = await asyncio.to_thread(
            self._jobs.list, request.page_size, request.page_token, states, request.model
        )
        return pb.ListJobsResponse(
            jobs=[convert_jobs.job(record) for record in records], next_page_token=token
        )

    async def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """See fine_tuning.proto."""
        if request.after_sequence < 0:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"after_sequence is {request.after_sequence}: it must be 0 (for all events) or "
                "more",
                field="after_sequence",
            )
        async for event in self._watch.follow(request.job_id, request.after_sequence):
            yield pb.WatchJobResponse(event=convert_jobs.event(event))

    async def CancelJob(  # noqa: N802
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        """See fine_tuning.proto."""
        record = await asyncio.to_thread(self._jobs.request_cancel, request.job_id)
        return pb.CancelJobResponse(job=convert_jobs.job(record))
