"""The versions before that a request goes by: the base that it grows from, and its incumbent.

What a base was trained on, its job's images, those of the version it grew from, and so on, is
found by jobs, which are never deleted, so that it does not matter what became of
the versions between. Reads the stores and keeps nothing.
"""

from pathlib import Path

import msgspec

from service.contract import Augmentation, Base
from service.domain import LATEST, plain_name
from service.errors import GraftError, InvalidInput, NotAllowed, NotFound, Reason, WrongState
from service.jobs.request import JobRequest, allowed_path
from service.jobs.settings import AllowedDirs
from service.jobs.store import JobRecord, JobStore
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore

_FIELD = "base"


class Lineage:
    """Finds earlier versions, and where the images of their jobs lie."""

    def __init__(
        self,
        jobs: JobStore,
        models: ModelStore,
        datasets: DatasetStore,
        allowed_dirs_of: AllowedDirs,
    ) -> None:
        self._jobs = jobs
        self._models = models
        self._datasets = datasets
        self._allowed_dirs_of = allowed_dirs_of

    def grow(
        self, request: JobRequest, model: str, version: int | None, alias: str | None
    ) -> JobRequest:
        """The request with its base pinned: by number, by alias, or by neither (`latest`).

        `model` is the base's key, "" for the request's own.
        Backbone, weights, grouping, background, decision and each field of the augmentation are the
        base's where the request names none. Raises NotFound (MODEL_NOT_FOUND, VERSION_NOT_FOUND,
        ALIAS_NOT_FOUND), or WrongState (BASE_DATA_GONE).
        """
        try:
            base = self._models.get_version(model or request.model, version, alias)
        except GraftError as error:
            raise type(error)(error.reason, error.message, field=_FIELD) from None
        self.origins(base.job_id)
        before = self._jobs.get(base.job_id, request.tenant).request
        chosen: dict[str, object] = {}
        if not request.backbone:
            # What the base's request left to the server or to its data is decided by now.
            chosen["backbone"] = base.manifest.backbone
            chosen["weights"] = request.weights or before.weights
        if request.grouping is None:
            chosen["grouping"] = before.grouping
        if not request.background:
            chosen["background"] = base.manifest.decoding.background
        if request.decision is None:
            chosen["decision"] = base.manifest.decision
        if before.augmentation is not None:
            chosen["augmentation"] = _merged(request.augmentation, before.augmentation)
        if before.case_sensitive_labels:
            chosen["case_sensitive_labels"] = True
        return msgspec.structs.replace(
            request,
            base=Base(base.model, base.version),
            base_job_id=base.job_id,
            base_digest=base.manifest.dataset_digest,
            **chosen,
        )

    def check_incumbent(self, request: JobRequest) -> None:
        """Raises NotFound (ALIAS_NOT_FOUND) where the gate compares with an alias that is missing.

        Not of a model without versions, nor for what a version that passes makes: `latest` and
        the gate's own alias.
        """
        gate = request.gate
        if gate is None or gate.not_worse_than in ("", LATEST, gate.alias):
            return
        try:
            self._models.get_version(request.model, None, gate.not_worse_than)
        except NotFound as error:
            if error.reason is not Reason.ALIAS_NOT_FOUND:
                return  # there is no such model: its first version has nothing to be worse than
            raise NotFound(
                error.reason,
                f"{error.message}, and a gate that compares with none would pass: name one that "
                "is there, or set gate.alias to the same where this job is to make it",
                field="gate.not_worse_than",
            ) from None

    def origins(self, job_id: str) -> list[str | Path]:
        """Returns what a job's version was trained on, oldest first: dataset ids and folders.

        Raises WrongState (BASE_DATA_GONE) when any of it is not there any more.
        """
        return [self._origin(job) for job in self._jobs.ancestors(job_id)]

    def _origin(self, job: JobRecord) -> str | Path:
        if job.dataset_id:
            try:
                self._datasets.get(job.dataset_id, job.tenant)
            except NotFound:
                raise _gone(
                    job,
                    f"the dataset {job.dataset_id} was deleted: upload the same images again, in "
                    "the same groups, which makes the same dataset",
                ) from None
            return job.dataset_id
        try:
            path = allowed_path(job.request.server_path, self._allowed_dirs_of(job.tenant))
        except (InvalidInput, NotAllowed, NotFound):
            path = None
        if path is None or not path.is_dir():
            raise _gone(
                job,
                f"there is no folder at {job.request.server_path!r} that the server may read: put "
                "it back",
            )
        return path


def _merged(own: Augmentation | None, base: Augmentation) -> Augmentation:
    given = {} if own is None else msgspec.structs.asdict(own)
    wanted = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(base, **wanted)


def _gone(job: JobRecord, what: str) -> WrongState:
    return WrongState(
        Reason.BASE_DATA_GONE,
        f"version {job.version} of {plain_name(job.request.model)} was trained on images that "
        f"are not there any more: {what}, or leave out the base and send all images",
        field=_FIELD,
    )
