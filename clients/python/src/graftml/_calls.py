"""Each unary call as a value: what to send, and how to read the answer.

Sync and async clients are thin over these: they only differ in how a call is
carried out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from graftml_stubs.v1 import backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2

from graftml import _answers, _requests, _rpcs, _uploads, types
from graftml._encoding import encoding
from graftml._rpcs import Rpc

T = TypeVar("T")

PAGE_SIZE = 100
_MOST_ITEMS = 1000
"""Of a page, where a list has very many short ones."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One unary call."""

    rpc: Rpc[Any, Any]
    request: Any
    read: Callable[[Any], T]


@dataclass(frozen=True)
class Page(Generic[T]):
    """Part of a list; `next_token` is empty on the last page."""

    items: list[T]
    next_token: str


@encoding
def fine_tune(
    data: str | types.ServerPath,
    name: str,
    options: types.FineTuneOptions,
    target: str | types.ServerPath = "",
) -> Call[types.Job]:
    request = _requests.fine_tune(data, name, options, target)
    return Call(_rpcs.FINE_TUNE, request, lambda answer: _answers.job(answer.job))


@encoding
def check_fine_tune(
    data: str | types.ServerPath,
    name: str,
    options: types.FineTuneOptions,
    target: str | types.ServerPath = "",
) -> Call[None]:
    request = _requests.fine_tune(data, name, options, target)
    request.validate_only = True
    return Call(_rpcs.FINE_TUNE, request, _nothing)


@encoding
def get_job(job_id: str) -> Call[types.Job]:
    request = fine_tuning_pb2.GetJobRequest(job_id=job_id)
    return Call(_rpcs.GET_JOB, request, lambda answer: _answers.job(answer.job))


@encoding
def list_jobs(states: Iterable[str] | str, model: str, page_token: str) -> Call[Page[types.Job]]:
    request = fine_tuning_pb2.ListJobsRequest(
        page_size=PAGE_SIZE, page_token=page_token, states=_requests.states(states), model=model
    )
    return Call(_rpcs.LIST_JOBS, request, lambda a: _page(a, a.jobs, _answers.job))


@encoding
def cancel_job(job_id: str) -> Call[types.Job]:
    request = fine_tuning_pb2.CancelJobRequest(job_id=job_id)
    return Call(_rpcs.CANCEL_JOB, request, lambda answer: _answers.job(answer.job))


@encoding
def delete_job(job_id: str) -> Call[None]:
    request = fine_tuning_pb2.DeleteJobRequest(job_id=job_id)
    return Call(_rpcs.DELETE_JOB, request, _nothing)


@encoding
def rank_backbones(
    data: str | types.ServerPath,
    backbones: Iterable[str | types.PretrainedBackbone],
    time_budget_s: float | None,
    seed: int | None,
    *,
    case_sensitive_labels: bool = False,
    request_id: str = "",
) -> Call[types.Job]:
    request = _requests.rank_backbones(
        data,
        backbones,
        time_budget_s,
        seed,
        case_sensitive_labels=case_sensitive_labels,
        request_id=request_id,
    )
    return Call(_rpcs.RANK_BACKBONES, request, lambda answer: _answers.job(answer.job))


@encoding
def check_rank_backbones(
    backbones: Iterable[str | types.PretrainedBackbone],
    time_budget_s: float | None,
    seed: int | None,
) -> Call[None]:
    request = _requests.rank_backbones("", backbones, time_budget_s, seed)
    request.validate_only = True
    return Call(_rpcs.RANK_BACKBONES, request, _nothing)


@encoding
def get_dataset(dataset_id: str) -> Call[types.Dataset]:
    request = dataset_pb2.GetDatasetRequest(dataset_id=dataset_id)
    return Call(_rpcs.GET_DATASET, request, lambda answer: _answers.dataset(answer.dataset))


@encoding
def list_datasets(page_token: str) -> Call[Page[types.Dataset]]:
    request = dataset_pb2.ListDatasetsRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call(_rpcs.LIST_DATASETS, request, lambda a: _page(a, a.datasets, _answers.dataset))


@encoding
def delete_dataset(dataset_id: str) -> Call[None]:
    request = dataset_pb2.DeleteDatasetRequest(dataset_id=dataset_id)
    return Call(_rpcs.DELETE_DATASET, request, _nothing)


@encoding
def remove_images(
    dataset: types.Dataset | str, digests: Iterable[str], display_name: str
) -> Call[types.Dataset]:
    request = dataset_pb2.RemoveImagesRequest(
        dataset_id=_uploads.id_of(dataset), digests=digests, display_name=display_name
    )
    return Call(_rpcs.REMOVE_IMAGES, request, lambda answer: _answers.dataset(answer.dataset))


@encoding
def relabel_images(
    dataset: types.Dataset | str, labels: Mapping[str, str], display_name: str
) -> Call[types.Dataset]:
    request = dataset_pb2.RelabelImagesRequest(
        dataset_id=_uploads.id_of(dataset), labels=labels, display_name=display_name
    )
    return Call(_rpcs.RELABEL_IMAGES, request, lambda answer: _answers.dataset(answer.dataset))


@encoding
def list_images(dataset: types.Dataset | str, page_token: str) -> Call[Page[types.DatasetImage]]:
    request = dataset_pb2.ListImagesRequest(
        dataset_id=_uploads.id_of(dataset), page_size=_MOST_ITEMS, page_token=page_token
    )
    return Call(_rpcs.LIST_IMAGES, request, lambda a: _page(a, a.images, _answers.dataset_image))


@encoding
def erase_image(digest: str) -> Call[types.Erasure]:
    request = dataset_pb2.EraseImageRequest(image_digest=digest)
    return Call(_rpcs.ERASE_IMAGE, request, _answers.erasure)


@encoding
def list_backbones(page_token: str) -> Call[Page[types.Backbone]]:
    request = backbone_pb2.ListBackbonesRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call(_rpcs.LIST_BACKBONES, request, lambda a: _page(a, a.backbones, _answers.backbone))


@encoding
def delete_backbone(name: str) -> Call[None]:
    request = backbone_pb2.DeleteBackboneRequest(name=name)
    return Call(_rpcs.DELETE_BACKBONE, request, _nothing)


@encoding
def predict(request: prediction_pb2.PredictRequest) -> Call[list[list[types.Prediction]]]:
    return Call(_rpcs.PREDICT, request, _answers.predictions)


@encoding
def get_model(name: str) -> Call[types.Model]:
    request = model_pb2.GetModelRequest(model=name)
    return Call(_rpcs.GET_MODEL, request, lambda answer: _answers.model(answer.model))


@encoding
def list_models(page_token: str) -> Call[Page[types.Model]]:
    request = model_pb2.ListModelsRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call(_rpcs.LIST_MODELS, request, lambda a: _page(a, a.models, _answers.model))


@encoding
def delete_model(name: str, force: bool) -> Call[None]:
    request = model_pb2.DeleteModelRequest(model=name, force=force)
    return Call(_rpcs.DELETE_MODEL, request, _nothing)


@encoding
def get_version(model: str, version: int | None, alias: str | None) -> Call[types.Version]:
    request = model_pb2.GetVersionRequest(**_requests.version_of(model, version, alias))
    return Call(_rpcs.GET_VERSION, request, lambda answer: _answers.version(answer.version))


@encoding
def list_versions(model: str, page_token: str) -> Call[Page[types.Version]]:
    request = model_pb2.ListVersionsRequest(model=model, page_size=PAGE_SIZE, page_token=page_token)
    return Call(_rpcs.LIST_VERSIONS, request, lambda a: _page(a, a.versions, _answers.version))


@encoding
def delete_version(model: str, version: int) -> Call[None]:
    request = model_pb2.DeleteVersionRequest(model=model, version=version)
    return Call(_rpcs.DELETE_VERSION, request, _nothing)


@encoding
def set_alias(model: str, alias: str, version: int) -> Call[types.Model]:
    request = model_pb2.SetAliasRequest(model=model, alias=alias, version=version)
    return Call(_rpcs.SET_ALIAS, request, lambda answer: _answers.model(answer.model))


@encoding
def delete_alias(model: str, alias: str) -> Call[types.Model]:
    request = model_pb2.DeleteAliasRequest(model=model, alias=alias)
    return Call(_rpcs.DELETE_ALIAS, request, lambda answer: _answers.model(answer.model))


@encoding
def rollback_alias(model: str, alias: str) -> Call[types.Rollback]:
    request = model_pb2.RollbackAliasRequest(model=model, alias=alias)
    return Call(_rpcs.ROLLBACK_ALIAS, request, _answers.rollback)


@encoding
def promote_version(model: str, version: int) -> Call[types.Model]:
    request = model_pb2.PromoteVersionRequest(model=model, version=version)
    return Call(_rpcs.PROMOTE_VERSION, request, lambda answer: _answers.model(answer.model))


@encoding
def get_report(model: str, version: int | None, alias: str | None) -> Call[dict[str, Any]]:
    request = _report(model, version, alias, model_pb2.REPORT_FORMAT_JSON)
    return Call(_rpcs.GET_REPORT, request, _answers.report)


@encoding
def get_report_html(model: str, version: int | None, alias: str | None) -> Call[str]:
    request = _report(model, version, alias, model_pb2.REPORT_FORMAT_HTML)
    return Call(_rpcs.GET_REPORT, request, lambda answer: str(answer.content, "utf-8"))


@encoding
def export_request(
    model: str, version: int | None, alias: str | None
) -> model_pb2.ExportModelRequest:
    """The answer is a stream of bytes; the transports write it down."""
    return model_pb2.ExportModelRequest(**_requests.version_of(model, version, alias))


def _report(
    model: str, version: int | None, alias: str | None, format_: model_pb2.ReportFormat
) -> model_pb2.GetReportRequest:
    return model_pb2.GetReportRequest(format=format_, **_requests.version_of(model, version, alias))


def _page(answer: Any, items: Iterable[Any], read: Callable[[Any], T]) -> Page[T]:
    return Page([read(item) for item in items], answer.next_page_token)


def _nothing(_answer: Any) -> None:
    return None
