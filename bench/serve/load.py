"""The load: callers in a process of their own.

    python -m bench.serve.load ADDRESS KIND FOLDER CALLERS SECONDS SERVER_PID [MODELS]

KIND is `graft` or `plain`. Closed loop: each caller sends its next picture when
the last one is answered. MODELS is a comma-separated list that the calls are
spread over. Prints one JSON line: pictures a second, latencies (ms), the
server's CPU a picture (ms), errors.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from graft.v1 import prediction_pb2, prediction_pb2_grpc

from bench.serve.work import photos

WARM_UP_S = 2.0


def figures(
    latencies_s: list[float], elapsed_s: float, cpu_s: float, errors: int
) -> dict[str, Any]:
    """What is reported of a run."""
    ms = np.array(latencies_s) * 1000
    return {
        "per_second": len(ms) / elapsed_s,
        "p50_ms": float(np.percentile(ms, 50)),
        "p99_ms": float(np.percentile(ms, 99)),
        "cpu_ms": cpu_s * 1000 / len(ms),
        "count": len(ms),
        "errors": errors,
    }


async def main(pictures: list[bytes]) -> None:
    """Runs it."""
    address, kind = sys.argv[1], sys.argv[2]
    callers, seconds, pid = int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6])
    models = sys.argv[7].split(",") if len(sys.argv) > 7 else ["bench"]
    server = psutil.Process(pid)
    async with grpc.aio.insecure_channel(address) as channel:
        call = _graft(channel, models) if kind == "graft" else _plain(channel)
        latencies: list[float] = []
        errors = 0
        turn = itertools.count()
        measuring, stop = False, False

        async def caller() -> None:
            nonlocal errors
            while not stop:
                data = pictures[next(turn) % len(pictures)]
                started = time.perf_counter()
                try:
                    await call(data)
                except grpc.aio.AioRpcError:
                    errors += measuring
                    continue
                if measuring:
                    latencies.append(time.perf_counter() - started)

        tasks = [asyncio.create_task(caller()) for _ in range(callers)]
        await asyncio.sleep(WARM_UP_S)
        measuring, started, cpu = True, time.perf_counter(), _cpu_s(server)
        await asyncio.sleep(seconds)
        elapsed, cpu_s = time.perf_counter() - started, _cpu_s(server) - cpu
        measuring, stop = False, True
        await asyncio.gather(*tasks)
    print(json.dumps(figures(latencies, elapsed, cpu_s, errors)))


def _graft(channel: grpc.aio.Channel, models: list[str]) -> Callable[[bytes], Any]:
    stub = prediction_pb2_grpc.PredictionServiceStub(channel)
    turn = itertools.cycle(models)

    async def call(data: bytes) -> None:
        answer = await stub.Predict(
            prediction_pb2.PredictRequest(
                model=next(turn), pictures=[prediction_pb2.Picture(encoded=data)]
            ),
            timeout=60,
        )
        assert answer.results[0].classification.scores[0].label

    return call


def _plain(channel: grpc.aio.Channel) -> Callable[[bytes], Any]:
    predict = channel.unary_unary("/plain/Predict")

    async def call(data: bytes) -> None:
        assert await predict(data, timeout=60)

    return call


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    asyncio.run(main(photos(Path(sys.argv[3]))))
