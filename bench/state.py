"""State: events and claims a second, and what many jobs and versions cost a start and its lists.

    python -m bench.state [FOLDER] [--jobs 10000] [--events 20] [--versions 1000] [--queued 4000]
        [--rounds 5] [--seconds 2] [--claims 300]

Makes a data folder within FOLDER, which should lie on the disk that is to be measured, and
deletes it in the end. Starts and calls are measured with an empty folder in turn; events and
claims within this process, by 1 thread and by 8, on the folder with all these jobs. One event or
claim is one flushed transaction: events a second follow the disk, whose own figure stands beside
them, and milliseconds of CPU do not.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

import grpc
from graftml_stubs.v1 import fine_tuning_pb2, fine_tuning_pb2_grpc, model_pb2, model_pb2_grpc

from bench import published, start
from bench.running import at_once, service, spread
from service.contract import EpochEnded, FeatureBased, Progressed
from service.domain import DEFAULT_TENANT, JobKind
from service.errors import Reason
from service.jobs.claims import Claims
from service.jobs.records import JobRecord, Payload
from service.jobs.replicas import Replicas
from service.jobs.request import JobRequest
from service.jobs.store import JobStore
from service.ops.cpus import describe
from service.storage.database import Database

TENANTS = 20
THREADS = (1, 8)
FLAGS = ("--warm-trainers=0",)
CALL_TIMEOUT_S = 60.0
CALLS = 10
"""Of a kind within one start; their median is one value."""
LEASE_S = 86_400.0
"""Nothing renews the lease of this process."""
PROGRESS: Payload = Progressed("training", 0.4, "epoch 4 of 10", 40, 100, 12.5, 8.25)
EPOCH: Payload = EpochEnded(
    epoch=4, epochs=10, train_loss=0.4321, train_accuracy=0.8765, validation_loss=0.5432,
    validation_accuracy=0.8123, images_per_second=812.5, eta_s=12.5, learning_rate=0.0123,
)  # fmt: skip

Table = dict[str, list[float]]
"""Values of each figure, one a round."""


class Stores:
    """What a supervisor works with."""

    def __init__(self, database: Database) -> None:
        self.jobs = JobStore(database, max_queued=10**6)
        self.claims = Claims(self.jobs)
        self._replica_id = Replicas(self.jobs, lease_s=LEASE_S).register()

    def queue(self, count: int, tenants: int = TENANTS) -> None:
        """Queues jobs of so many tenants, in turn."""
        for number in range(count):
            tenant = f"tenant-{number % tenants}" if tenants > 1 else DEFAULT_TENANT
            model = f"model-{number % 97}"
            message = fine_tuning_pb2.FineTuneRequest(model=model, labels={"run": "nightly"})
            message.server_path.path = "/data/birds"
            request = JobRequest(
                tenant=tenant,
                model=model,
                server_path="/data/birds",
                method=FeatureBased(),
                labels={"run": "nightly"},
            )
            self.jobs.create(request, "", message.SerializeToString(deterministic=True))

    def claim(self) -> JobRecord:
        """Claims a job, of which there must be one."""
        job = self.claims.claim(self._replica_id, JobKind.FINE_TUNE, ("cpu", "cuda", "auto"))
        assert job is not None
        return job

    def fail(self, job: JobRecord) -> None:
        """Ends a job."""
        self.claims.fail(job, Reason.TRAINING_FAILED, "the loss is not a number after epoch 7")


@contextmanager
def opened(folder: Path) -> Iterator[Stores]:
    """Yields the stores of a folder that no service uses."""
    database = Database(folder)
    try:
        yield Stores(database)
    finally:
        database.close()


def fill(folder: Path, jobs: int, events: int, versions: int) -> None:
    """Makes versions, one of each model, and jobs that have ended, of the default tenant."""
    backbone, head = published.near_empty_backbone(), published.near_empty_head(0)
    manifest = published.near_empty_manifest(backbone, head)
    heads = ((f"model-{n:04}", published.near_empty_head(n)) for n in range(versions))
    published.publish(folder, heads, manifest, backbone)
    with opened(folder) as stores:
        # The folder is made, not measured: a power cut may take it.
        stores.jobs.database._writer.execute("PRAGMA synchronous = OFF")
        for _ in range(jobs):
            stores.queue(1, tenants=1)
            job = stores.claim()
            # Beside QUEUED, RUNNING and FAILED.
            for _, payload in zip(range(events - 3), cycle((PROGRESS, EPOCH))):
                stores.claims.append(job, payload)
            stores.fail(job)


def timed(works: list[Callable[[], int]]) -> tuple[float, float]:
    """Runs each work in a thread; returns steps a second, and ms of CPU a step."""
    steps, passed_s, used_s = at_once(works)
    return sum(steps) / passed_s, 1000 * used_s / sum(steps)


def measure_events(stores: Stores, threads: int, seconds: float) -> tuple[float, float]:
    """Has each thread append events to a running job of its own."""
    stores.queue(threads)
    jobs = [stores.claim() for _ in range(threads)]
    until_s = time.perf_counter() + seconds

    def work(job: JobRecord) -> int:
        count = 0
        while time.perf_counter() < until_s:
            stores.claims.append(job, (PROGRESS, EPOCH)[count % 2])
            count += 1
        return count

    found = timed([partial(work, job) for job in jobs])
    for job in jobs:
        stores.fail(job)
    return found


def measure_claims(stores: Stores, threads: int, claims: int) -> tuple[float, float]:
    """Has threads claim jobs, and puts all of these back into the queue."""
    claimed: list[JobRecord] = []

    def work() -> int:
        share = claims // threads
        claimed.extend(stores.claim() for _ in range(share))
        return share

    found = timed([work] * threads)
    assert len({job.job_id for job in claimed}) == len(claimed), "a job was claimed twice"
    for job in claimed:
        stores.claims.requeue(job, "again")
    return found


def flushes_per_s(folder: Path, for_s: float = 0.5) -> float:
    """Measures the disk: appends of 8 KiB, each followed by fdatasync, a second."""
    count, began = 0, time.perf_counter()
    file = folder / "flush.probe"
    with file.open("wb", buffering=0) as to:
        while (passed := time.perf_counter() - began) < for_s:
            to.write(b"x" * 8192)
            os.fdatasync(to.fileno())
            count += 1
    file.unlink()
    return count / passed


def median_ms(call: Callable[[], object]) -> float:
    """Returns the median of some calls after a first one."""
    took = []
    for _ in range(CALLS + 1):
        began = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took[1:])


def measure_start(table: Table, name: str, folder: Path) -> None:
    """Notes what a start on the folder takes, and the process that started."""
    for figure, value in start.measure(folder, *FLAGS).items():
        table[f"{name}: {figure}"].append(value)


def measure_calls(table: Table, folder: Path, jobs: int, versions: int) -> None:
    """Notes milliseconds of lists, of one server; the client's parsing is included."""
    with service(folder, *FLAGS) as running, grpc.insecure_channel(running.address) as channel:
        tuning = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        models = model_pb2_grpc.ModelServiceStub(channel)

        def list_jobs(
            size: int, states: tuple[fine_tuning_pb2.JobState, ...] = ()
        ) -> list[fine_tuning_pb2.Job]:
            request = fine_tuning_pb2.ListJobsRequest(page_size=size, states=states)
            return list(tuning.ListJobs(request, timeout=CALL_TIMEOUT_S).jobs)

        def list_models() -> list[model_pb2.Model]:
            request = model_pb2.ListModelsRequest(page_size=1000)
            return list(models.ListModels(request, timeout=CALL_TIMEOUT_S).models)

        assert len(list_jobs(1000)) == min(1000, jobs)
        assert len(list_models()) == min(1000, versions)
        get = fine_tuning_pb2.GetJobRequest(job_id=list_jobs(1)[0].job_id)
        calls: dict[str, Callable[[], object]] = {
            "ListJobs, 50 a page": lambda: list_jobs(50),
            "ListJobs, 1000 a page": lambda: list_jobs(1000),
            "ListJobs, RUNNING (none)": lambda: list_jobs(50, (fine_tuning_pb2.JOB_STATE_RUNNING,)),
            "GetJob": lambda: tuning.GetJob(get, timeout=CALL_TIMEOUT_S),
            "ListModels, 1000 a page": list_models,
        }
        for name, call in calls.items():
            table[f"{name}, ms"].append(median_ms(call))


def main() -> None:
    """Prints median and range of every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=20, help="of each job")
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--queued", type=int, default=4000, help="jobs that claims choose among")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--claims", type=int, default=300)
    arguments = parser.parse_args()
    table: Table = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        full, empty = Path(temporary) / "full", Path(temporary) / "empty"
        fill(full, arguments.jobs, arguments.events, arguments.versions)
        load = os.getloadavg()[0]
        for _ in range(arguments.rounds):
            measure_start(table, "empty", empty)
            measure_start(table, "full", full)
            measure_calls(table, full, arguments.jobs, arguments.versions)
        with opened(full) as stores:
            for threads in THREADS * arguments.rounds:
                rate, cpu_ms = measure_events(stores, threads, arguments.seconds)
                table[f"events a second, {threads} threads"].append(rate)
                table[f"events, {threads} threads: CPU ms each"].append(cpu_ms)
                table["flushes of the disk a second"].append(flushes_per_s(full))
            stores.queue(arguments.queued)
            for threads in THREADS * arguments.rounds:
                rate, cpu_ms = measure_claims(stores, threads, arguments.claims)
                table[f"claims a second, {threads} threads"].append(rate)
                table[f"claims, {threads} threads: CPU ms each"].append(cpu_ms)
        size_mib = sum(file.stat().st_size for file in full.glob("graft.sqlite3*")) / 2**20
    print(
        f"{describe()}, load {load:.1f}"
        f" before and {os.getloadavg()[0]:.1f} after; {arguments.jobs} ended jobs with "
        f"{arguments.events} events each, {arguments.versions} versions, database {size_mib:.0f} "
        f"MiB; claims from {arguments.queued} queued jobs of {TENANTS} tenants"
    )
    for name, values in table.items():
        print(f"{name:36} {spread(values, '.2f')}, n = {len(values)}")


if __name__ == "__main__":
    main()
