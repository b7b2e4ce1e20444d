"""The fake server and the real one answer the same calls alike, and a fake that drifts is found."""

from collections.abc import Callable, Sequence
from pathlib import Path

import graftml
import pytest
from graftml import testing
from graftml.cli import _image_files
from graftml.testing import FakeGraft, SentImage
from graftml_stubs.v1 import fine_tuning_pb2, model_pb2

from service.engine import formats
from tests.conformance.scenarios import SCENARIOS, Scenario
from tests.conformance.transcript import Transcript, differences, listen
from tests.rpc.conftest import MakeService


async def told(target: str, scenario: Scenario, folder: Path) -> Transcript:
    """Returns what a client is told that does as the scenario says."""
    async with graftml.AsyncClient(target, retry=graftml.NO_RETRY) as client:
        transcript = listen(client)
        await scenario.act(client, transcript, folder)
        return transcript


def sure(_model: str, image: SentImage) -> dict[str, float]:
    """Answers as the real service's fake runtime: with the last class, and no score."""
    if not image.data:
        raise graftml.InvalidArgument("no image", reason=graftml.Reason.IMAGE_UNREADABLE)
    return {"cat": 0.1, "dog": 0.9}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_the_fake_answers_as_the_real_one(
    name: str, make_service: MakeService, images: Path
) -> None:
    scenario = SCENARIOS[name]
    service = await make_service(*scenario.trainers)
    real = await told(f"127.0.0.1:{service.app.port}", scenario, images)
    with FakeGraft(predict=sure, script=scenario.script) as fake:
        found = differences(real, await told(fake.target, scenario, images))
    assert not found, f"\n{found}"


def leaves_out_a_field(fake: FakeGraft) -> None:
    def answer(request: model_pb2.GetVersionRequest) -> model_pb2.GetVersionResponse:
        answer = fake._records.GetVersion(request)
        answer.version.ClearField("weights_licence")
        return answer

    fake.answer("GetVersion", answer)


def echoes_what_the_service_never_sends(fake: FakeGraft) -> None:
    def answer(request: fine_tuning_pb2.GetJobRequest) -> fine_tuning_pb2.GetJobResponse:
        answer = fake._jobs.GetJob(request)
        answer.job.ranking_request.request_id = answer.job.request.request_id
        return answer

    fake.answer("GetJob", answer)


def refuses_for_another_reason(fake: FakeGraft) -> None:
    error = graftml.NotFound("no such model", reason=graftml.Reason.VERSION_NOT_FOUND)
    fake.fail("GetModel", error)


def refuses_with_another_code(fake: FakeGraft) -> None:
    error = graftml.FailedPrecondition("no such model", reason=graftml.Reason.MODEL_NOT_FOUND)
    fake.fail("GetModel", error)


ACTS = testing.DEFAULT_SCRIPT
SWAPPED = (*ACTS[:1], testing.epoch(1, 2), ACTS[1], *ACTS[3:])
"""The data is read after an epoch."""


@pytest.mark.parametrize(
    ("name", "script", "drift", "found"),
    [
        ("life", ACTS, leaves_out_a_field, "-  version.weights_licence"),
        ("life", ACTS, echoes_what_the_service_never_sends, "+  job.ranking_request.request_id"),
        ("life", SWAPPED, lambda _: None, "+  event.epoch.learning_rate"),
        ("refusals", ACTS, refuses_for_another_reason, "+  VERSION_NOT_FOUND"),
        ("refusals", ACTS, refuses_with_another_code, "+  FAILED_PRECONDITION"),
        (
            "failures",
            [testing.running(), testing.cancelled()],
            lambda _: None,
            "-  job.state=JOB_STATE_FAILED",
        ),
    ],
)
async def test_a_fake_that_drifts_is_found(
    name: str,
    script: Sequence[fine_tuning_pb2.JobEvent],
    drift: Callable[[FakeGraft], None],
    found: str,
    images: Path,
) -> None:
    scenario = SCENARIOS[name]
    with FakeGraft(predict=sure, script=scenario.script) as fake:
        true = await told(fake.target, scenario, images)
    with FakeGraft(predict=sure, script=script) as fake:
        drift(fake)
        assert found in differences(true, await told(fake.target, scenario, images)).splitlines()


def test_the_command_takes_files_for_images_by_the_suffixes_that_the_service_does() -> None:
    assert _image_files.SUFFIXES == formats.SUFFIXES
