"""How a soak ended: nothing lost, the stores sound, the server drained; tables for people."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from graftml import Client

from bench.soak.book import OK, REFUSALS, Book
from bench.soak.served import Crash, Served, Tenant
from service import fsck

JOBS_TIMEOUT_S = 180.0
MAX_REFUSED_PART = 0.01
"""Of the steady load, which is well below what the server can carry."""
MAX_OTHERS_PERCENT = 5.0
"""Of all processors; with more, the capacity that was measured holds no longer."""
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
_CRASH_SOON_S = 10.0
"""From the kill of a trainer that waited to the crash of the job that it was just given."""


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
        elif not mine.state:
            book.job_ended(job_id, job.state.value, job.attempts)
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
    """Memory, and file descriptors and threads at the end, are about those of the start."""
    if len(samples) < 2:
        book.find("the server was not looked at", f"{len(samples)} samples")
        return
    memory_is_bounded(book, samples)
    for key, most in (("descriptors", MAX_MORE_DESCRIPTORS), ("threads", MAX_MORE_THREADS)):
        first, last = samples[0][key], samples[-1][key]
        book.expect(f"more {key} at the end", last <= first + most, f"{first}, then {last}")


def memory_is_bounded(book: Book, samples: Sequence[dict[str, Any]]) -> None:
    """The server's own memory does not go on growing; of a short soak this is only told."""
    if not samples or samples[-1]["at_s"] - samples[0]["at_s"] < MIN_GROWTH_S:
        return
    second, *later = _fifths(samples, "anonymous_mib")[1:]
    growth, most = later[-1] - second, max(MAX_GROWTH_MIB, second * MAX_GROWTH_PERCENT / 100)
    steps = np.diff([second, *later])
    is_steady = bool((steps >= _STEADY_PART * growth).all())
    # Something that is filled once is a step; one beyond all measure is none.
    book.expect(
        "the server's memory grows",
        growth <= most or not (is_steady or growth > 2 * most),
        f"{growth:.0f} MiB from the second fifth to the last, medians of the fifths from there: "
        f"{', '.join(f'{each:.0f}' for each in (second, *later))}",
    )


def _fifths(samples: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(np.median(part)) for part in np.array_split([each[key] for each in samples], 5)]


def crashes_are_kills(book: Book, crashes: Sequence[Crash], deaths: int) -> None:
    """Every trainer that crashed was killed, and every job whose trainer was had another.

    `deaths` are the waiting trainers that were found dead.
    """
    kills = {kill.job_id: kill for kill in book.kills if kill.job_id}
    unspent = dict(kills)
    waiting = [kill.at for kill in book.kills if not kill.job_id]
    book.expect(
        "waiting trainers died by themselves", deaths <= len(waiting),
        f"{deaths} were found dead, {len(waiting)} were killed",
    )  # fmt: skip
    excused = Counter(dict.fromkeys(kills, 1))
    for crash in crashes:
        if unspent.pop(crash.job_id, None) is not None:
            continue
        # It was given the job in the moment of its kill.
        near = [at for at in waiting if 0 <= crash.at - at + 1 <= _CRASH_SOON_S]
        if near:
            waiting.remove(near[0])
            excused[crash.job_id] += 1
            continue
        book.find("a trainer crashed by itself", f"{crash.job_id}: {crash.message}")
    for job_id, job in book.jobs.items():
        book.expect(
            "a job was tried again though its trainer was not killed",
            job.attempts <= 1 + excused[job_id],
            f"{job_id}: {job.attempts} attempts",
        )
        if job_id in kills and not (job.is_cancelled or kills[job_id].had_result):
            book.expect(
                "a job whose trainer was killed was not tried again",
                job.attempts > 1,
                f"{job_id} is {job.state or 'unknown'} after {job.attempts} attempts",
            )


def server_ends_well(book: Book, served: Served) -> float:
    """It drains and exits with 0, and its log complains of nothing; gives the seconds."""
    code, seconds = served.drain()
    book.expect("the server did not end well", code == 0, f"exit code {code} after {seconds:.1f} s")
    for message, count in served.complaints().items():
        book.find("the server's log complains", f"{count} x {message}")
    crashes_are_kills(book, served.crashes(), served.deaths())
    return seconds


def stores_are_sound(book: Book, data_dir: Path) -> None:
    """Database and disk agree."""
    for line in fsck.problems(data_dir):
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
    killed = [book.jobs[kill.job_id] for kill in book.kills if kill.job_id]
    again = sum(job.attempts > 1 for job in killed)
    told = sum(kill.had_result for kill in book.kills)
    lines = [
        f"jobs: {len(book.jobs)} accepted, {dict(states)}; lost "
        f"{book.findings.counts['a job was lost']}",
        f"trainers killed at work: {len(killed)}, {again} of these jobs were tried again, "
        f"{told} had their result already; waiting ones killed: {len(book.kills) - len(killed)}",
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
