"""Jobs held against their events, their versions, their datasets and their folders.

Reads and changes nothing. Every function gives what is broken, a line each, one
job in memory at a time.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from service.domain import TRANSITIONS, JobState
from service.jobs import events
from service.jobs.events import Payload, Published, StateChanged
from service.jobs.rows import BESIDE_REQUEST_BYTES
from service.storage.database import Connection


def job_problems(connection: Connection) -> Iterator[str]:
    """Each job against its events, by which its whole life can be told again."""
    rows = connection.execute(
        "SELECT jobs.job_id, tenant, model, state, start_time_s, end_time_s, version,"
        " error_reason, last_sequence, attempts, crashes, tenant_of(model) AS owner,"
        " sequence, payload_json"
        " FROM jobs LEFT JOIN job_events ON job_events.job_id = jobs.job_id"
        " ORDER BY jobs.job_id, sequence"
    )
    for job_id, found in itertools.groupby(rows, key=lambda row: row["job_id"]):
        for what in _problems(list(found)):
            yield f"{job_id}: {what}"


def size_problems(connection: Connection) -> Iterator[str]:
    """What is noted of the size of each tenant's jobs."""
    for row in connection.execute(
        "SELECT tenant, SUM(noted) AS noted, SUM(actual) AS actual FROM"
        " (SELECT tenant, size_bytes AS noted, 0 AS actual FROM job_bytes UNION ALL"
        " SELECT tenant, 0, LENGTH(CAST(request_json AS BLOB)) + LENGTH(message) + ?"
        " FROM jobs)"
        " GROUP BY tenant HAVING SUM(noted) <> SUM(actual)",
        (BESIDE_REQUEST_BYTES,),
    ):
        yield (
            f"tenant {row['tenant']}: its jobs take {row['actual']} bytes, and {row['noted']} are "
            "noted"
        )


def version_problems(connection: Connection) -> Iterator[str]:
    """Versions without the job that made them, and jobs whose version was lost.

    A version may have been deleted since; then its number was given all the same.
    """
    for row in connection.execute(
        "SELECT v.model, v.version, v.job_id, j.state, j.model AS made, j.version AS number"
        " FROM versions AS v LEFT JOIN jobs AS j ON j.job_id = v.job_id"
        " WHERE j.job_id IS NULL OR j.state <> 'SUCCEEDED' OR j.version <> v.version"
        " OR j.model <> v.model"
    ):
        told = (
            "which is not known"
            if row["state"] is None
            else f"which is {row['state']} with version {row['number']} of {row['made']}"
        )
        yield f"version {row['version']} of {row['model']}: was made by {row['job_id']}, {told}"
    for row in connection.execute(
        "SELECT j.job_id, j.model, j.version FROM jobs AS j JOIN models AS m ON m.name = j.model"
        " WHERE j.state = 'SUCCEEDED' AND j.version > m.last_version"
        " AND m.create_time_s <= j.end_time_s"
    ):
        yield f"{row['job_id']}: made version {row['version']} of {row['model']}, which was lost"


def dataset_use_problems(connection: Connection) -> Iterator[str]:
    """Datasets that a job waits for and that are gone, or that are another tenant's."""
    used = (
        "(SELECT job_id, dataset_id FROM jobs WHERE dataset_id IS NOT NULL"
        " UNION SELECT job_id, dataset_id FROM job_datasets)"
    )
    for row in connection.execute(
        f"SELECT j.job_id, j.state, u.dataset_id FROM jobs AS j JOIN {used} AS u USING (job_id)"  # nosec B608  # noqa: S608 - our words
        " LEFT JOIN datasets AS d ON d.dataset_id = u.dataset_id"
        " WHERE j.state IN ('QUEUED', 'RUNNING') AND d.dataset_id IS NULL"
    ):
        yield (
            f"{row['job_id']}: is {row['state']} and needs dataset {row['dataset_id']}, which is "
            "not there"
        )
    for row in connection.execute(
        "SELECT j.job_id, j.tenant, d.dataset_id, d.tenant AS owner"  # nosec B608  # noqa: S608 - our words
        f" FROM jobs AS j JOIN {used} AS u USING (job_id)"
        " JOIN datasets AS d ON d.dataset_id = u.dataset_id WHERE d.tenant <> j.tenant"
    ):
        yield (
            f"{row['job_id']}: is of tenant {row['tenant']} and uses dataset {row['dataset_id']} "
            f"of tenant {row['owner']}"
        )


def leftovers(connection: Connection, work_dir: Path) -> Iterator[str]:
    """Jobs under way and folders of jobs that have ended. None after a clean stop."""
    for row in connection.execute("SELECT job_id FROM jobs WHERE state = 'RUNNING'"):
        yield f"{row['job_id']}: is RUNNING, and no server works on it"
    try:
        entries = os.scandir(work_dir)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            row = connection.execute(
                "SELECT state FROM jobs WHERE job_id = ?", (entry.name,)
            ).fetchone()
            if row is None:
                yield f"work/{entry.name}: was left behind by no known job"
            elif row["state"] not in (JobState.QUEUED, JobState.RUNNING):
                yield f"work/{entry.name}: was left behind; its job is {row['state']}"


def _problems(rows: Sequence[Any]) -> Iterator[str]:
    job = rows[0]
    kept = [row for row in rows if row["sequence"] is not None]
    numbers = [row["sequence"] for row in kept]
    if numbers != list(range(1, job["last_sequence"] + 1)):
        yield (
            f"has {len(numbers)} events, numbered {_ranges(numbers)}, and its last number is "
            f"{job['last_sequence']}"
        )
    payloads: list[Payload] = []
    for row in kept:
        try:
            payloads.append(events.decode(row["payload_json"]))
        except msgspec.DecodeError as error:
            yield f"its event {row['sequence']} cannot be read: {error}"
    yield from _state_problems(job, payloads)
    if job["tenant"] != job["owner"]:
        yield f"is of tenant {job['tenant']}, and its model {job['model']} is not"


def _state_problems(job: Any, payloads: Sequence[Payload]) -> Iterator[str]:
    if job["state"] not in list(JobState):
        yield f"is {job['state']}, which is no state"
        return
    state = JobState(job["state"])
    states = [payload.state for payload in payloads if isinstance(payload, StateChanged)]
    for before, after in itertools.pairwise(states):
        if after not in TRANSITIONS.get(before, ()):
            yield f"its events tell of {after} after {before}"
    if states[:1] != [JobState.QUEUED]:
        yield f"its first state was {states[0] if states else 'none'}, not QUEUED"
    if states and states[-1] is not state:
        yield f"is {state}, and its last event of a state tells of {states[-1]}"
    last = payloads[-1] if payloads else None
    if state.is_final and not (isinstance(last, StateChanged) and last.state.is_final):
        yield f"is {state}, and its last event does not say so"
    if (runs := states.count(JobState.RUNNING)) != job["attempts"]:
        yield f"was RUNNING {runs} times by its events, and had {job['attempts']} attempts"
    if job["crashes"] > job["attempts"]:
        yield f"crashed {job['crashes']} times in {job['attempts']} attempts"
    if (job["start_time_s"] is not None) != (job["attempts"] > 0):
        yield f"has start time {job['start_time_s']} after {job['attempts']} attempts"
    if (job["end_time_s"] is not None) != state.is_final:
        yield f"is {state} with end time {job['end_time_s']}"
    if (job["error_reason"] is not None) != (state is JobState.FAILED):
        yield f"is {state} with the reason {job['error_reason']}"
    published = [payload.version for payload in payloads if isinstance(payload, Published)]
    if published != ([job["version"]] if state is JobState.SUCCEEDED else []):
        yield f"is {state} with version {job['version']}, and its events tell of {published}"


def _ranges(numbers: Sequence[int]) -> str:
    """As "1-4, 6"."""
    if not numbers:
        return "not at all"
    parts, first = [], numbers[0]
    for before, after in itertools.pairwise([*numbers, None]):
        if before is not None and after != before + 1:
            parts.append(f"{first}" if first == before else f"{first}-{before}")
            first = after if after is not None else first
    return ", ".join(parts[:10])
