"""The gRPC server: services, health, reflection and connections; started and drained.

`start` binds; health checks are answered SERVING from `serve` on. `refuse` answers them
NOT_SERVING and refuses new calls; `drain` lets running calls end within a time, then stops.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from graftml_stubs.v1 import backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.auth.audit import Audit
from service.auth.authenticator import Authenticator
from service.ops.metrics import Metrics
from service.rpc.admission import CallLimits
from service.rpc.interceptor import Interceptor
from service.rpc.open_inference import grpc_predict_v2_pb2

SERVICES: Mapping[str, str] = {
    file.services_by_name[name].full_name: name
    for file, name in (
        (fine_tuning_pb2.DESCRIPTOR, "FineTuningService"),
        (dataset_pb2.DESCRIPTOR, "DatasetService"),
        (backbone_pb2.DESCRIPTOR, "BackboneService"),
        (prediction_pb2.DESCRIPTOR, "PredictionService"),
        (model_pb2.DESCRIPTOR, "ModelService"),
        (grpc_predict_v2_pb2.DESCRIPTOR, "GRPCInferenceService"),
    )
}
"""Maps full names of the services that the server answers to their names."""

REFLECTION = (reflection.SERVICE_NAME, reflection.SERVICE_NAME.replace("v1alpha", "v1"))

_SERVING = health_pb2.HealthCheckResponse.SERVING

_LAST_ANSWERS_S = 0.5
"""Time for the last answers to leave, and for watchers of health, whom nothing else ends."""

_LAST_REFUSALS_S = 0.3
"""Time in which callers who were just answered call again, and are refused with the reason."""

_HANDSHAKE_S = 10.0
"""Time for a connection to begin to speak HTTP/2, and TLS."""

_AT_ONCE = 5000
"""Limit on the calls of one connection, and on all that wait for the event loop."""

_CONNECTION = (
    # A peer that does not answer a ping is gone: a machine that vanished is noticed within 80 s.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that pings more often than a careful client is warned, then disconnected.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.max_metadata_size", 16 * 1024),
    # Far above our own limits, whose refusals say what is too much and when to come back: gRPC's
    # own are UNAVAILABLE or CANCELLED, without a reason.
    ("grpc.max_concurrent_streams", _AT_ONCE),
    ("grpc.server.max_pending_requests", _AT_ONCE),
    ("grpc.server.max_pending_requests_hard_limit", _AT_ONCE),
    # Seconds; the default cancels a call, without a reason, that waited for the event loop for 30.
    ("grpc.server_max_unrequested_time_in_server", 600),
)

_NO_COMPRESSION = (("grpc.compression_enabled_algorithms_bitset", 1),)
"""Enables no algorithm but identity, the lowest bit of gRPC's enumeration."""

Service = tuple[Callable[[Any, Any], None], object]
"""A generated `add_XServicer_to_server`, and the servicer."""


class RpcServer:
    """A gRPC server that listens on one address."""

    def __init__(
        self,
        services: list[Service],
        metrics: Metrics,
        max_message_bytes: int,
        *,
        accepts_gzip: bool = False,
        authenticator: Authenticator | None = None,
        audit: Audit | None = None,
        limits: CallLimits | None = None,
    ) -> None:
        limits = limits or CallLimits()
        self._interceptor = Interceptor(
            metrics, authenticator or Authenticator(), audit or Audit(metrics), limits
        )
        handshake_s = min(_HANDSHAKE_S, limits.message_timeout_s)
        self._server = aio.server(
            interceptors=[self._interceptor],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                # Answers are as large as what was asked for; exports travel in chunks.
                ("grpc.max_send_message_length", -1),
                # gRPC inflates kilobytes of gzip to the largest message before it is counted.
                *(() if accepts_gzip else _NO_COMPRESSION),
                # Two servers on one port would share its calls at random.
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", round(handshake_s * 1000)),
                *_CONNECTION,
            ],
        )
        for add, servicer in services:
            add(servicer, self._server)
        self.is_serving = False
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _reflect((*SERVICES, health.SERVICE_NAME), self._server)

    async def start(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listens, with TLS where there are credentials; returns the port.

        Raises OSError if the address cannot be listened on.
        """
        try:
            port: int = (
                self._server.add_insecure_port(address)
                if credentials is None
                else self._server.add_secure_port(address, credentials)
            )
        except RuntimeError as error:
            raise OSError(
                f"the gRPC port cannot listen on {address}{_why_not(address)}: set --host and "
                "--port to an address of this machine that is free"
            ) from error
        await self._server.start()
        return port

    async def serve(self) -> None:
        """Answers health checks of all services with SERVING."""
        for name in ("", *SERVICES):
            await self._health.set(name, _SERVING)
        self.is_serving = True

    def recheck(self) -> None:
        """Ends streams and uploads of principals who may not go on, as the access list is now."""
        self._interceptor.recheck()

    async def refuse(self) -> None:
        """Answers health checks with NOT_SERVING, and refuses new calls."""
        self.is_serving = False
        await self._health.enter_graceful_shutdown()
        self._interceptor.close()

    async def drain(self, grace_s: float) -> None:
        """Refuses new calls, lets running ones end within `grace_s`, and stops."""
        await self.refuse()
        # It listens until then: a server that has stopped gives callers no reason.
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                if not self._interceptor.admission.is_empty:
                    await self._interceptor.admission.wait_empty()
                    await asyncio.sleep(_LAST_REFUSALS_S)
        await self._server.stop(_LAST_ANSWERS_S)
        self._interceptor.shutdown()


def _reflect(names: tuple[str, ...], server: aio.Server) -> None:
    """Lists services and describes their messages, as `grpc.reflection.v1` and `v1alpha`.

    The library has `v1alpha` alone. `v1` is the same under another name, byte for byte; newer
    clients ask for nothing else.
    """
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file).replace("v1alpha", "v1")
    described = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(described.SerializeToString())
    servicer = reflection.aio.ReflectionServicer((*names, *REFLECTION))
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": method}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(name, methods) for name in REFLECTION]
    )


def _why_not(address: str) -> str:
    """What the system says of listening there, in brackets; gRPC does not pass it on."""
    host, _, port = address.rpartition(":")
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except OSError as error:
        return f" ({error.strerror})"
    return ""
