"""How a soak ended: nothing lost, nothing piled up, every crash a kill; tables for people."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from graftml import Client

from bench.soak.book import Book
from bench.soak.server import Sample, Tenant

JOBS_TIMEOUT_S = 180.0
MAX_REFUSED_PART = 0.01
"""Of the steady load, which is well below what the server can carry."""
MAX_MORE_DESCRIPTORS = 40
MAX_MORE_THREADS = 20
"""At the end, when nothing is asked any more, against the start of the load."""
MAX_GROWTH_PERCENT = 25.0
MAX_GROWTH_MIB = 64.0
"""Both: of the server's own memory, the last fifth of a soak against its second."""
MIN_GROWTH_S = 590.0
"""In less, what is warmed up once weighs as much as what leaks."""
_STEADY_PART = 0.1
"""Of the growth that each fifth has, at least, where it is a leak's and not a step's."""


def nothing_is_lost(client: Client, book: Book, tenant: Tenant) -> None:
    """Finds accepted jobs that are unknown or have not ended, and versions that are gone."""
    deadline = time.monotonic() + JOBS_TIMEOUT_S
    while time.monotonic() < deadline and any(client.list_jobs(states=("QUEUED", "RUNNING"))):
        time.sleep(0.2)
    found = {job.job_id: job for job in client.list_jobs()}
    for job_id, mine in book.jobs.items():
        if mine.tenant != tenant.name:
            continue
        job = found.get(job_id)
        if job is None:
            book.find("a job was lost", job_id)
        elif not job.state.is_final:
            book.find("a job never ended", f"{job_id} is {job.state}")
        elif not mine.state:
            book.job_ended(job_id, job.state.value, job.attempts)
        else:
            same = job.state == mine.state
            book.expect("a job changed after its end", same, f"{job_id}: {mine.state}, {job.state}")
    for (name, model), versions in book.versions.items():
        if name == tenant.name and versions:
            there = {version.version for version in client.list_versions(model)}
            book.expect("a version was lost", versions <= there, f"{model}: {versions - there}")


def load_is_carried(book: Book, figures: dict[str, Any]) -> None:
    """Finds wrong answers to the steady load, and refusals that are not rare."""
    outcomes: dict[str, int] = figures["outcomes"]
    refused = outcomes["refused"] + outcomes["expired"]
    most = MAX_REFUSED_PART * sum(outcomes.values())
    codes = figures["codes"]
    book.expect("the steady load was answered wrongly", outcomes["other"] == 0, codes)
    book.expect("too much of the steady load was refused", refused <= most, codes)
    book.expect("the steady load got no answer", outcomes["ok"] > 0, codes)


def nothing_piles_up(book: Book, samples: Sequence[Sample]) -> None:
    """Finds more file descriptors or threads than at the start, and memory that goes on growing."""
    if len(samples) < 2:
        book.find("the server was not looked at", f"{len(samples)} samples")
        return
    first, last = samples[0], samples[-1]
    for name, before, after, most in (
        ("file descriptors", first.descriptors, last.descriptors, MAX_MORE_DESCRIPTORS),
        ("threads", first.threads, last.threads, MAX_MORE_THREADS),
    ):
        book.expect(f"more {name} at the end", after <= before + most, f"{before}, then {after}")
    if last.at_s - first.at_s < MIN_GROWTH_S:
        return
    fifths = [float(np.median(part)) for part in np.array_split([s.mib for s in samples], 5)][1:]
    growth = fifths[-1] - fifths[0]
    most_mib = max(MAX_GROWTH_MIB, fifths[0] * MAX_GROWTH_PERCENT / 100)
    is_steady = bool((np.diff(fifths) >= _STEADY_PART * growth).all())
    # Something that is filled once is a step; one beyond all measure is none.
    book.expect(
        "the server's memory grows",
        growth <= most_mib or not (is_steady or growth > 2 * most_mib),
        f"{growth:.0f} MiB; medians of the fifths from the second: {fifths}",
    )


def server_ended_well(
    book: Book, code: int | None, complaints: Counter[str], crashes: Counter[str]
) -> None:
    """Finds a bad exit, complaints in the log, and crashes of trainers that nobody killed."""
    book.expect("the server did not end well", code == 0, f"exit code {code}")
    for message, count in complaints.items():
        book.find("the server's log complains", f"{count} x {message}")
    for job_id, count in crashes.items():
        job = book.jobs.get(job_id)
        kills = int(job is not None and job.is_killed)
        book.expect("a trainer crashed by itself", count <= kills, f"{job_id}: {count} crashes")
    for job_id, job in book.jobs.items():
        told = f"{job_id} is {job.state or 'unknown'} after {job.attempts} attempts"
        if not job.is_killed:
            book.expect("a job was tried again without a kill", job.attempts <= 1, told)
        elif not (job.is_cancelled or job.had_result):
            book.expect("a killed job was not tried again", job.attempts == 2, told)


def report(book: Book, samples: Sequence[Sample], loads: dict[str, dict[str, Any]]) -> str:
    """Writes calls by outcome, the figures of the whole, and all findings."""
    rows = ["| Call | Outcome | Count |", "| --- | --- | ---: |"]
    for kind, outcomes in sorted(book.calls.items()):
        for outcome, count in sorted(outcomes.items()):
            mark = " **!**" if (kind, outcome) in book.unexpected else ""
            rows.append(f"| {kind} | {outcome}{mark} | {count} |")
    rows += ["", "| What | Figure |", "| --- | --- |"]
    for name, load in loads.items():
        rows.append(
            f"| Steady load of {name} | {load['offered_per_second']:.1f} calls/s, {load['codes']}; "
            f"p50 {load['p50_ms']:.1f}, p99 {load['p99_ms']:.1f} ms |"
        )
    states = Counter(job.state or "unknown" for job in book.jobs.values())
    killed = [job for job in book.jobs.values() if job.is_killed]
    rows.append(f"| Jobs | {len(book.jobs)}: {dict(states)} |")
    again = sum(job.attempts > 1 for job in killed)
    rows.append(f"| Trainers killed at work | {len(killed)}, {again} of the jobs tried again |")
    for name, values in (
        ("Memory of the server's own, MiB", [round(each.mib) for each in samples]),
        ("File descriptors", [each.descriptors for each in samples]),
        ("Threads", [each.threads for each in samples]),
    ):
        if values:
            rows.append(f"| {name} | {values[0]} to {values[-1]}, {max(values)} at most |")
    rows += ["", f"findings: {book.findings.total() or 'none'}"]
    for kind, count in book.findings.most_common():
        rows += [f"- {count} x {kind}", *(f"    {sample}" for sample in book.samples[kind])]
    return "\n".join(rows) + "\n"
