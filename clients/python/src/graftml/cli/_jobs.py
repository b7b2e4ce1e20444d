"""`graft jobs`."""

import argparse
from typing import Any

from graftml import Client, RankingHandle
from graftml.cli import _listing, _rank
from graftml.cli._output import Output, clock, percent
from graftml.cli._output import times as stage_times
from graftml.cli._watching import Watching, figures_of, follow, tell
from graftml.types import Job

_STATES = ["queued", "running", "succeeded", "failed", "cancelled"]


def add(commands: Any) -> None:
    """The commands and their options."""
    jobs = _listing.add(
        commands,
        "jobs",
        "List, watch, cancel and delete jobs",
        "List jobs, newest first",
        run_list,
        _add_filters,
        _listing.add_labels,
    )
    for name, text, run in (
        ("get", "Describe one job", run_get),
        ("watch", "Follow a job to its end; Ctrl-C stops watching", run_watch),
        ("cancel", "Cancel a job", run_cancel),
        ("delete", "Delete a job that has ended; its version stays", run_delete),
    ):
        jobs.add(name, text, run).add_argument("job_id", metavar="JOB")


def _add_filters(parser: Any) -> None:
    parser.add_argument(
        "--state",
        action="append",
        choices=_STATES,
        default=_listing.NOT_GIVEN,
        help="only jobs in this state; repeatable, for any of several",
    )
    parser.add_argument("--model", default=_listing.NOT_GIVEN, help="only jobs of this model")


def run_list(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Lists jobs."""
    states: list[str] = _listing.given(arguments, "state", [])
    labels: dict[str, str] = dict(_listing.given(arguments, "label", []))
    jobs = client.list_jobs(
        states=states, model=_listing.given(arguments, "model", ""), labels=labels
    )
    columns = ["job", "model", "state", "created", "time", "version", "progress"]
    return _listing.show(jobs, columns, _row, arguments, output, kinds="jobs", is_prose=True)


def _row(job: Job) -> list[object]:
    why = job.error.message if job.error else _progress(job)
    return [
        job.job_id,
        job.model or job.kind,
        "candidate" if job.is_candidate else job.state.lower(),
        job.create_time,
        None if job.elapsed_s is None else clock(job.elapsed_s),
        job.version,
        why,
    ]


def _progress(job: Job) -> str | None:
    """Returns a job's progress as the bar shows it, at the time of the newest event."""
    progress = job.progress
    if progress is None:
        return None
    figures = figures_of(progress)
    times = stage_times(progress.elapsed_s, progress.remaining_s)
    return ", ".join(
        filter(None, (f"{progress.stage} {percent(progress.fraction)}", figures, times))
    )


def run_get(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Describes one job."""
    output.thing(client.get_job(arguments.job_id))
    return 0


def run_watch(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Follows a job."""
    job = client.job(arguments.job_id)
    if job.job.kind == "ranking":
        with Watching(output) as watching:
            RankingHandle(client, job.job).wait(on_event=watching.event)
        ended = job.refresh()
        if output.is_json or ended.ranking is None:
            output.thing(ended)
        else:
            _rank.show(ended.ranking, output)
        return 0
    code, version = follow(job, output)
    if version is not None and version.is_candidate and not output.is_json:
        tell(version, output)
    return code


def run_cancel(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Cancels a job."""
    job = client.cancel_job(arguments.job_id)
    if output.is_json:
        output.emit(job)
    else:
        state = "will be cancelled" if job.cancel_requested else job.state.lower()
        output.line(f"job {job.job_id}: {state}")
    return 0


def run_delete(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Deletes a job."""
    client.delete_job(arguments.job_id)
    return output.deleted(arguments.job_id)
