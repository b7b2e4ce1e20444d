"""ModelService, in memory."""

# ruff: noqa: ARG002, N802 - a servicer has gRPC's names and takes what gRPC gives

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from graftml_stubs.v1 import decision_pb2, model_pb2_grpc
from graftml_stubs.v1 import model_pb2 as pb

from graftml.errors import FailedPrecondition, NotFound, Reason
from graftml.testing._refusals import page, refuse
from graftml.testing._script import figure_of

LATEST = "latest"
EXPORT_CHUNK_BYTES = 2**10


def now() -> Timestamp:
    """This moment."""
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


class Models(model_pb2_grpc.ModelServiceServicer):
    """Models by name, each with its versions by number."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._models: dict[str, pb.Model] = {}
        self._versions: dict[str, dict[int, pb.Version]] = {}
        self._earlier: dict[tuple[str, str], list[int]] = defaultdict(list)
        """Where each alias of a model pointed before, newest last."""

    def publish(
        self,
        name: str,
        classes: Sequence[str],
        *,
        job_id: str = "",
        method: pb.TransferMethod = pb.TRANSFER_METHOD_FEATURE_BASED,
        accuracy: float | None = 1.0,
        count: int = 10,
        labels: dict[str, str] | None = None,
        digest: str = "",
        gate_checks: Sequence[pb.GateCheck] = (),
        alias: str = "",
        decision: decision_pb2.Decision | None = None,
    ) -> pb.Version:
        """Adds a version, and the model where it is new; `latest` and `alias` move to it.

        No alias moves to one that failed a check: it is a candidate.
        """
        with self._lock:
            model = self._models.setdefault(name, pb.Model(name=name, create_time=now()))
            versions = self._versions.setdefault(name, {})
            number = max(versions, default=0) + 1
            versions[number] = pb.Version(
                model=name,
                version=number,
                job_id=job_id,
                create_time=now(),
                method=method,
                backbone="efficientnet_lite0",
                weights="fake",
                weights_licence="not known",
                backbone_digest=hashlib.sha256(name.encode()).hexdigest(),
                classes=classes,
                figures=[] if accuracy is None else [figure_of(accuracy, count)],
                calibrated=accuracy is not None,
                calibration_note="" if accuracy is not None else "nothing could be measured",
                dataset_digest=digest,
                parity=pb.Parity(max_difference=1e-6, top1_agreement=1.0, image_count=count),
                training_time=Duration(seconds=1),
                labels=labels or {},
                manifest_json=json.dumps({"format": 1, "model": name, "classes": list(classes)}),
                is_candidate=not all(check.passed for check in gate_checks),
                gate_checks=gate_checks,
                decision=decision or decision_pb2.Decision(argmax=decision_pb2.Argmax()),
            )
            model.update_time.CopyFrom(now())
            if not versions[number].is_candidate:
                for name_ in filter(None, (LATEST, alias)):
                    self._point(model, name_, number)
            return self._version(model, number)

    def _point(self, model: pb.Model, alias: str, number: int) -> None:
        """Moves an alias, and remembers where it was."""
        if model.aliases.get(alias, number) != number:
            self._earlier[model.name, alias].append(model.aliases[alias])
        model.aliases[alias] = number

    def is_candidate(self, model: str, version: int) -> bool:
        """Tells whether a version exists and is a candidate."""
        with self._lock:
            found = self._versions.get(model, {}).get(version)
            return found is not None and found.is_candidate

    def aliases_of(self, model: str) -> set[str] | None:
        """The names that a model's versions have; None where there is no such model."""
        with self._lock:
            return set(self._models[model].aliases) if model in self._models else None

    def resolve(self, request: Any) -> pb.Version:
        """The version that a request's model and `which` name."""
        with self._lock:
            model = self._model(request.model)
            if request.WhichOneof("which") == "version":
                number = request.version
            else:
                number = self._behind(model, request.alias or LATEST)
            return self._version(model, number)

    def _behind(self, model: pb.Model, alias: str) -> int:
        if alias not in model.aliases:
            raise refuse(
                NotFound, Reason.ALIAS_NOT_FOUND, f"model {model.name!r} has no alias {alias!r}"
            )
        return model.aliases[alias]

    def _model(self, name: str) -> pb.Model:
        if name not in self._models:
            raise refuse(NotFound, Reason.MODEL_NOT_FOUND, f"no model is named {name!r}")
        model = pb.Model()
        model.CopyFrom(self._models[name])
        model.version_count = len(self._versions[name])
        return model

    def _version(self, model: pb.Model, number: int) -> pb.Version:
        if number not in self._versions[model.name]:
            raise refuse(
                NotFound,
                Reason.VERSION_NOT_FOUND,
                f"model {model.name!r} has no version {number}",
            )
        version = pb.Version()
        version.CopyFrom(self._versions[model.name][number])
        version.aliases.extend(sorted(a for a, n in model.aliases.items() if n == number))
        return version

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        with self._lock:
            return pb.GetModelResponse(model=self._model(request.model))

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        with self._lock:
            models: list[Any] = [self._model(name) for name in sorted(self._models)]
        items, token = page(models, request.page_size, request.page_token)
        return pb.ListModelsResponse(models=items, next_page_token=token)

    def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> pb.DeleteModelResponse:
        with self._lock:
            named = sorted(set(self._model(request.model).aliases) - {LATEST})
            if named and not request.force:
                raise refuse(
                    FailedPrecondition,
                    Reason.MODEL_IN_USE,
                    f"model {request.model!r} is called by {', '.join(named)}: delete the aliases "
                    "first, or set force",
                )
            del self._models[request.model], self._versions[request.model]
            for key in [key for key in self._earlier if key[0] == request.model]:
                del self._earlier[key]
        return pb.DeleteModelResponse()

    def GetVersion(self, request: pb.GetVersionRequest, context: Any) -> pb.GetVersionResponse:
        return pb.GetVersionResponse(version=self.resolve(request))

    def ListVersions(
        self, request: pb.ListVersionsRequest, context: Any
    ) -> pb.ListVersionsResponse:
        with self._lock:
            model = self._model(request.model)
            numbers = sorted(self._versions[model.name], reverse=True)
            versions: list[Any] = [self._version(model, number) for number in numbers]
        items, token = page(versions, request.page_size, request.page_token)
        return pb.ListVersionsResponse(versions=items, next_page_token=token)

    def DeleteVersion(
        self, request: pb.DeleteVersionRequest, context: Any
    ) -> pb.DeleteVersionResponse:
        with self._lock:
            model = self._model(request.model)
            version = self._version(model, request.version)
            others = [n for n in self._versions[model.name] if n != version.version]
            if set(version.aliases) - {LATEST} or not others:
                raise refuse(
                    FailedPrecondition,
                    Reason.ALIAS_IN_USE,
                    f"version {version.version} of model {model.name!r} is its last, or an alias "
                    "points to it",
                )
            del self._versions[model.name][version.version]
            if LATEST in version.aliases:
                left = [n for n in others if not self._versions[model.name][n].is_candidate]
                aliases = self._models[model.name].aliases
                del aliases[LATEST]
                if left:
                    aliases[LATEST] = max(left)
        return pb.DeleteVersionResponse()

    def SetAlias(self, request: pb.SetAliasRequest, context: Any) -> pb.SetAliasResponse:
        with self._lock:
            self._check_movable(request.alias)
            self._version(self._model(request.model), request.version)
            model = self._models[request.model]
            self._point(model, request.alias, request.version)
            return pb.SetAliasResponse(model=self._model(request.model))

    def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Any) -> pb.DeleteAliasResponse:
        with self._lock:
            self._check_movable(request.alias)
            self._behind(self._model(request.model), request.alias)
            model = self._models[request.model]
            del model.aliases[request.alias]
            self._earlier.pop((request.model, request.alias), None)
            return pb.DeleteAliasResponse(model=self._model(request.model))

    def RollbackAlias(
        self, request: pb.RollbackAliasRequest, context: Any
    ) -> pb.RollbackAliasResponse:
        with self._lock:
            model, alias = self._model(request.model), request.alias or LATEST
            now_at = self._behind(model, alias)
            earlier = self._earlier[model.name, alias]
            while earlier:
                number = earlier.pop()
                if number != now_at and number in self._versions[model.name]:
                    self._models[model.name].aliases[alias] = number
                    return pb.RollbackAliasResponse(
                        model=self._model(model.name), from_version=now_at, to_version=number
                    )
            raise refuse(
                FailedPrecondition,
                Reason.NO_EARLIER_VERSION,
                f"the alias {alias!r} of model {model.name!r} pointed to no other version that is "
                "still there",
            )

    def PromoteVersion(
        self, request: pb.PromoteVersionRequest, context: Any
    ) -> pb.PromoteVersionResponse:
        with self._lock:
            version = self._version(self._model(request.model), request.version)
            if not version.is_candidate:
                raise refuse(
                    FailedPrecondition,
                    Reason.NOT_A_CANDIDATE,
                    f"version {version.version} of model {version.model!r} is published already",
                )
            self._versions[version.model][version.version].is_candidate = False
            self._point(self._models[version.model], LATEST, version.version)
            return pb.PromoteVersionResponse(model=self._model(request.model))

    def _check_movable(self, alias: str) -> None:
        if alias == LATEST:
            raise refuse(
                FailedPrecondition,
                Reason.ALIAS_RESERVED,
                "the alias 'latest' is moved by publishing alone: choose another name",
            )

    def GetReport(self, request: pb.GetReportRequest, context: Any) -> pb.GetReportResponse:
        version = self.resolve(request)
        if request.format == pb.REPORT_FORMAT_HTML:
            page_ = f"<!doctype html><title>{version.model} {version.version}</title>"
            return pb.GetReportResponse(content=page_.encode(), media_type="text/html")
        content = {
            "model": version.model,
            "version": version.version,
            "is_candidate": version.is_candidate,
            "accuracy": version.figures[0].accuracy if version.figures else None,
        }
        return pb.GetReportResponse(
            content=json.dumps(content).encode(), media_type="application/json"
        )

    def ExportModel(
        self, request: pb.ExportModelRequest, context: Any
    ) -> Iterator[pb.ExportModelResponse]:
        """No model, but bytes that name it and are long enough for several chunks."""
        version = self.resolve(request)
        file = f"fake onnx of {version.model} {version.version}\n".encode() * 200
        for start in range(0, len(file), EXPORT_CHUNK_BYTES):
            yield pb.ExportModelResponse(chunk=file[start : start + EXPORT_CHUNK_BYTES])
