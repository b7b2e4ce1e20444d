"""Tenants over the wire: nobody finds, or can tell that there is, what is another's."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from graftml_stubs.v1 import backbone_pb2 as bb
from graftml_stubs.v1 import dataset_pb2 as ds
from graftml_stubs.v1 import fine_tuning_pb2 as ft
from graftml_stubs.v1 import model_pb2 as md
from graftml_stubs.v1 import prediction_pb2 as pr
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.rpc.open_inference import grpc_predict_v2_pb2 as oip
from tests.rpc.conftest import (
    HANG,
    MakeTenants,
    colours,
    image,
)
from tests.rpc.tenants import METHODS, Tenant, registration
from tests.rpc.test_open_inference import request as infer_request

NAMES = {
    "model", "model_name", "job_id", "dataset_id", "target_dataset_id", "backbone", "image_digest",
}  # fmt: skip
"""Fields that name something of a tenant's; in some requests `name` does too."""
NAMED = ("inference.Model", "graft.v1.DeleteBackboneRequest")
"""How the names of those requests begin."""
MADE = {("FineTune", "model"), ("RegisterBackbone", "description.name")}
"""They name what is to be made: every tenant may choose any name."""


# What names something of a tenant's, and of which kind it is.
KINDS = {
    "model": "model",
    "model_name": "model",
    "name": "model",
    "job_id": "job",
    "dataset_id": "dataset",
    "target_dataset_id": "target",
    "backbone": "backbone",
    "image_digest": "image",
}

TEMPLATES: dict[str, Any] = {
    "FineTune": lambda own: ft.FineTuneRequest(
        model="anew",
        dataset_id=own["dataset"],
        backbone=own["backbone"],
        base=ft.BaseVersion(model=own["model"]),
        domain_adaptation=ft.DomainAdaptation(target_dataset_id=own["target"]),
    ),
    "GetJob": lambda own: ft.GetJobRequest(job_id=own["job"]),
    "ListJobs": lambda own: ft.ListJobsRequest(model=own["model"]),
    "WatchJob": lambda own: ft.WatchJobRequest(job_id=own["job"]),
    "CancelJob": lambda own: ft.CancelJobRequest(job_id=own["job"]),
    "DeleteJob": lambda own: ft.DeleteJobRequest(job_id=own["job"]),
    "RankBackbones": lambda own: ft.RankBackbonesRequest(
        dataset_id=own["dataset"], backbones=[ft.PretrainedBackbone(backbone=own["backbone"])]
    ),
    "UploadDataset": lambda _: ds.UploadDatasetRequest(header=ds.UploadDatasetHeader()),
    "GetDataset": lambda own: ds.GetDatasetRequest(dataset_id=own["dataset"]),
    "ListDatasets": lambda _: ds.ListDatasetsRequest(),
    "DeleteDataset": lambda own: ds.DeleteDatasetRequest(dataset_id=own["dataset"]),
    "AddImages": lambda own: ds.AddImagesRequest(
        header=ds.AddImagesHeader(dataset_id=own["dataset"])
    ),
    "RemoveImages": lambda own: ds.RemoveImagesRequest(
        dataset_id=own["dataset"], digests=[own["image"]]
    ),
    "RelabelImages": lambda own: ds.RelabelImagesRequest(
        dataset_id=own["dataset"], labels={own["image"]: "violet"}
    ),
    "ListImages": lambda own: ds.ListImagesRequest(dataset_id=own["dataset"]),
    "EraseImage": lambda own: ds.EraseImageRequest(image_digest=own["image"]),
    "RegisterBackbone": lambda _: registration()[0],
    "ListBackbones": lambda _: bb.ListBackbonesRequest(),
    "DeleteBackbone": lambda own: bb.DeleteBackboneRequest(name=own["backbone"]),
    "Predict": lambda own: _predict(own["model"]),
    "PredictStream": lambda own: pr.PredictStreamRequest(id="1", request=_predict(own["model"])),
    "GetModel": lambda own: md.GetModelRequest(model=own["model"]),
    "ListModels": lambda _: md.ListModelsRequest(),
    "DeleteModel": lambda own: md.DeleteModelRequest(model=own["model"]),
    "GetVersion": lambda own: md.GetVersionRequest(model=own["model"], version=1),
    "ListVersions": lambda own: md.ListVersionsRequest(model=own["model"]),
    "DeleteVersion": lambda own: md.DeleteVersionRequest(model=own["model"], version=1),
    "SetAlias": lambda own: md.SetAliasRequest(model=own["model"], alias="new", version=1),
    "DeleteAlias": lambda own: md.DeleteAliasRequest(model=own["model"], alias="prod"),
    "RollbackAlias": lambda own: md.RollbackAliasRequest(model=own["model"]),
    "PromoteVersion": lambda own: md.PromoteVersionRequest(model=own["model"], version=1),
    "GetReport": lambda own: md.GetReportRequest(model=own["model"]),
    "ExportModel": lambda own: md.ExportModelRequest(model=own["model"]),
    "ServerLive": lambda _: oip.ServerLiveRequest(),
    "ServerReady": lambda _: oip.ServerReadyRequest(),
    "ServerMetadata": lambda _: oip.ServerMetadataRequest(),
    "ModelReady": lambda own: oip.ModelReadyRequest(name=own["model"]),
    "ModelMetadata": lambda own: oip.ModelMetadataRequest(name=own["model"]),
    "ModelConfig": lambda own: oip.ModelConfigRequest(name=own["model"]),
    "ModelInfer": lambda own: infer_request(image("red"), model_name=own["model"]),
    "ModelStreamInfer": lambda own: infer_request(image("red"), model_name=own["model"]),
    "ModelStatistics": lambda own: oip.ModelStatisticsRequest(name=own["model"]),
    "RepositoryIndex": lambda _: oip.RepositoryIndexRequest(),
    "RepositoryModelLoad": lambda own: oip.RepositoryModelLoadRequest(model_name=own["model"]),
    "RepositoryModelUnload": lambda own: oip.RepositoryModelUnloadRequest(model_name=own["model"]),
}
"""For every method a request that its caller's own things make right, but for what they are."""


def _predict(model: str) -> pr.PredictRequest:
    return pr.PredictRequest(
        models=[pr.ModelSpec(model=model)], images=[pr.Image(encoded=image("red"))]
    )


def fields_of(kind: Descriptor, seen: tuple[Descriptor, ...] = ()) -> Iterator[str]:
    """Where a request may name something of a tenant's: "model", "base.model"."""
    is_named = kind.full_name.startswith(NAMED) and not seen
    for field in kind.fields:
        if field.name in NAMES or (is_named and field.name == "name"):
            yield field.name
        elif field.message_type is not None and field.message_type not in (*seen, kind):
            for inner in fields_of(field.message_type, (*seen, kind)):
                yield f"{field.name}.{inner}"


def put(message: Message, path: str, value: str) -> str:
    """Sets the field at `path`; answers with what was there."""
    *way, last = path.split(".")
    inner: Any = message
    for name in way:
        inner = getattr(inner, name)
        if not isinstance(inner, Message):  # of a list the first
            inner = inner[0]
    before: str = getattr(inner, last)
    setattr(inner, last, value)
    return before


def made_up(value: str) -> str:
    """Another of the same shape."""
    return value[:-1] + ("0" if value[-1] != "0" else "1")


PROBES = [
    (name, path)
    for name, method in METHODS.items()
    for path in fields_of(method.input_type)
    if (name, path) not in MADE
]


async def things_of(tenant: Tenant, model: str) -> dict[str, str]:
    """Makes one of each kind."""
    job = await tenant.make_model(model)
    alias = md.SetAliasRequest(model=model, alias="prod", version=1)
    await tenant.one("SetAlias", alias)
    target = await tenant.upload(is_unlabelled=True)
    own = await tenant.upload(width=40 + len(model))
    images = await tenant.one("ListImages", ds.ListImagesRequest(dataset_id=own.dataset_id))
    return {
        "model": model,
        "job": job.job_id,
        "dataset": job.request.dataset_id,
        "target": target.dataset_id,
        "image": images.images[0].digest,
        "backbone": (await tenant.register(f"tiny-{model}")).name,
    }


async def test_the_table_holds_every_method_of_every_service(make_tenants: MakeTenants) -> None:
    acme, _, _ = await make_tenants()
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(acme.service.channel)
    call = stub.ServerReflectionInfo(iter([asked]), metadata=acme.metadata)
    (answer,) = [answer async for answer in call]
    pool = descriptor_pool.Default()
    served = {
        method.full_name
        for service in answer.list_services_response.service
        if not service.name.startswith("grpc.")  # health and reflection know no tenants
        for method in pool.FindServiceByName(service.name).methods
    }
    assert served == {method.full_name for method in METHODS.values()}
    assert TEMPLATES.keys() == METHODS.keys()
    # And it looks where it should.
    assert {"base.model", "domain_adaptation.target_dataset_id"} < {path for _, path in PROBES}
    assert {("PredictStream", "request.models.model"), ("ModelReady", "name")} < set(PROBES)


async def differences(
    tenant: Tenant, own: dict[str, str], values: dict[str, str], probes: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Where a value's answer is another than that of a made-up one of the same shape."""
    found = []
    for method, path in probes:
        outcomes = []
        for change in (str, made_up):
            request = TEMPLATES[method](own)
            field = "backbone" if method == "DeleteBackbone" else path.rpartition(".")[2]
            value = change(values[KINDS[field]])
            assert put(request, path, value), f"the table sets no {path} of {method}"
            outcomes.append((await tenant.outcome(method, request)).without(value))
        if outcomes[0] != outcomes[1]:
            found.append((method, path))
    return found


async def test_what_is_another_tenants_is_answered_as_what_is_not_there(
    make_tenants: MakeTenants,
) -> None:
    acme, beta, default = await make_tenants()
    owned = await things_of(acme, "ants-of-acme")
    await acme.one("Predict", _predict("ants-of-acme"))
    own = await things_of(beta, "bees")
    before = await acme.everything()
    assert await differences(beta, own, owned, PROBES) == []
    # The default tenant's names are keys; no name may be taken for the key of another's model.
    own = await things_of(default, "cats")
    as_keys = {**owned, "model": "acme/ants-of-acme"}
    assert await differences(default, own, as_keys, PROBES) == []
    assert await acme.everything() == before
    # Of all that, its owner is told: the answers can differ.
    harmless = [probe for probe in PROBES if not probe[0].startswith("Delete")]
    deleting = [probe for probe in PROBES if probe not in harmless]
    for probes in (harmless, deleting[::-1]):  # aliases and versions before their models
        assert await differences(acme, owned, owned, probes) == probes


async def test_lists_show_ones_own_alone_by_plain_names(make_tenants: MakeTenants) -> None:
    tenants = await make_tenants()
    jobs = {}
    for tenant, model in zip(tenants, ("ants", "bees", "cats"), strict=True):
        jobs[model] = await tenant.make_model(model)
        await tenant.one("Predict", _predict(model))
    for tenant, model in zip(tenants, jobs, strict=True):
        listed = await tenant.one("ListModels", md.ListModelsRequest())
        assert [found.name for found in listed.models] == [model]
        listed = await tenant.one("ListJobs", ft.ListJobsRequest())
        assert list(listed.jobs) == [jobs[model]]
        assert jobs[model].model == jobs[model].request.model == model
        listed = await tenant.one("ListJobs", ft.ListJobsRequest(model=model))
        assert list(listed.jobs) == [jobs[model]]
        listed = await tenant.one("ListDatasets", ds.ListDatasetsRequest())
        (dataset,) = listed.datasets
        assert dataset.dataset_id == jobs[model].request.dataset_id
        index = await tenant.one("RepositoryIndex", oip.RepositoryIndexRequest())
        assert [found.name for found in index.models] == [model]
        counted = await tenant.one("ModelStatistics", oip.ModelStatisticsRequest())
        assert [(s.name, s.inference_count) for s in counted.model_stats] == [(model, 1)]
        described = await tenant.one("ModelMetadata", oip.ModelMetadataRequest(name=model))
        assert described.name == model


async def test_two_tenants_use_the_same_names_ids_and_images(make_tenants: MakeTenants) -> None:
    acme, beta, default = await make_tenants()
    jobs = [await t.make_model("ants", request_id="one") for t in (acme, beta, default)]
    assert len({job.job_id for job in jobs}) == len({j.request.dataset_id for j in jobs}) == 3
    for tenant, job in zip((acme, beta, default), jobs, strict=True):
        again = ft.FineTuneRequest(model="ants", request_id="one", inline_images=colours())
        assert (await tenant.one("FineTune", again)).job == job
        answer = await tenant.one("GetVersion", md.GetVersionRequest(model="ants"))
        assert (answer.version.model, answer.version.version) == ("ants", 1)
        assert answer.version.job_id == job.job_id
        assert json.loads(answer.version.manifest_json)["model"] == "ants"
        watched = await tenant.many("WatchJob", ft.WatchJobRequest(job_id=job.job_id))
        published = [e.event.published for e in watched if e.event.HasField("published")]
        assert [event.model for event in published] == ["ants"]
    # Equal images have one digest, which their owners may compare with their own copies.
    digests = set()
    for tenant, job in zip((acme, beta, default), jobs, strict=True):
        request = ds.GetDatasetRequest(dataset_id=job.request.dataset_id)
        digests.add((await tenant.one("GetDataset", request)).dataset.digest)
    assert len(digests) == 1

    await acme.one("DeleteModel", md.DeleteModelRequest(model="ants"))
    request = ds.DeleteDatasetRequest(dataset_id=jobs[0].request.dataset_id)
    await acme.one("DeleteDataset", request)
    assert (await acme.refused("Predict", _predict("ants"))).reason == "MODEL_NOT_FOUND"
    for tenant, job in ((beta, jobs[1]), (default, jobs[2])):
        (predicted,) = (await tenant.one("Predict", _predict("ants"))).answers
        assert (predicted.model, predicted.version) == ("ants", 1)
        request = ds.GetDatasetRequest(dataset_id=job.request.dataset_id)
        await tenant.one("GetDataset", request)
    assert (await acme.make_model("ants")).version == 1


async def test_a_version_grows_from_ones_own_model_of_a_name(make_tenants: MakeTenants) -> None:
    acme, beta, _ = await make_tenants()
    await beta.make_model("ants")
    await beta.make_model("ants")
    await acme.make_model("ants")
    job = await acme.make_model("ants", base=ft.BaseVersion(model="ants"))
    assert (job.version, job.base.model, job.base.version) == (2, "ants", 1)
    spec = acme.service.launcher.trainers[-1].spec
    assert (spec.model, spec.base.model) == ("ants", "ants")


async def test_no_job_finds_features_of_another_tenants_images(
    make_tenants: MakeTenants,
) -> None:
    tenants = await make_tenants()
    for tenant in tenants:
        await tenant.make_model("ants")
    specs = [trainer.spec for trainer in tenants[0].service.launcher.trainers]
    assert [spec.feature_cache_owner for spec in specs] == ["acme", "beta", ""]


async def test_pinning_a_model_pins_nobody_elses(make_tenants: MakeTenants) -> None:
    acme, beta, _ = await make_tenants()
    for tenant in (acme, beta):
        await tenant.make_model("ants")
        await tenant.one("RepositoryModelLoad", oip.RepositoryModelLoadRequest(model_name="ants"))
    await acme.one("RepositoryModelUnload", oip.RepositoryModelUnloadRequest(model_name="ants"))
    await acme.one("DeleteModel", md.DeleteModelRequest(model="ants"))
    index = await beta.one("RepositoryIndex", oip.RepositoryIndexRequest())
    assert [(found.name, found.reason) for found in index.models] == [("ants", "in memory")]


async def test_a_page_token_is_of_use_to_its_tenant_alone(make_tenants: MakeTenants) -> None:
    acme, beta, _ = await make_tenants()
    lists = {
        "ListModels": md.ListModelsRequest,
        "ListJobs": ft.ListJobsRequest,
        "ListDatasets": ds.ListDatasetsRequest,
    }
    for tenant in (acme, beta):
        for number, model in enumerate(("ants", "bees")):
            await tenant.make_model(model, inline_images=colours(2 + number))
    for method, kind in lists.items():
        token = (await acme.one(method, kind(page_size=1))).next_page_token
        assert token
        refused = await beta.refused(method, kind(page_size=1, page_token=token))
        assert (refused.reason, refused.field) == ("INVALID_FIELD", "page_token")
        last = await acme.one(method, kind(page_size=1, page_token=token))
        assert last.next_page_token == ""


async def test_a_tenant_at_its_bound_is_refused_and_others_are_not(
    make_tenants: MakeTenants,
) -> None:
    acme, beta, _ = await make_tenants(HANG, acme="concurrent_jobs = 1", beta="stored_mb = 0")
    request = ft.FineTuneRequest(model="ants", inline_images=colours(), request_id="one")
    first = (await acme.one("FineTune", request)).job
    assert (await acme.one("FineTune", request)).job.job_id == first.job_id
    refused = await acme.refused(
        "FineTune", ft.FineTuneRequest(model="ants", inline_images=colours())
    )
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
    )
    assert refused.retry_s > 0
    await acme.one("CancelJob", ft.CancelJobRequest(job_id=first.job_id))
    await acme.many("WatchJob", ft.WatchJobRequest(job_id=first.job_id))
    another = ft.FineTuneRequest(model="ants", inline_images=colours())
    job = (await acme.one("FineTune", another)).job
    await acme.one("CancelJob", ft.CancelJobRequest(job_id=job.job_id))

    header = ds.UploadDatasetRequest(header=ds.UploadDatasetHeader())
    for refused in (
        await beta.refused("FineTune", another),
        await beta.refused("UploadDataset", header),
        await beta.refused("RankBackbones", ft.RankBackbonesRequest(inline_images=colours())),
    ):
        assert (refused.reason, refused.code) == (
            "QUOTA_EXCEEDED",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        )
        assert "delete" in refused.message
    assert not (await beta.one("ListDatasets", ds.ListDatasetsRequest())).datasets


async def test_rankings_of_one_tenant_leave_room_for_others_and_follow_its_bound_on_jobs(
    make_tenants: MakeTenants,
) -> None:
    acme, beta, _ = await make_tenants(HANG, beta="concurrent_jobs = 0")
    request = ft.RankBackbonesRequest(inline_images=colours())
    first, _ = [(await acme.one("RankBackbones", request)).job for _ in range(2)]
    refused = await acme.refused("RankBackbones", request)
    assert (refused.code.name, refused.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert (await beta.refused("RankBackbones", request)).reason == "QUOTA_EXCEEDED"
    assert not (await beta.one("ListDatasets", ds.ListDatasetsRequest())).datasets
    # Its trainings have a bound of their own.
    await acme.one("FineTune", ft.FineTuneRequest(model="ants", inline_images=colours()))
    await acme.one("CancelJob", ft.CancelJobRequest(job_id=first.job_id))
    await acme.many("WatchJob", ft.WatchJobRequest(job_id=first.job_id))
    await acme.one("RankBackbones", request)
