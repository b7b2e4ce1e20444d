"""Shows an upload and a job as they get on.

JSON lines, a bar on a terminal, or one line a stage elsewhere; `--quiet` leaves out the
last two.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from graftml import JobHandle, types
from graftml.cli._output import Code, Output

if TYPE_CHECKING:
    from graftml.cli._bar import Bar

_PACE_S = 1.0
"""An upload that is younger says nothing of how long it takes."""
_CHECKED = "the server checks the images"


class Watching:
    """Shows an upload's bytes and a job's events; the bar is drawn as long as the `with` lasts."""

    def __init__(
        self,
        output: Output,
        clock: Callable[[], float] = time.monotonic,
        checks: str = _CHECKED,
    ) -> None:
        self._output, self._checks, self._clock = output, checks, clock
        self._bar: Bar | None = None
        self._stage = ""
        self._lines: set[str] = set()
        self._figures = ""
        self._upload_began: float | None = None
        self._is_candidate = False

    def __enter__(self) -> Self:
        output = self._output
        if not (output.is_json or output.is_quiet) and output.console.is_terminal:
            from graftml.cli._bar import Bar  # noqa: PLC0415 - rich, only where people read

            self._bar = Bar(output.console)
            self._bar.start()
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
        """Shows an upload's bytes on a terminal; after the last one the server is at work."""
        if self._upload_began is None or (total and self._stage == "checking" and sent < total):
            self._upload_began = self._clock()
        is_sent = total is not None and sent >= total
        mib = f"{sent / 2**20:.1f}"
        figures = f"{mib} MiB" if total is None else f"{mib} of {total / 2**20:.1f} MiB"
        if self._bar is None:
            return
        if is_sent:
            if self._stage != "checking":
                self._show("checking", None, self._checks, 0.0, None)
            return
        elapsed_s = self._clock() - self._upload_began
        has_pace = total is not None and sent > 0 and elapsed_s >= _PACE_S
        self._show(
            "uploading",
            sent / total if total else None,
            figures,
            elapsed_s,
            elapsed_s * (total - sent) / sent if has_pace and total else None,
        )

    def event(self, event: types.JobEvent) -> None:
        """Shows a job's event."""
        if self._output.is_json:
            self._output.emit(event)
            return
        match event.payload:
            case types.Progress() as progress:
                self._progress(progress)
            case types.EpochMetrics() as epoch:
                # Beside the bar until the next one; where lines are printed it is too much.
                self._figures = describe(epoch)
            case types.StateChanged() as change:
                self._changed(change)
            case types.VersionPublished() as published:
                self._is_candidate = published.is_candidate
                self._print(describe(published))
            case types.Note(level="info") as note:
                # A few a job, what was decided among them.
                if not self._output.is_quiet:
                    self._print(describe(note))
            case types.DataSummary() as data:
                for line in data_lines(data):
                    self._print(line)
            case payload:
                self._print(describe(payload))

    def _progress(self, progress: types.Progress) -> None:
        if self._bar is None:
            self._line(progress.stage, progress.stage)
            return
        figures = figures_of(progress)
        if progress.stage == "training" and self._figures:
            figures += f"; {self._figures}"
        self._show(
            progress.stage, progress.fraction, figures, progress.elapsed_s, progress.remaining_s
        )

    def _changed(self, change: types.StateChanged) -> None:
        state = change.state.lower()
        if not change.state.is_final:
            self._lines.clear()
        if change.state is types.JobState.SUCCEEDED and self._is_candidate:
            # The job did; what it was for did not happen.
            state = "ended: the version is a candidate, no alias moved to it"
        if self._bar is None:
            self._line(state, state)
        elif change.state.is_final:
            self._show(change.state.lower().replace("succeeded", "ended"), 1.0, "", 0.0, None)
        else:
            self._show(state, None, "", 0.0, None)

    def _show(
        self,
        stage: str,
        fraction: float | None,
        figures: str,
        elapsed_s: float,
        remaining_s: float | None,
    ) -> None:
        from graftml.cli._bar import Shown  # noqa: PLC0415

        assert self._bar is not None
        self._stage = stage
        self._bar.show(Shown(stage, fraction, figures, elapsed_s, remaining_s))

    def _line(self, stage: str, text: str) -> None:
        """Prints one line for a stage, once."""
        if stage not in self._lines and not (self._output.is_json or self._output.is_quiet):
            self._output.line(text)
        # Stages may take turns: each has its line once in an attempt.
        self._lines.add(stage)

    def _print(self, text: str) -> None:
        """Prints a line that stays, with --quiet too."""
        if not text:
            return
        if self._bar is not None:
            self._bar.print(text)
        else:
            self._output.line(text)


def figures_of(progress: types.Progress) -> str:
    """Returns what a stage is at, and its steps."""
    steps = f"{progress.step} of {progress.steps}" if progress.steps else ""
    unit = {"features": "images", "training": "steps"}.get(progress.stage, "")
    return ", ".join(filter(None, (progress.detail, f"{steps} {unit}".rstrip() if steps else "")))


def describe(payload: types.EventPayload) -> str:
    """Returns an event in one line for people; "" for one that is shown otherwise."""
    match payload:
        case types.EpochMetrics():
            return f"epoch {payload.epoch}/{payload.epochs}: {_figures_of(payload)}"
        case types.Note():
            return f"{payload.level}: {payload.text}"
        case types.VersionPublished():
            text = f"{payload.model} version {payload.version}: {payload.measured}"
            return text + ("; kept as a candidate" if payload.is_candidate else "")
        case _:
            return ""


def _figures_of(epoch: types.EpochMetrics) -> str:
    if epoch.validation_loss is None or epoch.validation_accuracy is None:
        return f"loss {epoch.train_loss:.3f}, accuracy {epoch.train_accuracy:.1%}, as trained"
    return f"loss {epoch.validation_loss:.3f}, accuracy {epoch.validation_accuracy:.1%}"


_SHOWN = 5
_SHOWN_CLASSES = 8


def data_lines(data: types.DataSummary) -> list[str]:
    """Returns a job's images and classes in one line, then what was left out and warned of."""
    images = sum(c.train + c.validation + c.test for c in data.classes)
    names = [c.label for c in data.classes[:_SHOWN_CLASSES]]
    more = len(data.classes) - len(names)
    listed = ", ".join(names) + (f" and {more} more" if more else "")
    text = f"{images} images of {len(data.classes)} classes" + (f" ({listed})" if names else "")
    rows: list[str] = []
    if data.summary.left_out_count:
        first, *rows = summary_lines(data.summary)
        text += f"; {first}"
    return [text, *rows, *(f"warning: {warning}" for warning in data.summary.warnings)]


def summary_lines(summary: types.ReadSummary) -> list[str]:
    """Returns the lines that say what was left out, with the first names, for people."""
    rows = [f"  {file.path}: {file.detail}" for file in summary.files[:_SHOWN]]
    if (more := summary.left_out_count - len(rows)) > 0:
        rows.append(f"  and {more} more")
    nested = ""
    if summary.nested_count:
        nested = f" ({summary.nested_count} of them from folders below their class)"
    return [f"{summary}{nested}", *rows]


def follow(job: JobHandle, output: Output) -> tuple[Code, types.Version | None]:
    """Watches a job to its end; no version when the user stopped watching (the job goes on)."""
    try:
        with Watching(output) as watching:
            version = job.wait(on_event=watching.event)
    except KeyboardInterrupt:
        output.complain(
            f"detached; job {job.job_id} goes on. Watch it: graft jobs watch {job.job_id} "
            f"- cancel it: graft jobs cancel {job.job_id}",
            Code.INTERRUPTED,
        )
        return Code.INTERRUPTED, None
    if output.is_json:
        output.emit({"type": "version", **vars(version)})
    elif not version.is_candidate:
        for check in version.gate_checks:
            if check.verdict == "undecided":
                output.warn(f"undecided, and let pass as asked: {check.detail}")
    return (Code.GATE_REFUSED if version.is_candidate else Code.OK), version


def tell(version: types.Version, output: Output) -> None:
    """Says what can be done with a version; of a candidate, why it is one."""
    model, number = version.model, version.version
    if not version.calibrated:
        note = f": {version.calibration_note}" if version.calibration_note else ""
        output.line(f"its probabilities are not calibrated{note}")
    if version.headline is None and version.method == "domain_adaptation":
        output.line(
            "To have it measured, give a --target with a folder per class, and --evaluate-on-target"
        )
    if not version.is_candidate:
        output.line(f"Try it: graft predict {model} IMAGE")
        return
    output.line(f"{model} version {number} did not pass its gate and is kept as a candidate:")
    for check in version.gate_checks:
        if not check.passed:
            output.line(f"- {check.detail}")
    output.line(
        f"Try it: graft predict {model}:{number} IMAGE - publish it all the same: graft promote "
        f"{model} {number}"
    )
