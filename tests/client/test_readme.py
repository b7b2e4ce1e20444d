"""What the client's README shows works as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from graftml.cli._arguments import parse
from graftml.testing import FakeGraft

README = (Path(__file__).parents[2] / "clients/python/README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    command.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    for command in line.split(";")
    if command.strip().startswith("graft ")
]


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGraft]:
    """A server beside what the README speaks of."""
    folder.rename(folder.parent / "images")
    monkeypatch.chdir(folder.parent)
    names = ("a.jpg", "b.jpg", "phone/a.jpg", "spring/tulip/a.jpg", "spring/rose/a.jpg")
    for name in (*names, "encoder.onnx"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    Path("server.pem").write_text("an authority")
    monkeypatch.setenv("GRAFT_TOKEN", "graft_ci_secret")
    with FakeGraft() as server:
        yield server


def test_there_are_programs_and_commands_to_try() -> None:
    assert len(PROGRAMS) == 14
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_of_the_readme_runs(number: int, server: FakeGraft) -> None:
    program = PROGRAMS[number].replace("localhost:50051", server.target)
    program = program.replace("credentials=tls", "credentials=None")  # the fake server has no TLS
    exec(compile(program, f"README program {number}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_understood(command: str) -> None:
    assert callable(parse(command.split()[1:], {}).run)
