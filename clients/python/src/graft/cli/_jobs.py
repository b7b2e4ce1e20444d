"""`graft jobs`."""

import argparse
from typing import Any

from graft.cli._output import Output
from graft.cli._watching import follow
from graft.client import Client
from graft.types import Job

_INTERRUPTED = 130
_STATES = ["queued", "running", "succeeded", "failed", "cancelled"]


def add(commands: Any) -> None:
    """The commands and their options."""
    jobs = commands.group("jobs", "List, watch and cancel jobs", run_list)
    listing = jobs.add("list", "Jobs, newest first", run_list)
    listing.add_argument("--state", action="append", choices=_STATES, default=[])
    listing.add_argument("--model", default="")
    for name, text, run in (
        ("get", "Describe one job", run_get),
        ("watch", "Follow a job to its end; Ctrl-C stops watching", run_watch),
        ("cancel", "Ask for a job's end", run_cancel),
    ):
        jobs.add(name, text, run).add_argument("job_id", metavar="JOB")


def run_list(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Lists jobs."""
    states, model = getattr(arguments, "state", []), getattr(arguments, "model", "")
    columns = ["job", "model", "state", "created", "version", "progress"]
    output.items(client.list_jobs(states=states, model=model), columns, _row)
    return 0


def _row(job: Job) -> list[object]:
    progress = f"{job.progress.stage} {job.progress.fraction:.0%}" if job.progress else None
    why = job.error.message if job.error else progress
    return [job.job_id, job.model, job.state.lower(), job.create_time, job.version, why]


def run_get(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Describes one job."""
    output.thing(client.get_job(arguments.job_id))
    return 0


def run_watch(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Follows a job."""
    version = follow(client.job(arguments.job_id), output)
    return _INTERRUPTED if version is None else 0


def run_cancel(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Cancels a job."""
    job = client.cancel_job(arguments.job_id)
    if output.is_json:
        output.emit(job)
    else:
        state = "will be cancelled" if job.cancel_requested else job.state.lower()
        output.line(f"job {job.job_id}: {state}")
    return 0
