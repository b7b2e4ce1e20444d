"""Principals, their quotas, and the table of methods: which roles may call each.

A principal is a token's id, tenant and roles; one is bound to the task that serves its call. The
table holds every method that the server answers except health checks, which anybody may call; a
method that is not in it is refused. Which of them change something the contract says. A role
counts within the principal's own tenant.
"""

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from google.protobuf.descriptor_pb2 import MethodOptions
from graftml_stubs.v1 import backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2

from service.domain import DEFAULT_TENANT, ModelKey
from service.errors import NotAllowed, Reason

Role = Literal["predict", "train", "admin"]
"""Counts within the principal's tenant; `admin` includes the other two."""


@dataclass(frozen=True)
class Quota:
    """The limits of one tenant; None means no limit."""

    calls_per_second: float | None = None
    concurrent_jobs: int | None = None
    """Jobs that have not ended."""
    stored_bytes: int | None = None
    """Bytes of datasets, versions, registered backbones and jobs."""
    rankings: int | None = None
    """Rankings of backbones that wait or run."""


@dataclass
class _Bucket:
    """Calls that are left at time `at`, in seconds of the clock."""

    left: float
    at: float


class CallMeter:
    """One bucket of calls for each tenant; belongs to the event loop.

    A bucket holds the calls of one second, and at least one, so that a page of
    images sent at once is within the limit.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, tenant: str, calls_per_second: float) -> float:
        """Takes one call and returns 0.0; or takes none and returns the seconds until one is left.

        The limit may be another one than at the call before.
        """
        now, capacity = self._clock(), max(1.0, calls_per_second)
        bucket = self._buckets.setdefault(tenant, _Bucket(capacity, now))
        gained = max(0.0, now - bucket.at) * calls_per_second
        bucket.left, bucket.at = min(capacity, bucket.left + gained), now
        if bucket.left >= 1:
            bucket.left -= 1
            return 0.0
        return (1 - bucket.left) / calls_per_second


@dataclass(frozen=True)
class Principal:
    """An authenticated caller."""

    name: str
    """The token's id, for logs; never the token."""
    tenant: str
    roles: frozenset[Role]
    quota: Quota = field(default_factory=Quota)
    token_sha256: str = field(default="", repr=False, compare=False)
    """SHA-256 of the secret that was presented, in hex; empty where no token is needed."""

    def key(self, model: str) -> ModelKey:
        """Returns the key of a model of this principal's tenant, for any name that was sent."""
        return ModelKey(self.tenant, model)


EVERYBODY = Principal("anonymous", DEFAULT_TENANT, frozenset({"predict", "train", "admin"}))
"""The principal of every call where no token is needed."""

UNAUTHENTICATED = Principal("unauthenticated", "", frozenset())
"""Stands for the principal of a call that was not admitted."""

# No default: a call that was never admitted must fail, not pass for everybody's.
_current: ContextVar[Principal] = ContextVar("principal")


def current() -> Principal:
    """Returns the principal of the call that is being served; raises LookupError outside one."""
    return _current.get()


def enter(principal: Principal) -> None:
    """Sets the principal of the call that this task serves."""
    _current.set(principal)


_ANY: frozenset[Role] = frozenset({"predict", "train", "admin"})
_PREDICT: frozenset[Role] = frozenset({"predict", "admin"})
_TRAIN: frozenset[Role] = frozenset({"train", "admin"})
_ADMIN: frozenset[Role] = frozenset({"admin"})

_SERVICES: Mapping[str, Mapping[frozenset[Role], tuple[str, ...]]] = {
    "graft.v1.FineTuningService": {
        _TRAIN: (
            "FineTune", "GetJob", "ListJobs", "WatchJob", "CancelJob", "DeleteJob", "RankBackbones",
        ),
    },
    "graft.v1.DatasetService": {
        _TRAIN: (
            "UploadDataset", "GetDataset", "ListDatasets", "DeleteDataset", "AddImages",
            "RemoveImages", "RelabelImages", "ListImages",
        ),
        _ADMIN: ("EraseImage",),
    },
    "graft.v1.BackboneService": {
        _TRAIN: ("ListBackbones",),
        _ADMIN: ("RegisterBackbone", "DeleteBackbone"),
    },
    "graft.v1.PredictionService": {_PREDICT: ("Predict", "PredictStream")},
    "graft.v1.ModelService": {
        _ANY: ("GetModel", "ListModels", "GetVersion", "ListVersions"),
        _TRAIN: (
            "SetAlias", "DeleteAlias", "RollbackAlias", "PromoteVersion", "GetReport",
            "ExportModel",
        ),
        _ADMIN: ("DeleteModel", "DeleteVersion"),
    },
    "inference.GRPCInferenceService": {
        _PREDICT: (
            "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata",
            "ModelInfer", "ModelStreamInfer", "ModelConfig", "ModelStatistics", "RepositoryIndex",
        ),
        _ADMIN: ("RepositoryModelLoad", "RepositoryModelUnload"),
    },
    "grpc.reflection.v1.ServerReflection": {_ANY: ("ServerReflectionInfo",)},
    "grpc.reflection.v1alpha.ServerReflection": {_ANY: ("ServerReflectionInfo",)},
}  # fmt: skip
"""Names of methods by the roles of which any one is enough."""

RULES: Mapping[str, frozenset[Role]] = {
    f"/{service}/{method}": roles
    for service, methods_of in _SERVICES.items()
    for roles, methods in methods_of.items()
    for method in methods
}
"""The roles of which any one is enough, by full method, "/graft.v1.ModelService/GetModel"."""

_CHANGES = {
    f"/{service.full_name}/{method.name}"
    for file in (backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.GetOptions().idempotency_level != MethodOptions.NO_SIDE_EFFECTS
} | {
    # Of a contract that is not ours, and does not say so.
    "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/inference.GRPCInferenceService/RepositoryModelUnload",
}


def check_role(principal: Principal, method: str) -> None:
    """Raises NotAllowed if none of the principal's roles is enough for the method."""
    roles = RULES.get(method)
    if roles is None:
        raise NotAllowed(
            Reason.ROLE_MISSING, f"nobody may call {method}: no rule says which role it needs"
        )
    if not roles & principal.roles:
        needed = " or ".join(sorted(roles, key=_ORDER.index))
        has = ", ".join(sorted(principal.roles, key=_ORDER.index))
        raise NotAllowed(
            Reason.ROLE_MISSING,
            f"this needs a token with the role {needed}, and yours has {has}: ask the server's "
            "operator for another",
        )


def is_change(method: str) -> bool:
    """Tells whether a call of the method changes something that is stored."""
    return method in _CHANGES


_ORDER: list[str] = ["predict", "train", "admin"]
