import asyncio
import os
import signal
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from msgspec.json import decode

from service.contract import (
    ExportSpec,
    FeatureBased,
    Finished,
    ImageSource,
    JobSpec,
    Note,
    Progressed,
    RankSpec,
    encode,
)
from service.jobs.launchers import ProcessLauncher, ProcessTrainer, kill_group

GUARD_S = 300.0
"""Ends a test whose process hangs."""

SAY = "import sys, json, os, signal, time, subprocess\nsay = lambda line: print(line, flush=True)\n"
NOTE = encode(Note("info", "ready")).decode()


def spec(folder: Path) -> JobSpec:
    return JobSpec(
        job_id="job-1",
        model="birds",
        data=ImageSource(folder="/data"),
        out_dir=str(folder / "out"),
        method=FeatureBased(),
        weights_dir="/weights",
    )


async def start(folder: Path, program: str, **environment: str) -> ProcessTrainer:
    launcher = ProcessLauncher(
        {"PATH": os.environ["PATH"], **environment},
        (sys.executable, "-c", SAY + textwrap.dedent(program)),
    )
    return await launcher.start(spec(folder), folder)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def wait_gone(pid: int) -> None:
    async with asyncio.timeout(GUARD_S):
        while is_alive(pid):  # noqa: ASYNC110 - the kernel gives no notice
            await asyncio.sleep(0.01)


async def test_records_come_in_order_and_the_exit_code_after(tmp_path: Path) -> None:
    records = [Progressed("training", 0.5, "äöü"), Note("warning", "x"), Finished(0.5, 2)]
    lines = [encode(record).decode() for record in records]
    trainer = await start(tmp_path, f"for line in {lines!r}: say(line)\nsys.exit(3)")
    assert [await trainer.next_record() for _ in range(4)] == [*records, None]
    assert await trainer.wait() == 3
    await trainer.stop(1)


async def test_a_trainer_stands_back_as_far_as_it_is_set(tmp_path: Path) -> None:
    for number, niceness in enumerate((10, 3)):
        program = (sys.executable, "-c", "import sys; sys.stdin.read()")
        folder = tmp_path / str(number)
        folder.mkdir()
        trainer = await ProcessLauncher({}, program, niceness=niceness).start(spec(folder), folder)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert psutil.Process(trainer.pid).nice() == max(niceness, own)
        await trainer.stop(1)


async def test_the_spec_reaches_the_trainer(tmp_path: Path) -> None:
    trainer = await start(
        tmp_path,
        """
        asked = json.load(open(sys.argv[2]))
        say(json.dumps({"type": "note", "level": "info", "text": asked["job_id"]}))
        """,
    )
    assert await trainer.next_record() == Note("info", "job-1")
    await trainer.stop(1)


async def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    trainer = await start(
        tmp_path,
        f"""
        say("no json")
        say('{{"type": "unheard of"}}')
        sys.stdout.buffer.write(b"\\xff\\xfe\\n" + b"x" * (3 * 2**20) + b"\\n")
        say({NOTE!r})
        """,
    )
    assert await trainer.next_record() == Note("info", "ready")
    assert await trainer.next_record() is None
    await trainer.stop(1)


async def test_of_the_environment_what_is_known_by_name_is_passed_on(tmp_path: Path) -> None:
    given = (
        "HF_HOME", "https_proxy", "OMP_NUM_THREADS", "SITE_A", "SITE_B", "OTHER",
        "AWS_SECRET_ACCESS_KEY", "DATABASE_URL", "GRAFT_PORT",
    )  # fmt: skip
    trainer = await start(
        tmp_path,
        f"""
        text = ",".join(sorted(os.environ.keys() & {set(given)!r}))
        say(json.dumps({{"type": "note", "level": "info", "text": text}}))
        """,
        **dict.fromkeys(given, "1"),
        GRAFT_PASS_ENVIRONMENT="SITE_*, OTHER,GRAFT_*",
    )
    passed = "HF_HOME,OMP_NUM_THREADS,OTHER,SITE_A,SITE_B,https_proxy"
    assert await trainer.next_record() == Note("info", passed)
    await trainer.stop(1)


async def test_a_trainer_that_is_told_to_stop_may_end_by_itself(tmp_path: Path) -> None:
    trainer = await start(
        tmp_path,
        f"""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        say({NOTE!r})
        while True: signal.pause()
        """,
    )
    await trainer.next_record()
    await trainer.stop(GUARD_S)
    assert await trainer.wait() == 4
    await trainer.stop(GUARD_S)


async def test_a_trainer_and_its_children_that_do_not_stop_are_killed(tmp_path: Path) -> None:
    trainer = await start(
        tmp_path,
        f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        say(json.dumps({{"type": "note", "level": "info", "text": str(child.pid)}}))
        say({NOTE!r})
        time.sleep(600)
        """,
    )
    record = await trainer.next_record()
    assert isinstance(record, Note)
    await trainer.stop(0.05)
    assert await trainer.wait() == -signal.SIGKILL
    await wait_gone(int(record.text))


async def test_a_child_that_a_dead_trainer_left_is_killed(tmp_path: Path) -> None:
    trainer = await start(
        tmp_path,
        """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        say(json.dumps({"type": "note", "level": "info", "text": str(child.pid)}))
        os._exit(1)
        """,
    )
    record = await trainer.next_record()
    assert isinstance(record, Note)
    await wait_gone(trainer.pid)
    await trainer.stop(GUARD_S)
    assert await trainer.wait() == 1
    await wait_gone(int(record.text))


async def test_a_trainer_learns_that_its_parent_is_gone(tmp_path: Path) -> None:
    program = (
        f"import asyncio; from pathlib import Path\n"
        f"from tests.unit.jobs.test_launcher import NOTE, start\n"
        f"async def main():\n"
        f"    trainer = await start(Path({str(tmp_path)!r}), 'say(NOTE); sys.stdin.read()'"
        f".replace('NOTE', repr(NOTE)))\n"
        f"    await trainer.next_record()\n"
        f"    print(trainer.pid, flush=True)\n"
        f"    import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
        f"asyncio.run(main())"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    out, _ = await asyncio.wait_for(parent.communicate(), GUARD_S)
    await wait_gone(int(out))


async def test_what_a_trainer_prints_beside_records_is_kept(tmp_path: Path) -> None:
    trainer = await start(
        tmp_path, "for n in range(1000): print('word', n, file=sys.stderr)\nsys.exit(1)"
    )
    assert await trainer.next_record() is None
    await trainer.wait()
    assert trainer.last_words() == [f"word {n}" for n in range(970, 1000)]
    assert (tmp_path / "trainer.log").stat().st_size > 8192
    await trainer.stop(1)


async def test_a_trainer_that_goes_on_writing_after_its_last_record_can_end(
    tmp_path: Path,
) -> None:
    trainer = await start(
        tmp_path, f"say({NOTE!r})\nsys.stdout.write('x' * (8 * 2**20))\nsys.exit(0)"
    )
    assert await trainer.next_record() == Note("info", "ready")
    assert await asyncio.wait_for(trainer.wait(), GUARD_S) == 0
    await trainer.stop(1)


async def test_a_command_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    launcher = ProcessLauncher({}, ("/nowhere/python",))
    with pytest.raises(OSError):
        await launcher.start(spec(tmp_path), tmp_path)


async def test_each_kind_of_spec_has_a_command_of_its_own(tmp_path: Path) -> None:
    say = "import sys\nprint(*sys.argv[1:], file=sys.stderr)"
    launcher = ProcessLauncher({}, (sys.executable, "-c", say))
    ranking = RankSpec(data=ImageSource(folder="/data"), backbones=[], weights_dir="/weights")
    export = ExportSpec(backbone="resnet18", out_dir="/out", weights_dir="/weights")
    for asked, command in ((spec(tmp_path), "run"), (export, "export"), (ranking, "rank")):
        trainer = await launcher.start(asked, tmp_path)
        assert await trainer.wait() == 0
        await trainer.stop(1)
        assert trainer.last_words()[-1] == f"{command} {tmp_path / 'spec.json'}"
    assert decode((tmp_path / "spec.json").read_bytes(), type=RankSpec) == ranking


@pytest.mark.parametrize("given", [None, "/elsewhere"])
async def test_temporary_files_go_with_the_job_unless_the_environment_says_where(
    tmp_path: Path, given: str | None
) -> None:
    say = "import os, sys; print(os.environ['TMPDIR'], file=sys.stderr)"
    environment = {} if given is None else {"TMPDIR": given}
    launcher = ProcessLauncher(environment, (sys.executable, "-c", say))
    trainer = await launcher.start(spec(tmp_path), tmp_path)
    assert await trainer.wait() == 0
    await trainer.stop(1)
    assert trainer.last_words()[-1] == (given or str(tmp_path))


def test_the_group_of_a_number_that_was_given_again_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, _: killed.append(pid))
    for pid, returncode in ((os.getpid(), 0), (os.getpid(), None), (2**22 + 1, 0)):
        kill_group(SimpleNamespace(pid=pid, returncode=returncode))  # type: ignore[arg-type]
    assert killed == [os.getpid(), 2**22 + 1]
