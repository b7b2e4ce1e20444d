"""Tenants of one server, each of which may call any method of it."""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import status_pb2
from graftml._async_io import End
from graftml_stubs.v1 import backbone_pb2 as bb
from graftml_stubs.v1 import dataset_pb2 as ds
from graftml_stubs.v1 import fine_tuning_pb2 as ft
from graftml_stubs.v1 import model_pb2 as md
from graftml_stubs.v1 import prediction_pb2 as pr
from grpc import aio

from service.rpc.open_inference import grpc_predict_v2_pb2 as oip
from tests.extractors import MEAN, SIZE, STD, extractor
from tests.rpc.conftest import GUARD_S, Refusal, Service, colours, image, of_status

SECRET = "s" * 32
STATUS = "grpc-status-details-bin"

METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for file in (ft, ds, bb, md, pr, oip)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@dataclass(frozen=True)
class Outcome:
    """How a call ended, with all that its caller can see of it."""

    code: grpc.StatusCode
    details: bytes
    answers: tuple[bytes, ...]

    def without(self, value: str) -> "Outcome":
        """As it would be for any other value of the same length."""
        old, new = value.encode(), b"#" * len(value)
        answers = tuple(answer.replace(old, new) for answer in self.answers)
        return Outcome(self.code, self.details.replace(old, new), answers)

    @property
    def refusal(self) -> Refusal:
        return of_status(status_pb2.Status.FromString(self.details))


class Tenant:
    """Calls any method with the token of a tenant."""

    def __init__(self, service: Service, name: str) -> None:
        self.service = service
        self.metadata = (("authorization", f"Bearer graft_{name}_{SECRET}"),)

    async def outcome(self, method: str, *requests: Message) -> Outcome:
        """On the wire all kinds of methods look alike, so one kind of call does for all."""
        descriptor = METHODS[method]
        call = self.service.channel.stream_stream(
            f"/{descriptor.containing_service.full_name}/{descriptor.name}"
        )([r.SerializeToString() for r in requests], metadata=self.metadata, timeout=GUARD_S)
        answers, end = list[bytes](), End(call)
        try:
            async for answer in call:
                answers.append(answer)
        except aio.AioRpcError as error:
            # Of a call that is refused while it sends, gRPC may tell INTERNAL first.
            told: Any = await end.told(error)
            details = bytes(dict(told.trailing_metadata())[STATUS])
            return Outcome(told.code(), details, tuple(answers))
        return Outcome(grpc.StatusCode.OK, b"", tuple(answers))

    async def many(self, method: str, *requests: Message) -> list[Any]:
        outcome = await self.outcome(method, *requests)
        assert outcome.code is grpc.StatusCode.OK, outcome
        kind = message_factory.GetMessageClass(METHODS[method].output_type)
        return [kind.FromString(answer) for answer in outcome.answers]

    async def one(self, method: str, request: Message) -> Any:
        (answer,) = await self.many(method, request)
        return answer

    async def refused(self, method: str, *requests: Message) -> Refusal:
        return (await self.outcome(method, *requests)).refusal

    async def make_model(self, name: str, **fields: Any) -> ft.Job:
        """Fine-tunes on three colours; answers with the job as it ended."""
        fields = {"inline_images": colours(), **fields}
        started = await self.one("FineTune", ft.FineTuneRequest(model=name, **fields))
        await self.many("WatchJob", ft.WatchJobRequest(job_id=started.job.job_id))
        job: ft.Job = (await self.one("GetJob", ft.GetJobRequest(job_id=started.job.job_id))).job
        assert job.state == ft.JOB_STATE_SUCCEEDED, job
        return job

    async def upload(self, *, is_unlabelled: bool = False, width: int = 30) -> ds.Dataset:
        header = ds.UploadDatasetHeader(is_unlabelled=is_unlabelled)
        parts = [
            ds.UploadDatasetRequest(image=ds.LabelledImage(label=label, content=content))
            for label in ("red", "blue")
            for content in (image(label, (width, 30)), image(label, (width + 1, 30)))
        ]
        end = ds.UploadDatasetEnd(message_count=len(parts))
        answer = await self.many(
            "UploadDataset",
            ds.UploadDatasetRequest(header=header),
            *parts,
            ds.UploadDatasetRequest(end=end),
        )
        found: ds.Dataset = answer[0].dataset
        return found

    async def register(self, name: str, file: bytes = b"", **fields: Any) -> bb.Backbone:
        """Registers a tiny backbone, or the file that is given."""
        answer = await self.many("RegisterBackbone", *registration(name, file, **fields))
        found: bb.Backbone = answer[0].backbone
        return found

    async def everything(self) -> list[Outcome]:
        """All that a tenant can list and ask about."""
        return [
            await self.outcome("ListModels", md.ListModelsRequest()),
            await self.outcome("ListJobs", ft.ListJobsRequest()),
            await self.outcome("ListDatasets", ds.ListDatasetsRequest()),
            await self.outcome("ListBackbones", bb.ListBackbonesRequest()),
            await self.outcome("RepositoryIndex", oip.RepositoryIndexRequest()),
            await self.outcome("ModelStatistics", oip.ModelStatisticsRequest()),
        ]


def registration(
    name: str = "tiny", file: bytes = b"", *, cut_off: bool = False, **fields: Any
) -> list[bb.RegisterBackboneRequest]:
    """Makes the messages that register a tiny backbone, or the file that is given."""
    file = file or extractor().SerializeToString()
    description = bb.BackboneDescription(
        **{"name": name, "size": SIZE, "mean": MEAN, "std": STD, **fields}
    )
    chunks = [file[start : start + 2000] for start in range(0, len(file), 2000)]
    messages = [
        bb.RegisterBackboneRequest(description=description),
        *(bb.RegisterBackboneRequest(chunk=chunk) for chunk in chunks),
    ]
    end = bb.RegisterBackboneEnd(message_count=len(chunks))
    return messages if cut_off else [*messages, bb.RegisterBackboneRequest(end=end)]
