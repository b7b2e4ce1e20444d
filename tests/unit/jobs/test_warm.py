import asyncio
import json
import os
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from service.contract import ExportSpec, ImageSource, Note, RankSpec, encode
from service.jobs import launchers as warm_module
from service.jobs.launchers import ProcessLauncher, WarmLauncher
from tests.unit.jobs.test_launcher import GUARD_S, is_alive, spec, wait_gone

WAITS = """
import json, os, sys
order = json.loads(sys.stdin.readline())
asked = json.load(open(order["spec"]))
text = f"warm {os.getpid()} {asked['job_id']}"
print(json.dumps({"type": "note", "level": "info", "text": text}), flush=True)
"""
COLD = encode(Note("info", "cold")).decode()


def launcher(program: str = WAITS, count: int = 1) -> WarmLauncher:
    environment = {"PATH": os.environ["PATH"]}
    return WarmLauncher(
        environment,
        count,
        (sys.executable, "-c", textwrap.dedent(program)),
        ProcessLauncher(environment, (sys.executable, "-c", f"print({COLD!r})")),
    )


async def words(warm: WarmLauncher, folder: Path) -> str:
    trainer = await warm.start(spec(folder), folder)
    record = await trainer.next_record()
    await trainer.stop(1)
    assert isinstance(record, Note)
    return record.text


async def until_waiting(warm: WarmLauncher, count: int) -> None:
    async with asyncio.timeout(GUARD_S):
        while warm.waiting < count:  # noqa: ASYNC110 - a process start gives no notice
            await asyncio.sleep(0.01)


async def test_a_job_goes_to_the_trainer_that_waits(tmp_path: Path) -> None:
    warm = launcher()
    await warm.open()
    text = await words(warm, tmp_path)
    assert text.startswith("warm")
    assert text.endswith("job-1")
    await warm.close()


async def test_each_job_gets_a_process_of_its_own_and_the_next_one_is_made_warm(
    tmp_path: Path,
) -> None:
    warm = launcher()
    await warm.open()
    first = await words(warm, tmp_path)
    await until_waiting(warm, 1)
    assert await words(warm, tmp_path) != first
    await warm.close()


async def test_a_job_that_finds_none_warm_gets_a_cold_one(tmp_path: Path) -> None:
    warm = launcher()
    assert await words(warm, tmp_path) == "cold"
    await until_waiting(warm, 1)
    assert (await words(warm, tmp_path)).startswith("warm")
    await warm.close()


async def test_a_waiting_trainer_that_died_is_passed_over(tmp_path: Path) -> None:
    warm = launcher("import sys; sys.exit('no torch here')")
    await warm.open()
    (waiting,) = warm._waiting
    await waiting.process.wait()
    assert await words(warm, tmp_path) == "cold"
    await warm.close()


async def test_no_warm_trainers_means_cold_ones_for_ever(tmp_path: Path) -> None:
    warm = launcher(count=0)
    await warm.open()
    assert await words(warm, tmp_path) == "cold"
    assert warm.waiting == 0
    await warm.close()


async def test_closing_ends_those_that_wait(tmp_path: Path) -> None:
    warm = launcher(count=2)
    await warm.open()
    pids = [waiting.process.pid for waiting in warm._waiting]
    await warm.close()
    assert not any(is_alive(pid) for pid in pids)


async def test_a_command_that_is_not_there_leaves_the_cold_ones(tmp_path: Path) -> None:
    warm = WarmLauncher({}, 1, ("/nowhere/python",), ProcessLauncher({}, ("/nowhere/python",)))
    await warm.open()
    assert warm.waiting == 0
    with pytest.raises(OSError):
        await warm.start(spec(tmp_path), tmp_path)
    await warm.close()


async def test_a_trainer_that_waits_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, os, signal\n"
        "from tests.unit.jobs.test_warm import launcher\n"
        "async def main():\n"
        "    warm = launcher()\n"
        "    await warm.open()\n"
        "    print(warm._waiting[0].process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    out, _ = await asyncio.wait_for(parent.communicate(), GUARD_S)
    await wait_gone(int(out))


async def test_a_ranking_goes_to_the_trainer_that_waits_too(tmp_path: Path) -> None:
    warm = launcher(
        """
        import json, sys
        order = json.loads(sys.stdin.readline())
        text = f"{order['command']} {json.load(open(order['spec']))['data']['folder']}"
        print(json.dumps({"type": "note", "level": "info", "text": text}), flush=True)
        """
    )
    await warm.open()
    ranking = RankSpec(data=ImageSource(folder="/data"), backbones=[], weights_dir="/weights")
    trainer = await warm.start(ranking, tmp_path)
    assert await trainer.next_record() == Note("info", "rank /data")
    await trainer.stop(1)
    await warm.close()


async def test_a_spec_that_cannot_be_written_leaves_the_trainer_that_waits(tmp_path: Path) -> None:
    warm = launcher()
    await warm.open()
    with pytest.raises(OSError):
        await warm.start(spec(tmp_path), tmp_path / "gone")
    assert warm.waiting == 1
    assert (await words(warm, tmp_path)).startswith("warm")
    await warm.close()


async def test_the_service_starts_where_no_file_can_be_had_for_a_trainer_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError("no room")

    warm = launcher()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", full)
        await warm.open()
    assert await words(warm, tmp_path) == "cold"
    await until_waiting(warm, 1)
    await warm.close()


async def test_one_that_died_while_it_waited_is_replaced_beside_the_one_that_was_taken(
    tmp_path: Path,
) -> None:
    warm = launcher(count=2)
    await warm.open()
    first = warm._waiting[0].process
    first.kill()
    await first.wait()
    assert (await words(warm, tmp_path)).startswith("warm")
    await until_waiting(warm, 2)
    await warm.close()


async def test_a_start_while_it_closes_gets_a_cold_one_and_none_that_is_being_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = launcher(count=2)
    await warm.open()
    killing, go_on = asyncio.Event(), asyncio.Event()
    kill = warm_module._Waiting.kill

    async def slow(waiting: warm_module._Waiting) -> None:
        await kill(waiting)
        killing.set()
        await go_on.wait()

    monkeypatch.setattr(warm_module._Waiting, "kill", slow)
    closing = asyncio.create_task(warm.close())
    await asyncio.wait_for(killing.wait(), GUARD_S)
    assert await asyncio.wait_for(words(warm, tmp_path), GUARD_S) == "cold"
    go_on.set()
    await closing
    assert warm.waiting == 0


async def test_a_trainer_that_the_kernel_keeps_does_not_hold_up_the_close(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warm = launcher()
    await warm.open()
    (waiting,) = warm._waiting
    wait = waiting.process.wait
    monkeypatch.setattr(waiting.process, "wait", asyncio.Event().wait)
    monkeypatch.setattr(warm_module, "KILLED_S", 0.05)
    await asyncio.wait_for(warm.close(), GUARD_S)
    assert "could not be killed" in caplog.text
    await wait()


@pytest.mark.parametrize("given", ["", "/elsewhere"])
async def test_a_trainer_that_waited_is_told_its_jobs_folder_for_temporary_files(
    tmp_path: Path, given: str
) -> None:
    says = """
    import json, os, sys
    before = os.environ["TMPDIR"]
    order = json.loads(sys.stdin.readline())
    text = json.dumps([before, order.get("tmp_dir", "")])
    print(json.dumps({"type": "note", "level": "info", "text": text}), flush=True)
    """
    environment = {"PATH": os.environ["PATH"], **({"TMPDIR": given} if given else {})}
    warm = WarmLauncher(environment, 1, (sys.executable, "-c", textwrap.dedent(says)))
    await warm.open()
    before, told = json.loads(await words(warm, tmp_path))
    await warm.close()
    assert (before, told) == ((given, "") if given else (tempfile.gettempdir(), str(tmp_path)))


async def test_an_export_leaves_the_trainer_that_waits_to_a_job(tmp_path: Path) -> None:
    warm = launcher()
    await warm.open()
    await until_waiting(warm, 1)
    asked = ExportSpec(backbone="resnet18", out_dir="/out", weights_dir="/weights")
    trainer = await warm.start(asked, tmp_path)
    assert await trainer.next_record() == Note("info", "cold")
    await trainer.stop(1)
    assert warm.waiting == 1
    await warm.close()
