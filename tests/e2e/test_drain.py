"""What callers, jobs and trainers see of a real process that is told to end."""

import json
import queue
import shutil
import signal
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import graftml
import grpc
import psutil
import pytest
from google.rpc import status_pb2
from graftml_stubs.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    fine_tuning_pb2,
    fine_tuning_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.conftest import GUARD_S, Connect, ServiceProcess, StartService
from tests.e2e.faults.house import wait_until
from tests.rpc.conftest import Refusal, of_status

pytestmark = pytest.mark.e2e

NEVER_S = 10 * GUARD_S
"""A drain that would be waited for to its end: one that ends before did so by itself."""
SMALL = "timm/test_resnet"
"""A network of few weights: what is drained is the same, and an epoch takes a moment."""
LONG = graftml.ModelBased(
    recipe="classic", epochs=10_000, batch_size=8, train_from_stage="layer4", precision="fp32"
)


@pytest.fixture
def few(digits: Path, tmp_path: Path) -> Path:
    """Two digits, eight of each: an epoch takes a moment."""
    for label in "01":
        folder = tmp_path / "few" / label
        folder.mkdir(parents=True)
        for path in sorted((digits / label).iterdir())[:8]:
            shutil.copy(path, folder)
    return tmp_path / "few"


def trainers_of(service: ServiceProcess) -> list[psutil.Process]:
    children = psutil.Process(service.process.pid).children(recursive=True)
    return [child for child in children if "trainer" in " ".join(child.cmdline())]


def refused(error: grpc.RpcError) -> Refusal:
    call: Any = error
    found = dict(call.trailing_metadata())["grpc-status-details-bin"]
    return of_status(status_pb2.Status.FromString(found))


def test_on_sigterm_everybody_is_told_and_its_job_goes_on_from_its_checkpoint_at_the_next_start(
    start_service: StartService, connect: Connect, few: Path
) -> None:
    flags = (f"--drain-s={NEVER_S}", "--warm-trainers=0")
    first = start_service(*flags)
    client = connect(first)
    # It trains for ever.
    job = client.fine_tune(few, name="few", backbone=SMALL, weights="random", method=LONG)
    for event in job.events(timeout_s=GUARD_S):
        if isinstance(event.payload, graftml.EpochMetrics) and event.payload.epoch == 2:
            break
    trainers = trainers_of(first)
    assert trainers

    more = queue.Queue[bool]()
    rest = image_messages(few)

    def upload() -> Iterator[dataset_pb2.UploadDatasetRequest]:
        yield dataset_pb2.UploadDatasetRequest(header=dataset_pb2.UploadDatasetHeader())
        yield rest.pop()
        more.get(timeout=GUARD_S)
        count = len(rest) + 1
        yield from rest
        yield dataset_pb2.UploadDatasetRequest(
            end=dataset_pb2.UploadDatasetEnd(message_count=count)
        )

    with grpc.insecure_channel(first.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        watcher = fine_tuning_pb2_grpc.FineTuningServiceStub(channel).WatchJob(
            fine_tuning_pb2.WatchJobRequest(job_id=job.job_id)
        )
        next(watcher)
        accepted = dataset_pb2_grpc.DatasetServiceStub(channel).UploadDataset.future(upload())
        wait_until_taken(first, "UploadDataset")

        first.process.send_signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with grpc.insecure_channel(first.address) as fresh:
            for old_or_new in (channel, fresh):
                with pytest.raises(grpc.RpcError) as caught:
                    model_pb2_grpc.ModelServiceStub(old_or_new).ListModels(
                        model_pb2.ListModelsRequest(), timeout=GUARD_S
                    )
                told = refused(caught.value)
                assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
                assert told.retry_s > 0
        with pytest.raises(grpc.RpcError) as caught:
            for _ in watcher:
                pass
        told = refused(caught.value)
        assert (told.code, told.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert told.retry_s > 0
        more.put(True)
        stored = accepted.result(timeout=GUARD_S).dataset
    assert first.process.wait(GUARD_S) == 0
    assert not any(trainer.is_running() for trainer in trainers)
    first.end()
    begun, ended = (json.loads(first.seen[place]) for place in (0, -1))
    assert (begun["message"], begun["pid"]) == ("starting", first.process.pid)
    assert begun["version"] == metadata.version("graftml-server")
    assert (ended["message"], ended["why"]) == ("stopped", "SIGTERM")
    assert ended["drain_s"] > 0

    second = start_service(*flags)
    assert connect(second).get_dataset(stored.dataset_id).image_count == stored.image_count
    again = connect(second).job(job.job_id)
    for event in again.events(timeout_s=GUARD_S):
        if isinstance(event.payload, graftml.Note) and "training goes on" in event.payload.text:
            break
    assert "from a checkpoint" in event.payload.text
    again.cancel()
    with pytest.raises(graftml.JobCancelled):
        again.wait(timeout_s=GUARD_S)


def test_a_second_sigterm_ends_it_at_once_and_its_trainers_too(
    start_service: StartService, connect: Connect, few: Path, tmp_path: Path
) -> None:
    hangs = tmp_path / "hangs"
    service = start_service(
        f"--drain-s={NEVER_S}", "--warm-trainers=0", f"--failpoints=hang@trainer.started!{hangs}"
    )
    connect(service).fine_tune(few, name="few")
    wait_until(hangs.exists)
    trainers = trainers_of(service)
    assert trainers
    held = threading.Event()

    def upload() -> Iterator[dataset_pb2.UploadDatasetRequest]:
        yield dataset_pb2.UploadDatasetRequest(header=dataset_pb2.UploadDatasetHeader())
        held.wait(GUARD_S)

    with grpc.insecure_channel(service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(health)
        accepted = dataset_pb2_grpc.DatasetServiceStub(channel).UploadDataset.future(upload())
        wait_until_taken(service, "UploadDataset")
        service.process.send_signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(GUARD_S) == 1
        with pytest.raises(grpc.RpcError):
            accepted.result(timeout=GUARD_S)
        held.set()
    _, alive = psutil.wait_procs(trainers, timeout=GUARD_S)
    assert not alive


def image_messages(folder: Path) -> list[dataset_pb2.UploadDatasetRequest]:
    return [
        dataset_pb2.UploadDatasetRequest(
            image=dataset_pb2.LabelledImage(label=path.parent.name, content=path.read_bytes())
        )
        for path in sorted(folder.rglob("*.png"))
    ]


def wait_until_taken(service: ServiceProcess, method: str) -> None:
    """Until the service's metrics say that a call of the method is under way."""

    def is_taken() -> bool:
        lines = service.metrics().splitlines()
        active = [line for line in lines if line.startswith("graft_rpc_active{")]
        return any(method in line and line.endswith(" 1.0") for line in active)

    wait_until(is_taken)
