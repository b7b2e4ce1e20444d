"""Decisions over the wire: a version's own, those of a call, and what is refused."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.text_format import Parse
from graftml_stubs.v1 import fine_tuning_pb2 as ft
from graftml_stubs.v1 import model_pb2
from graftml_stubs.v1 import prediction_pb2 as pb
from graftml_stubs.v1.decision_pb2 import Argmax, Balanced, Decision, Thresholds

from service.contract import Finished, JobSpec
from service.domain import Decision as Rule
from service.engine import head as heads
from service.rpc.open_inference import grpc_predict_v2_pb2 as oip
from service.rpc.open_inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from tests.fake_launcher import Script
from tests.rpc.conftest import MakeService, Service, colours, image, refusal, write_result
from tests.rpc.test_prediction import encoded

ARGMAX = Decision(argmax=Argmax())
BALANCED = Decision(balanced=Balanced())
GREY = image("#b0a8a0")
"""Red is a little more probable than green, and blue is not much behind: .39, .33, .28."""


def thresholds(others: float | None = None, **classes: float) -> Decision:
    return Decision(thresholds=Thresholds(classes=classes, others=others))


def write(spec: JobSpec) -> None:
    """Makes a head that is not sure, of classes that were not equally frequent."""
    head = heads.Head(
        np.eye(3, dtype=np.float32)[::-1].copy() * 5,
        np.zeros(3, np.float32),
        ("blue", "green", "red"),
        prior=np.array([0.1, 0.2, 0.7], np.float32),
        decision=spec.decision,
    )
    write_result(spec, decision=spec.decision)
    heads.save(head, Path(spec.out_dir) / "head.safetensors")


@pytest.fixture
async def deciding(make_service: MakeService) -> Service:
    made: Service = await make_service(Script([Finished(1.0, 3)], before_last=write))
    return made


async def make_version(service: Service, decision: Decision | None = None) -> ft.Job:
    request = ft.FineTuneRequest(model="colours", inline_images=colours(), decision=decision)
    started = await service.fine_tuning.FineTune(request)
    return await service.ended(started.job.job_id)


async def answered(service: Service, decision: Decision | None = None) -> pb.Classification:
    request = encoded(GREY, decision=decision, top_k=3)
    answer = await service.prediction.Predict(request)
    return answer.answers[0].results[0].classification


async def test_a_call_is_answered_by_its_own_decision_and_else_by_the_versions(
    deciding: Service,
) -> None:
    await make_version(deciding)
    plain = await answered(deciding)
    assert [score.label for score in plain.scores] == ["red", "green", "blue"]
    assert plain.answer == plain.scores[0]
    balanced = await answered(deciding, BALANCED)
    # Probabilities stay what they are, and so does their order.
    assert balanced.scores == plain.scores
    assert balanced.answer == plain.scores[2]
    assert (await answered(deciding, thresholds(red=0.9))).answer.label == "green"
    assert not (await answered(deciding, thresholds(others=0.9))).HasField("answer")

    await make_version(deciding, BALANCED)
    assert (await answered(deciding)).answer.label == "blue"
    assert (await answered(deciding, ARGMAX)).answer.label == "red"
    # What is answered need not be among the scores.
    one = await deciding.prediction.Predict(encoded(GREY))
    assert [score.label for score in one.answers[0].results[0].classification.scores] == ["red"]
    assert one.answers[0].results[0].classification.answer.label == "blue"


async def test_callers_with_decisions_of_their_own_share_a_stream(deciding: Service) -> None:
    await make_version(deciding)
    asked = {"": None, "argmax": ARGMAX, "balanced": BALANCED, "none": thresholds(others=1.0)}

    async def requests() -> AsyncIterator[pb.PredictStreamRequest]:
        for name, decision in asked.items():
            yield pb.PredictStreamRequest(id=name, request=encoded(GREY, decision=decision))

    got = {
        answer.id: answer.response.answers[0].results[0].classification.answer.label
        async for answer in deciding.prediction.PredictStream(requests())
    }
    assert got == {"": "red", "argmax": "red", "balanced": "blue", "none": ""}


async def test_a_version_and_its_job_say_their_decision_and_a_base_hands_it_on(
    deciding: Service,
) -> None:
    own = thresholds(0.25, red=0.75)
    job = await make_version(deciding, own)
    assert job.request.decision == own
    assert deciding.launcher.trainers[0].spec.decision == Rule(
        rule="thresholds", thresholds={"red": 0.75}, default_threshold=0.25
    )
    got = await deciding.models.GetVersion(model_pb2.GetVersionRequest(model="colours"))
    assert got.version.decision == own

    grown = ft.FineTuneRequest(
        model="colours", inline_images=colours(4), base=ft.BaseVersion(version=1)
    )
    started = await deciding.fine_tuning.FineTune(grown)
    assert not (await deciding.ended(started.job.job_id)).request.HasField("decision")
    got = await deciding.models.GetVersion(model_pb2.GetVersionRequest(model="colours"))
    assert (got.version.version, got.version.decision) == (2, own)
    grown.decision.CopyFrom(ARGMAX)
    started = await deciding.fine_tuning.FineTune(grown)
    await deciding.ended(started.job.job_id)
    got = await deciding.models.GetVersion(model_pb2.GetVersionRequest(model="colours"))
    assert (got.version.version, got.version.decision) == (3, ARGMAX)

    plain = await make_version(deciding)
    assert not plain.request.HasField("decision")
    got = await deciding.models.GetVersion(model_pb2.GetVersionRequest(model="colours"))
    assert got.version.decision == ARGMAX


@pytest.mark.parametrize(
    ("decision", "field"),
    [
        ("", "decision"),
        ("thresholds {}", "decision.thresholds"),
        ("thresholds { others: 1.5 }", "decision.thresholds.others"),
        ("thresholds { others: nan }", "decision.thresholds.others"),
        (
            'thresholds { classes { key: "red" value: -1 } }',
            "decision.thresholds.classes[red]",
        ),
        ('thresholds { classes { key: "" value: 0.5 } }', "decision.thresholds.classes"),
    ],
)
async def test_a_decision_that_makes_no_sense_is_refused_by_its_name(
    deciding: Service, decision: str, field: str
) -> None:
    await make_version(deciding)
    given = Parse(decision, Decision())
    asked = ft.FineTuneRequest(model="colours", inline_images=colours(), decision=given)
    for call, named in (
        (deciding.prediction.Predict(encoded(GREY, decision=given)), f"models[0].{field}"),
        (deciding.fine_tuning.FineTune(asked), field),
    ):
        found = await refusal(call)
        assert (found.reason, found.field) == ("INVALID_FIELD", named)


async def test_a_threshold_of_a_class_that_the_version_does_not_have_is_refused(
    deciding: Service,
) -> None:
    await make_version(deciding)
    found = await refusal(
        deciding.prediction.Predict(encoded(GREY, decision=thresholds(red=0.5, reed=0.5)))
    )
    assert (found.reason, found.field) == ("INVALID_FIELD", "models[0].decision.thresholds.classes")
    assert "'reed'" in found.message
    assert "'red'" in found.message


async def test_the_open_inference_protocol_names_what_the_decision_answers(
    deciding: Service,
) -> None:
    await make_version(deciding, BALANCED)
    stub = GRPCInferenceServiceStub(deciding.channel)

    async def label(version: str = "", **parameters: str) -> bytes:
        request = oip.ModelInferRequest(
            model_name="colours",
            model_version=version,
            inputs=[{"name": "images", "datatype": "BYTES", "shape": [1]}],  # type: ignore[list-item]
            outputs=[{"name": "labels"}],  # type: ignore[list-item]
            raw_input_contents=[len(GREY).to_bytes(4, "little") + GREY],
        )
        for name, text in parameters.items():
            request.parameters[name].string_param = text
        answer = await stub.ModelInfer(request)  # type: ignore[misc]
        raw: bytes = answer.raw_output_contents[0]
        return raw[4:]

    assert await label() == b"blue"
    assert await label(decision="argmax") == b"red"
    found = await refusal(label(decision="dice"))
    assert (found.field, "argmax or balanced" in found.message) == ("parameters", True)
    await make_version(deciding, thresholds(others=1.0))
    assert await label() == b""
    assert await label("1") == b"blue"
