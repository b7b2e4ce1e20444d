"""What an attempt needs before a trainer is started: its folder, its images, its spec.

Unpacks archives, and finds the files of the version that a gate compares with.
Everything in here blocks.
"""

import logging
import shutil
from functools import partial
from pathlib import Path
from threading import Event

import msgspec

from service.contract import (
    HEARTBEAT_S,
    BaseData,
    Incumbent,
    JobSpec,
    PretrainedBackbone,
)
from service.domain import ARGMAX, plain_name
from service.errors import NotFound
from service.ingest.reader import IMAGES_FOLDER, INDEX_FILE, OnProgress, untold
from service.jobs import registered
from service.jobs.lineage import Lineage
from service.jobs.request import AUTO, DEFAULT_VALIDATION_FRACTION, allowed_path
from service.jobs.settings import Kind, Settings, cache_owner
from service.jobs.store import JobRecord, JobStore
from service.jobs.weights import Exports, available
from service.ops import failpoints
from service.storage.datasets import DatasetRecord, DatasetStore
from service.storage.models import ModelStore

_PLANNED_PART = 0.9
"""Of a job's longest time that training may plan with; the rest is for the export."""
_CHECKPOINT = "checkpoint"
_HEARTBEATS = 6
"""That a trainer may miss, at least, before it counts as hung."""

log = logging.getLogger(__name__)


class Preparation:
    """Prepares attempts; holds nothing of any one."""

    def __init__(
        self, jobs: JobStore, models: ModelStore, datasets: DatasetStore, settings: Settings
    ) -> None:
        self._jobs = jobs
        self._models = models
        self._datasets = datasets
        self._lineage = Lineage(jobs, models, datasets, settings.allowed_dirs_of)
        self._settings = settings

    def folder(self, job_id: str) -> Path:
        """The job's own folder while it is under way."""
        return self._settings.work_dir / job_id

    def clear(self, job_id: str, *, keep_checkpoint: bool) -> None:
        """Deletes what an attempt left behind, as far as the disk lets it; blocks.

        A job that waits for another attempt keeps its checkpoint.
        """
        folder = self.folder(job_id)
        if not keep_checkpoint:
            shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            left = [path for path in folder.iterdir() if path.name != _CHECKPOINT]
        except FileNotFoundError:
            return
        except OSError:
            log.exception("what an attempt left cannot be seen", extra={"job_id": job_id})
            return
        for path in left:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            except OSError:
                log.exception("what an attempt left cannot be deleted", extra={"job_id": job_id})

    def spec(
        self,
        job: JobRecord,
        kind: Kind,
        progress: OnProgress = untold,
        stop: Event | None = None,
    ) -> JobSpec:
        """Empties the job's folder but for its checkpoint, and says what its trainer is to do.

        `progress` is told how many of how many files are read; gives up soon once `stop` is
        set. Raises GraftError when the job's data cannot be had.
        """
        stop = stop or Event()
        request, settings = job.request, self._settings
        self.clear(job.job_id, keep_checkpoint=True)
        folder = self.folder(job.job_id)
        out_dir, checkpoint_dir = folder / "out", folder / _CHECKPOINT
        out_dir.mkdir(parents=True)
        checkpoint_dir.mkdir(exist_ok=True)
        failpoints.reach("job.preparing")
        backbone = request.backbone_or(settings.default_backbone)
        exported = partial(self._models.exported_backbones, tenant=job.tenant)
        known = registered.named(settings, backbone, job.tenant) or PretrainedBackbone(
            backbone=backbone,
            weights=request.weights,
            exported=[] if backbone == AUTO else exported(backbone),
        )
        planned_s = settings.max_job_s * _PLANNED_PART
        data = self._data(job, progress, stop)
        target = self._target(job, progress, stop)
        return JobSpec(
            job_id=job.job_id,
            model=plain_name(request.model),
            data_dir=data.folder,
            data_index=data.index,
            out_dir=str(out_dir),
            method=request.method,
            backbone=backbone,
            weights=known.weights,
            exported=known.exported,
            backbones=self._choices(job, exported) if backbone == AUTO else [],
            weights_dir=str(settings.weights_dir),
            validation_fraction=(
                DEFAULT_VALIDATION_FRACTION
                if request.validation_fraction is None
                else request.validation_fraction
            ),
            outlier_false_alarm_rate=request.outlier_false_alarm_rate,
            grouping=request.grouping,
            previous_answers=self._previous_answers(job),
            seed=request.seed or 0,
            time_budget_s=min(request.time_budget_s or planned_s, planned_s),
            asked_budget_s=request.time_budget_s and min(request.time_budget_s, planned_s),
            # What has no slot on the GPU must not find its own way there.
            device="cpu" if kind == "cpu" else request.device,
            threads=settings.trainer_threads,
            provider=settings.provider,
            precision=settings.precision,
            labels=request.labels,
            background=request.background_or_white,
            framing=request.framing,
            augmentation=request.augmentation,
            target_dir=target.folder,
            target_index=target.index,
            case_sensitive_labels=request.case_sensitive_labels,
            baselines=request.baselines,
            decision=request.decision or ARGMAX,
            gate=request.gate,
            incumbent=self._incumbent(job),
            base=request.base
            and msgspec.structs.replace(request.base, model=plain_name(request.base.model)),
            base_data=self._bases(job, progress, stop),
            base_digest=request.base_digest,
            checkpoint_dir=str(checkpoint_dir),
            feature_cache=str(settings.feature_cache or ""),
            feature_cache_bytes=settings.feature_cache_bytes,
            heartbeat_s=min(HEARTBEAT_S, settings.heartbeat_timeout_s / _HEARTBEATS),
            feature_cache_owner=cache_owner(job.tenant),
        )

    def _choices(self, job: JobRecord, exported: Exports) -> list[PretrainedBackbone]:
        request, settings = job.request, self._settings
        return [
            *available(settings.weights_dir, exported),
            *registered.choices(settings, request.method, request.baselines, job.tenant),
        ]

    def _incumbent(self, job: JobRecord) -> Incumbent | None:
        gate = job.request.gate
        if gate is None or not gate.not_worse_than:
            return None
        try:
            found = self._models.get_version(job.request.model, None, gate.not_worse_than)
        except NotFound:
            return None  # the first of its name has nothing to be worse than
        return Incumbent(
            version=found.version,
            backbone_path=str(found.files.backbone_path),
            head_path=str(found.files.head_path),
            head_digest=found.files.head_digest,
            decoding=found.manifest.decoding,
            answers_path=str(found.answers_path),
        )

    def _previous_answers(self, job: JobRecord) -> str:
        request = job.request
        if request.base is None or request.base.model == request.model:
            found = self._models.newest(request.model)
            return "" if found is None else str(found.answers_path)
        try:
            base = self._models.get_version(request.base.model, request.base.version, None)
        except NotFound:
            return ""  # its images are there, and that is enough
        return str(base.answers_path)

    def _target(self, job: JobRecord, progress: OnProgress, stop: Event) -> BaseData:
        request = job.request
        if request.target_dataset_id:
            return self._stored(request.target_dataset_id, job.tenant)
        if not request.target_path:
            return BaseData("")
        path = self._allowed(job, request.target_path)
        if path.is_dir():
            return self._read(job, path, "target", progress, stop, is_unlabelled=True)
        dataset = self._import(job, path, progress, stop, is_unlabelled=True)
        self._jobs.use_target(job.job_id, dataset.dataset_id)
        return self._stored(dataset.dataset_id, job.tenant)

    def _data(self, job: JobRecord, progress: OnProgress, stop: Event) -> BaseData:
        request = job.request
        if request.dataset_id:
            return self._stored(request.dataset_id, job.tenant)
        path = self._allowed(job, request.server_path)
        if path.is_dir():
            return self._read(job, path, "data", progress, stop)
        dataset = self._import(job, path, progress, stop)
        self._jobs.use_dataset(job.job_id, dataset.dataset_id)
        return self._stored(dataset.dataset_id, job.tenant)

    def _bases(self, job: JobRecord, progress: OnProgress, stop: Event) -> list[BaseData]:
        found = []
        for number, origin in enumerate(self._lineage.origins(job.request.base_job_id)):
            if isinstance(origin, str):
                found.append(self._stored(origin, job.tenant))
            else:
                read = self._read(job, origin, f"base-{number}", progress, stop)
                found.append(msgspec.structs.replace(read, name=origin.name))
        return found

    def _stored(self, dataset_id: str, tenant: str) -> BaseData:
        folder = self._datasets.path(self._datasets.get(dataset_id, tenant).dataset_id)
        return BaseData(str(folder / IMAGES_FOLDER), str(folder / INDEX_FILE), dataset_id)

    def _read(
        self,
        job: JobRecord,
        path: Path,
        name: str,
        progress: OnProgress,
        stop: Event,
        *,
        is_unlabelled: bool = False,
    ) -> BaseData:
        index = self._datasets.read_folder(
            path,
            self.folder(job.job_id) / name,
            tenant=job.tenant,
            is_unlabelled=is_unlabelled,
            case_sensitive=job.request.case_sensitive_labels,
            on_progress=progress,
            is_abandoned=stop,
        )
        return BaseData(str(path), str(index))

    def _allowed(self, job: JobRecord, path: str) -> Path:
        # Checked again: links may lead elsewhere by now.
        return allowed_path(path, self._settings.allowed_dirs_of(job.tenant))

    def _import(
        self,
        job: JobRecord,
        path: Path,
        progress: OnProgress,
        stop: Event,
        *,
        is_unlabelled: bool = False,
    ) -> DatasetRecord:
        return self._datasets.import_archive(
            path,
            is_unlabelled=is_unlabelled,
            case_sensitive=job.request.case_sensitive_labels,
            tenant=job.tenant,
            max_stored_bytes=self._settings.max_stored_bytes_of(job.tenant),
            on_progress=progress,
            is_abandoned=stop,
        )
