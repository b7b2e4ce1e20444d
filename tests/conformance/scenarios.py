"""What callers do, on whichever server: each a function of a client and what it is to be told."""

import asyncio
import io
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graftml
from graftml import testing
from graftml_stubs.v1 import fine_tuning_pb2
from PIL import Image

from service.contract import (
    BackbonesRanked,
    DataFound,
    EpochEnded,
    ExitCode,
    Failed,
    Finished,
    Heartbeat,
    Progressed,
    RankedBackbone,
)
from service.domain import ClassCount, GateCheck, Parity
from service.errors import Reason
from tests.conformance.transcript import Transcript
from tests.extractors import SIZE, extractor
from tests.fake_launcher import Script
from tests.rpc.conftest import HANG, SUMMARY, write_result


def image(colour: str, side: int = 40) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, 40), colour).save(out, "PNG")
    return out.getvalue()


def script(**changes: Any) -> Script:
    """Returns what a trainer does that goes well, with nothing left at 0; changes a manifest."""
    filled = {"parity": Parity(1e-6, 1.0, 6), "weights_licence": "Apache-2.0"}
    return Script(
        records=[
            Progressed("features", 0.5),
            DataFound([ClassCount(label, 3, 0) for label in ("cat", "dog")], SUMMARY, "d" * 64),
            EpochEnded(
                epoch=1,
                epochs=2,
                train_loss=0.2,
                train_accuracy=1.0,
                validation_loss=0.1,
                validation_accuracy=1.0,
                images_per_second=50.0,
                eta_s=1.0,
                learning_rate=0.001,
            ),
            Finished(0.95, 20),
        ],
        before_last=lambda spec: write_result(spec, **filled, **changes),
    )


MADE = script()

Act = Callable[[graftml.AsyncClient, Transcript, Path], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """What is done, and what both servers are told of the jobs in it."""

    act: Act
    trainers: Sequence[Script] = (MADE,)
    """What each of the real server's trainers does, the last one again and again."""
    script: Sequence[fine_tuning_pb2.JobEvent] = testing.DEFAULT_SCRIPT
    """The same for the fake one."""


async def life(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    dataset = await client.upload_dataset(folder / "first")
    await client.get_dataset(dataset.dataset_id)
    [_] = [listed async for listed in client.list_datasets()]
    options: Any = {"request_id": "once", "labels": {"team": "birds"}, "seed": 3}
    job = await client.fine_tune(dataset, "pets", **options)
    await job.wait()
    again = await client.fine_tune(dataset, "pets", **options)
    assert again.job_id == job.job_id
    [_] = [listed async for listed in client.list_jobs(states="succeeded", model="pets")]
    [_] = [listed async for listed in client.list_models()]
    [_] = [listed async for listed in client.list_versions("pets")]
    await client.get_model("pets")
    await client.get_version("pets", alias="latest")
    await client.get_report_html("pets")


async def predictions(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    await (await client.fine_tune(folder / "first", "pets")).wait()
    told.lines.clear()
    image_, models = image("red"), ["pets", graftml.ModelSpec("pets", version=1)]
    await client.predict_many([image_, image_], models, top_k=2, include_features=True)
    await client.predict([image_, b""], "pets")
    with told.refusal():
        await client.predict(image_, "nobody")
    stream = client.predict_stream([image_], "pets")
    async with aclosing(stream):  # type: ignore[type-var]
        assert [answer.model async for answer in stream] == ["pets"]


async def aliases(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    for _ in range(2):
        await (await client.fine_tune(folder / "first", "pets")).wait()
    told.lines.clear()
    await client.set_alias("pets", "prod", 1)
    await client.get_version("pets", alias="prod")
    await client.delete_alias("pets", "prod")
    await client.rollback_alias("pets")
    await client.get_model("pets")
    await client.delete_version("pets", 2)
    await client.delete_model("pets", force=True)


async def bases(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    await (await client.fine_tune(folder / "first", "pets")).wait()
    told.lines.clear()
    await (await client.fine_tune(folder / "first", "pets", base="latest")).wait()
    with told.refusal():
        await client.fine_tune(folder / "first", "pets", base="nothing")


async def candidates(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    await (
        await client.fine_tune(folder / "first", "pets", gate=graftml.Gate(min_accuracy=0.99))
    ).wait()
    with told.refusal():
        await client.get_version("pets")
    await client.promote_version("pets", 1)


async def failures(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    job = await client.fine_tune(folder / "first", "pets")
    with told.refusal():
        await job.wait()
    with told.refusal():
        await job.cancel()
    await client.delete_job(job.job_id)
    with told.refusal():
        await job.refresh()


async def cancels(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    job = await client.fine_tune(folder / "first", "pets")
    async for event in job.events():
        if isinstance(event.payload, graftml.StateChanged) and event.payload.state == "RUNNING":
            break
    told.lines.clear()
    await job.cancel()
    with told.refusal():
        await job.wait()


async def rankings(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    started = await client.start_ranking(
        folder / "first", backbones=["resnet18"], request_id="once"
    )
    await started.wait()


async def datasets(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    first = await client.upload_dataset(folder / "first")
    await client.add_images(first, folder / "more")
    images = [listed async for listed in client.list_images(first)]
    await client.relabel_images(first, {images[0].digest: "red"})
    less = await client.remove_images(first, [images[-1].digest])
    await client.delete_dataset(less.dataset_id)
    with told.refusal():
        await client.get_dataset(less.dataset_id)
    target = await client.upload_dataset(folder / "target", is_unlabelled=True)
    [*_] = [listed async for listed in client.list_images(target)]
    await client.erase_image(images[0].digest)


async def backbones(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    file, colour = folder / "tiny.onnx", (0.5, 0.5, 0.5)
    await asyncio.to_thread(file.write_bytes, extractor().SerializeToString())
    made = await client.register_backbone(
        file, "tiny", size=SIZE, mean=colour, std=colour, licence="MIT"
    )
    [*_] = [listed async for listed in client.list_backbones()]
    await client.delete_backbone(made.name)
    with told.refusal():
        await client.delete_backbone(made.name)


async def refusals(client: graftml.AsyncClient, told: Transcript, folder: Path) -> None:
    for ask in (
        lambda: client.get_model("nobody"),
        lambda: client.get_version("nobody"),
        lambda: client.delete_model("nobody"),
        lambda: client.get_job("job-0"),
        lambda: client.cancel_job("job-0"),
        lambda: client.delete_job("job-0"),
        lambda: client.get_dataset("ds-0"),
        lambda: client.delete_dataset("ds-0"),
        lambda: client.remove_images("ds-0", ["0" * 64]),
        lambda: client.fine_tune("ds-0", "pets"),
        lambda: client.rank_backbones("ds-0"),
        lambda: client.fine_tune(
            folder / "first", "pets", method="domain_adaptation", target="ds-0"
        ),
    ):
        with told.refusal():
            await ask()


RANKED = BackbonesRanked(
    [
        RankedBackbone(
            backbone="resnet18",
            weights="IMAGENET1K_V1",
            weights_licence="BSD-3-Clause",
            log_loss=0.3,
            log_me=-0.1,
            image_ms=4.5,
            feature_dim=512,
        )
    ],
    "resnet18 is first.",
    9,
)
LOW = [
    GateCheck(
        name="accuracy", verdict="failed", passed=False, value=0.9, bound=0.99, detail="too low"
    )
]

SCENARIOS = {
    "life": Scenario(life),
    "predictions": Scenario(predictions),
    "aliases": Scenario(aliases),
    "bases": Scenario(bases),
    "failures": Scenario(
        failures,
        [
            Script(
                records=[Progressed("features", 0.5), Failed(Reason.TRAINING_FAILED, "no number")],
                exit_code=ExitCode.FAILED,
            )
        ],
        [testing.running(), testing.failed("no number")],
    ),
    "cancels": Scenario(cancels, [HANG], [testing.running()]),
    "rankings": Scenario(rankings, [Script(records=[Heartbeat(), RANKED])]),
    "datasets": Scenario(datasets),
    "backbones": Scenario(backbones),
    "refusals": Scenario(refusals),
    "candidates": Scenario(
        candidates,
        [script(gate_checks=LOW)],
        [
            *testing.DEFAULT_SCRIPT[:-2],
            testing.published(gate_failures=["too low"]),
            testing.succeeded(),
        ],
    ),
}
