"""Pinned versions are kept in memory as their rows say, on every replica."""

import logging
from types import SimpleNamespace

import pytest

from service.domain import ModelFiles, ModelKey
from service.engine.ledger import Ledger
from service.errors import Damaged, Exhausted, NotFound, Reason, unloadable
from service.ops.metrics import Metrics
from service.rpc.pins import ChangeFollower, Pins
from service.storage.changes import Changes
from service.storage.models import ModelStore
from tests.keys import BIRDS, key
from tests.unit.storage.conftest import (
    Publish,
    blobs,
    change_log,
    database,
    models,
    publish,
    store,
)

__all__ = ["blobs", "change_log", "database", "models", "publish", "store"]

BEARS = key("bears")


class FakeEngine:
    """Remembers what is pinned; pinning one of `refused` raises its error."""

    def __init__(self) -> None:
        self.pinned: frozenset[ModelFiles] = frozenset()
        self.refused: dict[ModelKey, Exception] = {}

    async def pin(self, files: ModelFiles) -> None:
        if (error := self.refused.get(files.model)) is not None:
            raise error
        self.pinned |= {files}

    def unpin(self, files: ModelFiles) -> None:
        self.pinned -= {files}

    @property
    def versions(self) -> set[tuple[str, int]]:
        return {(files.model.name, files.version) for files in self.pinned}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def pins(engine: FakeEngine, models: ModelStore) -> Pins:
    return Pins(engine, models)  # type: ignore[arg-type]


async def test_a_loaded_model_stays_until_it_is_unloaded_whatever_came_since(
    pins: Pins, engine: FakeEngine, publish: Publish
) -> None:
    publish(BIRDS, "job-1")
    publish(BEARS, "job-2")
    for model in (BIRDS, BEARS, BIRDS):
        await pins.load(model)
    publish(BIRDS, "job-3")
    await pins.reconcile()
    assert engine.versions == {("birds", 1), ("bears", 1)}
    await pins.unload(BIRDS)
    assert engine.versions == {("bears", 1)}


async def test_loading_a_newer_version_lets_the_older_one_go(
    pins: Pins, engine: FakeEngine, publish: Publish
) -> None:
    for number in (1, 2):
        publish(BIRDS, f"job-{number}")
        await pins.load(BIRDS)
        assert engine.versions == {("birds", number)}


async def test_a_replica_that_starts_or_hears_of_a_change_loads_what_others_pinned(
    pins: Pins, models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1")
    publish(BEARS, "job-2")
    await pins.load(BIRDS)
    other = FakeEngine()
    theirs = Pins(other, models)  # type: ignore[arg-type]
    await theirs.reconcile()
    assert other.versions == {("birds", 1)}
    await pins.unload(BIRDS)
    await pins.load(BEARS)
    await theirs.reconcile()
    assert other.versions == {("bears", 1)}
    models.delete_model(BEARS)
    await theirs.reconcile()
    assert other.versions == set()


async def test_what_does_not_fit_is_not_pinned(
    pins: Pins, engine: FakeEngine, models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1")
    engine.refused[BIRDS] = Exhausted(Reason.OUT_OF_MEMORY, "no room")
    with pytest.raises(Exhausted):
        await pins.load(BIRDS)
    assert models.pinned() == []
    with pytest.raises(NotFound):
        await pins.load(BEARS)
    with pytest.raises(NotFound):
        await pins.unload(BEARS)


async def test_a_pinned_version_that_cannot_be_loaded_is_logged_once_and_tried_again(
    pins: Pins,
    engine: FakeEngine,
    models: ModelStore,
    publish: Publish,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(BEARS, "job-1")
    publish(BIRDS, "job-2")
    models.pin(BEARS, 1)
    models.pin(BIRDS, 1)
    engine.refused[BEARS] = unloadable("backbone", "is missing")
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            await pins.reconcile()
    assert engine.versions == {("birds", 1)}
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [Damaged]
    engine.refused.clear()
    await pins.reconcile()
    assert engine.versions == {("birds", 1), ("bears", 1)}


async def test_a_version_that_is_deleted_while_it_is_loaded_is_not_pinned(
    pins: Pins, engine: FakeEngine, models: ModelStore, publish: Publish
) -> None:
    publish(BIRDS, "job-1")
    pin = engine.pin

    async def deleted_meanwhile(files: ModelFiles) -> None:
        await pin(files)
        models.delete_model(BIRDS)

    engine.pin = deleted_meanwhile  # type: ignore[method-assign]
    with pytest.raises(NotFound):
        await pins.load(BIRDS)
    assert engine.versions == set()


class VersionsThatCame:
    """A table in which a version appears right after it was read, and is asked at once."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def numbers(self, model: ModelKey) -> list[int]:
        self._ledger.account(model, 2)
        return [1]


async def test_a_version_that_came_while_they_were_read_keeps_its_counts(
    change_log: Changes,
) -> None:
    ledger = Ledger(Metrics({"version": "test"}))
    for version in (1, 3):
        ledger.account(BIRDS, version)
    engine = SimpleNamespace(ledger=ledger, recent=None)
    models = VersionsThatCame(ledger)
    follower = ChangeFollower(change_log, models, engine, None)  # type: ignore[arg-type]
    await follower.look_again(BIRDS)
    assert set(ledger.recorded(BIRDS)) == {1, 2}
