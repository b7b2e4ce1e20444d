"""The table of roles: whole, and what each role may call."""

import pytest
from google.protobuf.descriptor import FileDescriptor
from graftml_stubs.v1 import backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection_pb2

from service.auth.principal import EVERYBODY, RULES, Principal, check_role, is_change
from service.errors import NotAllowed, Reason
from service.rpc.open_inference import grpc_predict_v2_pb2
from service.rpc.server import REFLECTION, SERVICES


def methods_of(*files: FileDescriptor) -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


def test_every_method_that_the_server_answers_has_a_rule_and_none_has_one_for_nothing() -> None:
    answered = methods_of(
        fine_tuning_pb2.DESCRIPTOR,
        dataset_pb2.DESCRIPTOR,
        backbone_pb2.DESCRIPTOR,
        prediction_pb2.DESCRIPTOR,
        model_pb2.DESCRIPTOR,
        grpc_predict_v2_pb2.DESCRIPTOR,
    )
    answered |= {
        f"/{service}/{method.rpartition('/')[2]}"
        for service in REFLECTION
        for method in methods_of(reflection_pb2.DESCRIPTOR)
    }
    assert set(RULES) == answered
    # What the server says that it answers, and no service besides.
    assert {method.split("/")[1] for method in answered} == {
        *SERVICES,
        *REFLECTION,
    }
    assert not any(health.SERVICE_NAME in method for method in RULES)


@pytest.mark.parametrize(
    ("method", "enough"),
    [
        ("graft.v1.PredictionService/PredictStream", {"predict", "admin"}),
        ("inference.GRPCInferenceService/ModelInfer", {"predict", "admin"}),
        ("inference.GRPCInferenceService/RepositoryModelLoad", {"admin"}),
        ("graft.v1.ModelService/ListVersions", {"predict", "train", "admin"}),
        ("graft.v1.ModelService/ExportModel", {"train", "admin"}),
        ("graft.v1.ModelService/SetAlias", {"train", "admin"}),
        ("graft.v1.ModelService/DeleteVersion", {"admin"}),
        ("graft.v1.BackboneService/RegisterBackbone", {"admin"}),
        ("graft.v1.BackboneService/ListBackbones", {"train", "admin"}),
        ("graft.v1.BackboneService/DeleteBackbone", {"admin"}),
        ("graft.v1.FineTuningService/WatchJob", {"train", "admin"}),
        ("graft.v1.DatasetService/ListDatasets", {"train", "admin"}),
        ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", {"predict", "train"}),
        ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", {"predict", "train"}),
    ],
)
def test_only_the_roles_of_a_method_may_call_it(method: str, enough: set[str]) -> None:
    for role in ("predict", "train", "admin"):
        principal = Principal("x", "acme", frozenset({role}))  # type: ignore[arg-type]
        if role in enough or role == "admin":
            check_role(principal, f"/{method}")
        else:
            with pytest.raises(NotAllowed, match="needs a token with the role"):
                check_role(principal, f"/{method}")


def test_a_missing_role_is_named() -> None:
    principal = Principal("ci", "acme", frozenset({"predict", "train"}))
    with pytest.raises(NotAllowed) as caught:
        check_role(principal, "/graft.v1.ModelService/DeleteModel")
    assert caught.value.reason is Reason.ROLE_MISSING
    assert "this needs a token with the role admin, and yours has predict, train" in (
        caught.value.message
    )


def test_a_method_without_a_rule_is_refused_to_all() -> None:
    with pytest.raises(NotAllowed, match="no rule"):
        check_role(EVERYBODY, "/graft.v1.ModelService/DropEverything")


def test_what_deletes_sets_or_starts_is_a_change_and_what_reads_is_none() -> None:
    changes = {method.rpartition("/")[2] for method in RULES if is_change(method)}
    assert changes == {
        "FineTune", "CancelJob", "DeleteJob", "UploadDataset", "DeleteDataset", "DeleteModel",
        "DeleteVersion", "SetAlias", "DeleteAlias", "RollbackAlias", "PromoteVersion",
        "RankBackbones",
        "RepositoryModelLoad", "RepositoryModelUnload", "RegisterBackbone", "DeleteBackbone",
        "AddImages", "RemoveImages", "RelabelImages", "EraseImage",
    }  # fmt: skip
