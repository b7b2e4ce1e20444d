"""Predict and PredictStream: answers, and what bad input is answered with."""

import asyncio
import hashlib
import struct
import threading
import zlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from graftml_stubs.v1 import dataset_pb2, model_pb2
from graftml_stubs.v1 import prediction_pb2 as pb

from service.contract import Finished
from service.rpc.codec import predictions
from tests.fake_launcher import Script
from tests.rpc.conftest import (
    GUARD_S,
    MakeService,
    Service,
    colours,
    image,
    of_status,
    refusal,
    write_result,
)
from tests.rpc.test_server import scrape


def encoded(
    *images: bytes,
    model: str = "colours",
    top_k: int = 0,
    include_features: bool = False,
    **which: Any,
) -> pb.PredictRequest:
    return pb.PredictRequest(
        models=[pb.ModelSpec(model=model, **which)],
        images=[pb.Image(encoded=data) for data in images],
        top_k=top_k,
        include_features=include_features,
    )


def png_bomb(side: int) -> bytes:
    """A PNG header that promises side x side pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(side), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


async def test_images_are_answered_in_order_best_class_first(service: Service) -> None:
    await service.make_model()
    answer = await service.prediction.Predict(
        encoded(image("red"), image("blue", kind="JPEG"), image("green", kind="WEBP"),
                image("red", kind="BMP"), top_k=2)
    )  # fmt: skip
    (found,) = answer.answers
    assert (found.model, found.version) == ("colours", 1)
    best = [result.classification.scores[0] for result in answer.answers[0].results]
    assert [score.label for score in best] == ["red", "blue", "green", "red"]
    assert [score.class_index for score in best] == [2, 0, 1, 2]
    for result in answer.answers[0].results:
        assert len(result.classification.scores) == 2
        assert result.classification.scores[0].probability > 0.9
        assert not result.classification.features


async def test_without_top_k_one_class_is_answered_and_all_when_it_is_large(
    service: Service,
) -> None:
    await service.make_model()
    one = await service.prediction.Predict(encoded(image("red")))
    assert len(one.answers[0].results[0].classification.scores) == 1
    every = await service.prediction.Predict(encoded(image("red"), top_k=99))
    scores = every.answers[0].results[0].classification.scores
    assert sum(score.probability for score in scores) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("is_calibrated", [True, False])
async def test_answers_and_the_version_say_whether_probabilities_are_calibrated(
    make_service: MakeService, is_calibrated: bool
) -> None:
    note = "" if is_calibrated else "one image a class"
    write = partial(write_result, calibrated=is_calibrated, calibration_note=note)
    service: Service = await make_service(Script([Finished(1.0, 3)], before_last=write))
    await service.make_model()
    bad = pb.Image(encoded=b"no image")
    for images, expected in (
        ([pb.Image(encoded=image("red")), bad], is_calibrated),
        ([bad], False),
    ):
        request = pb.PredictRequest(models=[pb.ModelSpec(model="colours")], images=images)
        assert (await service.prediction.Predict(request)).answers[0].calibrated is expected
    got = await service.models.GetVersion(model_pb2.GetVersionRequest(model="colours"))
    assert (got.version.calibrated, got.version.calibration_note) == (is_calibrated, note)


async def test_features_come_when_asked_for(service: Service) -> None:
    await service.make_model()
    answer = await service.prediction.Predict(encoded(image("red"), include_features=True))
    assert list(answer.answers[0].results[0].classification.features) == pytest.approx([1, 0, 0])


async def test_tensors_of_both_types_get_the_encoded_images_answer(service: Service) -> None:
    await service.make_model()
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 255
    tensors = [
        pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=red.shape, data=red.tobytes()),
        pb.Tensor(
            data_type=pb.DATA_TYPE_FLOAT32,
            shape=red.shape,
            data=(red / 255).astype("<f4").tobytes(),
        ),
    ]
    request = pb.PredictRequest(
        models=[pb.ModelSpec(model="colours")], images=[pb.Image(tensor=t) for t in tensors]
    )
    answer = await service.prediction.Predict(request)
    assert [r.classification.scores[0].label for r in answer.answers[0].results] == ["red", "red"]


async def test_a_bad_image_fails_alone(service: Service) -> None:
    await service.make_model()
    whole = image("red", (300, 300), "JPEG")
    bad = {
        "text": b"this is not an image",
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "bomb": png_bomb(30_000),
        "page": b"<!DOCTYPE html>",
    }
    answer = await service.prediction.Predict(encoded(*bad.values(), image("blue")))
    *errors, good = answer.answers[0].results
    assert good.classification.scores[0].label == "blue"
    found = {name: of_status(result.error) for name, result in zip(bad, errors, strict=True)}
    assert {f.code for f in found.values()} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert found["text"].reason == "IMAGE_UNREADABLE"
    assert "not an image but text" in found["text"].message
    assert "0 bytes" in found["empty"].message
    assert "damaged or cut short" in found["truncated"].message
    assert found["bomb"].reason == "IMAGE_TOO_LARGE"
    assert "30000 x 30000" in found["bomb"].message
    assert "a web page (HTML)" in found["page"].message


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[2, 2], data=bytes(4)), "shape"),
        (pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[2, 2, 4], data=bytes(16)), "shape"),
        (pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[2, 2, 3], data=bytes(11)), "bytes"),
        (pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[-1, 2, 3], data=bytes(6)), "shape"),
        (pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[2**40, 2**40, 3], data=b""), ""),
        (
            pb.Tensor(
                data_type=pb.DATA_TYPE_FLOAT32,
                shape=[1, 1, 3],
                data=np.array([0, np.nan, 1], "<f4").tobytes(),
            ),
            "between 0 and 1",
        ),
    ],
)
async def test_a_tensor_that_is_no_image_fails_alone(
    service: Service, tensor: pb.Tensor, why: str
) -> None:
    await service.make_model()
    request = pb.PredictRequest(
        models=[pb.ModelSpec(model="colours")], images=[pb.Image(tensor=tensor)]
    )
    answer = await service.prediction.Predict(request)
    found = of_status(answer.answers[0].results[0].error)
    assert (found.code, found.reason) in (
        (grpc.StatusCode.INVALID_ARGUMENT, "TENSOR_INVALID"),
        (grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_TOO_LARGE"),
    )
    assert why in found.message


async def test_a_tensor_without_a_type_is_refused_by_name(service: Service) -> None:
    await service.make_model()
    request = pb.PredictRequest(
        models=[pb.ModelSpec(model="colours")], images=[pb.Image(tensor=pb.Tensor())]
    )
    found = await refusal(service.prediction.Predict(request))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert found.field == "images[0].tensor.data_type"


async def test_requests_that_ask_nothing_sensible_are_refused_by_field(service: Service) -> None:
    await service.make_model()
    cases = {
        "images": encoded(),
        "images[0]": pb.PredictRequest(models=[pb.ModelSpec(model="colours")], images=[pb.Image()]),
        "top_k": encoded(image("red"), top_k=-1),
    }
    for field, request in cases.items():
        found = await refusal(service.prediction.Predict(request))
        assert (found.code, found.reason, found.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
            field,
        )


async def test_more_images_than_a_call_may_bring_are_refused(make_service: MakeService) -> None:
    service: Service = await make_service(max_images=2)
    await service.make_model()
    found = await refusal(service.prediction.Predict(encoded(*[image("red")] * 3)))
    assert found.field == "images"
    assert "several calls" in found.message


async def test_unknown_models_versions_and_aliases_are_named(service: Service) -> None:
    await service.make_model()
    cases = {
        "MODEL_NOT_FOUND": encoded(image("red"), model="colour"),
        "VERSION_NOT_FOUND": encoded(image("red"), version=7),
        "ALIAS_NOT_FOUND": encoded(image("red"), alias="stable"),
    }
    for reason, request in cases.items():
        found = await refusal(service.prediction.Predict(request))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, reason)
    found = await refusal(service.prediction.Predict(cases["MODEL_NOT_FOUND"]))
    assert "colours" in found.message


async def test_a_message_beyond_the_limit_is_refused(make_service: MakeService) -> None:
    service: Service = await make_service(max_message_mb=1)
    await service.make_model()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.prediction.Predict(encoded(bytes(2 * 2**20)))
    # gRPC itself refuses, before anything of ours sees the message.
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in caught.value.details()


async def test_a_call_whose_deadline_passes_ends_and_leaves_the_service_well(
    service: Service,
) -> None:
    await service.make_model()
    await service.prediction.Predict(encoded(image("red")))
    (session,) = service.runtime.sessions.values()
    session.hold()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.prediction.Predict(encoded(image("red")), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    session.release()
    answer = await service.prediction.Predict(encoded(image("blue")))
    assert answer.answers[0].results[0].classification.scores[0].label == "blue"


async def test_a_full_queue_refuses_and_says_when_to_come_back(make_service: MakeService) -> None:
    service: Service = await make_service(max_queue=2)
    await service.make_model()
    found = await refusal(service.prediction.Predict(encoded(*[image("red")] * 3)))
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert found.retry_s > 0


async def test_a_stream_answers_every_request_by_its_id(service: Service) -> None:
    await service.make_model()
    asked = {
        "a": encoded(image("red")),
        "b": encoded(image("red"), model="nobody"),
        "c": encoded(image("blue")),
    }

    async def requests() -> AsyncIterator[pb.PredictStreamRequest]:
        for key, request in asked.items():
            yield pb.PredictStreamRequest(id=key, request=request)

    answers = {answer.id: answer async for answer in service.prediction.PredictStream(requests())}
    assert set(answers) == set(asked)
    assert answers["a"].response.answers[0].results[0].classification.scores[0].label == "red"
    assert answers["c"].response.answers[0].results[0].classification.scores[0].label == "blue"
    assert of_status(answers["b"].error).reason == "MODEL_NOT_FOUND"


async def test_an_error_that_nobody_expected_leaves_with_an_id_and_nothing_of_ours(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    await service.make_model()
    await service.prediction.Predict(encoded(image("red")))
    (session,) = service.runtime.sessions.values()
    session.fail_next = ZeroDivisionError("/secret/path")
    found = await refusal(service.prediction.Predict(encoded(image("red"))))
    assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in found.message
    incident = found.message.split()[-1]
    assert any(incident in record.getMessage() for record in caplog.records)


async def test_many_callers_are_batched_and_each_gets_its_own(make_service: MakeService) -> None:
    service: Service = await make_service(threads=1)
    await service.make_model()
    (session,) = service.runtime.sessions.values()
    session.hold()
    names = ["red", "green", "blue"] * 8
    calls = [asyncio.ensure_future(service.prediction.Predict(encoded(image(names[0]))))]
    assert await asyncio.to_thread(session.running.acquire, timeout=GUARD_S)
    # All that come while the first one runs.
    calls += [
        asyncio.ensure_future(service.prediction.Predict(encoded(image(name))))
        for name in names[1:]
    ]
    async with asyncio.timeout(GUARD_S):
        while "graft_queue_depth 23.0" not in await scrape(service):
            pass
    session.release()
    answers = await asyncio.gather(*calls)
    got = [answer.answers[0].results[0].classification.scores[0].label for answer in answers]
    assert got == names
    assert max(session.batches) > 1


async def test_an_answer_of_too_many_scores_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.make_model()
    request = encoded(image("red"), image("red"), top_k=9)
    answer = await service.prediction.Predict(request)
    assert [len(result.classification.scores) for result in answer.answers[0].results] == [3, 3]
    monkeypatch.setattr(predictions, "MAX_SCORES", 5)
    refused = await refusal(service.prediction.Predict(request))
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "top_k")
    assert "are 6 scores" in refused.message


async def test_answers_are_built_in_a_workers_thread(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.make_model()
    built_in: list[str] = []
    build = predictions.response

    def noted(*args: Any, **options: Any) -> pb.PredictResponse:
        built_in.append(threading.current_thread().name)
        return build(*args, **options)

    monkeypatch.setattr(predictions, "response", noted)
    await service.prediction.Predict(encoded(image("red"), image("blue")))
    (name,) = built_in
    assert name.startswith("infer-")


# Several models in one call


def of_models(*names: str, images: int = 1) -> pb.PredictRequest:
    request = encoded(*[image("red")] * images)
    del request.models[:]
    request.models.extend(pb.ModelSpec(model=name) for name in names)
    return request


async def test_several_models_answer_in_order_after_one_run(service: Service) -> None:
    await service.make_model("ants")
    await service.make_model("bees")
    request = of_models("bees", "ants", "bees")
    request.images.append(pb.Image(encoded=b"no image"))
    answer = await service.prediction.Predict(request)
    assert [found.model for found in answer.answers] == ["bees", "ants", "bees"]
    for found in answer.answers:
        good, bad = found.results
        assert good.classification.scores[0].label == "red"
        assert bad.error == answer.answers[0].results[1].error
        assert of_status(bad.error).reason == "IMAGE_UNREADABLE"
    (session,) = service.runtime.sessions.values()
    assert session.batches == [1]


async def test_a_model_that_is_not_there_fails_the_call_and_is_named_with_its_place(
    service: Service,
) -> None:
    await service.make_model("ants")
    found = await refusal(service.prediction.Predict(of_models("ants", "wasps")))
    assert (found.code, found.reason, found.field) == (
        grpc.StatusCode.NOT_FOUND,
        "MODEL_NOT_FOUND",
        "models[1]",
    )
    assert "'wasps'" in found.message


async def test_the_models_of_a_call_are_bounded_and_so_are_its_answers(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(max_images=64)
    await service.make_model("ants")
    await service.prediction.Predict(of_models(*["ants"] * 32, images=2))
    cases = {
        "names no model": ("models", of_models()),
        "names 33 models, more than the 32": ("models", of_models(*["ants"] * 33)),
        "3 images for 32 models, 96 answers, more than the 64": (
            "images",
            of_models(*["ants"] * 32, images=3),
        ),
    }
    for why, (field, request) in cases.items():
        found = await refusal(service.prediction.Predict(request))
        assert (found.reason, found.field) == ("INVALID_FIELD", field)
        assert why in found.message


async def test_the_scores_of_all_models_together_are_bounded(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.make_model("ants")
    monkeypatch.setattr(predictions, "MAX_SCORES", 5)
    request = of_models("ants", "ants")
    request.top_k = 3
    refused = await refusal(service.prediction.Predict(request))
    assert (refused.reason, refused.field) == ("INVALID_FIELD", "top_k")


# Features of recent images


async def test_a_repeated_image_is_computed_once_until_it_is_erased(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(recent_features_mb=1)
    await service.make_model()
    sent = colours().images[0].content
    (session,) = service.runtime.sessions.values()
    first = await service.prediction.Predict(encoded(sent))
    assert await service.prediction.Predict(encoded(sent)) == first
    assert session.batches == [1]
    assert 'graft_recent_features_total{outcome="hit"} 1.0' in await scrape(service)
    await service.datasets.EraseImage(
        dataset_pb2.EraseImageRequest(image_digest=hashlib.sha256(sent).hexdigest())
    )
    assert "graft_recent_features_bytes 0.0" in await scrape(service)
    assert await service.prediction.Predict(encoded(sent)) == first
    assert session.batches == [1, 1]


async def test_a_new_version_that_is_replayed_on_images_costs_a_head_alone(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(recent_features_mb=1)
    await service.make_model()
    images = [image("red"), image("blue"), b"no image"]
    await service.prediction.Predict(encoded(*images))
    (session,) = service.runtime.sessions.values()
    before = list(session.batches)
    await service.make_model()
    answer = await service.prediction.Predict(encoded(*images))
    assert answer.answers[0].version == 2
    assert [result.WhichOneof("outcome") for result in answer.answers[0].results] == [
        "classification",
        "classification",
        "error",
    ]
    assert session.batches == before
