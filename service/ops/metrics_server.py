"""Serves the metrics port: Prometheus metrics at /metrics, whether the service serves at /healthz.

Plain HTTP on threads of its own, without certificate or token, so that Prometheus and
health checks of containers can ask; for a trusted network only. Knows neither gRPC nor
what is measured. Stops with `MetricsServer.close`.
"""

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

MAX_CONNECTIONS: Final = 32
"""Connections at once, each with a thread. A further one ends the oldest: a scrape and a health
check take milliseconds, and whoever sends slowly must not keep them out."""

_POLL_S = 0.05
_HANDOVER_S = 1.0
"""Longest wait for the thread of a connection that was ended."""
_HEALTH = {True: ("200 OK", b"serving\n"), False: ("503 Service Unavailable", b"not serving\n")}


class MetricsServer:
    """Listens from its construction on.

    `is_serving` is called on a thread of this server for each GET of /healthz: True
    is answered with 200, False with 503. Raises OSError for an address that is not available.
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, is_serving: Callable[[], bool]
    ) -> None:
        metrics = make_wsgi_app(registry)

        def answer(environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
            if environ["PATH_INFO"] != "/healthz":
                page: Iterable[bytes] = metrics(environ, start)
                return page
            status, text = _HEALTH[is_serving()]
            start(status, [("Content-Type", "text/plain")])
            return [text]

        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        kind = _Server6 if family == socket.AF_INET6 else _Server
        self._server = make_server(str(address[0]), port, answer, kind, _Handler)
        self.port = int(self._server.server_port)
        # `close` waits for one poll, which by default takes half a second.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # Connections that the kernel holds until they are accepted. With socketserver's 5, one that
    # finds the queue full tries again after seconds, and a health check is late.
    request_queue_size = 4 * MAX_CONNECTIONS

    def __init__(self, *args: Any, **options: Any) -> None:
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._open: dict[Any, None] = {}
        """Connections with a thread, the oldest first."""
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a connection's thread, in the place of the oldest where all are taken."""
        if not self._slots.acquire(blocking=False):
            with suppress(OSError, StopIteration, RuntimeError):
                next(iter(self._open)).shutdown(socket.SHUT_RDWR)
            if not self._slots.acquire(timeout=_HANDOVER_S):
                # The oldest is being answered: this one comes again.
                self.shutdown_request(request)
                return
        self._open[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers one request, and gives its slot back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._open[request]
            self._slots.release()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    # Seconds; ends a connection that sends nothing.
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        pass
