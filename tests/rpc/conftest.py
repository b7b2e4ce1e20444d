"""A whole service in this process: real stores, sockets and stubs; fakes at its two doors."""

import hashlib
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from graftml import _async_io
from graftml_stubs.v1 import (
    backbone_pb2_grpc,
    dataset_pb2,
    dataset_pb2_grpc,
    fine_tuning_pb2,
    fine_tuning_pb2_grpc,
    model_pb2_grpc,
    prediction_pb2_grpc,
)
from grpc import aio
from PIL import Image

from service.app import App
from service.config import Config
from service.contract import DataFound, EpochEnded, Finished, JobSpec, Progressed
from service.domain import (
    ClassCount,
    LeftOut,
    LeftOutFile,
    LeftOutReason,
    Manifest,
    Parity,
    ReadSummary,
)
from service.engine import head as heads
from service.engine.head import Head
from service.rpc import interceptor, message_io, server
from tests import processes
from tests.fake_launcher import FakeLauncher, Script
from tests.fake_runtime import FakeRuntime
from tests.figures import figure

CLASSES = ("blue", "green", "red")
SUMMARY = ReadSummary(
    seen=10,
    used=9,
    left_out=[LeftOut(LeftOutReason.WRONG_FORMAT, "red", 1)],
    files=[LeftOutFile("red/notes.txt", "red", LeftOutReason.WRONG_FORMAT, "no image")],
)
"""What a trainer tells of the files of three colours."""

GUARD_S = 300.0
"""Ends a test that hangs, and is the limit on what must not come too late: some hundred times
what a quiet machine needs."""


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No peer is given up because the machine is slow; a test of such a limit sets it."""
    monkeypatch.setattr(interceptor, "_STATUS_TIMEOUT_S", GUARD_S)
    monkeypatch.setattr(server, "_HANDSHAKE_S", GUARD_S)
    monkeypatch.setattr(_async_io, "_STATUS_LOOKS", round(GUARD_S / _async_io._LOOK_S))


@pytest.fixture
def apart() -> None:
    """Has what was sent read and checked as always, each in a process of its own."""


@pytest.fixture(autouse=True)
def read_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has it read and checked in this process: a process takes as long as all else of a test."""
    if "apart" not in request.fixturenames:
        processes.spare(monkeypatch)


def image(colour: str, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    """An encoded image of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


def write_result(spec: JobSpec, **changes: object) -> None:
    """Does a trainer's work: a head that names the strongest of three colours.

    `changes` are the manifest's.
    """
    out = Path(spec.out_dir)
    (out / "backbone.onnx").write_bytes(b"a backbone")
    weight = np.eye(3, dtype=np.float32)[::-1].copy() * 20
    head = Head(
        weight,
        np.zeros(3, np.float32),
        CLASSES,
        is_calibrated=bool(changes.get("calibrated", True)),
    )
    heads.save(head, out / "head.safetensors")
    manifest = Manifest(
        model=spec.model,
        job_id=spec.job_id,
        method="feature_based",
        backbone=spec.backbone,
        weights="pretrained",
        backbone_digest=hashlib.sha256(b"a backbone").hexdigest(),
        feature_dim=3,
        classes=list(CLASSES),
        temperature=1.0,
        train_count=6,
        train_groups=6,
        figures=[figure()],
        calibrated=True,
        dataset_digest="d" * 64,
        reading=SUMMARY,
        seed=spec.seed,
        hyperparameters={},
        preprocess={},
        parity=Parity(0.0, 1.0, 3),
        opset=17,
        device="cpu",
        precision="fp32",
        provider="cpu",
        versions={},
        started_at="2026-01-01T00:00:00+00:00",
        duration_s=0.1,
        labels=spec.labels,
    )
    manifest = msgspec.structs.replace(manifest, **changes)
    (out / "answers.safetensors").write_bytes(b"answers")
    (out / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    (out / "report.json").write_text('{"format": 1}')
    (out / "report.html").write_text("<!doctype html>")


SUCCESS = Script(
    records=[
        Progressed("features", 0.5),
        DataFound([ClassCount(label, 2, 1) for label in CLASSES], SUMMARY, "d" * 64),
        EpochEnded(
            epoch=1,
            epochs=1,
            train_loss=0.2,
            train_accuracy=1.0,
            validation_loss=0.1,
            validation_accuracy=1.0,
            images_per_second=50.0,
            eta_s=0.0,
            learning_rate=0.0,
        ),
        Finished(1.0, 3),
    ],
    before_last=write_result,
)
HANG = Script(records=[Progressed("training", 0.1)], hangs=True)


@dataclass
class Service:
    """The running service and everything to talk to it."""

    app: App
    channel: aio.Channel
    runtime: FakeRuntime
    launcher: FakeLauncher
    data_dir: Path
    allowed: Path

    def __post_init__(self) -> None:
        self.fine_tuning: Any = fine_tuning_pb2_grpc.FineTuningServiceStub(self.channel)
        self.datasets: Any = dataset_pb2_grpc.DatasetServiceStub(self.channel)
        self.backbones: Any = backbone_pb2_grpc.BackboneServiceStub(self.channel)
        self.prediction: Any = prediction_pb2_grpc.PredictionServiceStub(self.channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)

    async def make_model(self, name: str = "colours") -> fine_tuning_pb2.Job:
        """Fine-tunes on three colours; answers with the job as it ended."""
        request = fine_tuning_pb2.FineTuneRequest(model=name, inline_images=colours())
        started = await self.fine_tuning.FineTune(request)
        return await self.ended(started.job.job_id)

    async def ended(self, job_id: str) -> fine_tuning_pb2.Job:
        """The job once its events have ended."""
        async for _ in self.fine_tuning.WatchJob(fine_tuning_pb2.WatchJobRequest(job_id=job_id)):
            pass
        answer = await self.fine_tuning.GetJob(fine_tuning_pb2.GetJobRequest(job_id=job_id))
        return answer.job


def colours(shades: int = 3) -> fine_tuning_pb2.InlineImages:
    """Labelled images of three colours, none twice."""
    return fine_tuning_pb2.InlineImages(
        images=[
            dataset_pb2.LabelledImage(label=label, content=image(label, (40 + n, 40)))
            for label in CLASSES
            for n in range(shades)
        ]
    )


MakeService = Callable[..., Any]

UNHURRIED = {
    "drain_s": GUARD_S,
    "predict_timeout_s": GUARD_S,
    "load_timeout_s": GUARD_S,
    "message_timeout_s": GUARD_S,
    "heartbeat_timeout_s": GUARD_S,
    # Tests send one image again and again, and mean it to be computed.
    "recent_features_mb": 0,
}
"""Settings with which nothing ends early on a slow machine, and every image is computed."""


@asynccontextmanager
async def services(folder: Path) -> AsyncIterator[MakeService]:
    """Starts services; a second one on the same folder after the first was closed."""
    opened: list[Service] = []

    async def make(*scripts: Script, **settings: Any) -> Service:
        allowed = folder / "allowed"
        allowed.mkdir(exist_ok=True)
        config = Config(
            port=0,
            metrics_port=0,
            data_dir=folder / "data",
            allowed_dirs=(allowed,),
            **UNHURRIED | settings,
        )
        runtime, launcher = FakeRuntime(), FakeLauncher(*(scripts or (SUCCESS,)))
        app = App(config, {}, runtime=runtime, launcher=launcher)
        await app.__aenter__()
        channel = aio.insecure_channel(
            f"127.0.0.1:{app.port}", options=[("grpc.max_receive_message_length", -1)]
        )
        service = Service(app, channel, runtime, launcher, config.data_dir, allowed)
        opened.append(service)
        if "message_timeout_s" in settings:
            # It is for a connection's first bytes too, which may take several tries.
            await channel.channel_ready()
        return service

    yield make
    for service in opened:
        await close(service)


@pytest.fixture
async def make_service(tmp_path: Path) -> AsyncIterator[MakeService]:
    """Starts services of one test."""
    async with services(tmp_path) as make:
        yield make


async def close(service: Service) -> None:
    """Ends a service; twice is harmless."""
    await service.channel.close()
    await service.app.__aexit__(None, None, None)


@pytest.fixture
async def service(make_service: MakeService) -> Service:
    made: Service = await make_service()
    return made


@dataclass(frozen=True)
class Refusal:
    """What a refused call was answered with."""

    code: grpc.StatusCode
    reason: str
    message: str
    field: str
    retry_s: float


@pytest.fixture
def held_as_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a request hold its bytes alone, so that tests can count them."""
    monkeypatch.setattr(message_io, "ELEMENT_BYTES", 0)


async def refusal(call: Any) -> Refusal:
    """Awaits a call, or reads a stream, that must be refused."""
    # The server's own status, though gRPC may set another for a call that is still sent to.
    end = _async_io.End(call) if isinstance(call, aio.Call) else None
    with pytest.raises(aio.AioRpcError) as caught:  # noqa: PT012 - a stream is read in a loop
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    error: Any = caught.value if end is None else await end.told(caught.value)
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    found = of_status(status)
    assert found.message == error.details()
    return found


def of_status(status: status_pb2.Status) -> Refusal:
    """Reads the details that the contract promises."""
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad, retry):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    assert info.domain == "graft"
    code = next(c for c in grpc.StatusCode if c.value[0] == status.code)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return Refusal(
        code, info.reason, status.message, field, retry.retry_delay.ToMilliseconds() / 1000
    )


MakeTenants = Any


@pytest.fixture
def make_tenants(make_service: MakeService, tmp_path: Path) -> MakeTenants:
    """Three tenants of one server, each with a token that may do everything."""
    from tests.rpc.tenants import SECRET, Tenant

    async def make(*scripts: Any, **bounds: str) -> tuple[Tenant, Tenant, Tenant]:
        digest = hashlib.sha256(SECRET.encode()).hexdigest()
        names = ("acme", "beta", "default")
        path = tmp_path / "access.toml"
        path.write_text(
            "".join(f"[tenants.{name}]\n{bounds.get(name, '')}\n" for name in names)
            + "".join(
                f'[[tokens]]\nid = "{name}"\nsha256 = "{digest}"\ntenant = "{name}"\n'
                'roles = ["predict", "train", "admin"]\n'
                for name in names
            )
        )
        path.chmod(0o600)
        service = await make_service(*scripts, access_file=path)
        acme, beta, default = (Tenant(service, name) for name in names)
        return acme, beta, default

    return make
