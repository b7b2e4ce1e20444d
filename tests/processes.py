"""What the server has done in a process of its own, done in this one.

For tests of something else: a process takes as long as all that they do. That what is sent is read
and checked apart, tests/unit/ingest shows.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from service.ingest import backbone_check, reader
from service.ingest.backbone_process import Asked, BackboneChecks, Checked, Task
from service.ingest.process import ReaderProcesses


def spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has datasets read and files of backbones checked in this process."""
    monkeypatch.setattr(backbone_check, "_allow", lambda _: None)
    monkeypatch.setattr(BackboneChecks, "check", _check)
    monkeypatch.setattr(ReaderProcesses, "read", _read)


def check_here(source: Path, target: Path, asked: Asked) -> Checked:
    """Checks one file; the bound on memory is the caller's to take away."""
    task = Task(
        source=str(source), target=str(target), asked=asked, file_bytes=0, memory_bytes=0, cpu_s=0,
        niceness=0,
    )  # fmt: skip
    return backbone_check._checked(task)


def _check(_: BackboneChecks, source: Path, target: Path, asked: Asked, *__: object) -> Checked:
    return check_here(source, target, asked)


def _read(
    readers: ReaderProcesses,
    request: reader.ReadRequest,
    go_on: Callable[[], None] = lambda: None,
    on_progress: reader.OnProgress = reader.untold,
) -> reader.Read:
    with readers._place(request.tenant, go_on):
        return reader.read(request, reader.inspect_here, 1, go_on, on_progress)
