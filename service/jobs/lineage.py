"""The versions before that a request goes by: the base that it grows from, and its incumbent.

A version knows what it was trained on, its base's images first, so that it does not matter what
became of the versions between, or of the jobs that made them. Reads the stores and keeps nothing.
"""

from pathlib import Path

import msgspec

from service import backbones as registry
from service.contract import Augmentation, Base
from service.domain import LATEST, ModelKey, VersionSource
from service.errors import GraftError, InvalidInput, NotAllowed, NotFound, Reason, WrongState
from service.jobs.request import JobRequest, allowed_path
from service.jobs.settings import AllowedDirs
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore

_FIELD = "base"
_MOST_SOURCES = 100


class Lineage:
    """Finds earlier versions, and where the images that they were trained on lie."""

    def __init__(
        self, models: ModelStore, datasets: DatasetStore, allowed_dirs_of: AllowedDirs
    ) -> None:
        self._models = models
        self._datasets = datasets
        self._allowed_dirs_of = allowed_dirs_of

    def grow(
        self, request: JobRequest, model: str, version: int | None, alias: str | None
    ) -> JobRequest:
        """Returns the request with its base pinned: by number, by alias, or by neither (`latest`).

        `model` is the base's name, "" for the request's own.
        Backbone, weights, grouping, background, decision and each field of the augmentation are the
        base's where the request names none. Raises NotFound (MODEL_NOT_FOUND, VERSION_NOT_FOUND,
        ALIAS_NOT_FOUND), or WrongState (BASE_DATA_GONE).
        """
        try:
            key = ModelKey(request.tenant, model or request.model)
            base = self._models.get_version(key, version, alias)
        except GraftError as error:
            raise type(error)(error.reason, error.message, field=_FIELD) from None
        before = self._models.manifest(base)
        sources = self._models.sources(key, base.version)
        sources = [source for source in sources if source.role == "source"]
        request = msgspec.structs.replace(
            request, base=Base(key.name, base.version), base_sources=sources
        )
        self.check_sources(request)
        chosen: dict[str, object] = {}
        if not request.backbone:
            # What the base's request left to the server or to its data is decided by now.
            chosen["backbone"] = before.backbone
            # Of a registered one they are in its file.
            is_registered = registry.is_registered(before.backbone)
            chosen["weights"] = request.weights or ("" if is_registered else before.weights_asked)
        if request.grouping is None:
            chosen["grouping"] = before.grouping
        if not request.background:
            chosen["background"] = before.decoding.background
        if request.decision is None:
            chosen["decision"] = before.decision
        if before.augmentation is not None:
            chosen["augmentation"] = _merged(request.augmentation, before.augmentation)
        if before.case_sensitive_labels:
            chosen["case_sensitive_labels"] = True
        return msgspec.structs.replace(request, base_digest=before.dataset_digest, **chosen)

    def check_incumbent(self, request: JobRequest) -> None:
        """Raises NotFound (ALIAS_NOT_FOUND) where the gate compares with an alias that is missing.

        Not of a model without versions, nor for what a version that passes makes: `latest` and
        the gate's own alias.
        """
        gate = request.gate
        if gate is None or gate.not_worse_than in ("", LATEST, gate.alias):
            return
        try:
            self._models.get_version(request.key, None, gate.not_worse_than)
        except NotFound as error:
            if error.reason is not Reason.ALIAS_NOT_FOUND:
                return  # there is no such model: its first version has nothing to be worse than
            raise NotFound(
                error.reason,
                f"{error.message}, and a gate that compares with none would pass: name one that "
                "is there, or set gate.alias to the same where this job is to make it",
                field="gate.not_worse_than",
            ) from None

    def check_sources(self, request: JobRequest) -> None:
        """Raises WrongState (BASE_DATA_GONE) when images of the base are not there any more."""
        assert request.base is not None
        if not 1 <= len(request.base_sources) <= _MOST_SOURCES:
            count = len(request.base_sources) or "none"
            raise _gone(
                request.base,
                f"its images come from {count} places, and 1 to {_MOST_SOURCES} are known to be "
                "read: leave out the base and send all images",
            )
        for source in request.base_sources:
            self.place(request, source)

    def place(self, request: JobRequest, source: VersionSource) -> str | Path:
        """Returns where images of the base lie: a dataset's id, or a folder.

        Raises WrongState (BASE_DATA_GONE) when they are not there any more.
        """
        base, tenant = request.base, request.tenant
        assert base is not None
        if source.dataset_id:
            try:
                return self._datasets.get(source.dataset_id, tenant).dataset_id
            except NotFound:
                raise _gone(
                    base,
                    f"the dataset {source.dataset_id} was deleted: upload the same images again, "
                    "in the same groups, which makes the same dataset, or leave out the base and "
                    "send all images",
                ) from None
        try:
            path = allowed_path(source.folder, self._allowed_dirs_of(tenant))
        except (InvalidInput, NotAllowed, NotFound):
            path = None
        if path is None or not path.is_dir():
            raise _gone(
                base,
                f"there is no folder at {source.folder!r} that the server may read: put it back, "
                "or leave out the base and send all images",
            )
        return path


def _merged(own: Augmentation | None, base: Augmentation) -> Augmentation:
    given = {} if own is None else msgspec.structs.asdict(own)
    wanted = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(base, **wanted)


def _gone(base: Base, what: str) -> WrongState:
    return WrongState(
        Reason.BASE_DATA_GONE,
        f"version {base.version} of {base.model} was trained on images that are not there any "
        f"more: {what}",
        field=_FIELD,
    )
