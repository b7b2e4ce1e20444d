"""The model repository extension: lists a caller's models, and pins them in memory."""

import asyncio

from service.auth import principal
from service.engine.engine import Engine
from service.errors import NotFound, bad_field
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.pins import Pins
from service.storage import pagination
from service.storage.models import ModelStore


class Repository:
    """A caller's models, by their latest versions; keeps nothing of its own."""

    def __init__(self, engine: Engine, models: ModelStore, pins: Pins) -> None:
        self._engine = engine
        self._models = models
        self._pins = pins

    async def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Lists all of the caller's models by name."""
        _check(request.repository_name)
        return await asyncio.to_thread(self._index, principal.current().tenant)

    async def load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Loads a model's latest version and pins it in memory."""
        _check(request.repository_name)
        if any(name == "config" or name.startswith("file:") for name in request.parameters):
            raise bad_field(
                "parameters",
                "a published version has no other configuration or files: fine-tune to make a new "
                "one",
            )
        await self._pins.load(principal.current().key(request.model_name))
        return pb.RepositoryModelLoadResponse()

    async def unload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        """Unpins a model; raises NotFound for one that does not exist."""
        _check(request.repository_name)
        await self._pins.unload(principal.current().key(request.model_name))
        return pb.RepositoryModelUnloadResponse()

    def _index(self, tenant: str) -> pb.RepositoryIndexResponse:
        response = pb.RepositoryIndexResponse()
        token = ""  # nosec B105 # no password
        while True:
            records, token = self._models.list_models(pagination.MAX_SIZE, token, tenant)
            for record in records:
                try:
                    latest = self._models.resolve(record.key, None, None)
                except NotFound:
                    continue  # deleted since, or candidates alone
                is_loaded = self._engine.is_loaded(latest)
                response.models.add(
                    name=latest.model.name,
                    version=str(latest.version),
                    state="READY",
                    reason="in memory" if is_loaded else "loads on demand",
                )
            if not token:
                return response


def _check(repository_name: str) -> None:
    if repository_name:
        raise bad_field("repository_name", "there is one repository: leave repository_name empty")
