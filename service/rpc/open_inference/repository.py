"""The model repository extension: what there is, and what is to stay in memory.

Owns which files were pinned for which model, by its key, on the event loop alone: what a
model's latest version is may change between its load and its unload.
"""

import asyncio
from typing import Protocol

from service.auth.principal import current as caller
from service.domain import plain_name
from service.engine.engine import ModelFiles
from service.errors import NotFound
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference.tensors import bad
from service.rpc.serving import Resolve
from service.storage import pages
from service.storage.models import ModelStore


class Pinning(Protocol):
    """What of the engine is needed here."""

    async def pin(self, files: ModelFiles) -> None:
        """Loads a model and keeps it in memory; twice is as once."""

    def unpin(self, files: ModelFiles) -> None:
        """Lets it leave memory; nothing happens to what was not pinned."""

    def is_loaded(self, files: ModelFiles) -> bool:
        """Whether it is in memory; no use of it."""

    def damage_of(self, files: ModelFiles) -> str:
        """What is known to be wrong with its files."""


class Repository:
    """A caller's models, by their latest versions."""

    def __init__(self, engine: Pinning, resolve: Resolve, models: ModelStore) -> None:
        self._engine = engine
        self._resolve = resolve
        self._models = models
        self._pinned: dict[str, ModelFiles] = {}

    async def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """All of the caller's models by name."""
        _check(request.repository_name)
        found = await asyncio.to_thread(self._latest, caller().tenant)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=plain_name(files.name),
                    version=str(version),
                    state="UNAVAILABLE" if (damage := self._engine.damage_of(files)) else "READY",
                    reason=damage
                    or ("in memory" if self._engine.is_loaded(files) else "loads on demand"),
                )
                for version, files in found
            ]
        )

    async def load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Loads a model's latest version, which then stays."""
        _check(request.repository_name)
        model = caller().key(request.model_name)
        if any(name == "config" or name.startswith("file:") for name in request.parameters):
            raise bad(
                "parameters",
                "a published version has no other configuration or files: fine-tune to make a new "
                "one",
            )
        _, files = self._resolve(model, None, None)
        await self._engine.pin(files)
        before = self._pinned.get(model)
        self._pinned[model] = files
        if before is not None and before != files:
            self._engine.unpin(before)
        return pb.RepositoryModelLoadResponse()

    def unload(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        """Lets a model leave memory."""
        _check(request.repository_name)
        model = caller().key(request.model_name)
        if (pinned := self._pinned.pop(model, None)) is not None:
            self._engine.unpin(pinned)
        _, files = self._resolve(model, None, None)
        self._engine.unpin(files)
        return pb.RepositoryModelUnloadResponse()

    def _latest(self, tenant: str) -> list[tuple[int, ModelFiles]]:
        found = []
        token = ""  # nosec B105 # no password
        while True:
            records, token = self._models.list_models(pages.MAX_SIZE, token, tenant)
            for record in records:
                try:
                    found.append(self._resolve(record.name, None, None))
                except NotFound:
                    continue  # deleted since
            if not token:
                return found


def _check(repository_name: str) -> None:
    if repository_name:
        raise bad("repository_name", "there is one repository: leave repository_name empty")
