"""The steady load of Predict calls, in a process of its own: `python -m bench.soak.load`.

Reads one JSON line, `Order`, from standard input and goes on until that is closed.
First it measures what callers of the closed loop get; then it sends at a part of
that, whatever the server does (an open loop), and prints a JSON line, `Window`,
every second. A latency counts from the moment that the call was to be sent, so
neither a server nor a generator that falls behind is flattered.
"""

import asyncio
import itertools
import sys
import time
from collections import Counter
from pathlib import Path

import grpc
import msgspec
import numpy as np
from graftml.errors import from_rpc
from graftml_stubs.v1 import prediction_pb2

from bench.serve.load import arrivals_s
from bench.soak.book import OK
from bench.soak.served import Door, bearer

_PATH = "/graft.v1.PredictionService/Predict"
_MAX_UNDER_WAY = 5000
WRONG_ANSWER = "WRONG_ANSWER"
NOT_SENT = "NOT_SENT"
"""So many calls were under way that this process sent no more: the server is far behind."""


class Target(msgspec.Struct):
    """A model to ask."""

    token: str
    """"" for none."""
    model: str
    classes: list[str]
    """Nothing else may be answered."""
    labels: list[str]
    """For each image what must be answered, "" where the model is not sure."""


class Order(msgspec.Struct):
    """What to do."""

    address: str
    certificate: str
    """PEM; "" without TLS."""
    key: str
    """PEM, of the certificate."""
    images: list[str]
    targets: list[Target]
    """In turn."""
    callers: int
    capacity_s: float
    """How long the closed loop is measured."""
    part: float
    """Of the capacity, in the open loop."""
    max_rate: float
    timeout_s: float
    seed: int


class Window(msgspec.Struct):
    """What ended within a second; latencies are of good answers alone, None of none."""

    outcomes: dict[str, int]
    p50_ms: float | None = None
    p99_ms: float | None = None
    lag_p99_ms: float | None = None
    """How late this process sent."""
    sample: str = ""
    """What went wrong, of one call."""


class Started(msgspec.Struct):
    """The open loop begins."""

    capacity: float
    """Good answers a second in the closed loop."""
    rate: float
    outcomes: dict[str, int]


class Load:
    """The calls of one order."""

    def __init__(self, order: Order, channel: grpc.aio.Channel) -> None:
        self._order = order
        self._call = channel.unary_unary(_PATH)
        bodies = []
        for path in order.images:
            image = prediction_pb2.Image(encoded=Path(path).read_bytes())
            bodies.append(prediction_pb2.PredictRequest(images=[image]).SerializeToString())
        # A message's fields may be written apart and joined.
        named = [
            prediction_pb2.PredictRequest(
                models=[prediction_pb2.ModelSpec(model=target.model)]
            ).SerializeToString()
            for target in order.targets
        ]
        targets = len(order.targets)
        # Every image comes to every model.
        self._requests = itertools.cycle(
            _Request(named[which] + body, order.targets[which], place)
            for first in range(targets)
            for place, body in enumerate(bodies)
            for which in ((first + place) % targets,)
        )
        self._outcomes: Counter[str] = Counter()
        self._latencies_s: list[float] = []
        self._lags_s: list[float] = []
        self._sample = ""
        self._is_over = asyncio.Event()

    async def run(self) -> None:
        """Measures, then loads until standard input is closed."""
        order = self._order
        reader = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        reader.add_done_callback(lambda _: self._is_over.set())
        capacity = await self._closed()
        rate = min(order.part * capacity, order.max_rate)
        _say(Started(capacity, rate, dict(self._outcomes)))
        self._outcomes.clear()
        windows = asyncio.create_task(self._windows())
        await self._open(rate)
        windows.cancel()
        _say(self._window())

    async def _closed(self) -> float:
        begun = time.perf_counter() + self._order.capacity_s / 10  # warm by then
        until, good = begun + self._order.capacity_s, 0

        async def caller() -> None:
            nonlocal good
            while time.perf_counter() < until:
                is_good = await self._one(self._order.timeout_s) == OK
                good += is_good and begun <= time.perf_counter() < until
                if not is_good:
                    await asyncio.sleep(0.01)

        await asyncio.gather(*(caller() for _ in range(self._order.callers)))
        return good / self._order.capacity_s

    async def _open(self, rate: float) -> None:
        origin = time.perf_counter()
        running: set[asyncio.Task[None]] = set()

        async def arrival(due: float) -> None:
            lag_s = time.perf_counter() - due
            self._lags_s.append(lag_s)
            outcome = await self._one(max(0.001, self._order.timeout_s - lag_s))
            if outcome == OK:
                self._latencies_s.append(time.perf_counter() - due)

        for offset_s in arrivals_s(max(rate, 1.0), self._order.seed):
            if (wait_s := origin + offset_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            if self._is_over.is_set():
                break
            if len(running) >= _MAX_UNDER_WAY:
                self._outcomes[NOT_SENT] += 1
                continue
            task = asyncio.create_task(arrival(origin + offset_s))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def _one(self, timeout_s: float) -> str:
        request = next(self._requests)
        metadata = bearer(request.target.token)
        try:
            data = await self._call(request.message, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            told = from_rpc(error, "the server")
            outcome = told.reason or told.code.name
            self._sample = f"{outcome}: {told}"
        else:
            answer = prediction_pb2.PredictResponse.FromString(data)
            is_right = is_answer(answer, request.target, request.place)
            outcome = OK if is_right else WRONG_ANSWER
            if not is_right:
                self._sample = f"{request.target.model}, image {request.place}: {answer}"[:500]
        self._outcomes[outcome] += 1
        return outcome

    async def _windows(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            _say(self._window())

    def _window(self) -> Window:
        window = Window(dict(self._outcomes), sample=self._sample)
        if self._latencies_s:
            p50, p99 = np.percentile(np.array(self._latencies_s) * 1000, (50, 99))
            window.p50_ms, window.p99_ms = float(p50), float(p99)
        if self._lags_s:
            window.lag_p99_ms = float(np.percentile(np.array(self._lags_s) * 1000, 99))
        self._outcomes.clear()
        self._latencies_s.clear()
        self._lags_s.clear()
        self._sample = ""
        return window


class _Request(msgspec.Struct):
    message: bytes
    target: Target
    place: int


def is_answer(answer: prediction_pb2.PredictResponse, target: Target, place: int) -> bool:
    """Whether this answers the image at that place: one score, of the model's own classes."""
    (found,) = answer.answers
    if found.model != target.model or len(found.results) != 1:
        return False
    scores = found.results[0].classification.scores
    if len(scores) != 1 or scores[0].label not in target.classes:
        return False
    return target.labels[place] in ("", scores[0].label)


def _say(line: msgspec.Struct) -> None:
    print(msgspec.json.encode(line).decode(), flush=True)


async def main() -> None:
    """Does what it is told."""
    order = msgspec.json.decode(sys.stdin.readline(), type=Order)
    credentials = Door(order.address, order.certificate.encode(), order.key.encode()).credentials
    async with (
        grpc.aio.secure_channel(order.address, credentials)
        if credentials
        else grpc.aio.insecure_channel(order.address)
    ) as channel:
        await channel.channel_ready()
        await Load(order, channel).run()


if __name__ == "__main__":
    asyncio.run(main())
