"""The trainer as the process that the service starts, and as people start it."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from service import contract, prepared
from service.contract import (
    DEFAULT_BACKBONE,
    ExitCode,
    Exported,
    ExportedBackbone,
    ExportSpec,
    Failed,
    FeatureBased,
    Finished,
    ImageSource,
    JobSpec,
    Record,
    decode_record,
)
from service.ops import cgroups
from tests.trainer.conftest import GUARD_S, MakeFolder, MakeSpec, registered
from trainer import export
from trainer.__main__ import main

pytestmark = pytest.mark.e2e


def start(
    spec: JobSpec, tmp_path: Path, program: Sequence[str] = ("-m", "trainer")
) -> "subprocess.Popen[bytes]":
    file = tmp_path / "spec.json"
    file.write_bytes(contract.encode(spec))
    return subprocess.Popen(
        [sys.executable, *program, "run", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def records(process: "subprocess.Popen[bytes]") -> list[Record]:
    assert process.stdout is not None
    return [decode_record(line) for line in process.stdout]


def halting(tmp_path: Path, **changes: object) -> JobSpec:
    """A job that halts where it reads the index of its images, a pipe."""
    halt = tmp_path / "halt"
    os.mkfifo(halt)
    return JobSpec(
        job_id="job-1",
        model="birds",
        data=ImageSource(folder=str(tmp_path), index_file=str(halt)),
        out_dir=str(tmp_path),
        method=FeatureBased(),
        weights_dir="/weights",
        **changes,  # type: ignore[arg-type]
    )


TALKS = """
import os, sys
from trainer import __main__, train
run = train.run
def talking(*given):
    print("a library has a word", flush=True)
    os.write(1, b"so has native code\\n")
    return run(*given)
train.run = talking
sys.exit(__main__.main())
"""


def test_a_job_speaks_records_alone_and_ends_with_ok(
    make_folder: MakeFolder, make_spec: MakeSpec, registered_file: Path, tmp_path: Path
) -> None:
    spec = make_spec(make_folder(per_class=5), **registered(registered_file))
    with start(spec, tmp_path, ("-c", TALKS)) as process:
        told = records(process)
        assert process.wait(GUARD_S) == ExitCode.OK
        assert process.stderr is not None
        assert process.stderr.read() == b"a library has a word\nso has native code\n"
    assert isinstance(told[-1], Finished)
    assert (Path(spec.out_dir) / "head.safetensors").exists()


def test_bad_data_ends_with_its_reason_before_torch_is_loaded(
    make_folder: MakeFolder, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(make_folder(classes=("red",)))
    with start(spec, tmp_path) as process:
        told = records(process)
        assert process.wait(GUARD_S) == ExitCode.FAILED
    assert isinstance(told[-1], Failed)
    assert "for 1 class (red)" in told[-1].message


@pytest.mark.parametrize("how", ["sigterm", "parent gone"])
def test_it_ends_when_told_or_when_its_parent_is_gone(how: str, tmp_path: Path) -> None:
    spec = halting(tmp_path)
    with start(spec, tmp_path) as process, Path(spec.data.index_file).open("wb"):
        assert process.stdin is not None
        if how == "sigterm":
            os.kill(process.pid, signal.SIGTERM)
        else:
            process.stdin.close()
        assert process.wait(GUARD_S) == ExitCode.STOPPED


HOLDS_THE_INTERPRETER = """
import ctypes
from trainer.records import Records
from service.contract import Note
records = Records()
records.keep_alive()
records.send(Note("info", "busy"))
ctypes.PyDLL(None).sleep(3600)
"""
STARTS_ONE = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def test_a_trainer_in_the_middle_of_native_code_dies_with_its_server() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_ONE, HOLDS_THE_INTERPRETER],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        trainer = psutil.Process(int(server.stdout.readline()))
        server.kill()
        try:
            trainer.wait(GUARD_S)
        finally:
            with suppress(psutil.NoSuchProcess):
                trainer.kill()


@pytest.mark.parametrize("command", ["run", "rank", "export", "wait"])
def test_the_kernel_kills_a_trainer_before_its_server_for_want_of_memory(
    command: str, tmp_path: Path
) -> None:
    own = Path("/proc/self/oom_score_adj").read_text()
    halt = tmp_path / "halt"
    os.mkfifo(halt)
    # It halts where it reads its spec or, without one, before the imports that take memory.
    (tmp_path / "threadpoolctl.py").write_text(f"open({str(halt)!r}).read()")
    spec = [] if command == "wait" else [str(halt)]
    with (
        subprocess.Popen(
            [sys.executable, "-m", "trainer", command, *spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        ) as process,
        halt.open("wb"),
    ):
        told = Path(f"/proc/{process.pid}/oom_score_adj").read_text()
        process.kill()
    assert told == "1000\n"
    assert Path("/proc/self/oom_score_adj").read_text() == own


def test_a_system_that_does_not_let_it_say_so_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (tmp_path, tmp_path / "none" / "oom_score_adj"):
        monkeypatch.setattr(cgroups, "_OOM_SCORE_ADJ", file)
        cgroups.be_killed_first()


def test_a_trainer_gains_no_rights_dumps_no_core_and_writes_no_larger_files(tmp_path: Path) -> None:
    spec = halting(tmp_path, feature_cache_bytes=2**36)
    with start(spec, tmp_path) as process, Path(spec.data.index_file).open("wb"):
        status = Path(f"/proc/{process.pid}/status").read_text()
        limits = [
            resource.prlimit(process.pid, kind)
            for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)
        ]
        process.kill()
    assert "NoNewPrivs:\t1" in status
    assert limits == [(0, 0), (2**37, 2**37)]


def test_preparing_an_environment_exports_the_default_backbone_into_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ExportSpec] = []

    def run(spec: ExportSpec) -> Exported:
        asked.append(spec)
        for name in ("digest.onnx", contract.REFERENCE_FILE):
            (Path(spec.out_dir) / name).write_bytes(b"made")
        return Exported([ExportedBackbone("weights", "digest", reference="reference")])

    monkeypatch.setattr(export, "run", run)
    monkeypatch.setattr(prepared, "environment_folder", lambda: tmp_path)
    for _ in range(2):
        assert main(["prepare"]) == ExitCode.OK
    (spec,) = asked
    assert spec.backbone == DEFAULT_BACKBONE
    found = prepared.find(tmp_path, DEFAULT_BACKBONE)
    assert found is not None
    assert (found[1] / "digest.onnx").read_bytes() == b"made"
