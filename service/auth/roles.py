"""The table of methods: which roles may call each, and which of them change something.

It holds every method that the server answers except health checks, which anybody
may call; a method that is not in it is refused. A role counts within the
principal's own tenant.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from service.auth.principal import Principal, Role
from service.errors import NotAllowed, Reason


@dataclass(frozen=True)
class Rule:
    """The roles that a method needs."""

    roles: frozenset[Role]
    """Any one of these is enough."""
    is_change: bool = False
    """Whether calls of it stand in the audit log."""


_ANY = Rule(frozenset({"predict", "train", "admin"}))
_PREDICT = Rule(frozenset({"predict", "admin"}))
_TRAIN = Rule(frozenset({"train", "admin"}))
_TRAIN_CHANGES = Rule(_TRAIN.roles, is_change=True)
_ADMIN_CHANGES = Rule(frozenset({"admin"}), is_change=True)

_SERVICES: Mapping[str, Mapping[str, Rule]] = {
    "graft.v1.FineTuningService": {
        "FineTune": _TRAIN_CHANGES,
        "GetJob": _TRAIN,
        "ListJobs": _TRAIN,
        "WatchJob": _TRAIN,
        "CancelJob": _TRAIN_CHANGES,
        "DeleteJob": _TRAIN_CHANGES,
        "RankBackbones": _TRAIN_CHANGES,
    },
    "graft.v1.DatasetService": {
        "UploadDataset": _TRAIN_CHANGES,
        "GetDataset": _TRAIN,
        "ListDatasets": _TRAIN,
        "DeleteDataset": _TRAIN_CHANGES,
        "AddImages": _TRAIN_CHANGES,
        "RemoveImages": _TRAIN_CHANGES,
        "RelabelImages": _TRAIN_CHANGES,
        "ListImages": _TRAIN,
        "EraseImage": _ADMIN_CHANGES,
    },
    "graft.v1.BackboneService": {
        "RegisterBackbone": _ADMIN_CHANGES,
        "ListBackbones": _TRAIN,
        "DeleteBackbone": _ADMIN_CHANGES,
    },
    "graft.v1.PredictionService": {
        "Predict": _PREDICT,
        "PredictStream": _PREDICT,
    },
    "graft.v1.ModelService": {
        "GetModel": _ANY,
        "ListModels": _ANY,
        "DeleteModel": _ADMIN_CHANGES,
        "GetVersion": _ANY,
        "ListVersions": _ANY,
        "DeleteVersion": _ADMIN_CHANGES,
        "SetAlias": _TRAIN_CHANGES,
        "DeleteAlias": _TRAIN_CHANGES,
        "RollbackAlias": _TRAIN_CHANGES,
        "PromoteVersion": _TRAIN_CHANGES,
        "GetReport": _TRAIN,
        "ExportModel": _TRAIN,
    },
    "inference.GRPCInferenceService": {
        "ServerLive": _PREDICT,
        "ServerReady": _PREDICT,
        "ModelReady": _PREDICT,
        "ServerMetadata": _PREDICT,
        "ModelMetadata": _PREDICT,
        "ModelInfer": _PREDICT,
        "ModelStreamInfer": _PREDICT,
        "ModelConfig": _PREDICT,
        "ModelStatistics": _PREDICT,
        "RepositoryIndex": _PREDICT,
        "RepositoryModelLoad": _ADMIN_CHANGES,
        "RepositoryModelUnload": _ADMIN_CHANGES,
    },
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _ANY},
}

RULES: Mapping[str, Rule] = {
    f"/{service}/{method}": rule
    for service, methods in _SERVICES.items()
    for method, rule in methods.items()
}
"""By full method, "/graft.v1.ModelService/GetModel"."""


def check_role(principal: Principal, method: str) -> None:
    """Raises NotAllowed if none of the principal's roles is enough for the method."""
    rule = RULES.get(method)
    if rule is None:
        raise NotAllowed(
            Reason.ROLE_MISSING, f"nobody may call {method}: no rule says which role it needs"
        )
    if not rule.roles & principal.roles:
        needed = " or ".join(sorted(rule.roles, key=_ORDER.index))
        has = ", ".join(sorted(principal.roles, key=_ORDER.index))
        raise NotAllowed(
            Reason.ROLE_MISSING,
            f"{method.rpartition('/')[2]} needs a token with the role {needed}; this one has "
            f"{has}: ask the server's operator for another",
        )


def is_change(method: str) -> bool:
    """Tells whether a call of the method changes something that is stored."""
    rule = RULES.get(method)
    return rule is not None and rule.is_change


_ORDER: list[str] = ["predict", "train", "admin"]
