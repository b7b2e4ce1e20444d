"""Real trainers are killed at each step of their work: the job is tried again, and answers go on.

One server for all: a fault with a file acts when the file is not there, so each
test takes away the files of its own.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import graftml
import pytest
from PIL import Image

from tests.e2e.conftest import GUARD_S, register_small
from tests.e2e.faults.house import ROOT, House, asked

pytestmark = pytest.mark.e2e

FEATURE_BASED = (
    ("trainer.started", "trainer.features"),
    ("trainer.validating", "trainer.training"),
    ("trainer.reporting", "trainer.finished"),
)
"""Each of a pair by one attempt of a job."""
BACKBONE = "onnx/small"
AGAIN = ("once", "again", "once more")
ALL = (*(point for pair in FEATURE_BASED for point in pair), "trainer.sent", "trainer.exported")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each fault that shall not act."""
    folder = tmp_path_factory.mktemp("done")
    for name in (*ALL, *AGAIN):
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def client(
    tmp_path_factory: pytest.TempPathFactory, done: Path, digits: Path
) -> Iterator[graftml.Client]:
    """Of a server that has a model, `digits`, on a backbone of few weights."""
    faults = [f"kill@{point}!{done / point}" for point in ALL]
    # At each start of a trainer no more than one acts.
    faults += [f"kill@trainer.started!{done / name}" for name in AGAIN]
    folder = tmp_path_factory.mktemp("house")
    house = House(folder)
    client = house.start(";".join(faults))
    assert register_small(client, folder) == BACKBONE
    client.fine_tune(digits, "digits", backbone=BACKBONE).wait(GUARD_S)
    yield client
    house.is_sound()
    house.close()


@pytest.fixture
def always_answered(client: graftml.Client, digits: Path) -> Iterator[None]:
    """The model is asked all the while; every question must be answered."""
    with asked(client, next((digits / "0").iterdir()), "digits", "0"):
        yield


def attempts_of(job: graftml.JobHandle) -> int:
    events = list(job.events())
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    starts = [e for e in events if getattr(e.payload, "state", None) == "RUNNING"]
    assert job.refresh().attempts == len(starts)
    return len(starts)


@pytest.mark.parametrize("points", FEATURE_BASED, ids=lambda points: points[0])
def test_a_job_whose_trainer_is_killed_is_tried_again_while_models_answer(
    client: graftml.Client, digits: Path, done: Path, always_answered: None, points: tuple[str, str]
) -> None:
    for point in points:
        (done / point).unlink()
    # Images of its own: the features of others are known, and not computed again.
    size = 97 + FEATURE_BASED.index(points)
    unseen = [
        (file.parent.name, Image.open(file).resize((size, size)))
        for file in sorted(digits.rglob("*.png"))
    ]
    job = client.fine_tune(unseen, points[0], backbone=BACKBONE)
    assert job.wait(GUARD_S).version == 1
    assert attempts_of(job) == 3
    assert all((done / point).exists() for point in points)


def test_a_result_that_was_told_counts_though_its_trainer_is_killed(
    client: graftml.Client, digits: Path, done: Path
) -> None:
    (done / "trainer.sent").unlink()
    job = client.fine_tune(digits, "told", backbone=BACKBONE)
    assert job.wait(GUARD_S).version == 1
    assert attempts_of(job) == 1


def test_a_job_whose_trainer_is_killed_each_time_fails_and_says_why(
    client: graftml.Client, digits: Path, done: Path, always_answered: None
) -> None:
    for name in AGAIN:
        (done / name).unlink()
    job = client.fine_tune(digits, "doomed", backbone=BACKBONE)
    with pytest.raises(graftml.JobFailed, match="attempt 3 of 3") as failed:
        job.wait(GUARD_S)
    assert failed.value.job.error is not None
    assert failed.value.job.error.reason == "OUT_OF_MEMORY"
    assert "unless somebody killed it" in str(failed.value)
    assert attempts_of(job) == 3
    with pytest.raises(graftml.errors.NotFound):
        client.get_model("doomed")


def test_a_backbone_whose_export_is_killed_is_exported_again(
    client: graftml.Client, digits: Path, done: Path
) -> None:
    (done / "trainer.exported").unlink()
    few = [(digit, file) for digit in "01" for file in islice((digits / digit).iterdir(), 6)]
    job = client.fine_tune(
        few, "exported", backbone="timm/test_resnet", weights="random", method="feature_based"
    )
    assert job.wait(GUARD_S).version == 1
    assert attempts_of(job) == 2
    assert (done / "trainer.exported").exists()


SAVE_TWICE = """
import os
import sys
from service.ops import failpoints
from trainer.checkpoint import Checkpoints
for point in sys.argv[1:]:
    kept = Checkpoints(point, "key")
    process = os.fork()
    if process == 0:
        failpoints.arm(f"kill@{point}")
        kept.save({"epoch": 1}, print)
        kept.save({"epoch": 2}, print)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), kept.load(sys.exit))
"""
"""Each in a process of its own; one that has torch, which they are all forked from."""


def test_the_checkpoint_that_a_killed_process_leaves_is_whole(tmp_path: Path) -> None:
    points = ("trainer.checkpointing#2", "trainer.checkpointed#2")
    for point in points:
        (tmp_path / point).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SAVE_TWICE, *points],
        check=True,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    killed = -signal.SIGKILL
    assert done.stdout.splitlines() == [f"{killed} {{'epoch': {epoch}}}" for epoch in (1, 2)]
