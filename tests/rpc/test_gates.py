"""Gates, candidates and rollbacks over the wire."""

from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from graftml_stubs.v1 import fine_tuning_pb2 as ft
from graftml_stubs.v1 import model_pb2 as pb

from service.contract import Finished, Gate, JobSpec
from service.domain import GateCheck
from tests.fake_launcher import Script
from tests.rpc.conftest import SUCCESS, MakeService, Service, colours, refusal, write_result
from tests.rpc.test_models import predicted_version

MET = GateCheck(
    name="parity", verdict="passed", passed=True, value=1e-6, bound=1e-3, detail="parity 1e-6"
)
MISSED = GateCheck(
    name="accuracy",
    verdict="failed",
    passed=False,
    value=0.5,
    bound=0.9,
    detail="accuracy 0.5 is below 0.9",
)
UNDECIDED = GateCheck(
    name="class_recall",
    verdict="undecided",
    passed=False,
    value=None,
    bound=0.8,
    detail="no image of red was measured on",
    images_needed=40,
)


def _write(spec: JobSpec, checks: list[GateCheck], **changes: object) -> None:
    write_result(spec, gate_checks=checks, **changes)


MISSES = Script([Finished(0.5, 3)], before_last=partial(_write, checks=[MET, MISSED]))
PASSES = Script([Finished(1.0, 3)], before_last=partial(_write, checks=[MET]))


async def fine_tune(service: Service, **fields: object) -> ft.Job:
    request = ft.FineTuneRequest(model="colours", inline_images=colours(), **fields)  # type: ignore[arg-type]
    started = await service.fine_tuning.FineTune(request)
    return await service.ended(started.job.job_id)


async def published(service: Service, job: ft.Job) -> ft.VersionPublished:
    call = service.fine_tuning.WatchJob(ft.WatchJobRequest(job_id=job.job_id))
    events = [answer.event async for answer in call]
    (found,) = [e.published for e in events if e.WhichOneof("payload") == "published"]
    return found


async def test_a_candidate_is_asked_by_number_and_served_once_it_is_promoted(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(PASSES, MISSES)
    gate = ft.Gate(min_accuracy=0.9, alias="prod")
    first = await fine_tune(service, gate=gate)
    second = await fine_tune(service, gate=gate)
    assert (second.state, second.version) == (ft.JOB_STATE_SUCCEEDED, 2)
    event = await published(service, second)
    assert (event.version, event.is_candidate) == (2, True)
    assert list(event.gate_failures) == ["accuracy 0.5 is below 0.9"]
    assert not (await published(service, first)).is_candidate
    assert await predicted_version(service) == 1
    assert await predicted_version(service, alias="prod") == 1
    assert await predicted_version(service, version=2) == 2

    listed = (await service.models.ListVersions(pb.ListVersionsRequest(model="colours"))).versions
    assert [(v.version, v.is_candidate) for v in listed] == [(2, True), (1, False)]
    assert list(listed[0].gate_checks) == [
        pb.GateCheck(
            name="parity",
            verdict=pb.GATE_VERDICT_PASSED,
            passed=True,
            value=1e-6,
            bound=1e-3,
            detail="parity 1e-6",
        ),
        pb.GateCheck(
            name="accuracy",
            verdict=pb.GATE_VERDICT_FAILED,
            value=0.5,
            bound=0.9,
            detail="accuracy 0.5 is below 0.9",
        ),
    ]
    jobs = (await service.fine_tuning.ListJobs(ft.ListJobsRequest())).jobs
    assert [(job.version, job.is_candidate) for job in jobs] == [(2, True), (1, False)]
    assert all(job.HasField("elapsed") for job in jobs)
    promote = pb.PromoteVersionRequest(model="colours", version=2)
    answer = await service.models.PromoteVersion(promote)
    get = ft.GetJobRequest(job_id=jobs[0].job_id)
    # A job says what its version was at its end, and the version what it is.
    assert (await service.fine_tuning.GetJob(get)).job.is_candidate
    promoted = await service.models.GetVersion(pb.GetVersionRequest(model="colours", version=2))
    assert not promoted.version.is_candidate
    assert answer.model.aliases == {"latest": 2, "prod": 1}
    assert await predicted_version(service) == 2
    found = await refusal(service.models.PromoteVersion(promote))
    assert (found.code, found.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_CANDIDATE",
    )  # fmt: skip


async def test_what_cannot_be_told_is_a_candidate_that_says_how_many_images_would_do(
    make_service: MakeService,
) -> None:
    cannot_tell = partial(_write, checks=[UNDECIDED], figures=[], calibrated=False)
    service: Service = await make_service(Script([Finished(None, 0)], before_last=cannot_tell))
    event = await published(service, await fine_tune(service))
    assert (event.is_candidate, list(event.gate_failures)) == (True, [UNDECIDED.detail])
    assert not event.HasField("accuracy")
    assert (event.measured_on, event.measured_count) == (pb.MEASURED_ON_UNSPECIFIED, 0)
    got = await service.models.GetVersion(pb.GetVersionRequest(model="colours", version=1))
    [check] = got.version.gate_checks
    assert (check.verdict, check.images_needed) == (pb.GATE_VERDICT_UNDECIDED, 40)
    assert not check.HasField("value")
    assert (list(got.version.figures), got.version.calibrated) == ([], False)


@pytest.mark.parametrize(
    ("condition", "field"),
    [
        ({"min_accuracy": 0.9}, "gate.min_accuracy"),
        ({"min_class_recall": 0.0}, "gate.min_class_recall"),
        ({"class_recalls": {"red": 0.9}}, "gate.class_recalls"),
        ({"not_worse_than": "latest"}, "gate.not_worse_than"),
    ],
)
async def test_a_gate_on_the_accuracy_of_an_adapted_version_needs_labels_of_the_target(
    service: Service, condition: dict[str, Any], field: str
) -> None:
    adaptation = ft.DomainAdaptation(target_images=colours())
    asked = ft.FineTuneRequest(
        model="colours",
        inline_images=colours(),
        domain_adaptation=adaptation,
        gate=ft.Gate(max_latency=Duration(seconds=1), **condition),
    )
    found = await refusal(service.fine_tuning.FineTune(asked))
    assert (found.reason, found.field) == ("INVALID_FIELD", field)
    assert "say evaluate_on_target and label some target images, or leave" in found.message
    asked.domain_adaptation.evaluate_on_target = True
    await service.fine_tuning.FineTune(asked)


@pytest.mark.parametrize("most", [0.01, 0.03])
async def test_a_bound_on_what_is_lost_needs_a_version_to_lose_it_to(
    service: Service, most: float
) -> None:
    asked = ft.FineTuneRequest(
        model="colours", inline_images=colours(), gate=ft.Gate(max_regression=most)
    )
    found = await refusal(service.fine_tuning.FineTune(asked))
    assert (found.field, "set not_worse_than" in found.message) == ("gate.max_regression", True)


@pytest.mark.parametrize("is_check", [True, False])
async def test_a_gate_compares_with_no_alias_that_is_not_there(
    make_service: MakeService, is_check: bool
) -> None:
    service: Service = await make_service(PASSES, MISSES)

    async def ask(model: str = "colours", **gate: Any) -> None:
        await service.fine_tuning.FineTune(
            ft.FineTuneRequest(
                model=model,
                inline_images=colours(),
                gate=ft.Gate(**gate),
                validate_only=is_check,
            )
        )

    await fine_tune(service, gate=ft.Gate(alias="prod"))
    await ask("new", not_worse_than="prod")
    found = await refusal(ask(not_worse_than="prdo", alias="canary"))
    assert (found.code, found.reason, found.field) == (
        grpc.StatusCode.NOT_FOUND, "ALIAS_NOT_FOUND", "gate.not_worse_than",
    )  # fmt: skip
    assert "no alias 'prdo'; it has latest, prod" in found.message
    await ask(not_worse_than="prod")
    await ask(not_worse_than="canary", alias="canary")


async def test_a_gate_compares_with_latest_where_nothing_is_published_yet(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(MISSES)
    await fine_tune(service)
    again = await fine_tune(service, gate=ft.Gate(not_worse_than="latest"))
    assert again.state == ft.JOB_STATE_SUCCEEDED


async def test_a_model_with_candidates_alone_says_how_to_publish_one(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(MISSES)
    await fine_tune(service)
    found = await refusal(service.models.GetVersion(pb.GetVersionRequest(model="colours")))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "ALIAS_NOT_FOUND")
    assert "candidates (1)" in found.message
    assert "promote one" in found.message
    prod = pb.GetVersionRequest(model="colours", alias="prod")
    assert "it has none" in (await refusal(service.models.GetVersion(prod))).message


async def test_an_alias_is_rolled_back_one_further_each_time(make_service: MakeService) -> None:
    service: Service = await make_service(SUCCESS)
    for _ in range(3):
        await service.make_model()
    back = pb.RollbackAliasRequest(model="colours")
    answers = [await service.models.RollbackAlias(back) for _ in range(2)]
    assert [(a.from_version, a.to_version) for a in answers] == [(3, 2), (2, 1)]
    assert answers[1].model.aliases == {"latest": 1}
    assert await predicted_version(service) == 1
    found = await refusal(service.models.RollbackAlias(back))
    assert (found.code, found.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION, "NO_EARLIER_VERSION",
    )  # fmt: skip
    assert "points to version 1" in found.message
    prod = pb.RollbackAliasRequest(model="colours", alias="prod")
    found = await refusal(service.models.RollbackAlias(prod))
    assert found.reason == "ALIAS_NOT_FOUND"
    for number in (1, 3):
        await service.models.SetAlias(
            pb.SetAliasRequest(model="colours", alias="prod", version=number)
        )
    answer = await service.models.RollbackAlias(prod)
    assert (answer.from_version, answer.to_version) == (3, 1)
    # Publishing moves latest on, from where it was rolled back to.
    await service.make_model()
    answer = await service.models.RollbackAlias(back)
    assert (answer.from_version, answer.to_version) == (4, 1)


async def test_a_gate_and_baselines_reach_the_trainer_and_come_back(service: Service) -> None:
    gate = ft.Gate(
        min_accuracy=0.9,
        min_class_recall=0.5,
        class_recalls={"red": 0.8},
        not_worse_than="latest",
        max_regression=0.02,
        when_uncertain=ft.WHEN_UNCERTAIN_PROMOTE,
        max_parity_difference=0.01,
        max_latency=Duration(nanos=5_500_000),
        alias="prod",
    )
    baselines = [ft.BASELINE_FROM_SCRATCH, ft.BASELINE_LINEAR_PROBE]
    await service.make_model()
    job = await fine_tune(service, gate=gate, baselines=baselines)
    assert job.request.gate == gate
    assert list(job.request.baselines) == baselines
    spec = service.launcher.trainers[1].spec
    assert spec.gate == Gate(
        min_accuracy=0.9, min_class_recall=0.5, class_recalls={"red": 0.8},
        not_worse_than="latest", max_regression=0.02, when_uncertain="promote",
        max_parity_difference=0.01, max_latency_ms=5.5, alias="prod",
    )  # fmt: skip
    assert spec.baselines == ["from_scratch", "linear_probe"]
    assert spec.incumbent is not None
    assert spec.incumbent.version == 1
    assert spec.incumbent.answers_digest == spec.previous_answers
    assert spec.previous_answers in spec.files
    assert service.launcher.trainers[0].spec.previous_answers == ""
    assert spec.feature_cache == str(service.data_dir / "features.sqlite")
    assert spec.feature_cache_bytes == 2**30


async def test_no_features_are_kept_where_the_operator_wants_none(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(feature_cache_mb=0)
    await service.make_model()
    assert service.launcher.trainers[0].spec.feature_cache == ""
