"""Every call of the contract, once: its path, its messages, whether a repeat is harmless.

Knows no channel; the transports make callables of these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message
from graftml_stubs.v1 import backbone_pb2 as backbones
from graftml_stubs.v1 import dataset_pb2 as datasets
from graftml_stubs.v1 import fine_tuning_pb2 as tuning
from graftml_stubs.v1 import model_pb2 as models
from graftml_stubs.v1 import prediction_pb2 as prediction

Req = TypeVar("Req")
Res = TypeVar("Res")
M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)


@dataclass(frozen=True)
class Rpc(Generic[Req, Res]):
    """One method of a service."""

    path: str
    serialize: Callable[[Req], bytes]
    parse: Callable[[bytes], Res]
    is_safe: bool
    """Whether sending it again, after an answer got lost, changes nothing."""


BY_PATH: dict[str, bool] = {}
"""The paths of the contract's calls and whether each is safe."""


def _rpc(method: str, request: type[M], response: type[N], *, is_safe: bool) -> Rpc[M, N]:
    path = f"/graft.v1.{method}"
    BY_PATH[path] = is_safe
    return Rpc(path, request.SerializeToString, response.FromString, is_safe)


# A request id makes FineTune safe; the client always sends one.
FINE_TUNE = _rpc(
    "FineTuningService/FineTune", tuning.FineTuneRequest, tuning.FineTuneResponse, is_safe=True
)
GET_JOB = _rpc(
    "FineTuningService/GetJob", tuning.GetJobRequest, tuning.GetJobResponse, is_safe=True
)
LIST_JOBS = _rpc(
    "FineTuningService/ListJobs", tuning.ListJobsRequest, tuning.ListJobsResponse, is_safe=True
)
WATCH_JOB = _rpc(
    "FineTuningService/WatchJob", tuning.WatchJobRequest, tuning.WatchJobResponse, is_safe=True
)
# A repeat would find the job cancelled and answer with JOB_FINISHED.
CANCEL_JOB = _rpc(
    "FineTuningService/CancelJob", tuning.CancelJobRequest, tuning.CancelJobResponse, is_safe=False
)
# A repeated delete would answer NOT_FOUND for what it deleted itself.
DELETE_JOB = _rpc(
    "FineTuningService/DeleteJob", tuning.DeleteJobRequest, tuning.DeleteJobResponse, is_safe=False
)
# As FineTune.
RANK_BACKBONES = _rpc(
    "FineTuningService/RankBackbones",
    tuning.RankBackbonesRequest,
    tuning.RankBackbonesResponse,
    is_safe=True,
)

# The same images always get the same id.
UPLOAD_DATASET = _rpc(
    "DatasetService/UploadDataset",
    datasets.UploadDatasetRequest,
    datasets.UploadDatasetResponse,
    is_safe=True,
)
GET_DATASET = _rpc(
    "DatasetService/GetDataset",
    datasets.GetDatasetRequest,
    datasets.GetDatasetResponse,
    is_safe=True,
)
LIST_DATASETS = _rpc(
    "DatasetService/ListDatasets",
    datasets.ListDatasetsRequest,
    datasets.ListDatasetsResponse,
    is_safe=True,
)
# Here and below: a repeated delete would answer NOT_FOUND for what it deleted itself.
DELETE_DATASET = _rpc(
    "DatasetService/DeleteDataset",
    datasets.DeleteDatasetRequest,
    datasets.DeleteDatasetResponse,
    is_safe=False,
)
# Here and below: the same change of the same dataset always gives the same one.
ADD_IMAGES = _rpc(
    "DatasetService/AddImages",
    datasets.AddImagesRequest,
    datasets.AddImagesResponse,
    is_safe=True,
)
REMOVE_IMAGES = _rpc(
    "DatasetService/RemoveImages",
    datasets.RemoveImagesRequest,
    datasets.RemoveImagesResponse,
    is_safe=True,
)
RELABEL_IMAGES = _rpc(
    "DatasetService/RelabelImages",
    datasets.RelabelImagesRequest,
    datasets.RelabelImagesResponse,
    is_safe=True,
)
LIST_IMAGES = _rpc(
    "DatasetService/ListImages",
    datasets.ListImagesRequest,
    datasets.ListImagesResponse,
    is_safe=True,
)
# An image that is erased already is answered with the same.
ERASE_IMAGE = _rpc(
    "DatasetService/EraseImage",
    datasets.EraseImageRequest,
    datasets.EraseImageResponse,
    is_safe=True,
)

# The same file under the same name again changes nothing.
REGISTER_BACKBONE = _rpc(
    "BackboneService/RegisterBackbone",
    backbones.RegisterBackboneRequest,
    backbones.RegisterBackboneResponse,
    is_safe=True,
)
LIST_BACKBONES = _rpc(
    "BackboneService/ListBackbones",
    backbones.ListBackbonesRequest,
    backbones.ListBackbonesResponse,
    is_safe=True,
)
DELETE_BACKBONE = _rpc(
    "BackboneService/DeleteBackbone",
    backbones.DeleteBackboneRequest,
    backbones.DeleteBackboneResponse,
    is_safe=False,
)

PREDICT = _rpc(
    "PredictionService/Predict",
    prediction.PredictRequest,
    prediction.PredictResponse,
    is_safe=True,
)
# Safe, but what was sent on a broken stream is not kept to send it again.
PREDICT_STREAM = _rpc(
    "PredictionService/PredictStream",
    prediction.PredictStreamRequest,
    prediction.PredictStreamResponse,
    is_safe=False,
)

GET_MODEL = _rpc(
    "ModelService/GetModel", models.GetModelRequest, models.GetModelResponse, is_safe=True
)
LIST_MODELS = _rpc(
    "ModelService/ListModels", models.ListModelsRequest, models.ListModelsResponse, is_safe=True
)
DELETE_MODEL = _rpc(
    "ModelService/DeleteModel", models.DeleteModelRequest, models.DeleteModelResponse, is_safe=False
)
GET_VERSION = _rpc(
    "ModelService/GetVersion", models.GetVersionRequest, models.GetVersionResponse, is_safe=True
)
LIST_VERSIONS = _rpc(
    "ModelService/ListVersions",
    models.ListVersionsRequest,
    models.ListVersionsResponse,
    is_safe=True,
)
DELETE_VERSION = _rpc(
    "ModelService/DeleteVersion",
    models.DeleteVersionRequest,
    models.DeleteVersionResponse,
    is_safe=False,
)
# A repeat, late, could undo what someone else set in between.
SET_ALIAS = _rpc(
    "ModelService/SetAlias", models.SetAliasRequest, models.SetAliasResponse, is_safe=False
)
DELETE_ALIAS = _rpc(
    "ModelService/DeleteAlias", models.DeleteAliasRequest, models.DeleteAliasResponse, is_safe=False
)
# A repeat would go back one version more.
ROLLBACK_ALIAS = _rpc(
    "ModelService/RollbackAlias",
    models.RollbackAliasRequest,
    models.RollbackAliasResponse,
    is_safe=False,
)
# A repeat would find no candidate any more.
PROMOTE_VERSION = _rpc(
    "ModelService/PromoteVersion",
    models.PromoteVersionRequest,
    models.PromoteVersionResponse,
    is_safe=False,
)
GET_REPORT = _rpc(
    "ModelService/GetReport", models.GetReportRequest, models.GetReportResponse, is_safe=True
)
EXPORT_MODEL = _rpc(
    "ModelService/ExportModel", models.ExportModelRequest, models.ExportModelResponse, is_safe=True
)


def _identity(data: bytes) -> bytes:
    return data


# The two messages of grpc.health.v1 are one field each: a package for them would be the
# client's largest. Request: empty means the whole server. Response: field 1, a varint.
HEALTH = Rpc[bytes, bytes]("/grpc.health.v1.Health/Check", _identity, _identity, is_safe=True)
WHOLE_SERVER = b""
SERVING = b"\x08\x01"
