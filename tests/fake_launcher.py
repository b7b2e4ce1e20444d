"""A scriptable stand-in for trainer processes, for tests: no process, no torch."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.contract import ExitCode, Record, Spec


@dataclass
class Script:
    """What one trainer does: gives `records`, then ends with `exit_code`.

    `before_last` runs right before the last record, as a place to write the
    artifacts. With `hangs` it gives its records and then neither speaks nor
    ends until it is stopped; `starts_after` holds its start back.
    """

    records: Sequence[Record] = ()
    exit_code: int = ExitCode.OK
    before_last: Callable[[Any], None] | None = None
    hangs: bool = False
    fails_to_start: bool = False
    starts_after: asyncio.Event | None = None
    words: list[str] = field(default_factory=list)


class FakeTrainer:
    """Plays one script."""

    def __init__(self, spec: Any, script: Script) -> None:
        self.spec = spec
        self.stopped = asyncio.Event()
        self.said_all = asyncio.Event()
        self._script = script
        self._next = 0
        self._exit_code: int | None = None

    async def next_record(self) -> Record | None:
        """The script's next record."""
        script = self._script
        if self._next < len(script.records):
            if self._next == len(script.records) - 1 and script.before_last is not None:
                script.before_last(self.spec)
            self._next += 1
            return script.records[self._next - 1]
        self.said_all.set()
        if script.hangs:
            await self.stopped.wait()
        return None

    async def wait(self) -> int:
        """The script's exit code, or STOPPED when it was stopped first."""
        if self._script.hangs:
            await self.stopped.wait()
        return self._exit_code if self._exit_code is not None else self._script.exit_code

    async def stop(self, grace_s: float) -> None:
        """Ends at once."""
        if self._script.hangs and self._exit_code is None:
            self._exit_code = ExitCode.STOPPED
        self.stopped.set()

    def last_words(self) -> list[str]:
        """The script's."""
        return self._script.words


class FakeLauncher:
    """Gives each start the next script; the last one is used again."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts) or [Script()]
        self.started: asyncio.Queue[FakeTrainer] = asyncio.Queue()
        self.starting = asyncio.Event()
        self.trainers: list[FakeTrainer] = []

    async def start(self, spec: Spec, folder: Path) -> FakeTrainer:
        """Starts no process; raises OSError where the script says so."""
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        if script.fails_to_start:
            raise OSError("no process can be had")
        if script.starts_after is not None:
            self.starting.set()
            await script.starts_after.wait()
        trainer = FakeTrainer(spec, script)
        self.trainers.append(trainer)
        self.started.put_nowait(trainer)
        return trainer
