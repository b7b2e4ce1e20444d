"""Requests at their worst, by real calls: whatever a field holds, no call ends as INTERNAL."""

import asyncio
import base64
import logging
from collections.abc import Iterator
from typing import Any, cast

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from graftml._async_io import End
from graftml_stubs.v1 import dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2
from grpc import aio

from service.rpc.open_inference import grpc_predict_v2_pb2
from service.rpc.server import SERVICES
from tests.fuzz.messages import extremes
from tests.rpc.conftest import GUARD_S, MakeService, Service, colours, image, refusal

OURS = [
    method
    for name in SERVICES
    for method in descriptor_pool.Default().FindServiceByName(name).methods
]
FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_MAX_DEPTH = 4
_AT_ONCE = 24

TEXTS = (
    "",
    "../../etc/passwd",
    "a/b",
    "/\0",
    "nul\0l\r\n\x1b[31m\u202e",
    "caf\u00e9\u0301\u200d\u2028\U0010ffff",
    "'; DROP TABLE jobs; --",
    "%s{0}<b>",
    "x" * 70_000,
    "9" * 400,
)

Path = tuple[FieldDescriptor, ...]

# What the field under test is set in, so that checks behind the first ones are reached.
BASES: dict[str, Message] = {
    "FineTuneRequest": fine_tuning_pb2.FineTuneRequest(model="cats", dataset_id="ds-none"),
    "RankBackbonesRequest": fine_tuning_pb2.RankBackbonesRequest(dataset_id="ds-none"),
    "PredictRequest": prediction_pb2.PredictRequest(
        models=[prediction_pb2.ModelSpec(model="colours")],
        images=[prediction_pb2.Image(encoded=image("red"))],
    ),
    "PredictStreamRequest": prediction_pb2.PredictStreamRequest(
        request=prediction_pb2.PredictRequest(
            models=[prediction_pb2.ModelSpec(model="colours")],
            images=[prediction_pb2.Image(encoded=image("red"))],
        )
    ),
    "UploadDatasetRequest": dataset_pb2.UploadDatasetRequest(),
    "SetAliasRequest": model_pb2.SetAliasRequest(model="colours", alias="prod", version=7),
    "ModelInferRequest": grpc_predict_v2_pb2.ModelInferRequest(
        model_name="colours",
        inputs=[
            grpc_predict_v2_pb2.ModelInferRequest.InferInputTensor(
                name="images", datatype="UINT8", shape=[1, 1, 3]
            )
        ],
        raw_input_contents=[b"abc"],
    ),
}


def scalars(descriptor: Any, above: Path = ()) -> Iterator[Path]:
    """Every field that holds no message, with the way to it."""
    for field in descriptor.fields:
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            yield (*above, field)
        elif len(above) < _MAX_DEPTH:
            yield from scalars(field.message_type, (*above, field))


def with_value(message: Any, path: Path, value: Any) -> Any:
    """Sets one field of a message, making what lies on the way."""
    first, *rest = path
    inner = getattr(message, first.name)
    if not rest:
        if first.is_repeated:
            inner.append(value)
        else:
            setattr(message, first.name, value)
    elif first.message_type.GetOptions().map_entry:
        _set_entry(inner, first.message_type, rest, value)
    elif first.is_repeated:
        with_value(inner[0] if len(inner) else inner.add(), tuple(rest), value)
    else:
        inner.SetInParent()
        with_value(inner, tuple(rest), value)
    return message


def _set_entry(entries: Any, kind: Any, rest: list[FieldDescriptor], value: Any) -> None:
    key, held = kind.fields
    if rest[0] is not key and len(rest) > 1:
        with_value(entries["key"], tuple(rest[1:]), value)
    elif rest[0] is not key:
        entries["key"] = value
    elif held.type == FieldDescriptor.TYPE_MESSAGE:
        entries[value].SetInParent()
    else:
        entries[value] = held.default_value


def _of(field: FieldDescriptor) -> tuple[Any, ...]:
    return TEXTS if field.type == FieldDescriptor.TYPE_STRING else extremes(field)


def requests_of(method: Any) -> Iterator[tuple[str, Message]]:
    """A request for each field and extreme, and what it is."""
    kind = message_factory.GetMessageClass(method.input_type)
    for path in scalars(method.input_type):
        for value in _of(path[-1]):
            message = kind()
            if (base := BASES.get(method.input_type.name)) is not None:
                message.CopyFrom(base)
            names = ".".join(field.name for field in path)
            yield f"{names} = {value!r:.60}", with_value(message, path, value)


async def answer(service: Service, method: Any, requests: list[bytes]) -> grpc.StatusCode:
    """How a call ends that sends these bytes."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    shape = "stream" if method.client_streaming else "unary"
    shape += "_stream" if method.server_streaming else "_unary"
    make = getattr(service.channel, shape)

    async def sent() -> Any:
        for request in requests:
            yield request

    call = make(path)(sent() if method.client_streaming else requests[0], timeout=GUARD_S)
    # Of a call that is refused while it sends, gRPC may tell INTERNAL first.
    end = End(call)
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except aio.AioRpcError as error:
        told: Any = await end.told(error)
        return cast("grpc.StatusCode", told.code())
    return grpc.StatusCode.OK


async def stored(service: Service) -> tuple[int, int, int]:
    """How many jobs, datasets and models there are."""
    jobs = await service.fine_tuning.ListJobs(fine_tuning_pb2.ListJobsRequest(page_size=1000))
    sets = await service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest(page_size=1000))
    models = await service.models.ListModels(model_pb2.ListModelsRequest(page_size=1000))
    return len(jobs.jobs), len(sets.datasets), len(models.models)


def faults_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() + str(r.exc_info) for r in caplog.records if r.levelno >= logging.ERROR]


def upload_around(message: Any) -> list[bytes]:
    """An upload that holds the message where it belongs."""
    header = dataset_pb2.UploadDatasetRequest(header=dataset_pb2.UploadDatasetHeader())
    end = dataset_pb2.UploadDatasetRequest(end=dataset_pb2.UploadDatasetEnd(message_count=1))
    part = message.WhichOneof("part")
    parts = [message, end] if part == "header" else [header, message, end]
    return [each.SerializeToString() for each in parts]


@pytest.mark.parametrize("service_name", SERVICES)
async def test_whatever_a_field_holds_the_call_is_answered_and_nothing_is_stored(
    service: Service, service_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    await service.make_model()
    before = await stored(service)
    room = asyncio.Semaphore(_AT_ONCE)
    found: list[str] = []
    count = 0

    async def ask(method: Any, what: str, message: Message) -> None:
        sent = [message.SerializeToString()]
        if method.name == "UploadDataset":
            sent = upload_around(message)
        async with room:
            code = await answer(service, method, sent)
        if code in FAULTS:
            found.append(f"{method.name}: {what}: {code.name}")

    async with asyncio.TaskGroup() as group:
        for method in OURS:
            if method.containing_service.full_name != service_name:
                continue
            for what, message in requests_of(method):
                count += 1
                group.create_task(ask(method, what, message))
    assert count > 50
    assert found == []
    assert faults_told(caplog) == []
    assert await stored(service) == before


async def test_bytes_that_are_no_message_are_refused_as_invalid_by_every_method(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    # A field's number 0; a length beyond the end; text that is not UTF-8 in field 1.
    for garbage in (b"\0\0", b"\x0a\xff\xff\xff\x7f", b"\x0a\x02\xff\xfe"):
        for method in OURS:
            code = await answer(service, method, [garbage])
            has_text = any(
                field.number == 1 and field.type == FieldDescriptor.TYPE_STRING
                for field in method.input_type.fields
            )
            if not method.input_type.fields or (garbage.startswith(b"\x0a\x02") and not has_text):
                assert code not in FAULTS, method.full_name
            else:
                assert code is grpc.StatusCode.INVALID_ARGUMENT, (method.full_name, garbage)
    assert faults_told(caplog) == []


@pytest.mark.parametrize(
    "key",
    [
        '["jobs", 99999999999999999999]',
        '["versions", 9223372036854775808]',
        '["versions", -99999999999999999999]',
        '["versions", 1.5]',
        '["datasets", 1e999, ""]',
        '["datasets", null, ""]',
        '["models", "\\ud800"]',
        '["jobs", ' + "[" * 3000,
        "[]",
        "{}",
        "",
    ],
)
async def test_a_page_token_that_no_list_gave_is_refused(service: Service, key: str) -> None:
    await service.make_model()
    token = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=") or "="
    calls = (
        service.fine_tuning.ListJobs(fine_tuning_pb2.ListJobsRequest(page_token=token)),
        service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest(page_token=token)),
        service.models.ListModels(model_pb2.ListModelsRequest(page_token=token)),
        service.models.ListVersions(
            model_pb2.ListVersionsRequest(model="colours", page_token=token)
        ),
    )
    for call in calls:
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_list_of_states_is_walked_once_a_state_and_may_not_be_long(
    service: Service,
) -> None:
    await service.make_model()
    asked = fine_tuning_pb2.ListJobsRequest(states=[3] * 900)
    assert len((await service.fine_tuning.ListJobs(asked)).jobs) == 1
    asked = fine_tuning_pb2.ListJobsRequest(states=[3] * 1000)
    refused = await refusal(service.fine_tuning.ListJobs(asked))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "more than 1000 fields and list elements" in refused.message


@pytest.mark.parametrize("method", ["GetJob", "ListJobs", "CancelJob"])
async def test_a_call_that_brings_no_images_takes_no_large_message(
    service: Service, method: str
) -> None:
    call = service.channel.unary_unary(f"/graft.v1.FineTuningService/{method}")
    refused = await refusal(call(bytes(2**20)))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"one of {method} has at most 65536" in refused.message


@pytest.mark.parametrize(
    ("accept_gzip", "code"),
    [("no", grpc.StatusCode.UNIMPLEMENTED), ("yes", grpc.StatusCode.OK)],
)
async def test_gzip_is_taken_where_the_operator_says_so(
    make_service: MakeService, accept_gzip: str, code: grpc.StatusCode
) -> None:
    service: Service = await make_service(accept_gzip=accept_gzip)
    # One too short to be worth compressing is sent as it is.
    asked = model_pb2.ListModelsRequest(page_size=1, page_token="")
    asked.MergeFromString(b"\x9a\x06\x80\x10" + bytes(2048))
    call = service.models.ListModels(asked, compression=grpc.Compression.Gzip)
    assert await call.code() is code


async def test_what_extreme_values_are_accepted_is_told_again(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    job = await service.make_model()
    kept = await service.fine_tuning.GetJob(fine_tuning_pb2.GetJobRequest(job_id=job.job_id))
    pb = fine_tuning_pb2
    base = pb.FineTuneRequest(
        model="extreme", dataset_id=kept.job.request.dataset_id, feature_based=pb.FeatureBased()
    )
    changes: list[dict[str, Any]] = [
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"feature_based": {"l2": 5e-324}},
        {"feature_based": {"l2": 1.7e308}},
        {"model_based": {"learning_rate": 1.7e308, "weight_decay": 0.0}},
        {"grouping": {"folder_level": 32}},
        {"gate": {"class_recalls": {"x" * 128: 5e-324}}},
        {"labels": {"k\n\x1b": "\u202e\0" * 20}},
        {"time_budget": {"seconds": 2**62}},
        {"time_budget": {"seconds": 315_576_000_000, "nanos": 999_999_999}},
        {"gate": {"max_latency": {"seconds": 2**63 - 1}}},
        {"gate": {"max_parity_difference": 1.7e308}},
        {"request_id": "\0\u2028" * 60},
    ]
    for change in changes:
        request = pb.FineTuneRequest()
        request.CopyFrom(base)
        request.MergeFrom(pb.FineTuneRequest(**change))
        started = await service.fine_tuning.FineTune(request)
        ended = await service.ended(started.job.job_id)
        assert pb.JobState.Name(ended.state) == "JOB_STATE_SUCCEEDED", change
    assert faults_told(caplog) == []


async def test_inline_images_of_which_one_has_a_bad_label_store_nothing(
    service: Service,
) -> None:
    before = await stored(service)
    for label in ("../cat", "cat\0", "\u202etac", "a/b", ".hidden", "x" * 129, ""):
        images = colours()
        images.images[-1].label = label
        with pytest.raises(aio.AioRpcError) as caught:
            await service.fine_tuning.FineTune(
                fine_tuning_pb2.FineTuneRequest(model="m", inline_images=images)
            )
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, label
    for name in (
        "../../evil",
        "/etc/passwd",
        "..",
        "a\0b",
        "x" * 5000,
        "\u202egnp.exe",
        "\\\\s\\x",
    ):
        images = colours()
        for each in images.images:
            each.filename = name
        started = await service.fine_tuning.FineTune(
            fine_tuning_pb2.FineTuneRequest(model="m", inline_images=images)
        )
        await service.ended(started.job.job_id)
    # The same images are the same dataset, whatever their files were called.
    assert (await stored(service))[1] == before[1] + 1
    assert not list(service.data_dir.parent.rglob("*evil*"))
