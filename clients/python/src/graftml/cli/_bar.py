"""The bar on a terminal: one stage at a time, with a clock that goes on while nothing arrives."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from graftml._display import escaped
from graftml.cli._output import percent, times


@dataclass(frozen=True)
class Shown:
    """A stage, how far it is and how long it takes, as the bar shows it."""

    stage: str
    fraction: float | None = None
    """None where that is not known: the bar only moves."""
    figures: str = ""
    elapsed_s: float = 0.0
    remaining_s: float | None = None


class Bar:
    """Draws from `start` to `stop`; `show` may be called at any time, from one thread."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown, self._since = Shown("queued"), clock()
        self._bar = Progress(
            # In a narrow terminal the figures are cut, and nothing else.
            TextColumn("{task.fields[stage]:<10}", markup=False, table_column=_whole(10)),
            BarColumn(20),
            TextColumn("{task.fields[done]:>4}", markup=False, table_column=_whole(4)),
            TextColumn(
                "{task.fields[figures]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            _Clock(self.times, table_column=_whole(_CLOCK_CHARS)),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, stage="queued", done="", figures="")

    def start(self) -> None:
        """Begins to draw."""
        self._bar.start()

    def stop(self) -> None:
        """Ends drawing; what was drawn last stays."""
        self._bar.stop()

    def show(self, shown: Shown) -> None:
        """Draws this from now on."""
        self._shown, self._since = shown, self._clock()
        done = shown.fraction
        if done is None:
            # rich takes a total of None for "as before".
            self._bar.reset(self._task, total=None)
        self._bar.update(
            self._task,
            total=None if done is None else 1.0,
            completed=done or 0.0,
            stage=escaped(shown.stage),
            done="" if done is None else percent(done),
            figures=escaped(shown.figures),
        )

    def print(self, text: str) -> None:
        """Prints one line above the bar."""
        self._bar.console.print(escaped(text), soft_wrap=True)

    def times(self) -> str:
        """Returns the time that the stage has taken, and what remains where that is known."""
        passed_s = self._clock() - self._since
        return times(
            self._shown.elapsed_s + passed_s,
            None if self._shown.remaining_s is None else self._shown.remaining_s - passed_s,
        )


_CLOCK_CHARS = 22
"""Of "12:34, about 1:23 left"."""


def _whole(chars: int) -> Column:
    return Column(no_wrap=True, min_width=chars)


class _Clock(ProgressColumn):
    def __init__(self, times: Callable[[], str], table_column: Column) -> None:
        super().__init__(table_column)
        self._times = times

    def render(self, task: Task) -> Text:  # noqa: ARG002 - what it shows is not the task's
        """Returns the clock; rich asks for it several times a second, whatever arrives."""
        return Text(self._times())
