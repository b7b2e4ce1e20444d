"""How a soak ended: nothing lost, the stores sound, the server drained; tables for people."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from graft import Client

from bench.soak.book import OK, REFUSALS, Book
from bench.soak.served import Served, Tenant
from service import check

JOBS_TIMEOUT_S = 180.0
MAX_REFUSED_PART = 0.01
"""Of the steady load, which is well below what the server can carry."""
MAX_OTHERS_PERCENT = 5.0
"""Of all processors; with more, the capacity that was measured holds no longer."""
MAX_MORE_DESCRIPTORS = 40
MAX_MORE_THREADS = 20
"""At the end, when nothing is asked any more, against the start of the load."""
_EXPECTED_COMPLAINTS = ("the trainer crashed", "a waiting trainer had died")
"""Of the server's log: what kills of trainers lead to."""


def nothing_is_lost(client: Client, book: Book, tenant: Tenant) -> None:
    """Every job that was accepted is known and has ended; every version is there."""
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
        elif mine.state and job.state != mine.state:
            book.find("a job changed after its end", f"{job_id}: {mine.state}, then {job.state}")
    for (name, model), versions in book.versions.items():
        if name == tenant.name and versions:
            there = {version.version for version in client.list_versions(model)}
            book.expect("a version was lost", versions <= there, f"{model}: {versions - there}")


def load_is_carried(book: Book, outcomes: Counter[str]) -> None:
    """Refusals of the steady load are rare."""
    refused = sum(outcomes[name] for name in REFUSALS)
    book.expect(
        "too much of the steady load was refused",
        refused <= MAX_REFUSED_PART * max(1, outcomes.total()),
        f"{refused} of {outcomes.total()} calls",
    )
    book.expect("the steady load got no answer", outcomes[OK] > 0, f"{dict(outcomes)}")


def nothing_piles_up(book: Book, samples: Sequence[dict[str, Any]]) -> None:
    """File descriptors and threads at the end are about those of the start."""
    if len(samples) < 2:
        book.find("the server was not looked at", f"{len(samples)} samples")
        return
    for key, most in (("descriptors", MAX_MORE_DESCRIPTORS), ("threads", MAX_MORE_THREADS)):
        first, last = samples[0][key], samples[-1][key]
        book.expect(f"more {key} at the end", last <= first + most, f"{first}, then {last}")


def server_ends_well(book: Book, served: Served) -> float:
    """It drains and exits with 0, and its log complains of nothing; gives the seconds."""
    code, seconds = served.drain()
    book.expect("the server did not end well", code == 0, f"exit code {code} after {seconds:.1f} s")
    for message, count in served.complaints().items():
        if not message.startswith(_EXPECTED_COMPLAINTS):
            book.find("the server's log complains", f"{count} x {message}")
    return seconds


def stores_are_sound(book: Book, data_dir: Path) -> None:
    """Database and disk agree."""
    for line in check.problems(data_dir):
        book.find("the stores are broken", line)


def slope_per_hour(samples: Sequence[dict[str, Any]], key: str) -> float:
    """How a figure grows, by least squares over the last two thirds; NaN of too few samples."""
    points = [(sample["at_s"], sample[key]) for sample in samples if sample.get(key) is not None]
    points = points[len(points) // 3 :]
    if len(points) < 3:
        return float("nan")
    at_s, values = np.array(points).T
    return float(np.polyfit(at_s, values, 1)[0]) * 3600


def table(book: Book) -> str:
    """Calls by kind and outcome; what must not happen is marked."""
    rows = ["| call | outcome | count |", "| --- | --- | ---: |"]
    for kind, outcomes in sorted(book.calls.items()):
        for outcome, count in sorted(outcomes.items()):
            mark = " **!**" if (kind, outcome) in book.unexpected else ""
            rows.append(f"| {kind} | {outcome}{mark} | {count} |")
    return "\n".join(rows)


def summary(book: Book, samples: Sequence[dict[str, Any]]) -> str:
    """Figures of the whole, a line each."""
    states = Counter(job.state or "unwatched" for job in book.jobs.values())
    killed = [job for job in book.jobs.values() if job.was_killed]
    again = sum(job.attempts > 1 for job in killed)
    lines = [
        f"jobs: {len(book.jobs)} accepted, {dict(states)}; lost "
        f"{book.findings.counts['a job was lost']}",
        f"trainers killed at work: {len(killed)}, {again} of these jobs were tried again",
    ]
    if samples:
        first, last = samples[0], samples[-1]
        for key, name in (
            ("pss_mib", "memory (PSS), MiB"),
            ("anonymous_mib", "memory (its own), MiB"),
            ("descriptors", "file descriptors"),
            ("threads", "threads"),
        ):
            most = max(sample[key] for sample in samples)
            lines.append(
                f"{name}: {first[key]:g} at the start, {last[key]:g} at the end, {most:g} at most; "
                f"slope {slope_per_hour(samples, key):+.1f} an hour"
            )
        for key in ("p50_ms", "p99_ms"):
            known = [sample[key] for sample in samples if sample.get(key) is not None]
            if known:
                lines.append(
                    f"{key[:3]} of the seconds: median {np.median(known):.1f}, worst "
                    f"{max(known):.1f} ms"
                )
    return "\n".join(lines)


def machine(percent: dict[str, float]) -> str:
    """Whether the machine was the soak's own."""
    told = ", ".join(f"{name} {part:.0f} %" for name, part in percent.items())
    warning = (
        "\nNOT ALONE: what others took of this machine is in every latency and refusal"
        if percent.get("others", 0) > MAX_OTHERS_PERCENT
        else ""
    )
    return f"of all cores: {told}{warning}"


def findings(book: Book) -> str:
    """All of them, or that there is none."""
    if not book.findings.counts:
        return "findings: none"
    lines = [f"findings: {book.findings.counts.total()}"]
    for kind, count in book.findings.counts.most_common():
        lines.append(f"- {count} x {kind}")
        lines += [f"    {sample}" for sample in book.findings.samples[kind]]
    return "\n".join(lines)
