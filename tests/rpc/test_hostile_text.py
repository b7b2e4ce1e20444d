"""Texts of strangers reach a real server and the command: what a terminal obeys is refused or
escaped, with `--json` too."""

import asyncio
import io
import json
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from graftml._display import escaped
from graftml.cli import main

from tests.rpc.conftest import CLASSES, Service, image

EVIL = "\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b[8mhidden\x1b[0m\u202e\x9b31m\x7f\u2028\U000e0041"
SHOWN = r"\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b[8mhidden\x1b[0m\u202e\x9b31m\x7f\u2028\U000e0041"

Run = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
def run(service: Service, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command against the server; returns its exit code and all that it wrote."""

    async def run(*arguments: object) -> tuple[int, str]:
        command = [*map(str, arguments), "--server", f"127.0.0.1:{service.app.port}"]
        code = await asyncio.to_thread(main, command)
        out, err = capsys.readouterr()
        assert escaped(out + err, keep="\n") == out + err
        return code, out + err

    return run


def archive(path: Path) -> Path:
    """An archive of good images and one file that is none, whose name does harm."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as written:
        for label in CLASSES:
            for n in range(3):
                written.writestr(f"{label}/{n}.png", image(label, (40 + n, 40)))
        written.writestr(f"{CLASSES[0]}/bad{EVIL}.png", b"no image")
    path.write_bytes(out.getvalue())
    return path


async def test_names_in_an_archive_are_escaped_wherever_they_are_shown(
    run: Run, tmp_path: Path
) -> None:
    sent = archive(tmp_path / "colours.zip")
    code, out = await run("datasets", "upload", sent)
    assert code == 0
    assert SHOWN in out
    code, out = await run("datasets", "--json")
    listed = json.loads(out)
    assert code == 0
    for arguments in (
        ("datasets",),
        ("datasets", "get", listed["dataset_id"]),
        ("finetune", listed["dataset_id"], "--name", "m"),
        ("jobs",),
    ):
        code, out = await run(*arguments)
        assert code == 0
    code, out = await run("datasets", "get", listed["dataset_id"], "--json")
    assert any(EVIL in file["path"] for file in json.loads(out)["summary"]["files"])


async def test_a_dataset_gets_no_name_that_a_terminal_obeys(run: Run, tmp_path: Path) -> None:
    sent = archive(tmp_path / "colours.zip")
    code, out = await run("datasets", "upload", sent, "--name", f"n{EVIL}")
    assert code == 1
    assert "display_name holds no control characters" in out
    assert "[INVALID_FIELD]" in out
    # By itself it is named after the file, escaped.
    code, out = await run("datasets", "upload", sent.rename(tmp_path / f"{EVIL[:30]}.zip"))
    assert code == 0
    assert (await run("datasets", "--json"))[0] == 0


@pytest.mark.parametrize("where", ["model", "dataset", "job"])
async def test_a_refusal_shows_what_was_asked_for_escaped(run: Run, where: str) -> None:
    command = {
        "model": ("models", "get", EVIL),
        "dataset": ("datasets", "get", EVIL),
        "job": ("jobs", "get", EVIL),
    }[where]
    code, out = await run(*command)
    assert code == 1
    assert r"\x1b]52;c;aGk=\x07" in out
