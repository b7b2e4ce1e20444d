"""The main job through real processes, and what survives when they die."""

import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import graft
import grpc
import numpy as np
import onnxruntime
import psutil
import pytest
from graft.v1 import fine_tuning_pb2, fine_tuning_pb2_grpc
from PIL import Image

from tests.e2e.conftest import Connect, ServiceProcess, StartService

pytestmark = pytest.mark.e2e


def trainers_of(service: ServiceProcess) -> list[psutil.Process]:
    children = psutil.Process(service.process.pid).children(recursive=True)
    return [child for child in children if "trainer" in " ".join(child.cmdline())]


def test_fine_tune_predict_report_export_and_metrics(
    start_service: StartService, connect: Connect, digits: Path, tmp_path: Path
) -> None:
    service = start_service()
    client = connect(service)
    events: list[graft.JobEvent] = []
    job = client.fine_tune(digits, name="digits", labels={"team": "post"})
    version = job.wait(timeout_s=100, on_event=events.append)

    assert version.validation_accuracy >= 0.85
    assert version.parity.max_difference < 1e-3
    assert version.labels == {"team": "post"}
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))

    paths = sorted(digits.rglob("*.png"))[::5]
    answers = client.predict(paths, model="digits", top_k=4)
    right = [a.label == p.parent.name for a, p in zip(answers, paths, strict=True)]
    assert np.mean(right) >= 0.9

    assert b"<!doctype html>" in client.get_report_html("digits").encode()

    # Bare ONNX Runtime and PIL, as a stranger would use the exported file, give the answer.
    file = tmp_path / "digits.onnx"
    client.export_model("digits", file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    for path, answer in zip(paths, answers, strict=True):
        image = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
        pixels = np.asarray(image.crop((16, 16, 240, 240)))[None]
        (probabilities,) = session.run(None, {"images": pixels})
        served = {s.label: s.probability for s in answer.scores}
        # Two resizes here against one in the service: close, not equal.
        assert labels[probabilities[0].argmax()] == answer.label or answer.probability < 0.6
        assert abs(served[answer.label] - probabilities[0][labels.index(answer.label)]) < 0.15

    with urllib.request.urlopen(service.metrics_url, timeout=5) as response:
        metrics = response.read().decode()
    assert f'graft_images_total{{model="digits",outcome="ok"}} {len(paths)}.0' in metrics
    assert 'graft_provider_info{precision="fast",provider="' in metrics

    # The serving process has no torch in it, even after all this.
    maps = Path(f"/proc/{service.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps
    assert service.end() == 0


def test_killed_in_the_middle_it_serves_again_and_runs_the_job_again(
    start_service: StartService, connect: Connect, digits: Path
) -> None:
    # No trainer but the job's, so that it is known which one dies.
    first = start_service("--warm-trainers=0")
    client = connect(first)
    options = {"backbone": "resnet18", "weights": "random"}
    client.fine_tune(digits, name="done", **options).wait(timeout_s=100)
    image = next(digits.rglob("*.png"))
    [before] = client.predict(image, model="done")

    job = client.fine_tune(digits, name="again", **options)
    for event in job.events(timeout_s=60):
        if isinstance(event.payload, graft.DataSummary):
            break
    (trainer,) = trainers_of(first)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(10)
    # The trainer sees its parent gone and ends too.
    trainer.wait(20)

    second = start_service()
    client = connect(second)
    [after] = client.predict(image, model="done")
    assert (after.label, after.probability) == (before.label, before.probability)
    version = client.job(job.job_id).wait(timeout_s=100)
    assert version.model == "again"
    assert client.get_job(job.job_id).attempts == 2
    assert second.end() == 0


def test_int8_is_a_setting_whose_accuracy_is_measured_as_it_serves(
    start_service: StartService, connect: Connect, digits: Path
) -> None:
    client = connect(start_service("--precision=int8"))
    versions = [client.fine_tune(digits, name=name).wait(timeout_s=100) for name in ("one", "two")]
    for version in versions:
        assert version.manifest["serving_precision"] == "int8"
        assert version.manifest["float_validation_accuracy"] >= 0.85
        assert version.validation_accuracy >= 0.85
    assert versions[0].backbone_digest == versions[1].backbone_digest
    paths = sorted(digits.rglob("*.png"))[::5]
    answers = client.predict(paths, model="two")
    right = [a.label == p.parent.name for a, p in zip(answers, paths, strict=True)]
    assert np.mean(right) >= 0.9


def test_a_killed_trainer_leaves_the_service_standing_and_the_job_is_tried_again(
    start_service: StartService, connect: Connect, digits: Path
) -> None:
    service = start_service()
    client = connect(service)
    job = client.fine_tune(digits, name="digits", backbone="resnet18", weights="random")
    for event in job.events(timeout_s=60):
        if isinstance(event.payload, graft.DataSummary):
            break
    # The one that waits for a next job, too.
    for trainer in trainers_of(service):
        trainer.kill()
    assert client.is_serving()
    job.wait(timeout_s=100)
    assert job.refresh().attempts == 2


def test_streams_abandoned_at_any_moment_leave_the_service_standing(
    start_service: StartService, connect: Connect, digits: Path
) -> None:
    service = start_service()
    client = connect(service)
    job = client.fine_tune(digits, name="digits")
    job.wait(timeout_s=100)
    with grpc.insecure_channel(service.address) as channel:
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        request = fine_tuning_pb2.WatchJobRequest(job_id=job.job_id)
        for _ in range(500):
            calls = [stub.WatchJob(request, timeout=30) for _ in range(4)]
            for call in calls:
                next(call)
                call.cancel()
    assert client.is_serving()


def test_sigterm_stops_the_trainer_and_queues_its_job_again(
    start_service: StartService, connect: Connect, digits: Path
) -> None:
    first = start_service()
    client = connect(first)
    job = client.fine_tune(
        digits,
        name="digits",
        backbone="resnet18",
        weights="random",
        method=graft.ModelBased(recipe="classic", epochs=10_000),
    )
    for event in job.events(timeout_s=60):
        if isinstance(event.payload, graft.DataSummary):
            break
    trainers = trainers_of(first)
    assert trainers
    assert first.end() == 0
    assert not any(trainer.is_running() for trainer in trainers)

    second = start_service()
    again = connect(second).job(job.job_id)
    assert again.refresh().state in ("QUEUED", "RUNNING")
    again.cancel()
    with pytest.raises(graft.JobCancelled):
        again.wait(timeout_s=30)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--port", "seven"], {}, "--port is 'seven'; it must be a whole number"),
        (["--max-batch", "0"], {}, "--max-batch is 0; it must be"),
        ([], {"GRAFT_MAX_BATCHES": "3"}, "did you mean GRAFT_MAX_BATCH?"),
        (["--allowed-dirs", "/no/such/folder"], {}, "/no/such/folder"),
        (["--provider", "tpu"], {}, "auto, tensorrt, cuda, openvino, cpu"),
    ],
)
def test_a_bad_setting_is_named_and_ends_the_start(
    arguments: list[str], environment: dict[str, str], says: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **environment},
    )
    assert done.returncode == 2
    assert says in done.stderr


def test_a_cuda_provider_that_is_not_there_is_no_silent_step_down(tmp_path: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has an NVIDIA GPU")
    done = subprocess.run(
        [sys.executable, "-m", "service", "--provider=cuda", f"--data-dir={tmp_path}", "--port=0"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "no NVIDIA GPU was found" in done.stderr


def test_images_that_a_client_sends_in_every_form_get_one_answer(
    start_service: StartService, connect: Connect, digits: Path
) -> None:
    service = start_service()
    client = connect(service)
    client.fine_tune(digits, name="d", backbone="resnet18", weights="random").wait(timeout_s=100)
    path = next(digits.rglob("*.png"))
    image = Image.open(path).convert("RGB")
    array = np.asarray(image)
    as_float = (array / 255).astype(np.float32)
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    forms = [path, str(path), path.read_bytes(), buffer.getvalue(), image, array, as_float]
    answers = client.predict(forms, model="d")
    assert len({(a.label, round(a.probability, 5)) for a in answers}) == 1
