"""What the fake server has: models, datasets and backbones, with canned contents.

What is added is there, what is deleted is gone, and an alias is where it was put last. Nothing
is checked, read or computed: a refusal of the service's is a test's to inject with `fail`, an
answer of its own with `answer`.
"""

# ruff: noqa: N802 - a method is named as the call that it answers

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from graftml_stubs.v1 import backbone_pb2, dataset_pb2, decision_pb2
from graftml_stubs.v1 import model_pb2 as pb

from graftml.errors import InvalidArgument, NotFound, Reason
from graftml.testing._refusals import page, refuse
from graftml.testing._script import CLASSES, IMAGES_A_CLASS, SUMMARY, figure_of

LATEST = "latest"
EXPORT_CHUNK_BYTES = 2**10
WHOLE = dataset_pb2.ReadSummary(seen_count=6, used_count=6)
"""Of images that are there already: none is left out."""
_SHIPPED = backbone_pb2.Backbone(
    name="efficientnet_lite0",
    source=backbone_pb2.BACKBONE_SOURCE_PACKAGE,
    size=224,
    feature_dim=1280,
    licence="Apache-2.0",
    weights="fake",
)


def now() -> Timestamp:
    """Returns this moment."""
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


def _digest(*parts: Message) -> str:
    return hashlib.sha256(b"".join(part.SerializeToString() for part in parts)).hexdigest()


def _whole(sent: Sequence[Any]) -> Sequence[Any]:
    """Returns an upload; refuses one that its client broke off."""
    if not sent or not sent[-1].HasField("end"):
        raise refuse(
            InvalidArgument, Reason.INVALID_FIELD, "the upload ended without an `end`", "part"
        )
    return sent


class Records:
    """Answers the calls about them; every method is called under one lock."""

    def __init__(self) -> None:
        self.aliases: dict[str, dict[str, int]] = {}
        self.versions: dict[str, dict[int, pb.Version]] = {}
        self.datasets: dict[str, dataset_pb2.Dataset] = {}
        self.backbones: dict[str, backbone_pb2.Backbone] = {_SHIPPED.name: _SHIPPED}

    # Models

    def publish(
        self,
        name: str,
        classes: Sequence[str] = CLASSES,
        *,
        job_id: str = "job-0",
        method: pb.TransferMethod = pb.TRANSFER_METHOD_FEATURE_BASED,
        accuracy: float | None = 1.0,
        count: int = 10,
        labels: Mapping[str, str] | None = None,
        gate_failures: Sequence[str] = (),
        decision: decision_pb2.Decision | None = None,
    ) -> pb.Version:
        """Adds a version; `latest` moves to it unless it is a candidate."""
        versions = self.versions.setdefault(name, {})
        number = max(versions, default=0) + 1
        version = pb.Version(
            model=name,
            version=number,
            job_id=job_id,
            create_time=now(),
            method=method,
            backbone=_SHIPPED.name,
            weights="fake",
            weights_licence="not known",
            backbone_digest=_digest(_SHIPPED),
            classes=classes,
            figures=[] if accuracy is None else [figure_of(accuracy, count)],
            calibrated=accuracy is not None,
            calibration_note="" if accuracy is not None else "nothing could be measured",
            dataset_digest=_digest(SUMMARY),
            parity=pb.Parity(max_difference=1e-6, top1_agreement=1.0, image_count=count),
            training_time=Duration(seconds=1),
            labels=labels or {},
            manifest_json=json.dumps({"format": 1, "model": name, "classes": list(classes)}),
            image_size=_SHIPPED.size,
            serving_precision="fp32",
            is_candidate=bool(gate_failures),
            gate_checks=[
                pb.GateCheck(
                    name="accuracy",
                    verdict=pb.GATE_VERDICT_FAILED,
                    value=accuracy,
                    bound=1.0,
                    detail=text,
                )
                for text in gate_failures
            ],
            decision=decision or decision_pb2.Decision(argmax=decision_pb2.Argmax()),
        )
        versions[number] = version
        aliases = self.aliases.setdefault(name, {})
        if not version.is_candidate:
            aliases[LATEST] = number
        return version

    def model(self, name: str) -> pb.Model:
        """Returns a model as it is now."""
        versions = self._versions(name)
        times = [version.create_time for version in versions.values()]
        return pb.Model(
            name=name,
            create_time=times[0] if times else None,
            update_time=times[-1] if times else None,
            aliases=self.aliases[name],
            version_count=len(versions),
        )

    def find(self, named: Any, field: str = "") -> pb.Version:
        """Returns the version that a message names: by number, by alias, or `latest`.

        Raises the service's error, which names the field that the message is.
        """
        versions, number = self._versions(named.model, field), named.version
        if named.WhichOneof("which") != "version":
            alias = named.alias or LATEST
            number = self.aliases[named.model].get(alias)
            if number is None:
                raise refuse(
                    NotFound,
                    Reason.ALIAS_NOT_FOUND,
                    f"model {named.model!r} has no alias {alias!r}",
                    field,
                )
        if number not in versions:
            raise refuse(
                NotFound,
                Reason.VERSION_NOT_FOUND,
                f"model {named.model!r} has no version {number}",
                field,
            )
        return self._shown(versions[number])

    def _versions(self, name: str, field: str = "") -> dict[int, pb.Version]:
        if name not in self.versions:
            raise refuse(NotFound, Reason.MODEL_NOT_FOUND, f"no model is named {name!r}", field)
        return self.versions[name]

    def _shown(self, version: pb.Version) -> pb.Version:
        shown = pb.Version()
        shown.CopyFrom(version)
        aliases = self.aliases[version.model]
        shown.aliases.extend(sorted(a for a, at in aliases.items() if at == version.version))
        return shown

    def GetModel(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self.model(request.model))

    def ListModels(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        chosen = [
            self.model(name)
            for name, versions in sorted(self.versions.items())
            if name.startswith(request.name_prefix)
            and any(
                dict(request.labels).items() <= dict(version.labels).items()
                for version in versions.values()
            )
        ]
        models, token = page(chosen, request)
        return pb.ListModelsResponse(models=models, next_page_token=token)

    def DeleteModel(self, request: pb.DeleteModelRequest) -> pb.DeleteModelResponse:
        self._versions(request.model)
        del self.versions[request.model], self.aliases[request.model]
        return pb.DeleteModelResponse()

    def GetVersion(self, request: pb.GetVersionRequest) -> pb.GetVersionResponse:
        return pb.GetVersionResponse(version=self.find(request))

    def ListVersions(self, request: pb.ListVersionsRequest) -> pb.ListVersionsResponse:
        newest_first = [*self._versions(request.model).values()][::-1]
        versions, token = page([self._shown(version) for version in newest_first], request)
        return pb.ListVersionsResponse(versions=versions, next_page_token=token)

    def DeleteVersion(self, request: pb.DeleteVersionRequest) -> pb.DeleteVersionResponse:
        named = pb.GetVersionRequest(model=request.model, version=request.version)
        for alias in self.find(named).aliases:
            del self.aliases[request.model][alias]
        del self.versions[request.model][request.version]
        left = [n for n, v in self.versions[request.model].items() if not v.is_candidate]
        if left:
            self.aliases[request.model].setdefault(LATEST, max(left))
        return pb.DeleteVersionResponse()

    def SetAlias(self, request: pb.SetAliasRequest) -> pb.SetAliasResponse:
        self.find(pb.GetVersionRequest(model=request.model, version=request.version))
        self.aliases[request.model][request.alias] = request.version
        return pb.SetAliasResponse(model=self.model(request.model))

    def DeleteAlias(self, request: pb.DeleteAliasRequest) -> pb.DeleteAliasResponse:
        self.find(pb.GetVersionRequest(model=request.model, alias=request.alias))
        del self.aliases[request.model][request.alias]
        return pb.DeleteAliasResponse(model=self.model(request.model))

    def RollbackAlias(self, request: pb.RollbackAliasRequest) -> pb.RollbackAliasResponse:
        """Goes to the version one below, whatever the alias named before."""
        alias = request.alias or LATEST
        at = self.find(pb.GetVersionRequest(model=request.model, alias=alias)).version
        self.aliases[request.model][alias] = max(1, at - 1)
        return pb.RollbackAliasResponse(
            model=self.model(request.model), from_version=at, to_version=max(1, at - 1)
        )

    def PromoteVersion(self, request: pb.PromoteVersionRequest) -> pb.PromoteVersionResponse:
        self.find(pb.GetVersionRequest(model=request.model, version=request.version))
        self.versions[request.model][request.version].is_candidate = False
        self.aliases[request.model][LATEST] = request.version
        return pb.PromoteVersionResponse(model=self.model(request.model))

    def GetReport(self, request: pb.GetReportRequest) -> pb.GetReportResponse:
        version = self.find(request)
        if request.format == pb.REPORT_FORMAT_HTML:
            title = f"<!doctype html><title>{version.model} {version.version}</title>"
            return pb.GetReportResponse(content=title.encode(), media_type="text/html")
        content = {
            "model": version.model,
            "version": version.version,
            "is_candidate": version.is_candidate,
            "accuracy": version.figures[0].accuracy if version.figures else None,
        }
        return pb.GetReportResponse(
            content=json.dumps(content).encode(), media_type="application/json"
        )

    def ExportModel(self, request: pb.ExportModelRequest) -> Iterator[pb.ExportModelResponse]:
        """Sends no model, but bytes that name it and are long enough for several chunks."""
        version = self.find(request)
        file = f"fake onnx of {version.model} {version.version}\n".encode() * 200
        for start in range(0, len(file), EXPORT_CHUNK_BYTES):
            yield pb.ExportModelResponse(chunk=file[start : start + EXPORT_CHUNK_BYTES])

    # Datasets

    def dataset(self, dataset_id: str, field: str = "") -> dataset_pb2.Dataset:
        """Returns a dataset, or raises the service's error, which names the field."""
        if dataset_id not in self.datasets:
            raise refuse(
                NotFound, Reason.DATASET_NOT_FOUND, f"there is no dataset {dataset_id!r}", field
            )
        return self.datasets[dataset_id]

    def _store(self, sent: Sequence[Message], **fields: Any) -> dataset_pb2.Dataset:
        """Stores a dataset of canned images; the same messages get the same id."""
        digest = _digest(*sent)
        dataset = dataset_pb2.Dataset(
            dataset_id=f"ds-{digest[:16]}",
            digest=digest,
            create_time=now(),
            size_bytes=sum(message.ByteSize() for message in sent),
            image_count=IMAGES_A_CLASS * len(CLASSES),
            **{"summary": SUMMARY, **fields},
        )
        if not dataset.is_unlabelled:
            for label in CLASSES:
                dataset.classes.add(label=label, train_count=IMAGES_A_CLASS)
        self.datasets[dataset.dataset_id] = dataset
        return dataset

    def UploadDataset(
        self, sent: Sequence[dataset_pb2.UploadDatasetRequest]
    ) -> dataset_pb2.UploadDatasetResponse:
        header = _whole(sent)[0].header
        dataset = self._store(
            sent,
            display_name=header.display_name,
            is_unlabelled=header.is_unlabelled,
            case_sensitive_labels=header.case_sensitive_labels,
        )
        return dataset_pb2.UploadDatasetResponse(dataset=dataset)

    def AddImages(
        self, sent: Sequence[dataset_pb2.AddImagesRequest]
    ) -> dataset_pb2.AddImagesResponse:
        return dataset_pb2.AddImagesResponse(dataset=self._changed(sent, _whole(sent)[0].header))

    def RemoveImages(
        self, request: dataset_pb2.RemoveImagesRequest
    ) -> dataset_pb2.RemoveImagesResponse:
        return dataset_pb2.RemoveImagesResponse(
            dataset=self._changed([request], request, summary=WHOLE)
        )

    def RelabelImages(
        self, request: dataset_pb2.RelabelImagesRequest
    ) -> dataset_pb2.RelabelImagesResponse:
        return dataset_pb2.RelabelImagesResponse(
            dataset=self._changed([request], request, summary=WHOLE)
        )

    def _changed(self, sent: Sequence[Message], named: Any, **fields: Any) -> dataset_pb2.Dataset:
        before = self.dataset(named.dataset_id)
        return self._store(
            sent,
            display_name=named.display_name or before.display_name,
            is_unlabelled=before.is_unlabelled,
            **fields,
        )

    def GetDataset(self, request: dataset_pb2.GetDatasetRequest) -> dataset_pb2.GetDatasetResponse:
        return dataset_pb2.GetDatasetResponse(dataset=self.dataset(request.dataset_id))

    def ListDatasets(
        self, request: dataset_pb2.ListDatasetsRequest
    ) -> dataset_pb2.ListDatasetsResponse:
        datasets, token = page([*self.datasets.values()][::-1], request)
        return dataset_pb2.ListDatasetsResponse(datasets=datasets, next_page_token=token)

    def DeleteDataset(
        self, request: dataset_pb2.DeleteDatasetRequest
    ) -> dataset_pb2.DeleteDatasetResponse:
        self.dataset(request.dataset_id)
        del self.datasets[request.dataset_id]
        return dataset_pb2.DeleteDatasetResponse()

    def ListImages(self, request: dataset_pb2.ListImagesRequest) -> dataset_pb2.ListImagesResponse:
        self.dataset(request.dataset_id)
        names = [f"{label}/{n}.jpg" for label in CLASSES for n in range(IMAGES_A_CLASS)]
        images, token = page(
            [
                dataset_pb2.DatasetImage(
                    digest=hashlib.sha256(name.encode()).hexdigest(),
                    name=name,
                    label=name.partition("/")[0],
                    size_bytes=600,
                )
                for name in names
            ],
            request,
        )
        return dataset_pb2.ListImagesResponse(images=images, next_page_token=token)

    def EraseImage(self, _: dataset_pb2.EraseImageRequest) -> dataset_pb2.EraseImageResponse:
        """Answers as if every dataset had had it, and no version had learned from it."""
        return dataset_pb2.EraseImageResponse(dataset_ids=list(self.datasets))

    # Backbones

    def RegisterBackbone(
        self, sent: Sequence[backbone_pb2.RegisterBackboneRequest]
    ) -> backbone_pb2.RegisterBackboneResponse:
        given = _whole(sent)[0].description
        file = b"".join(message.chunk for message in sent)
        digest = hashlib.sha256(file).hexdigest()
        backbone = backbone_pb2.Backbone(
            name=f"onnx/{given.name}",
            source=backbone_pb2.BACKBONE_SOURCE_REGISTERED,
            size=given.size,
            feature_dim=512,
            licence=given.licence,
            digest=digest,
            weights=f"sha256:{digest[:16]}",
            source_digest=digest,
            size_bytes=len(file),
            create_time=now(),
        )
        self.backbones[backbone.name] = backbone
        return backbone_pb2.RegisterBackboneResponse(backbone=backbone)

    def ListBackbones(
        self, request: backbone_pb2.ListBackbonesRequest
    ) -> backbone_pb2.ListBackbonesResponse:
        backbones, token = page([self.backbones[name] for name in sorted(self.backbones)], request)
        return backbone_pb2.ListBackbonesResponse(backbones=backbones, next_page_token=token)

    def DeleteBackbone(
        self, request: backbone_pb2.DeleteBackboneRequest
    ) -> backbone_pb2.DeleteBackboneResponse:
        name = f"onnx/{request.name.removeprefix('onnx/')}"
        if name not in self.backbones:
            raise refuse(
                NotFound,
                Reason.BACKBONE_NOT_FOUND,
                f"no backbone is registered as {name!r}",
                "backbone",
            )
        del self.backbones[name]
        return backbone_pb2.DeleteBackboneResponse()
