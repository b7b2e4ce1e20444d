"""Specs: what a trainer is to do, of a job's request and of what the operator decided.

Reads the images of folders and archives first, and finds the files of the versions that a
request goes by. `staged` keeps the files that a spec names by digest on the trainer's machine.
Everything in here blocks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Literal

import msgspec

from service.contract import (
    HEARTBEAT_S,
    MOST_RANKED_IMAGES,
    ExportedBackbone,
    ImageSource,
    Incumbent,
    JobSpec,
    PretrainedBackbone,
    RankSpec,
)
from service.domain import ARGMAX, ModelKey, PrecisionSetting, VersionSource
from service.errors import NotFound
from service.ingest.reader import OnProgress
from service.jobs import weights
from service.jobs.claims import Claims
from service.jobs.lineage import Lineage
from service.jobs.records import JobRecord
from service.jobs.request import (
    AUTO,
    DEFAULT_RANKING_S,
    DEFAULT_VALIDATION_FRACTION,
    JobRequest,
    RankRequest,
    allowed_path,
)
from service.jobs.settings import Settings, Slot, cache_owner
from service.jobs.weights import available
from service.storage.blobs import Blobs
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore

CHECKPOINT = "checkpoint"
"""In a job's folder: what survives an attempt."""
_PLANNED_PART = 0.9
"""Of a job's longest time that training may plan with; the rest is for the export."""
_HEARTBEATS = 6
"""That a trainer may miss, at least, before it counts as hung."""


class Specs:
    """Makes specs; keeps nothing of any one."""

    def __init__(
        self, claims: Claims, models: ModelStore, datasets: DatasetStore, settings: Settings
    ) -> None:
        self._claims = claims
        self._models = models
        self._datasets = datasets
        self._lineage = Lineage(models, datasets, settings.allowed_dirs_of)
        self._settings = settings
        self._heartbeat_s = min(HEARTBEAT_S, settings.heartbeat_timeout_s / _HEARTBEATS)

    def spec(
        self, job: JobRecord, folder: Path, slot: Slot, gpu: str, progress: OnProgress, stop: Event
    ) -> tuple[JobSpec | RankSpec, list[VersionSource]]:
        """Returns what a job's trainer is to do, and the images that a version will be made of.

        `folder` and `gpu` ("": none) are the job's own. `progress` gets how many of how many files
        are read; gives up soon once `stop` is set. Raises GraftError when the job's data cannot be
        had, LeaseLost.
        """
        reading = _Reading(self, job, folder, progress, stop)
        if isinstance(job.request, RankRequest):
            return self._ranking(job.request, reading, folder, gpu), []
        return self._fine_tuning(job, job.request, reading, folder, slot, gpu)

    def _fine_tuning(
        self,
        job: JobRecord,
        request: JobRequest,
        reading: "_Reading",
        folder: Path,
        slot: Slot,
        gpu: str,
    ) -> tuple[JobSpec, list[VersionSource]]:
        settings = self._settings
        out_dir, checkpoint_dir = folder / "out", folder / CHECKPOINT
        out_dir.mkdir()
        checkpoint_dir.mkdir(exist_ok=True)
        backbone = request.backbone_or(settings.default_backbone)
        exported = partial(self._models.exported_backbones, tenant=job.tenant)
        known = weights.find_registered(settings, backbone, job.tenant) or PretrainedBackbone(
            backbone=backbone,
            weights=request.weights,
            exported=[] if backbone == AUTO else exported(backbone),
        )
        is_precision_asked = request.serving_precision != "auto"
        planned_s = settings.max_job_s * _PLANNED_PART
        data, source = reading.data(request)
        target, target_source = reading.target(request)
        sources = [*request.base_sources, source, *([target_source] if target_source else [])]
        spec = JobSpec(
            job_id=job.job_id,
            model=request.model,
            data=data,
            out_dir=str(out_dir),
            method=request.method,
            backbone=backbone,
            weights=known.weights,
            exported=known.exported,
            backbones=[
                *available(settings.weights_dir, exported),
                *weights.registered_choices(
                    settings, request.method, request.baselines, job.tenant
                ),
            ]
            if backbone == AUTO
            else [],
            validation_fraction=(
                DEFAULT_VALIDATION_FRACTION
                if request.validation_fraction is None
                else request.validation_fraction
            ),
            outlier_false_alarm_rate=request.outlier_false_alarm_rate,
            grouping=request.grouping,
            previous_answers=self._previous_answers(request),
            time_budget_s=min(request.time_budget_s or planned_s, planned_s),
            asked_budget_s=request.time_budget_s and min(request.time_budget_s, planned_s),
            # What has no slot on the GPU must not find its own way there.
            device="cpu" if slot == "cpu" else request.device,
            precision=(
                request.serving_precision if is_precision_asked else _precision(settings, slot)
            ),
            is_precision_asked=is_precision_asked,
            labels=request.labels,
            background=request.background_or_white,
            framing=request.framing,
            augmentation=request.augmentation,
            target=target,
            case_sensitive_labels=request.case_sensitive_labels,
            baselines=request.baselines,
            decision=request.decision or ARGMAX,
            gate=request.gate,
            incumbent=self._incumbent(request),
            base=request.base,
            base_data=reading.bases(request),
            base_digest=request.base_digest,
            checkpoint_dir=str(checkpoint_dir),
            **self._common(request, gpu),
        )
        return spec, sources

    def _ranking(
        self, request: RankRequest, reading: "_Reading", folder: Path, gpu: str
    ) -> RankSpec:
        settings = self._settings
        data, _ = reading.data(request)
        exported = partial(self._models.exported_backbones, tenant=request.tenant)
        named = [
            # What the store knows of it spares its export.
            weights.find_registered(settings, asked.backbone, request.tenant)
            or msgspec.structs.replace(asked, exported=exported(asked.backbone))
            for asked in request.backbones
        ]
        all_available = [
            *available(settings.weights_dir, exported),
            *settings.registered_of(request.tenant),
        ]
        return RankSpec(
            data=data,
            backbones=named or all_available,
            work_dir=str(folder),
            only_available=not request.backbones,
            time_budget_s=request.time_budget_s or DEFAULT_RANKING_S,
            precision=settings.precision,
            **self._common(request, gpu),
        )

    def _common(self, request: JobRequest | RankRequest, gpu: str) -> dict[str, Any]:
        """Returns the fields that say with what a trainer computes, and where it keeps what."""
        settings = self._settings
        return {
            "weights_dir": str(settings.weights_dir),
            "seed": request.seed or 0,
            "gpu": gpu,
            "threads": settings.trainer_threads,
            "provider": settings.provider,
            "provider_table": str(settings.provider_table or ""),
            "feature_cache": str(settings.feature_cache or ""),
            "feature_cache_bytes": settings.feature_cache_bytes,
            "feature_cache_owner": cache_owner(request.tenant),
            "heartbeat_s": self._heartbeat_s,
        }

    def _incumbent(self, request: JobRequest) -> Incumbent | None:
        gate = request.gate
        if gate is None or not gate.not_worse_than:
            return None
        try:
            found = self._models.get_version(request.key, None, gate.not_worse_than)
        except NotFound:
            return None  # the first of its name has nothing to be worse than
        return Incumbent(
            version=found.version,
            backbone_digest=found.backbone_digest,
            head_digest=found.head_digest,
            decoding=found.decoding,
            answers_digest=found.answers_digest,
        )

    def _previous_answers(self, request: JobRequest) -> str:
        if request.base is None or request.base.model == request.model:
            found = self._models.newest(request.key)
            return "" if found is None else found.answers_digest
        try:
            model = ModelKey(request.tenant, request.base.model)
            base = self._models.get_version(model, request.base.version, None)
        except NotFound:
            return ""  # its images are there, and that is enough
        return base.answers_digest


class _Reading:
    """Finds and reads the images of one attempt."""

    def __init__(
        self, specs: Specs, job: JobRecord, folder: Path, progress: OnProgress, stop: Event
    ) -> None:
        self._claims, self._datasets = specs._claims, specs._datasets
        self._lineage, self._settings = specs._lineage, specs._settings
        self._job = job
        self._folder = folder
        self._progress = progress
        self._stop = stop

    def data(self, request: JobRequest | RankRequest) -> tuple[ImageSource, VersionSource]:
        most = MOST_RANKED_IMAGES if isinstance(request, RankRequest) else 0
        return self._found(request.dataset_id, request.server_path, "data", most=most)

    def target(self, request: JobRequest) -> tuple[ImageSource | None, VersionSource | None]:
        if not request.target_dataset_id and not request.target_path:
            return None, None
        return self._found(request.target_dataset_id, request.target_path, "target", is_target=True)

    def bases(self, request: JobRequest) -> list[ImageSource]:
        found = []
        for number, source in enumerate(request.base_sources):
            place = self._lineage.place(request, source)
            if isinstance(place, str):
                found.append(self._stored(place))
            else:
                read = self._read(place, f"base-{number}")
                found.append(msgspec.structs.replace(read, name=place.name))
        return found

    def _found(
        self,
        dataset_id: str,
        server_path: str,
        name: str,
        *,
        is_target: bool = False,
        most: int = 0,
    ) -> tuple[ImageSource, VersionSource]:
        role: Literal["source", "target"] = "target" if is_target else "source"
        if not dataset_id:
            # Checked again: links may lead elsewhere by now.
            path = allowed_path(server_path, self._settings.allowed_dirs_of(self._job.tenant))
            if path.is_dir():
                read = self._read(path, name, is_unlabelled=is_target, most=most)
                return read, VersionSource(role, folder=str(path))
            dataset_id = self._datasets.import_archive(
                path,
                is_unlabelled=is_target,
                case_sensitive=self._job.request.case_sensitive_labels,
                tenant=self._job.tenant,
                max_stored_bytes=self._settings.max_stored_bytes_of(self._job.tenant),
                on_progress=self._progress,
                is_abandoned=self._stop,
            ).dataset_id
            self._claims.hold(self._job, dataset_id, is_target=is_target)
        return self._stored(dataset_id), VersionSource(role, dataset_id)

    def _stored(self, dataset_id: str) -> ImageSource:
        return self._datasets.source(dataset_id, self._job.tenant)

    def _read(
        self, path: Path, name: str, *, is_unlabelled: bool = False, most: int = 0
    ) -> ImageSource:
        return self._datasets.read_folder(
            path,
            self._folder / name,
            tenant=self._job.tenant,
            is_unlabelled=is_unlabelled,
            case_sensitive=self._job.request.case_sensitive_labels,
            most=most,
            on_progress=self._progress,
            is_abandoned=self._stop,
        )


@contextmanager
def staged(spec: JobSpec | RankSpec, blobs: Blobs) -> Iterator[JobSpec | RankSpec]:
    """Yields a spec with the files that it names by digest, which stay here until the end.

    Blocks while they are fetched. Raises Damaged (MODEL_UNLOADABLE) where an index or a pack is
    missing. Without the others a trainer gets on: it exports a backbone anew, and says what it
    could not compare with.
    """
    needed = {
        digest
        for source in _sources(spec)
        if source.index
        for digest in (source.index, *source.packs)
    }
    useful = _backbones(spec)
    if isinstance(spec, JobSpec):
        useful |= _versions_before(spec)
    wanted = needed | blobs.are_there(useful - needed)
    with blobs.files(wanted, "file that the job works with") as files:
        yield msgspec.structs.replace(spec, files={key: str(path) for key, path in files.items()})


def _sources(spec: JobSpec | RankSpec) -> Iterable[ImageSource]:
    yield spec.data
    if isinstance(spec, JobSpec):
        yield from spec.base_data
        if spec.target is not None:
            yield spec.target


def _backbones(spec: JobSpec | RankSpec) -> set[str]:
    exported: list[ExportedBackbone] = [
        each for backbone in spec.backbones for each in backbone.exported
    ]
    if isinstance(spec, JobSpec):
        exported += spec.exported
    return {digest for each in exported for digest in (each.digest, each.reference) if digest}


def _versions_before(spec: JobSpec) -> set[str]:
    before = spec.incumbent
    known = {spec.previous_answers}
    if before is not None:
        known |= {before.backbone_digest, before.head_digest, before.answers_digest}
    return known - {""}


def _precision(settings: Settings, slot: Slot) -> PrecisionSetting:
    # A job on the CPU beside a GPU that serves: bf16 is the CPU's alone.
    if slot == "cpu" and settings.gpus and settings.precision == "auto":
        return "fp32"
    return settings.precision
