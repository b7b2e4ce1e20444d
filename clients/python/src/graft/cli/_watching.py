"""Shows a job as it gets on: JSON lines, a bar on a terminal, or a line an event elsewhere."""

import sys
from types import TracebackType
from typing import Any, Self

from graft import types
from graft._jobs import JobHandle
from graft.cli._output import Output


class Watching:
    """Told of a job's events; the bar lives as long as its `with`."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar: Any = None
        self._task: Any = None
        self._figures = ""

    def __enter__(self) -> Self:
        if not self._output.is_json and self._output.console.is_terminal:
            from rich.progress import (  # noqa: PLC0415 - only where people read
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.fields[stage]:<10}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self._output.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, stage="queued", figures="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def uploaded(self, sent: int, total: int | None) -> None:
        """Told of an upload's bytes."""
        if self._bar is not None:
            fraction = sent / total if total else 0.0
            self._bar.update(
                self._task,
                completed=fraction,
                stage="uploading",
                figures=f"{sent / 2**20:.1f} MiB",
            )

    def event(self, event: types.JobEvent) -> None:
        """Told of a job's event."""
        if self._output.is_json:
            self._output.emit(event)
            return
        payload = event.payload
        text = describe(payload)
        if self._bar is None:
            if text:
                self._output.line(text)
            return
        if isinstance(payload, types.Progress):
            self._bar.update(self._task, completed=payload.fraction, stage=payload.stage)
        elif isinstance(payload, types.EpochMetrics):
            self._bar.update(
                self._task,
                completed=payload.epoch / max(1, payload.epochs),
                stage="training",
                figures=text,
            )
        elif isinstance(payload, types.StateChanged):
            self._bar.update(self._task, stage=payload.state.lower())
        elif text:
            self._bar.console.print(text)


def describe(payload: types.EventPayload) -> str:
    """An event in one line for people."""
    match payload:
        case types.StateChanged(state=state):
            text = state.lower()
        case types.Progress():
            detail = f" ({payload.detail})" if payload.detail else ""
            text = f"{payload.stage} {payload.fraction:.0%}{detail}"
        case types.EpochMetrics():
            text = (
                f"epoch {payload.epoch}/{payload.epochs}: loss {payload.validation_loss:.3f}, "
                f"accuracy {payload.validation_accuracy:.1%}, {_clock(payload.eta_s)} left"
            )
        case types.DataSummary():
            images = sum(c.train + c.validation + c.test for c in payload.classes)
            text = f"{images} images of {len(payload.classes)} classes"
            if payload.summary.left_out_count:
                text += f"; {summary_lines(payload.summary)}"
        case types.Note():
            text = f"{payload.level}: {payload.text}"
        case types.VersionPublished():
            text = (
                f"{payload.model} version {payload.version}: {payload.validation_accuracy:.1%} of "
                f"{payload.validation_count} validation images right"
            )
            if payload.is_candidate:
                text += "; kept as a candidate"
        case _:
            text = ""
    return text


_SHOWN = 5


def summary_lines(summary: types.ReadSummary) -> str:
    """What was left out, and the first names of it, for people."""
    rows = [f"  {file.path}: {file.detail}" for file in summary.files[:_SHOWN]]
    if (more := summary.left_out_count - len(rows)) > 0:
        rows.append(f"  and {more} more")
    nested = ""
    if summary.nested_count:
        nested = f" ({summary.nested_count} of them from folders below their class)"
    return "\n".join([f"{summary}{nested}", *rows])


def follow(job: JobHandle, output: Output, timeout_s: float | None = None) -> types.Version | None:
    """Watches a job to its end; None when the user stopped watching (the job goes on)."""
    try:
        with Watching(output) as watching:
            version = job.wait(timeout_s, on_event=watching.event)
    except KeyboardInterrupt:
        print(
            f"graft: detached; job {job.job_id} goes on. Watch it: graft jobs watch {job.job_id} "
            f"- cancel it: graft jobs cancel {job.job_id}",
            file=sys.stderr,
        )
        return None
    if output.is_json:
        output.emit({"type": "version", **vars(version)})
    return version


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
