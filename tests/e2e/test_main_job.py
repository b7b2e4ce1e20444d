"""The main job, transfer and rankings through real processes: one server for all of them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import graftml
import grpc
import numpy as np
import onnxruntime
import pytest
from graftml_stubs.v1 import fine_tuning_pb2, fine_tuning_pb2_grpc
from PIL import Image

from service.engine import providers
from service.ops.cpus import available_cores
from tests.e2e.conftest import GUARD_S, Connect, ServiceProcess, StartService, register_small

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def events() -> list[graftml.JobEvent]:
    """What was told of the job that made the model."""
    return []


@pytest.fixture(scope="module")
def version(
    shared: ServiceProcess, client: graftml.Client, digits: Path, events: list[graftml.JobEvent]
) -> graftml.Version:
    """A model, `digits`."""
    # A job would wait for it, but only as long as a machine that is not busy needs.
    shared.wait_for("the default backbone is exported")
    job = client.fine_tune(digits, name="digits", labels={"team": "post"})
    return job.wait(timeout_s=GUARD_S, on_event=events.append)


def counted(service: ServiceProcess, series: str) -> float:
    """What a counter says, 0 before it says anything."""
    lines = service.metrics().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(series))


def test_fine_tune_predict_report_export_and_metrics(
    shared: ServiceProcess,
    client: graftml.Client,
    version: graftml.Version,
    events: list[graftml.JobEvent],
    digits: Path,
    tmp_path: Path,
) -> None:
    figure = version.headline
    assert figure is not None
    assert (figure.measured_on, figure.image_count) == ("cross_validation", 80)
    assert figure.accuracy_low <= figure.accuracy <= figure.accuracy_high
    assert figure.accuracy >= 0.85
    assert version.calibrated, version.calibration_note
    assert version.parity.max_difference < 1e-3
    assert version.labels == {"team": "post"}
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    # The backbone was exported after the start, not by the job.
    details = [e.payload.detail for e in events if isinstance(e.payload, graftml.Progress)]
    assert not any("exporting" in each or "quantising" in each for each in details)
    assert version.serving_precision == ("int8" if providers.has_vnni() else "fp32")

    paths = sorted(digits.rglob("*.png"))[::5]
    asked = 'graft_images_total{model="digits",outcome="ok"}'
    before = counted(shared, asked)
    answers = client.predict(paths, model="digits", top_k=4)
    assert all(answer.calibrated for answer in answers)
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

    assert counted(shared, asked) == before + len(paths)
    measured = shared.metrics()
    assert 'graft_provider_info{precision="auto",provider="' in measured
    assert f'graft_cpu_cores{{kind="available"}} {available_cores():.1f}' in measured

    # The serving process has no torch in it, even after all this.
    maps = Path(f"/proc/{shared.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps


def test_int8_is_asked_for_or_a_setting_and_its_accuracy_is_measured_as_it_serves(
    start_service: StartService, connect: Connect, digits: Path, tmp_path: Path
) -> None:
    client = connect(start_service("--precision=int8", "--warm-trainers=0"))
    backbone = register_small(client, tmp_path)
    versions = []
    for name, labels, asked in (("one", "01", "auto"), ("two", "03", "int8"), ("3", "12", "fp32")):
        few = [(n, path) for n in labels for path in sorted((digits / n).iterdir())[:12]]
        job = client.fine_tune(
            few, name=name, backbone=backbone, method="feature_based", serving_precision=asked
        )
        versions.append(job.wait(timeout_s=GUARD_S))
    floating = versions.pop()
    assert floating.serving_precision == "fp32"
    assert floating.backbone_digest != versions[0].backbone_digest
    for version in versions:
        assert version.manifest["serving_precision"] == "int8"
        assert version.serving_precision == "int8"
        assert version.manifest["quantisation"]["changed_answers"] <= 0.05
        assert version.headline is not None
        assert version.headline.accuracy >= 0.85
    # Rounded once.
    assert versions[0].backbone_digest == versions[1].backbone_digest
    few = [(n, path) for n in "03" for path in sorted((digits / n).iterdir())[:12]]
    answers = client.predict([path for _, path in few], model="two")
    right = [a.label == label for a, (label, _) in zip(answers, few, strict=True)]
    assert np.mean(right) >= 0.9


def test_streams_abandoned_at_any_moment_leave_the_service_standing(
    shared: ServiceProcess, client: graftml.Client, version: graftml.Version
) -> None:
    with grpc.insecure_channel(shared.address) as channel:
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        request = fine_tuning_pb2.WatchJobRequest(job_id=version.job_id)
        for _ in range(100):
            calls = [stub.WatchJob(request, timeout=GUARD_S) for _ in range(4)]
            for call in calls:
                next(call)
                call.cancel()
    assert client.is_serving(timeout_s=GUARD_S)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ([], {"GRAFT_MAX_BATCHES": "3"}, "did you mean GRAFT_MAX_BATCH?"),
        (["--allowed-dirs", "/no/such/folder"], {}, "/no/such/folder"),
        (["--access-file", "/no/such/file"], {}, "/no/such/file"),
        (
            ["--tls-cert-file", "/no/such/file", "--tls-key-file", "/no/such/file"],
            {},
            "--tls-cert-file /no/such/file cannot be read",
        ),
    ],
)
def test_a_bad_setting_is_named_and_ends_the_start(
    arguments: list[str], environment: dict[str, str], says: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "run", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        env={**os.environ, **environment},
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_cuda_provider_that_is_not_there_is_no_silent_step_down(tmp_path: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has an NVIDIA GPU")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "service",
            "run",
            "--provider=cuda",
            f"--data-dir={tmp_path}",
            "--port=0",
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )
    assert done.returncode == 1
    assert "no NVIDIA GPU was found" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert '"message": "stopped", "why": "cannot serve: ' in last
    assert "no NVIDIA GPU was found" in last


def test_images_that_a_client_sends_in_every_form_get_one_answer(
    client: graftml.Client, version: graftml.Version, digits: Path
) -> None:
    path = next(digits.rglob("*.png"))
    image = Image.open(path).convert("RGB")
    array = np.asarray(image)
    as_float = (array / 255).astype(np.float32)
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    forms = [path, str(path), path.read_bytes(), buffer.getvalue(), image, array, as_float]
    answers = client.predict(forms, model="digits")
    assert len({(a.label, round(a.probability, 5)) for a in answers}) == 1


@pytest.fixture(scope="module")
def inverted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scans, light on dark: another domain, in a folder per class."""
    root = tmp_path_factory.mktemp("inverted")
    for path in digits.rglob("*.png"):
        target = root / path.relative_to(digits)
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(target)
    return root


def test_a_model_is_adapted_to_images_without_labels(
    client: graftml.Client, digits: Path, inverted: Path
) -> None:
    method = graftml.DomainAdaptation(target=inverted, evaluate_on_target=True)
    job = client.fine_tune(digits, name="adapted", method=method)
    version = job.wait(timeout_s=GUARD_S)
    assert version.method == "domain_adaptation"
    assert version.headline is not None
    assert (version.headline.measured_on, version.headline.image_count) == ("target", 80)
    adaptation = client.get_report("adapted")["adaptation"]
    assert adaptation["target_images"] == 80
    # None where the source's head was kept; else what adapting won over it, on the target.
    comparison = adaptation["comparison"]
    assert comparison is None or comparison["difference"] >= -0.02
    answers = client.predict(sorted(inverted.rglob("*.png"))[::8], model="adapted")
    assert all(answer.out_of_distribution_score is not None for answer in answers)


def test_a_version_that_fails_its_gate_is_kept_and_a_good_one_is_rolled_back(
    shared: ServiceProcess, client: graftml.Client, digits: Path
) -> None:
    gate = graftml.Gate(min_accuracy=0.5, alias="prod")
    first = client.fine_tune(digits, name="gated", gate=gate).wait(timeout_s=GUARD_S)
    assert (first.version, first.is_candidate) == (1, False)
    assert client.get_model("gated").aliases == {"latest": 1, "prod": 1}

    asked = graftml.Gate(
        min_accuracy=1.0, max_latency_ms=0.001, not_worse_than="prod", alias="prod"
    )
    second = client.fine_tune(digits, name="gated", gate=asked).wait(timeout_s=GUARD_S)
    assert second.is_candidate
    # The same images and the same method: identical answers pass, however few they are.
    assert {c.name: c.verdict for c in second.gate_checks}["not_worse"] == "passed", [
        c.detail for c in second.gate_checks
    ]
    assert {c.name: c.verdict for c in second.gate_checks}["latency"] == "failed"
    assert client.get_model("gated").aliases == {"latest": 1, "prod": 1}
    [answer] = client.predict(next(digits.rglob("*.png")), model="gated", version=2)
    assert answer.version == 2

    client.promote_version("gated", 2)
    assert client.get_model("gated").aliases["latest"] == 2
    assert client.rollback_alias("gated").to_version == 1
    assert client.get_model("gated").aliases == {"latest": 1, "prod": 1}

    metrics = shared.metrics()
    assert 'graft_outlier_score_bucket{le="1.0",model="gated",origin="validation"}' in metrics
    assert 'graft_outlier_score_count{model="gated",origin="live"} 1.0' in metrics


def test_a_model_grows_by_a_class_and_computes_the_old_images_no_more(
    client: graftml.Client, digits: Path
) -> None:
    few = [(p.parent.name, p) for p in sorted(digits.rglob("*.png")) if p.parent.name != "3"]
    client.fine_tune(few, name="grown").wait(timeout_s=GUARD_S)
    more = [("3", p) for p in sorted((digits / "3").iterdir())]
    more += [("0", p) for p in sorted((digits / "0").iterdir())[:2]]
    version = client.fine_tune(more, name="grown", base=1).wait(timeout_s=GUARD_S)
    assert version.classes == ("0", "1", "2", "3")
    growth = client.get_report("grown")["growth"]
    assert growth["base_version"] == 1
    assert growth["added_classes"] == ["3"]
    assert growth["base_images"] + growth["added_images"] == 80


def test_backbones_are_ranked_on_a_dataset(
    client: graftml.Client, version: graftml.Version, digits: Path, tmp_path: Path
) -> None:
    known = {job.job_id for job in client.list_jobs()}
    small = register_small(client, tmp_path)
    ranking = client.rank_backbones(
        digits, backbones=[small, "efficientnet_lite0"], time_budget_s=GUARD_S
    )
    for ranked in ranking.backbones:
        assert ranked.log_loss is not None and ranked.log_me is not None
        assert ranked.image_ms is not None and ranked.image_ms > 0
    found = {each.backbone: (each.weights, each.feature_dim) for each in ranking.backbones}
    assert found.keys() == {small, "efficientnet_lite0"}
    assert found["efficientnet_lite0"] == (version.weights, 1280)
    assert ranking.image_count == 80
    assert ranking.explanation.startswith(f"{ranking.backbones[0].backbone} is first: on 80 images")
    # Nothing was trained and nothing published.
    assert {job.job_id for job in client.list_jobs() if job.kind == "fine_tune"} == known

    with pytest.raises(graftml.InvalidArgument, match="has no weights 'no-such'"):
        client.rank_backbones(digits, backbones="efficientnet_lite0:no-such")

    empty = digits.parent / "one class"
    (empty / "only").mkdir(parents=True, exist_ok=True)
    (empty / "only" / "a.png").write_bytes(next((digits / "0").iterdir()).read_bytes())
    with pytest.raises(graftml.InvalidArgument) as caught:
        client.rank_backbones(empty, time_budget_s=GUARD_S)
    assert caught.value.reason == graftml.Reason.DATASET_UNUSABLE
