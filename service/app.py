"""Composes the service: builds every package's objects in order, and closes them in reverse.

The only module that knows all packages. `async with App(config)` is entered when health
checks answer SERVING, and left when everything is drained and closed.
"""

import asyncio
import logging
import platform
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Self

from graftml_stubs.v1 import (
    backbone_pb2_grpc,
    dataset_pb2_grpc,
    fine_tuning_pb2_grpc,
    model_pb2_grpc,
    prediction_pb2_grpc,
)
from threadpoolctl import threadpool_limits

from service import prepared
from service.auth.access_control import AccessControl
from service.config import Config
from service.domain import ModelKey
from service.engine.engine import Engine, EngineLimits
from service.engine.export import Exporter
from service.engine.gpu import LARGEST_RUN, GpuLimits
from service.engine.provider_table import ProviderTable, machine_key
from service.engine.providers import choose_provider, visible_gpus
from service.engine.runtime import OnnxRuntime, Read, Runtime
from service.engine.timing import Measurer
from service.errors import Damaged, GraftError, Reason
from service.jobs.attempt import Attempts
from service.jobs.claims import Claims
from service.jobs.default_export import DefaultExport
from service.jobs.launchers import Launcher, ProcessLauncher, WarmLauncher
from service.jobs.lineage import Lineage
from service.jobs.replicas import Replicas
from service.jobs.settings import Settings
from service.jobs.store import JobStore
from service.jobs.supervisor import Supervisor
from service.jobs.watcher import JobWatcher
from service.jobs.weights import WeightsCheck
from service.ops import child
from service.ops.cpus import describe
from service.ops.malloc_trim import MallocTrimmer
from service.ops.metrics import Metrics
from service.ops.metrics_server import MetricsServer
from service.rpc.admission import CallLimits
from service.rpc.backbones import BackboneServicer
from service.rpc.datasets import DatasetServicer
from service.rpc.fine_tune import FineTuningServicer
from service.rpc.models import ModelServicer
from service.rpc.open_inference import grpc_predict_v2_pb2_grpc
from service.rpc.open_inference.servicer import OpenInferenceServicer
from service.rpc.pins import ChangeFollower, Pins
from service.rpc.predict import PredictionServicer
from service.rpc.server import RpcServer
from service.storage.models import ModelStore
from service.storage.version_rows import StoredVersion
from service.stores import open_stores

MIB = 2**20
_STORE_THREADS = 32
_LARGEST_CPU_RUN = 32
"""Most images in a run on a CPU, where nothing is set; fewer where fewer pay."""
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
        self._damaged = asyncio.Event()
        self.port = 0
        self.metrics_port = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await self._build(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def wait_failed(self) -> None:
        """Waits until a part that the service needs has failed; raises its error."""
        parts = {
            asyncio.ensure_future(self._supervisor.wait_failed()),
            asyncio.create_task(self._database_damaged()),
        }
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
        for part in done:
            part.result()

    async def _database_damaged(self) -> None:
        await self._damaged.wait()
        raise Damaged(
            Reason.STORAGE_DAMAGED,
            "the database is damaged: put the data folder back from a backup, as the runbook says",
        )

    async def _build(self, stack: AsyncExitStack) -> None:
        config = self._config
        # Stores block their threads; what takes long has others (`jobs.uninterrupted`).
        asyncio.get_running_loop().set_default_executor(
            ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="store")
        )
        metrics = Metrics(
            {
                "version": metadata.version("graftml-server"),
                "python": platform.python_version(),
                "onnxruntime": next(
                    found.version
                    for package in ("onnxruntime-gpu", "onnxruntime")
                    for found in metadata.distributions(name=package)
                ),
            }
        )

        threads = _count_threads(config, stack, metrics)

        stack.callback(MallocTrimmer().close)

        # Access.
        access = AccessControl(config, metrics)

        # Storage.
        loop = asyncio.get_running_loop()

        def on_damage() -> None:
            loop.call_soon_threadsafe(self._damaged.set)

        stores = open_stores(
            stack,
            config,
            self._environment,
            metrics,
            threads=threads,
            is_shared=lambda: access.authenticator.is_shared,
            on_damage=on_damage,
        )
        models, datasets, jobs = stores.models, stores.datasets, stores.jobs
        edits = stores.edits
        _watch_stores(config.data_dir, metrics, jobs, models)

        # Inference.
        runtime = self._runtime or _choose_runtime(
            config, threads, metrics, self._environment, stack
        )
        limits = EngineLimits(
            threads=threads,
            max_batch=_largest_run(config, is_gpu=runtime.is_gpu),
            max_queue=config.max_queue,
            max_bytes=config.model_memory_mb * MIB,
            load_timeout_s=config.load_timeout_s,
            recent_bytes=config.recent_features_mb * MIB,
            max_pinned_bytes=config.model_memory_mb * MIB // 2 if access.needs_tokens else None,
        )
        engine = Engine(runtime, stores.blobs.read, limits, metrics)
        stack.callback(engine.close)
        pins = Pins(engine, models)
        follower = ChangeFollower(stores.changes, models, engine, pins)

        # Training.
        async def warm(model: ModelKey, stored: StoredVersion) -> None:
            await engine.warm(stored.files(model))

        watcher = JobWatcher(jobs)
        settings = Settings(
            work_dir=config.data_dir / "work" / "jobs",
            weights_dir=config.weights_folder,
            allowed_dirs_of=access.allowed_dirs_of,
            max_stored_bytes_of=access.max_stored_bytes_of,
            registered_of=stores.backbones.pretrained,
            default_backbone=config.default_backbone,
            prepared=prepared.environment_folder(),
            cpu_jobs=config.cpu_jobs,
            gpu_jobs=config.gpu_jobs,
            ranking_jobs=config.ranking_jobs,
            gpus=visible_gpus(self._environment) if runtime.is_gpu else (),
            max_job_s=config.max_job_s,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            min_free_bytes=config.min_free_mb * MIB,
            feature_cache=config.feature_cache,
            feature_cache_bytes=config.feature_cache_mb * MIB,
            trainer_threads=config.trainer_threads,
            provider=config.provider,
            precision=config.precision,
            provider_table=config.provider_table,
        )
        export = DefaultExport(models, self._launcher, settings)
        claims = Claims(jobs)
        attempts = Attempts(
            claims=claims,
            models=models,
            datasets=datasets,
            blobs=stores.blobs,
            launcher=self._launcher,
            metrics=metrics,
            settings=settings,
            on_published=warm,
            export=export,
        )
        self._supervisor = supervisor = Supervisor(
            jobs=jobs,
            claims=claims,
            replicas=Replicas(
                jobs, platform.node(), metadata.version("graftml-server"), folder=config.data_dir
            ),
            attempts=attempts,
            datasets=datasets,
            metrics=metrics,
            settings=settings,
        )

        # RPC.
        fine_tuning = FineTuningServicer(
            jobs,
            datasets,
            watcher,
            Lineage(models, datasets, access.allowed_dirs_of),
            metrics=metrics,
            settings=settings,
            weights=WeightsCheck(config.weights_folder, may_connect=not self._has_detour),
            exported=models.exported_backbones,
        )
        exporter = Exporter(stores.blobs.read)
        stack.callback(exporter.close)
        prediction = PredictionServicer(
            engine, models, max_images=config.max_images, timeout_s=config.predict_timeout_s
        )
        open_inference = OpenInferenceServicer(
            engine,
            models,
            pins,
            version=metadata.version("graftml-server"),
            is_ready=lambda: rpc.is_serving,
            max_images=config.max_images,
            timeout_s=config.predict_timeout_s,
        )
        rpc = RpcServer(
            [
                (fine_tuning_pb2_grpc.add_FineTuningServiceServicer_to_server, fine_tuning),
                (
                    dataset_pb2_grpc.add_DatasetServiceServicer_to_server,
                    DatasetServicer(datasets, edits, config.message_timeout_s),
                ),
                (
                    backbone_pb2_grpc.add_BackboneServiceServicer_to_server,
                    BackboneServicer(
                        stores.backbones, config.weights_folder, config.message_timeout_s
                    ),
                ),
                (prediction_pb2_grpc.add_PredictionServiceServicer_to_server, prediction),
                (
                    model_pb2_grpc.add_ModelServiceServicer_to_server,
                    ModelServicer(models, exporter, follower),
                ),
                (
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
            watcher.close()
            await asyncio.gather(rpc.drain(config.drain_s), supervisor.close(config.drain_s))

        # After the drain: until then a job may get a warm trainer.
        stack.push_async_callback(self._close_trainers, export)
        stack.push_async_callback(drain)
        stack.push_async_callback(follower.close)
        await follower.start()
        await supervisor.start()
        housekeeping = stores.housekeeping(config, supervisor.sweep)
        stack.push_async_callback(asyncio.to_thread, housekeeping.close)
        await rpc.serve()
        await self._prepare_trainers(export)
        log.info(
            "serving",
            extra={
                "version": metadata.version("graftml-server"),
                "host": config.host,
                "port": self.port,
                "metrics_port": self.metrics_port,
            },
        )

    async def _prepare_trainers(self, export: DefaultExport) -> None:
        """Has ready what the first job would wait for, in the background."""
        config = self._config
        if isinstance(self._launcher, WarmLauncher):
            await self._launcher.open()
            if config.warm_trainers and config.cpu_jobs + config.gpu_jobs:
                export.start()

    async def _close_trainers(self, export: DefaultExport) -> None:
        await export.close()
        if isinstance(self._launcher, WarmLauncher):
            await self._launcher.close()


def _watch_stores(data_dir: Path, metrics: Metrics, jobs: JobStore, models: ModelStore) -> None:
    metrics.data_free_bytes.set_function(lambda: float(shutil.disk_usage(data_dir).free))
    metrics.data_disk_bytes.set_function(lambda: float(shutil.disk_usage(data_dir).total))
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


def _count_threads(config: Config, stack: AsyncExitStack, metrics: Metrics) -> int:
    cpus = describe()
    for kind, count in cpus.cores.items():
        metrics.cpu_cores.labels(kind).set(count)
    threads = config.threads or cpus.available_cores
    log.info("processor", extra={**asdict(cpus), "threads": threads})
    # Each worker applies heads on its own core: NumPy's threads would spin for each other there,
    # which costs more than ten times what a head of a thousand classes does.
    stack.enter_context(threadpool_limits(1, "blas"))
    return threads


def _largest_run(config: Config, *, is_gpu: bool) -> int:
    return config.max_batch or (LARGEST_RUN if is_gpu else _LARGEST_CPU_RUN)


def _choose_runtime(
    config: Config,
    threads: int,
    metrics: Metrics,
    environment: Mapping[str, str],
    stack: AsyncExitStack,
) -> Runtime:
    provider = choose_provider(config.provider)
    metrics.provider_info.labels(provider.name, config.precision, provider.why).set(1)
    log.info(
        "provider chosen",
        extra={"provider": provider.name, "precision": config.precision, "why": provider.why},
    )
    max_batch = _largest_run(config, is_gpu=provider.is_gpu)
    if not provider.others:
        gpu = GpuLimits(max_batch, config.gpu_mem_limit_mb * MIB)
        return OnnxRuntime(provider, threads, max_batch=max_batch, gpu=gpu)
    table = ProviderTable(config.provider_table, machine_key())

    def ask(digest: str, read: Read) -> None:
        measurer.measure(digest, read)

    runtime = OnnxRuntime(
        provider, threads, max_batch=max_batch, measured=table.get, on_unmeasured=ask
    )
    own = child.environment_of(environment)
    measurer = Measurer(provider, threads, max_batch, table, metrics, own, runtime.adopt)
    stack.callback(measurer.close)
    return runtime
