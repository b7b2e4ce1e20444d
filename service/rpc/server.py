"""The gRPC server: services, health, reflection, limits; started and drained.

`start` binds; health says SERVING from `serve` on. `drain` says NOT_SERVING,
refuses new calls, lets accepted ones end within the grace period, then stops.
"""

from collections.abc import Callable, Mapping
from typing import Any

from graft.v1 import dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.rpc.calls import Calls
from service.rpc.open_inference import grpc_predict_v2_pb2
from service.telemetry import Telemetry

SERVICES: Mapping[str, str] = {
    file.services_by_name[name].full_name: name
    for file, name in (
        (fine_tuning_pb2.DESCRIPTOR, "FineTuningService"),
        (dataset_pb2.DESCRIPTOR, "DatasetService"),
        (prediction_pb2.DESCRIPTOR, "PredictionService"),
        (model_pb2.DESCRIPTOR, "ModelService"),
        (grpc_predict_v2_pb2.DESCRIPTOR, "GRPCInferenceService"),
    )
}
"""Full names of what the server answers."""

_SERVING = health_pb2.HealthCheckResponse.SERVING

Register = Callable[[aio.Server], None]


class RpcServer:
    """One listening server."""

    def __init__(
        self, services: list[Register], metrics: Telemetry, max_message_bytes: int
    ) -> None:
        self._server = aio.server(
            interceptors=[Calls(metrics)],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                # Answers are as large as what was asked for; exports travel in chunks.
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would share its calls at random.
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        for register in services:
            register(self._server)
        self.is_serving = False
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, address: str) -> int:
        """Listens; returns the port. Raises OSError when the address cannot be had."""
        try:
            port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await self._server.start()
        return port

    async def serve(self) -> None:
        """Tells health checks that all services answer."""
        for name in ("", *SERVICES):
            await self._health.set(name, _SERVING)
        self.is_serving = True

    async def drain(self, grace_s: float) -> None:
        """Ends: no new calls, accepted ones may end within `grace_s`."""
        self.is_serving = False
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def to_register(add: Callable[[Any, Any], None], servicer: object) -> Register:
    """Binds a generated `add_XServicer_to_server` to its servicer."""

    def register(server: aio.Server) -> None:
        add(servicer, server)

    return register
