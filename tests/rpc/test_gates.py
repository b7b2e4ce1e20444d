"""Gates, candidates and rollbacks over the wire."""

from functools import partial

import grpc
from google.protobuf.duration_pb2 import Duration
from graft.v1 import fine_tuning_pb2 as ft
from graft.v1 import model_pb2 as pb

from service.domain import GateCheck
from service.jobs.contract import Finished, Gate, JobSpec
from service.jobs.fake_launcher import Script
from tests.rpc.conftest import SUCCESS, MakeService, Service, colours, refusal, write_result
from tests.rpc.test_models import predicted_version

MET = GateCheck(name="parity", passed=True, value=1e-6, bound=1e-3, detail="parity 1e-6")
MISSED = GateCheck(
    name="accuracy", passed=False, value=0.5, bound=0.9, detail="accuracy 0.5 is below 0.9"
)


def _write(spec: JobSpec, checks: list[GateCheck]) -> None:
    write_result(spec, gate_checks=checks)


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
    assert [(c.name, c.passed, c.value, c.bound, c.detail) for c in listed[0].gate_checks] == [
        ("parity", True, 1e-6, 1e-3, "parity 1e-6"),
        ("accuracy", False, 0.5, 0.9, "accuracy 0.5 is below 0.9"),
    ]
    jobs = (await service.fine_tuning.ListJobs(ft.ListJobsRequest())).jobs
    assert [(job.version, job.is_candidate) for job in jobs] == [(2, True), (1, False)]
    assert all(job.HasField("elapsed") for job in jobs)
    promote = pb.PromoteVersionRequest(model="colours", version=2)
    answer = await service.models.PromoteVersion(promote)
    get = ft.GetJobRequest(job_id=jobs[0].job_id)
    assert not (await service.fine_tuning.GetJob(get)).job.is_candidate
    assert answer.model.aliases == {"latest": 2, "prod": 1}
    assert await predicted_version(service) == 2
    found = await refusal(service.models.PromoteVersion(promote))
    assert (found.code, found.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_CANDIDATE",
    )  # fmt: skip


async def test_a_model_with_candidates_alone_says_how_to_publish_one(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(MISSES)
    await fine_tune(service)
    found = await refusal(service.models.GetVersion(pb.GetVersionRequest(model="colours")))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "ALIAS_NOT_FOUND")
    assert "candidates (1)" in found.message
    assert "PromoteVersion" in found.message


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
    prod = pb.RollbackAliasRequest(model="colours", alias="prod")
    found = await refusal(service.models.RollbackAlias(prod))
    assert found.reason == "ALIAS_NOT_FOUND"
    for number in (1, 3):
        await service.models.SetAlias(
            pb.SetAliasRequest(model="colours", alias="prod", version=number)
        )
    answer = await service.models.RollbackAlias(prod)
    assert (answer.from_version, answer.to_version) == (3, 1)


async def test_a_gate_and_baselines_reach_the_trainer_and_come_back(service: Service) -> None:
    gate = ft.Gate(
        min_accuracy=0.9,
        not_worse_than="latest",
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
        min_accuracy=0.9, not_worse_than="latest", max_parity_difference=0.01,
        max_latency_ms=5.5, alias="prod",
    )  # fmt: skip
    assert spec.baselines == ["from_scratch", "linear_probe"]
    assert spec.incumbent is not None
    assert spec.incumbent.version == 1
    assert spec.feature_cache == str(service.data_dir / "features.sqlite")
    assert spec.feature_cache_bytes == 2**30


async def test_no_features_are_kept_where_the_operator_wants_none(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(feature_cache_mb=0)
    await service.make_model()
    assert service.launcher.trainers[0].spec.feature_cache == ""
