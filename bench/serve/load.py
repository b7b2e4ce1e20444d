"""The load: callers, or arrivals, in a process of their own.

    python -m bench.serve.load ADDRESS FOLDER --kind graft|plain --pid PID
        (--callers N | --rate R) [--seconds S] [--warm-up S] [--timeout S] [--models A,B]
        [--token TOKEN] [--labels PREFIX]

Closed loop (--callers): each caller sends its next image when the last one is
answered. Open loop (--rate): images arrive at random at a fixed rate (Poisson), whatever
the server does; a latency, and a call's deadline, count from the moment that the image
was to be sent, so a generator or a server that falls behind is not flattered.

Requests are serialised before the clock starts, but for a number behind each image's
last byte, which makes it a file of its own: nothing kept of an earlier call can answer
it. The generator shares the cores with what it measures, so its own CPU time, its lag
behind the schedule and the CPU time of all other processes are reported too. Prints one
JSON line (see `Tally.figures`).
"""

import argparse
import asyncio
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from graftml_stubs.v1 import prediction_pb2

from bench.photographs import photos

STAMP = 8
"""Bytes of the number that follows an image."""
PAUSE_S = 0.01
"""What a caller of the closed loop waits after a failed call: it is not to spin."""
OUTCOMES = {
    grpc.StatusCode.OK: "ok",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "refused",
    grpc.StatusCode.DEADLINE_EXCEEDED: "expired",
}

Call = Callable[[bytes, float], Awaitable[bytes]]


class WrongAnswer(Exception):  # noqa: N818
    """The server answered OK, but with no classification."""


def percentiles(seconds: list[float], prefix: str = "") -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds; NaN of nothing."""
    ms = np.array(seconds or [np.nan]) * 1000
    middle, high = np.percentile(ms, (50, 99))
    return {
        f"{prefix}p50_ms": float(middle),
        f"{prefix}p99_ms": float(high),
        f"{prefix}max_ms": float(ms.max()),
    }


def figures(latencies_s: list[float], elapsed_s: float, cpu_s: float) -> dict[str, Any]:
    """What is reported of every run, with a server and without."""
    return {
        "per_second": len(latencies_s) / elapsed_s,
        "cpu_ms": cpu_s * 1000 / max(1, len(latencies_s)),
        "count": len(latencies_s),
        "errors": 0,
        **percentiles(latencies_s),
    }


@dataclass(frozen=True)
class CpuTimes:
    """CPU time of a server, of this process, and of all others on the CPUs it may use."""

    server_s: float
    own_s: float
    others_s: float

    def since(self, before: "CpuTimes") -> "CpuTimes":
        """Returns what was used after `before`."""
        return CpuTimes(
            self.server_s - before.server_s,
            self.own_s - before.own_s,
            max(0.0, self.others_s - before.others_s),
        )


def cpu_times(server: psutil.Process | None = None) -> CpuTimes:
    """Reads them; what other virtual machines took of these CPUs counts as others'."""
    may = os.sched_getaffinity(0)
    each = [one for n, one in enumerate(psutil.cpu_times(percpu=True)) if n in may]
    busy_s = sum(c.user + c.nice + c.system + c.irq + c.softirq + c.steal for c in each)
    server_s, own_s = cpu_s(server) if server else 0.0, cpu_s(psutil.Process())
    return CpuTimes(server_s, own_s, busy_s - server_s - own_s)


class Tally:
    """What became of the calls, each with its latency."""

    def __init__(self) -> None:
        self.latencies_s: dict[str, list[float]] = {
            name: [] for name in (*OUTCOMES.values(), "other")
        }
        self.codes: Counter[str] = Counter()
        self.lags_s: list[float] = []

    def add(self, code: str, outcome: str, latency_s: float) -> None:
        """Counts one call."""
        self.latencies_s[outcome].append(latency_s)
        self.codes[code] += 1

    def figures(self, elapsed_s: float, ended_ok: int, used: "CpuTimes") -> Any:
        """Rates count the good answers that came within the measured time.

        In the open loop outcomes and latencies are of the calls that were to be
        sent within it, wherever they ended.
        """
        ok = self.latencies_s["ok"]
        total = sum(map(len, self.latencies_s.values()))
        return {
            **figures(ok, elapsed_s, 0),
            **percentiles(self.latencies_s["refused"], "refused_"),
            "per_second": ended_ok / elapsed_s,
            "cpu_ms": used.server_s * 1000 / max(1, ended_ok),
            "offered_per_second": total / elapsed_s,
            "errors": total - len(ok),
            "outcomes": {name: len(values) for name, values in self.latencies_s.items()},
            "codes": dict(self.codes),
            "generator_cpu_percent": 100 * used.own_s / elapsed_s,
            "others_cpu_percent": 100 * used.others_s / elapsed_s,
            "lag_p99_ms": percentiles(self.lags_s)["p99_ms"],
        }


class Load:
    """One measured run against one server."""

    def __init__(
        self, call: Call, requests: Iterator[bytes], timeout_s: float, warm_up_s: float
    ) -> None:
        self._call = call
        self._requests = requests
        self._timeout_s = timeout_s
        self._warm_up_s = warm_up_s
        self._from = self._until = float("inf")
        self._tally = Tally()
        self._ended_ok = 0

    async def closed(self, callers: int, seconds: float, server: psutil.Process) -> Any:
        """Callers that wait for each answer; what ends within the time counts."""
        stop = False

        async def caller() -> None:
            while not stop:
                begun = time.perf_counter()
                code, outcome = await self._outcome(next(self._requests), self._timeout_s)
                ended = time.perf_counter()
                if self._counts_in(ended):
                    self._tally.add(code, outcome, ended - begun)
                    self._ended_ok += outcome == "ok"
                if outcome != "ok":
                    await asyncio.sleep(PAUSE_S)

        tasks = [asyncio.create_task(caller()) for _ in range(callers)]
        used = await self._measure(time.perf_counter(), seconds, server)
        stop = True
        await asyncio.gather(*tasks)
        return self._tally.figures(seconds, self._ended_ok, used)

    async def open(self, due_s: Iterator[float], seconds: float, server: psutil.Process) -> Any:
        """Arrivals at `due_s` from the start, which run until the time is over."""
        origin = time.perf_counter()
        running: set[asyncio.Task[None]] = set()

        async def arrival(due: float) -> None:
            lag_s = time.perf_counter() - due
            left_s = self._timeout_s - lag_s
            # What is late already has expired, whoever was slow.
            code, outcome = "LATE", "expired"
            if left_s > 0:
                code, outcome = await self._outcome(next(self._requests), left_s)
            ended = time.perf_counter()
            self._ended_ok += outcome == "ok" and self._counts_in(ended)
            if self._counts_in(due):
                self._tally.add(code, outcome, ended - due)
                self._tally.lags_s.append(lag_s)

        async def arrivals() -> None:
            for offset_s in due_s:
                due = origin + offset_s
                if due > self._until:
                    return
                if (wait_s := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait_s)
                task = asyncio.create_task(arrival(due))
                running.add(task)
                task.add_done_callback(running.discard)

        sender = asyncio.create_task(arrivals())
        used = await self._measure(origin, seconds, server)
        await sender
        await asyncio.gather(*running)
        return self._tally.figures(seconds, self._ended_ok, used)

    async def _measure(self, origin: float, seconds: float, server: psutil.Process) -> CpuTimes:
        """Measures from when the load is warm; returns the CPU time used meanwhile."""
        self._from = origin + self._warm_up_s
        self._until = self._from + seconds
        await asyncio.sleep(self._from - time.perf_counter())
        before = cpu_times(server)
        await asyncio.sleep(self._until - time.perf_counter())
        return cpu_times(server).since(before)

    def _counts_in(self, moment: float) -> bool:
        return self._from <= moment < self._until

    async def _outcome(self, request: bytes, timeout_s: float) -> tuple[str, str]:
        try:
            await self._call(request, timeout_s)
        except grpc.aio.AioRpcError as error:
            return error.code().name, OUTCOMES.get(error.code(), "other")
        except WrongAnswer:
            return "WRONG_ANSWER", "other"
        return "OK", "ok"


def arrivals_s(rate: float, seed: int = 0) -> Iterator[float]:
    """Yields seconds from the start at which images arrive, without end (Poisson)."""
    random = np.random.default_rng(seed)
    moment = 0.0
    while True:
        moment += random.exponential(1 / rate)
        yield moment


def requests(kind: str, images: list[bytes], models: list[str]) -> Iterator[bytes]:
    """Yields the calls' bytes, for ever: every image in turn, every model in turn."""
    # A message's fields may be written apart and joined: one copy of an image does for all,
    # and the image's bytes come last.
    names, bodies = [b""], images
    if kind == "graft":
        asked = [[prediction_pb2.ModelSpec(model=name)] for name in models]
        names = [prediction_pb2.PredictRequest(models=one).SerializeToString() for one in asked]
        bodies = [
            prediction_pb2.PredictRequest(
                images=[prediction_pb2.Image(encoded=stamped(data, 0))]
            ).SerializeToString()[:-STAMP]
            for data in images
        ]
    turns = zip(itertools.cycle(names), itertools.cycle(bodies), strict=False)
    for number, (name, body) in enumerate(turns, time.time_ns()):
        yield stamped(name + body, number)


def stamped(data: bytes, number: int) -> bytes:
    """Returns a JPEG file, or what ends with one, with a number that no decoder reads."""
    return data + number.to_bytes(STAMP)


def connect(kind: str, channel: grpc.aio.Channel, token: str = "", labels: str = "") -> Call:
    """Returns the call, which raises WrongAnswer, also for a label with another beginning."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    path = "/plain/Predict" if kind == "plain" else "/graft.v1.PredictionService/Predict"
    predict: Any = channel.unary_unary(path)

    async def call(request: bytes, timeout_s: float) -> bytes:
        answer: bytes = await predict(request, timeout=timeout_s, metadata=metadata)
        if not (answer if kind == "plain" else classifies(answer, labels)):
            raise WrongAnswer
        return answer

    return call


def classifies(answer: bytes, labels: str) -> bool:
    """Whether an answer gives one image one label, with this beginning."""
    results = prediction_pb2.PredictResponse.FromString(answer).answers[0].results
    scores = [score for result in results for score in result.classification.scores]
    return len(results) == len(scores) == 1 and scores[0].label.startswith(labels)


def cpu_s(process: psutil.Process) -> float:
    """Processor time that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def run(arguments: argparse.Namespace, images: list[bytes]) -> Any:
    """Runs one load and gives its figures."""
    server = psutil.Process(arguments.pid)
    async with grpc.aio.insecure_channel(arguments.address) as channel:
        await channel.channel_ready()
        load = Load(
            connect(arguments.kind, channel, arguments.token, arguments.labels),
            requests(arguments.kind, images, arguments.models.split(",")),
            arguments.timeout,
            arguments.warm_up,
        )
        if arguments.callers:
            return await load.closed(arguments.callers, arguments.seconds, server)
        return await load.open(arrivals_s(arguments.rate), arguments.seconds, server)


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address")
    parser.add_argument("folder", type=Path, help="of JPEG photos")
    parser.add_argument("--kind", choices=("graft", "plain"), default="graft")
    parser.add_argument("--pid", type=int, required=True, help="the server, for its CPU time")
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--callers", type=int, help="closed loop")
    loop.add_argument("--rate", type=float, help="open loop, images a second")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--warm-up", type=float, default=2, help="seconds that do not count")
    parser.add_argument("--timeout", type=float, default=60, help="of each call, seconds")
    parser.add_argument("--models", default="bench", help="that the calls are spread over")
    parser.add_argument("--token", default="", help="that the calls carry")
    parser.add_argument("--labels", default="", help="how every answered label begins")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(run(arguments, photos(arguments.folder)))))


if __name__ == "__main__":
    main()
