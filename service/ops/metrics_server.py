"""The metrics port: what is measured at /metrics, whether the service serves at /healthz.

Plain HTTP on threads of its own, with neither certificate nor token, so that
Prometheus and what watches containers can ask; for a trusted network alone.
Knows neither gRPC nor what is measured. Stops with `MetricsServer.close`.
"""

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

_TURN_S = 0.05
_ANSWERS = {True: ("200 OK", b"serving\n"), False: ("503 Service Unavailable", b"not serving\n")}


class MetricsServer:
    """Listens from when it is made.

    `is_serving` is called on a thread of this server's for each GET of /healthz: True
    is answered 200, False 503.
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, is_serving: Callable[[], bool]
    ) -> None:
        metrics = make_wsgi_app(registry)

        def answer(asked: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
            if asked["PATH_INFO"] != "/healthz":
                found: Iterable[bytes] = metrics(asked, start)
                return found
            status, text = _ANSWERS[is_serving()]
            start(status, [("Content-Type", "text/plain")])
            return [text]

        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        kind = _Server6 if family == socket.AF_INET6 else _Server
        self._server = make_server(str(address[0]), port, answer, kind, _Quiet)
        self.port = int(self._server.server_port)
        # Closing waits for one turn of it, and with the default that is half a second.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_TURN_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    # One that connects and says nothing keeps its thread no longer than this.
    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        pass
