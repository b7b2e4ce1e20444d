"""Opens all stores of a data folder, in order, and does for them what nobody waits for.

That is collecting blobs, deleting what is past its retention, and trimming logs.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service import scratch
from service.config import Config
from service.engine import feature_cache as feature_caches
from service.ingest.archives import Limits
from service.ingest.backbone_process import BackboneChecks
from service.ingest.process import ReaderProcesses
from service.jobs.settings import cache_owner
from service.jobs.store import DAY_S, JobStore
from service.ops.metrics import Metrics
from service.storage import backbone_rows, dataset_rows, permissions, version_rows
from service.storage.blob_cache import BlobCache, InPlace
from service.storage.blobs import BlobFolder, Blobs, BlobStore
from service.storage.changes import Changes
from service.storage.collector import Collector
from service.storage.database import Database
from service.storage.dataset_edits import DatasetEdits
from service.storage.dataset_keeping import DatasetKeeper
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from service.storage.quotas import Quotas
from service.storage.registered import BackboneStore

MIB = 2**20
_HOUSEKEEPING_S = 600.0
_CHANGES_KEPT_S = 86_400.0
"""A replica that has not polled for so long looks at everything again."""

log = logging.getLogger(__name__)


class Housekeeping:
    """Runs steps by name, one after the other, every `every_s` in a thread. Stops with `close`.

    The first time is that long after the start. A step that fails is logged and tried again the
    next time.
    """

    def __init__(self, steps: Mapping[str, Callable[[], object]], every_s: float) -> None:
        self._steps = steps
        self._every_s = every_s
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; waits for the step that runs."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing.wait(self._every_s):
            for name, step in self._steps.items():
                if self._is_closing.is_set():
                    return
                try:
                    step()
                except Exception:
                    log.exception(
                        "housekeeping failed and is tried again later", extra={"step": name}
                    )


@dataclass(frozen=True, kw_only=True)
class Stores:
    """All stores of one data folder."""

    database: Database
    objects: BlobStore
    blobs: Blobs
    changes: Changes
    models: ModelStore
    datasets: DatasetStore
    edits: DatasetEdits
    backbones: BackboneStore
    jobs: JobStore

    def housekeeping(self, config: Config, sweep: Callable[[], object]) -> Housekeeping:
        """Starts what nobody waits for; `sweep` deletes folders of jobs that have ended."""
        jobs = self.jobs
        steps: dict[str, Callable[[], object]] = {
            "work folders": sweep,
            "job retention": partial(jobs.delete_old, config.job_retention_days * DAY_S),
            "event retention": partial(jobs.delete_old_events, config.event_retention_days * DAY_S),
            "unneeded blobs": Collector(
                self.database, self.objects, grace_s=config.collect_grace_s
            ).run,
            "copies of collected blobs": self.blobs.trim,
            "changes": partial(self.changes.trim, _CHANGES_KEPT_S),
        }
        if days := config.dataset_retention_days:
            steps["dataset retention"] = partial(self.datasets.delete_unused, days * DAY_S)
        return Housekeeping(steps, min(_HOUSEKEEPING_S, config.collect_grace_s))


def open_stores(
    stack: AsyncExitStack,
    config: Config,
    environment: Mapping[str, str],
    metrics: Metrics,
    *,
    threads: int,
    is_shared: Callable[[], bool],
    on_damage: Callable[[], None],
) -> Stores:
    """Opens the stores of a data folder, which `stack` closes; errors as `Database`.

    `on_damage` is called when the database is found damaged, from any thread.
    """
    database = Database(
        config.data_dir, busy_timeout_s=config.database_timeout_s, on_damage=on_damage
    )
    stack.callback(database.close)
    # Only now does the folder belong to this server alone.
    scratch.prepare(config.data_dir)
    permissions.close_to_others(config.data_dir)
    objects = BlobFolder(config.blobs_folder)
    local = (
        BlobCache(objects, config.data_dir / "cache", config.blob_cache_mb * MIB)
        if config.blob_cache_mb
        else InPlace(objects)
    )
    blobs = Blobs(database, objects, local, on_damaged=metrics.blobs_damaged.inc)
    changes = Changes(database)
    jobs = JobStore(database, config.max_queued_jobs, is_shared, config.default_backbone)
    quotas = Quotas(
        [
            dataset_rows.stored_bytes,
            version_rows.stored_bytes,
            backbone_rows.stored_bytes,
            jobs.stored_bytes,
        ]
    )
    backbones = BackboneStore(
        database,
        blobs,
        quotas,
        BackboneChecks(environment, niceness=config.trainer_niceness),
        work=config.data_dir / "tmp",
        max_bytes=config.max_backbone_mb * MIB,
    )
    stack.callback(backbones.close)
    reader = ReaderProcesses(
        config.data_dir, environment, threads=threads, niceness=config.trainer_niceness
    )
    limits = Limits(
        max_upload_bytes=config.max_upload_mb * MIB,
        max_unpacked_bytes=config.max_unpacked_mb * MIB,
        max_files=config.max_dataset_files,
    )
    keeper = DatasetKeeper(database, blobs, quotas, config.data_dir / "uploads")
    datasets = DatasetStore(database, keeper, reader, limits, quotas)
    stack.callback(datasets.close)
    edits = DatasetEdits(database, keeper, changes, partial(_forget, config.feature_cache))
    stack.callback(edits.close)
    return Stores(
        database=database,
        objects=objects,
        blobs=blobs,
        changes=changes,
        models=ModelStore(database, blobs, changes, quotas),
        datasets=datasets,
        edits=edits,
        backbones=backbones,
        jobs=jobs,
    )


def _forget(feature_cache: Path | None, tenant: str, image_digest: str) -> None:
    """Forgets the features that are kept of a tenant's image."""
    if feature_cache is not None:
        feature_caches.forget(feature_cache, cache_owner(tenant), image_digest)
