"""The model repository extension: lists models, and pins them in memory.

Owns which files were pinned for which model, by its key, on the event loop alone: the
latest version of a model may change between its load and its unload.
"""

import asyncio

from service.auth import principal
from service.domain import ModelFiles, plain_name
from service.engine.engine import Engine
from service.errors import NotFound
from service.rpc.fallback import Fallback
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference.tensors import bad
from service.storage import pages
from service.storage.models import ModelStore
from service.storage.records import Removed


class Repository:
    """A caller's models, by their latest versions."""

    def __init__(self, engine: Engine, fallback: Fallback, models: ModelStore) -> None:
        self._engine = engine
        self._fallback = fallback
        self._models = models
        self._pinned: dict[str, ModelFiles] = {}

    async def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Lists all of the caller's models by name."""
        _check(request.repository_name)
        return await asyncio.to_thread(self._index, principal.current().tenant)

    async def load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Loads a model's latest version and pins it in memory."""
        _check(request.repository_name)
        model = principal.current().key(request.model_name)
        if any(name == "config" or name.startswith("file:") for name in request.parameters):
            raise bad(
                "parameters",
                "a published version has no other configuration or files: fine-tune to make a new "
                "one",
            )
        files = (await self._fallback.resolve(model, None, None)).files
        await self._engine.pin(files)
        before = self._pinned.get(model)
        self._pinned[model] = files
        if before is not None and before != files:
            self._engine.unpin(before)
        return pb.RepositoryModelLoadResponse()

    async def unload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        """Unpins a model; raises NotFound for one that does not exist."""
        _check(request.repository_name)
        model = principal.current().key(request.model_name)
        if (pinned := self._pinned.pop(model, None)) is not None:
            self._engine.unpin(pinned)
        self._engine.unpin((await self._fallback.resolve(model, None, None)).files)
        return pb.RepositoryModelUnloadResponse()

    def forget(self, removed: Removed) -> None:
        """Drops the pin of a deleted version, which the engine has forgotten too."""
        pinned = self._pinned.get(removed.model)
        if pinned is not None and pinned.version in removed.versions:
            del self._pinned[removed.model]

    def _index(self, tenant: str) -> pb.RepositoryIndexResponse:
        response = pb.RepositoryIndexResponse()
        token = ""  # nosec B105 # no password
        while True:
            records, token = self._models.list_models(pages.MAX_SIZE, token, tenant)
            for record in records:
                try:
                    latest = self._models.resolve(record.name, None, None)
                except NotFound:
                    continue  # deleted since
                damage = self._engine.damage_of(latest.files)
                in_memory = self._engine.is_loaded(latest.files)
                response.models.add(
                    name=plain_name(latest.model),
                    version=str(latest.version),
                    state="UNAVAILABLE" if damage else "READY",
                    reason=damage or ("in memory" if in_memory else "loads on demand"),
                )
            if not token:
                return response


def _check(repository_name: str) -> None:
    if repository_name:
        raise bad("repository_name", "there is one repository: leave repository_name empty")
