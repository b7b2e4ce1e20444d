"""Follows a document as a reader does: its commands in order, in one shell, and their output.

Code blocks by their language: `console` has commands after `$ ` and the output that each must
have, `sh` commands without output, `python` programs. Others are not run. CONTRIBUTING.md says
what may differ in an output. A command that is shown to fail ends with a line of `graft` or is
followed by `echo $?`; any other must end with 0.

What is done differently from what the document shows:

- `graft-server run ...` runs beside the shell, on free ports, and ends the one that ran before
  it; the shell's GRAFT_SERVER and programs' `localhost:50051` are its address.
- `make demo` does not install anything.
- Servers compute on the CPU, in the machine's default precision, or that of GRAFT_PRECISION:
  what a document says must hold in each.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.conftest import GUARD_S, ROOT, ServiceProcess

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVER = "graft-server run"
DEMO = "make demo"
PRECISION = os.environ.get("GRAFT_PRECISION", "auto")
INSTALLED = f"GRAFT_PROVIDER=cpu GRAFT_PRECISION={PRECISION} make -o .venv/.installed demo"

VARIES = {
    r"\d{4}-\d\d-\d\d( \d\d:\d\d(:\d\d)?)?": r"\d{4}-\d\d-\d\d(?: \d\d:\d\d(?::\d\d)?)?",
    r"(job|ds)-[0-9a-f-]+": r"(?:job|ds)-[0-9a-f-]+",
    r"\b[0-9a-f]{12,64}\b": r"[0-9a-f]{12,64}",
    r"localhost:\d+": r"(?:localhost|127\.0\.0\.1):\d+",
    r"\d+:\d\d(:\d\d)?": r"\d+:\d\d(?::\d\d)?",
    r"\d+(\.\d+)?%": r"\d+(?:\.\d+)?%",
    r"\d+\.\d+": r"\d+\.\d+",
    r"\d+ (?=min|s\b|ms|MiB)": r"\d+ ",
    r"─+": "─+",
    r"\s+": r"\s+",
}
"""What differs from run to run, and the pattern that stands for it: dates, ids, digests,
addresses, durations, percentages, decimal numbers, and widths. Whole numbers do not."""
_VARYING = re.compile("|".join(f"({re.sub(r'[(](?![?])', '(?:', shown)})" for shown in VARIES))


def pattern(line: str) -> str:
    """The regular expression of a line that is shown."""
    parts, end = [], 0
    for found in _VARYING.finditer(line.strip()):
        assert found.lastindex is not None
        parts += [re.escape(line.strip()[end : found.start()])]
        parts += [list(VARIES.values())[found.lastindex - 1]]
        end = found.end()
    return "".join(parts) + re.escape(line.strip()[end:])


def is_as_shown(shown: str, output: str) -> bool:
    """Tells whether an output is the one that a document shows; `...` stands for any lines."""
    wanted = [line for line in shown.splitlines() if line.strip()]
    got = [line.strip() for line in output.splitlines() if line.strip()]
    lines = [r"(?:.*\n)*?" if line.strip() == "..." else f"{pattern(line)}\n" for line in wanted]
    return re.fullmatch("".join(lines), "".join(f"{line}\n" for line in got)) is not None


@dataclass
class Step:
    """A command or a program, and what it must print; None where nothing is shown."""

    language: str
    command: str
    shown: str | None = None


def steps(text: str) -> list[Step]:
    """The steps of a document, in order."""
    found = []
    for language, block in BLOCK.findall(text):
        if language == "console":
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                found.append(Step("sh", *_command(part)))
        elif language in ("sh", "python"):
            found.append(Step(language, block.strip()))
    return found


def _command(part: str) -> tuple[str, str]:
    """Parts a command from its output; it goes on after a backslash and within quotes."""
    lines = part.split("\n")
    end = 0
    while lines[end].endswith("\\") or _is_open("\n".join(lines[: end + 1])):
        end += 1
    return "\n".join(lines[: end + 1]), "\n".join(lines[end + 1 :])


def _is_open(command: str) -> bool:
    """Tells whether a command ends within quotes."""
    try:
        shlex.split(command)
    except ValueError:
        return True
    return False


@dataclass
class Shell:
    """A shell in a folder that has what a reader's has: the repository, its environment."""

    folder: Path
    servers: list[ServiceProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("GRAFT_", "MAKE"))}
        self.process = subprocess.Popen(
            ["bash", "--norc"],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**own, "COLUMNS": "100", "NO_COLOR": "1"},
        )

    def run(self, command: str) -> tuple[str, int]:
        """Runs a command in the shell; returns its output and its exit code."""
        if command.startswith(SERVER):
            self._serve(command)
            return "", 0
        if command.startswith(DEMO):
            command = command.replace(DEMO, INSTALLED, 1)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        end = "-- end of the command --"
        self.process.stdin.write(
            f"{{ {command}\n}} </dev/null\n"
            f"_code=$?; printf '\\n{end} %d\\n' $_code\n(exit $_code)\n"
        )
        self.process.stdin.flush()
        late = threading.Timer(GUARD_S, self.process.kill)
        late.start()
        lines = []
        try:
            for line in self.process.stdout:
                if line.startswith(end):
                    return "".join(lines), int(line.removeprefix(end))
                lines.append(line)
        finally:
            late.cancel()
        raise AssertionError(f"the shell ended in {command!r}:\n{''.join(lines)}")

    def program(self, text: str) -> tuple[str, int]:
        """Runs a Python program; returns its output and its exit code."""
        if self.servers:
            text = text.replace("localhost:50051", self.servers[-1].address)
        file = self.folder / "program.py"
        file.write_text(text)
        return self.run(f"{shlex.quote(sys.executable)} {file.name}")

    def _serve(self, command: str) -> None:
        self.end_server()
        flags = shlex.split(command.removeprefix(SERVER).replace("\\\n", " "))
        flags = [f"--precision={PRECISION}", *flags]
        server = ServiceProcess(self.folder / "data", *flags, cwd=self.folder)
        self.servers.append(server)
        port = server.address.rpartition(":")[2]
        assert self.run(f"export GRAFT_SERVER=localhost:{port}")[1] == 0

    def end_server(self) -> None:
        """Ends the server that runs."""
        if self.servers and self.servers[-1].process.poll() is None:
            assert self.servers[-1].end() == 0

    def end(self) -> None:
        """Ends what runs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(GUARD_S)
        self.process.stdout.close()
        self.end_server()


@contextlib.contextmanager
def shell(folder: Path) -> Iterator[Shell]:
    """Gives a shell in the folder."""
    for name in ("Makefile", "clients", "proto", "pyproject.toml"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    if not (folder / ".venv").exists():
        (folder / ".venv").symlink_to(sys.prefix)
    opened = Shell(folder)
    try:
        yield opened
    finally:
        opened.end()


def follow(document: Path, folder: Path) -> list[str]:
    """Does what the document says in the folder; returns what was not as it shows."""
    wrong = []
    todo = steps(document.read_text("utf-8"))
    with shell(folder) as opened:
        for step, following in zip(todo, [*todo[1:], None], strict=True):
            run = opened.program if step.language == "python" else opened.run
            output, code = run(step.command)
            may_fail = (following and following.command == "echo $?") or (
                step.shown is not None and "\ngraft: " in f"\n{step.shown}"
            )
            if code and not may_fail:
                wrong.append(f"{step.command}\nended with {code}:\n{output}")
            elif step.shown is not None and not is_as_shown(step.shown, output):
                wrong.append(f"{step.command}\nprinted:\n{output}\nshown:\n{step.shown}")
    return wrong
