"""The progress of uploads and jobs, as people see it."""

import io
import sys
import time
from typing import Any

import graftml
import pytest
from graftml import types
from graftml.cli import _bar, _output, _watching, main
from graftml.cli._output import Output
from graftml.testing import FakeGraft, data, note, progress, published, running, succeeded
from rich.console import Console

SCRIPT = [
    running(),
    progress("preparing", 0.0, "reading the images"),
    data({"cat": 3, "dog": 3}),
    note("a word"),
    progress("features", 0.5, "training images", elapsed_s=3.0, step=3, steps=6),
    progress("features", 1.0, "training images"),
    progress("preparing", 0.1, "exporting the backbone"),
    progress("features", 0.5, "validation images"),
    progress("training", 0.0, "epoch 1 of 2", step=0, steps=8),
    progress(
        "training", 0.25, "epoch 1 of 2", elapsed_s=61.0, remaining_s=183.4, step=2, steps=8
    ),
    progress("training", 0.5, "epoch 1 of 2: validating", step=4, steps=8),
    note("few images", warning=True),
    progress("checking", 0.0),
    published(0.95),
    succeeded(),
]  # fmt: skip


class Terminal(io.StringIO):
    """Standard output that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def played() -> Any:
    with FakeGraft(script=SCRIPT) as server:
        yield server


def finetune(server: FakeGraft, *more: str) -> int:
    return main(["finetune", "server:/x", "--name", "cats", "--server", server.target, *more])


def test_without_a_terminal_there_is_one_line_a_stage(
    played: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(played) == 0
    assert capsys.readouterr().out.splitlines() == [
        "job job-1 of model cats",
        "queued",
        "running",
        "preparing",
        "6 images of 2 classes (cat, dog)",
        "info: a word",
        "features",
        "training",
        "warning: few images",
        "checking",
        "cats version 1: 0.950 [0.91 to 0.99] by cross-validation over 20 images",
        "succeeded",
        "Try it: graft predict cats IMAGE",
    ]


def test_quiet_leaves_the_stages_out(played: FakeGraft, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(played, "--quiet") == 0
    assert capsys.readouterr().out.splitlines() == [
        "job job-1 of model cats",
        "6 images of 2 classes (cat, dog)",
        "warning: few images",
        "cats version 1: 0.950 [0.91 to 0.99] by cross-validation over 20 images",
        "Try it: graft predict cats IMAGE",
    ]


def test_a_terminal_gets_a_bar(played: FakeGraft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    assert finetune(played) == 0
    out = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "info: a word" in out
    assert "ended" in out
    assert "100%" in out


def test_jobs_show_the_stage_its_steps_and_its_times(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeGraft(script=SCRIPT[:10]) as server:
        assert finetune(server, "--detach") == 0
        assert main(["jobs", "--server", server.target]) == 0
        out = capsys.readouterr().out
    told = "training 25%, epoch 1 of 2, 2 of 8 steps, 1:01, about 3:03 left"
    assert told in " ".join(out.split())


def test_the_client_reads_all_of_a_progress() -> None:
    with FakeGraft(script=SCRIPT[:10]) as server, graftml.Client(server.target) as client:
        job = client.fine_tune(graftml.ServerPath("/x"), "cats").refresh()
    assert job.progress == types.Progress(
        "training", 0.25, "epoch 1 of 2", elapsed_s=61.0, remaining_s=183.4, step=2, steps=8
    )
    assert job.elapsed_s is not None


def test_the_clock_of_the_bar_goes_on_while_nothing_arrives() -> None:
    clock = Clock()
    bar = _bar.Bar(Console(file=io.StringIO(), width=120), clock)
    bar.show(_bar.Shown("training", 0.25, "", elapsed_s=61.0, remaining_s=183.0))
    assert bar.times() == "1:01, about 3:03 left"
    clock.now += 60
    assert bar.times() == "2:01, about 2:03 left"
    clock.now += 300
    assert bar.times() == "7:01"
    bar.show(_bar.Shown("exporting", None))
    assert bar.times() == "0:00"


def test_a_bar_is_never_full_before_the_end() -> None:
    assert [_output.percent(f) for f in (0.0, 0.996, 0.9999, 1.0)] == ["0%", "99%", "99%", "100%"]
    assert [_output.clock(s) for s in (0.4, 61, 3599, 3600, 7265)] == [
        "0:00", "1:01", "59:59", "1:00:00", "2:01:05",
    ]  # fmt: skip


def test_after_the_last_byte_the_bar_says_that_the_server_is_checking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    shown: list[_bar.Shown] = []
    monkeypatch.setattr(_bar.Bar, "show", lambda _self, value: shown.append(value))
    clock = Clock()
    mib = 2**20
    with _watching.Watching(Output(is_json=False), clock) as watching:
        watching.uploaded(0, 4 * mib)
        clock.now += 10
        watching.uploaded(mib, 4 * mib)
        watching.uploaded(4 * mib, 4 * mib)
        watching.uploaded(4 * mib, 4 * mib)
        # Sent again after a broken connection.
        watching.uploaded(2 * mib, 4 * mib)
    assert shown == [
        _bar.Shown("uploading", 0.0, "0.0 of 4.0 MiB", 0.0, None),
        _bar.Shown("uploading", 0.25, "1.0 of 4.0 MiB", 10.0, 30.0),
        _bar.Shown("checking", None, "the server checks the images", 0.0, None),
        _bar.Shown("uploading", 0.5, "2.0 of 4.0 MiB", 0.0, None),
    ]


def test_an_upload_of_unknown_size_is_shown_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown: list[_bar.Shown] = []
    monkeypatch.setattr(_bar.Bar, "show", lambda _self, value: shown.append(value))
    with _watching.Watching(Output(is_json=False), time.monotonic) as watching:
        watching.uploaded(2**20, None)
    assert [(s.stage, s.fraction, s.figures) for s in shown] == [("uploading", None, "1.0 MiB")]
