"""/healthz says what it is told, on every address family, also when nobody answers in time."""

import asyncio
import contextlib
import http.client
import socket
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
from prometheus_client import CollectorRegistry, Gauge

from service import app
from service.config import Config
from service.ops.metrics import Metrics
from service.ops.metrics_server import MAX_CONNECTIONS, MetricsServer

GUARD_S = 60.0


def asked(server: MetricsServer, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, server.port, timeout=GUARD_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_healthz_follows_what_is_served_and_metrics_do_not_care() -> None:
    registry, is_serving = CollectorRegistry(), threading.Event()
    Gauge("one", "One.", registry=registry).set(1)
    server = MetricsServer(registry, "127.0.0.1", 0, is_serving.is_set)
    try:
        assert asked(server, "/healthz") == (503, "not serving\n")
        is_serving.set()
        assert asked(server, "/healthz") == (200, "serving\n")
        is_serving.clear()
        assert asked(server, "/healthz")[0] == 503
        assert "one 1.0" in asked(server, "/metrics")[1]
    finally:
        server.close()
    with pytest.raises(ConnectionRefusedError):
        asked(server, "/healthz")


def test_whoever_sends_slowly_keeps_no_thread_from_others() -> None:
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0, lambda: True)
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), GUARD_S))
            for _ in range(3 * MAX_CONNECTIONS)
        ]
        # Answered, though each of those before it has not sent its request yet.
        assert asked(server, "/healthz") == (200, "serving\n")
        threads = [t for t in threading.enumerate() if "process_request_thread" in t.name]
        assert len(threads) <= MAX_CONNECTIONS
        # The oldest were ended for it.
        assert slow[0].recv(1) == b""


def test_the_metrics_port_can_be_had_on_ipv6() -> None:
    server = MetricsServer(CollectorRegistry(), "::1", 0, lambda: True)
    try:
        assert asked(server, "/healthz", "::1")[0] == 200
    finally:
        server.close()


async def test_a_loop_that_is_stuck_is_not_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_HEALTH_TIMEOUT_S", GUARD_S)
    asks = app._called_on(asyncio.get_running_loop(), lambda: True)
    assert await asyncio.to_thread(asks)
    monkeypatch.setattr(app, "_HEALTH_TIMEOUT_S", 0.05)
    # Waited for on the loop itself, so that nothing else runs on it.
    assert _from_a_thread(asks) == [False]


def _from_a_thread(asks: Callable[[], bool]) -> list[bool]:
    said: list[bool] = []
    thread = threading.Thread(target=lambda: said.append(asks()))
    thread.start()
    thread.join(GUARD_S)
    return said


async def test_a_port_that_is_taken_is_named() -> None:
    taken = MetricsServer(CollectorRegistry(), "127.0.0.1", 0, lambda: True)
    try:
        async with AsyncExitStack() as stack:
            config = Config(metrics_port=taken.port)
            with pytest.raises(OSError, match=f"127.0.0.1:{taken.port} .Address already in use"):
                app._measure(config, stack, Metrics({"version": "1"}), lambda: True)
    finally:
        taken.close()
