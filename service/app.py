"""Composes the service: builds every package's objects in order, and closes them in reverse.

The only module that knows all packages. `async with App(config)` is entered when health
checks answer SERVING, and left when everything is drained and closed.
"""

import asyncio
import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

from graft.v1 import (
    backbone_pb2_grpc,
    dataset_pb2_grpc,
    fine_tuning_pb2_grpc,
    model_pb2_grpc,
    prediction_pb2_grpc,
)

from service import scratch
from service.auth.access_control import AccessControl
from service.config import Config
from service.engine.engine import Engine, EngineLimits
from service.engine.exporter import Exporter
from service.engine.providers import choose_provider
from service.engine.runtime import OnnxRuntime, Runtime
from service.errors import GraftError
from service.ingest.backbone_process import BackboneChecks
from service.ingest.process import ReaderProcesses
from service.jobs.launcher import Launcher, ProcessLauncher
from service.jobs.lineage import Lineage
from service.jobs.ranking import Rankings
from service.jobs.store import JobStore
from service.jobs.supervisor import Settings, Supervisor
from service.jobs.warm import WarmLauncher
from service.jobs.watch import Watch
from service.jobs.weights import WeightsCheck
from service.ops.malloc_trim import MallocTrimmer
from service.ops.metrics import Metrics
from service.ops.metrics_server import MetricsServer
from service.rpc.admission import CallLimits
from service.rpc.backbones import BackboneServicer
from service.rpc.datasets import DatasetServicer
from service.rpc.fallback import Fallback
from service.rpc.fine_tune import FineTuningServicer
from service.rpc.models import ModelServicer
from service.rpc.open_inference import grpc_predict_v2_pb2_grpc
from service.rpc.open_inference.servicer import OpenInferenceServicer
from service.rpc.predict import PredictionServicer
from service.rpc.server import RpcServer, to_register
from service.storage import private
from service.storage.artifacts import Artifacts, StoredVersion
from service.storage.database import Database
from service.storage.datasets import DatasetStore, Limits
from service.storage.models import ModelStore
from service.storage.records import Removed
from service.storage.registered import BackboneStore

MIB = 2**20
_STORE_THREADS = 32
_MOST_HELD = 16
"""Requests of the largest size that are held at once; more of smaller ones."""
_HEALTH_TIMEOUT_S = 4.0
"""Shorter than the timeouts of readiness and liveness probes."""
_DETOURS = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_ENDPOINT")
"""Variables that send the trainers' downloads through a proxy, or to another host."""

log = logging.getLogger(__name__)


class App:
    """Runs the service of a configuration; trainers get the environment that is passed in.

    Tests pass their own `runtime` and `launcher`.
    """

    def __init__(
        self,
        config: Config,
        environment: Mapping[str, str],
        *,
        runtime: Runtime | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._config = config
        self._environment = environment
        self._runtime = runtime
        self._has_detour = any(environment.get(name) for name in _DETOURS)
        self._launcher = launcher or WarmLauncher(
            environment,
            config.warm_trainers,
            cold=ProcessLauncher(environment, niceness=config.trainer_niceness),
        )
        self._stack = AsyncExitStack()
        self.port = 0
        self.metrics_port = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._build(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def wait_failed(self) -> None:
        """Waits until a part that the service needs has failed; raises its error."""
        await self._supervisor.wait_failed()

    async def _build(self, stack: AsyncExitStack) -> None:
        config = self._config
        # Stores block their threads; what takes long has others (`jobs.uninterrupted`).
        asyncio.get_running_loop().set_default_executor(
            ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="store")
        )
        threads = config.threads or len(os.sched_getaffinity(0))
        metrics = Metrics(
            {
                "version": metadata.version("graft-server"),
                "python": platform.python_version(),
                "onnxruntime": next(
                    found.version
                    for package in ("onnxruntime-gpu", "onnxruntime")
                    for found in metadata.distributions(name=package)
                ),
            }
        )

        stack.callback(MallocTrimmer().close)

        # Access.
        access = AccessControl(config, metrics)

        # Storage.
        database = Database(config.data_dir, busy_timeout_s=config.database_timeout_s)
        stack.callback(database.close)
        # Only now does the folder belong to this server alone.
        scratch.prepare(config.data_dir)
        private.close_to_others(config.data_dir)
        artifacts = Artifacts(config.data_dir / "artifacts")
        models = ModelStore(database, artifacts)
        datasets = _datasets(stack, config, database, threads, self._environment)
        backbones = self._backbones(stack, database, artifacts)
        jobs = JobStore(database, config.max_queued_jobs, access.is_shared)
        _watch_stores(config.data_dir, metrics, database, jobs, models)

        # Inference.
        runtime = self._runtime or _choose_runtime(config, threads, metrics)
        limits = EngineLimits(
            threads=threads,
            max_batch=config.max_batch,
            max_queue=config.max_queue,
            max_bytes=config.model_memory_mb * MIB,
            load_timeout_s=config.load_timeout_s,
            max_pinned_bytes=config.model_memory_mb * MIB // 2 if access.needs_tokens else None,
        )
        engine = Engine(runtime, limits, metrics)
        stack.callback(engine.close)

        # Training.
        async def warm(model: str, stored: StoredVersion) -> None:
            await engine.warm(stored.files(model))

        watch = Watch(jobs)
        settings = Settings(
            work_dir=config.data_dir / "work",
            weights_dir=config.weights_folder,
            allowed_dirs_of=access.allowed_dirs_of,
            max_stored_bytes_of=access.max_stored_bytes_of,
            registered_of=backbones.pretrained,
            default_backbone=config.default_backbone,
            cpu_jobs=config.cpu_jobs,
            gpu_jobs=config.gpu_jobs,
            has_gpu=runtime.provider in ("cuda", "tensorrt"),
            max_job_s=config.max_job_s,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            min_free_bytes=config.min_free_mb * MIB,
            feature_cache=config.feature_cache,
            feature_cache_bytes=config.feature_cache_mb * MIB,
            trainer_threads=config.trainer_threads,
            provider=config.provider,
            precision=config.precision,
        )
        self._supervisor = supervisor = Supervisor(
            jobs=jobs,
            models=models,
            datasets=datasets,
            artifacts=artifacts,
            launcher=self._launcher,
            metrics=metrics,
            settings=settings,
            on_published=warm,
        )

        rankings = Rankings(models, datasets, self._launcher, settings, access.is_shared)

        # RPC.
        fine_tuning = FineTuningServicer(
            jobs,
            datasets,
            watch,
            Lineage(jobs, models, datasets, access.allowed_dirs_of),
            rankings,
            settings=settings,
            weights=WeightsCheck(config.weights_folder, may_connect=not self._has_detour),
            exported=models.exported_backbones,
        )
        fallback = Fallback(engine, models, metrics)
        exporter = Exporter()
        stack.callback(exporter.close)
        prediction = PredictionServicer(
            fallback,
            max_images=config.max_images,
            timeout_s=config.predict_timeout_s,
        )
        open_inference = OpenInferenceServicer(
            engine,
            fallback,
            models,
            version=metadata.version("graft-server"),
            is_ready=lambda: rpc.is_serving,
            max_images=config.max_images,
            timeout_s=config.predict_timeout_s,
        )
        models.on_removed = _forgetting(asyncio.get_running_loop(), engine, open_inference)
        rpc = RpcServer(
            [
                to_register(
                    fine_tuning_pb2_grpc.add_FineTuningServiceServicer_to_server, fine_tuning
                ),
                to_register(
                    dataset_pb2_grpc.add_DatasetServiceServicer_to_server,
                    DatasetServicer(datasets, config.message_timeout_s),
                ),
                to_register(
                    backbone_pb2_grpc.add_BackboneServiceServicer_to_server,
                    BackboneServicer(
                        backbones,
                        config.weights_folder,
                        config.default_backbone,
                        config.message_timeout_s,
                    ),
                ),
                to_register(
                    prediction_pb2_grpc.add_PredictionServiceServicer_to_server, prediction
                ),
                to_register(
                    model_pb2_grpc.add_ModelServiceServicer_to_server,
                    ModelServicer(models, engine, exporter),
                ),
                to_register(
                    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server,
                    open_inference,
                ),
            ],
            metrics,
            config.max_message_mb * MIB,
            accepts_gzip=config.accept_gzip == "yes",
            authenticator=access.authenticator,
            audit=access.audit,
            limits=CallLimits(
                calls=config.max_calls,
                uploads=config.max_uploads,
                watchers=config.max_watchers,
                held_bytes=_MOST_HELD * config.max_message_mb * MIB,
                message_timeout_s=config.message_timeout_s,
            ),
        )

        self.metrics_port = _measure(config, stack, metrics, lambda: rpc.is_serving)
        self.port = await rpc.start(config.address, access.credentials)
        access.watch(stack, rpc.recheck)

        async def drain() -> None:
            await rpc.refuse()
            # Watchers would stay until their jobs end; they reconnect to the next server.
            watch.close()
            await asyncio.gather(
                rpc.drain(config.drain_s), supervisor.close(config.drain_s), rankings.close()
            )

        if isinstance(self._launcher, WarmLauncher):
            # After the drain: until then a job may get a warm trainer.
            stack.push_async_callback(self._launcher.close)
        stack.push_async_callback(drain)
        await supervisor.start()
        await rpc.serve()
        if isinstance(self._launcher, WarmLauncher):
            await self._launcher.open()
        log.info(
            "serving",
            extra={"host": config.host, "port": self.port, "metrics_port": self.metrics_port},
        )

    def _backbones(
        self, stack: AsyncExitStack, database: Database, artifacts: Artifacts
    ) -> BackboneStore:
        config = self._config
        checks = BackboneChecks(self._environment, niceness=config.trainer_niceness)
        store = BackboneStore(database, artifacts, checks, config.max_backbone_mb * MIB)
        stack.callback(store.close)
        return store


def _watch_stores(
    data_dir: Path, metrics: Metrics, database: Database, jobs: JobStore, models: ModelStore
) -> None:
    metrics.data_free_bytes.set_function(lambda: float(shutil.disk_usage(data_dir).free))
    metrics.database_damaged.set_function(lambda: float(database.is_damaged))
    metrics.watch_counts("jobs", "Jobs by state.", "state", _or_none(jobs.counts_by_state))
    metrics.watch_counts("stored", "Stored objects by kind.", "kind", _or_none(models.counts))


def _or_none(counts: Callable[[], Mapping[str, int]]) -> Callable[[], Mapping[str, int]]:
    def counted() -> Mapping[str, int]:
        # Without the database's answer, the other metrics are still scraped.
        try:
            return counts()
        except GraftError:
            return {}

    return counted


def _datasets(
    stack: AsyncExitStack,
    config: Config,
    database: Database,
    threads: int,
    environment: Mapping[str, str],
) -> DatasetStore:
    reader = ReaderProcesses(
        config.data_dir, environment, threads=threads, niceness=config.trainer_niceness
    )
    limits = Limits(
        max_upload_bytes=config.max_upload_mb * MIB,
        max_unpacked_bytes=config.max_unpacked_mb * MIB,
        max_files=config.max_dataset_files,
    )
    store = DatasetStore(database, config.data_dir / "datasets", reader, limits)
    stack.callback(store.close)
    return store


def _measure(
    config: Config, stack: AsyncExitStack, metrics: Metrics, is_serving: Callable[[], bool]
) -> int:
    try:
        server = MetricsServer(
            metrics.registry,
            config.metrics_host,
            config.metrics_port,
            _called_on(asyncio.get_running_loop(), is_serving),
        )
    except OSError as error:
        raise OSError(
            f"the metrics port cannot listen on {config.metrics_host}:{config.metrics_port} "
            f"({error.strerror}): set --metrics-host and --metrics-port to an address of this "
            "machine that is free"
        ) from error
    stack.callback(server.close)
    return server.port


def _called_on(
    loop: asyncio.AbstractEventLoop, is_serving: Callable[[], bool]
) -> Callable[[], bool]:
    """Returns a function for other threads; it returns False while the event loop is stuck."""

    async def call() -> bool:
        return is_serving()

    def wait() -> bool:
        future = asyncio.run_coroutine_threadsafe(call(), loop)
        try:
            return future.result(_HEALTH_TIMEOUT_S)
        except TimeoutError:
            future.cancel()
            return False

    return wait


def _choose_runtime(config: Config, threads: int, metrics: Metrics) -> Runtime:
    provider = choose_provider(config.provider)
    metrics.provider_info.labels(provider.name, config.precision, provider.why).set(1)
    log.info(
        "provider chosen",
        extra={"provider": provider.name, "precision": config.precision, "why": provider.why},
    )
    return OnnxRuntime(provider, threads, config.precision, max_batch=config.max_batch)


def _forgetting(
    loop: asyncio.AbstractEventLoop, engine: Engine, open_inference: OpenInferenceServicer
) -> Callable[[Removed], None]:
    def forget(removed: Removed) -> None:
        engine.forget(
            models=[removed.model] if removed.is_model_gone else [],
            versions=[(removed.model, version) for version in removed.versions],
            backbones=removed.backbones,
            heads=removed.heads,
            paths=removed.paths,
        )
        open_inference.forget(removed)

    def schedule(removed: Removed) -> None:
        loop.call_soon_threadsafe(partial(forget, removed))

    return schedule
