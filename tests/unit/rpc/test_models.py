"""Deletions whose callers leave."""

import asyncio
import threading
from typing import Any

import pytest
from graft.v1 import model_pb2 as pb

from service.auth import principal
from service.auth.principal import EVERYBODY
from service.rpc.models import ModelServicer
from service.storage.records import Removed

GUARD_S = 60.0


class Models:
    """Deletes when the test lets it."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def delete_model(self, name: str, *, force: bool) -> Removed:
        self.has_begun.set()
        assert self.may_end.wait(GUARD_S)
        return Removed(name, [1], True, ["b"], ["h"], [])


class Engine:
    """Notes what it is to forget."""

    def __init__(self) -> None:
        self.forgotten: list[Any] = []

    def forget(self, *, models: list[str], **_: object) -> None:
        self.forgotten += models


async def test_a_deletion_is_forgotten_by_the_engine_though_its_caller_left() -> None:
    principal.enter(EVERYBODY)
    models: Any = Models()
    engine: Any = Engine()
    nothing: Any = None
    servicer = ModelServicer(models, engine, nothing)
    call = asyncio.create_task(servicer.DeleteModel(pb.DeleteModelRequest(model="cats"), nothing))
    assert await asyncio.to_thread(models.has_begun.wait, GUARD_S)
    call.cancel()
    await asyncio.sleep(0)
    models.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, GUARD_S)
    assert engine.forgotten == ["cats"]
