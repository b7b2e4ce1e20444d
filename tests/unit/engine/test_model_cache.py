"""Models in memory: loaded once, evicted, pinned."""

import asyncio
import dataclasses
import gc

import pytest

from service.engine.engine import ModelFiles
from service.engine.runtime import Read
from service.errors import Exhausted, Expired, Reason
from service.ops.metrics import Metrics
from tests.fake_runtime import FakeRuntime, FakeSession
from tests.keys import key
from tests.unit.engine.conftest import GUARD_S, MakeEngine, MakeModel, Stored
from tests.unit.engine.test_engine import best, encoded, value
from tests.unit.engine.test_workers import PIXELS, Held


async def test_a_pinned_model_stays_when_others_must_leave(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    runtime._nbytes = 10_000
    engine = make_engine(max_bytes=25_000)
    pinned, *others = [make_model(f"m{i}", f"b{i}") for i in range(4)]
    await engine.pin(pinned)
    for model in others:
        await engine.warm(model)
    assert engine.is_loaded(pinned)
    assert not engine.is_loaded(others[0])
    engine.unpin(pinned)
    for model in others:
        await engine.warm(model)
    assert not engine.is_loaded(pinned)


async def test_a_backbone_that_two_pinned_models_share_stays_until_both_are_unpinned(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    runtime._nbytes = 10_000
    engine = make_engine(max_bytes=25_000)
    one, two = make_model("one", "shared"), make_model("two", "shared")
    await engine.pin(one)
    await engine.pin(two)
    engine.unpin(one)
    for i in range(3):
        await engine.warm(make_model(f"m{i}", f"b{i}"))
    assert engine.is_loaded(two)


async def test_pinning_more_than_the_bound_is_refused(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    runtime._nbytes = 10_000
    engine = make_engine(max_bytes=15_000)
    await engine.pin(make_model("m0", "b0"))
    with pytest.raises(Exhausted) as refused:
        await engine.pin(make_model("m1", "b1"))
    assert refused.value.reason is Reason.OUT_OF_MEMORY


async def test_a_tenant_pins_its_share_of_the_memory_and_no_more(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    def of(tenant: str, name: str) -> ModelFiles:
        return dataclasses.replace(make_model(name, f"b-{name}"), model=key(name, tenant))

    runtime._nbytes = 10_000
    engine = make_engine(max_bytes=45_000, max_pinned_bytes=22_500)
    first, second, third = (of("acme", name) for name in ("m0", "m1", "m2"))
    for files in (first, second, first):
        await engine.pin(files)
    with pytest.raises(Exhausted, match="what one tenant may pin") as refused:
        await engine.pin(third)
    assert refused.value.reason is Reason.OUT_OF_MEMORY
    await engine.pin(of("zoo", "m3"))
    engine.unpin(first)
    await engine.pin(third)


async def test_concurrent_first_calls_share_one_load(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(), make_model()
    await asyncio.gather(*(engine.classify(model, [encoded("red")], GUARD_S) for _ in range(8)))
    assert len(runtime.loads) == 1


async def test_least_recently_used_backbones_leave_and_come_back(
    make_engine: MakeEngine,
    make_model: MakeModel,
    runtime: FakeRuntime,
    metrics: Metrics,
) -> None:
    runtime._nbytes = 10_000
    engine = make_engine(max_bytes=25_000)
    models = [make_model(f"m{i}", f"b{i}") for i in range(3)]
    for model in (*models, models[0]):
        assert best((await engine.classify(model, [encoded("red")], GUARD_S))[0]) == "red"
        assert engine._memory.nbytes <= 25_000
    assert runtime.loads == [model.backbone_digest for model in (*models, models[0])]
    assert value(metrics, "graft_evictions_total", kind="backbone") == 2


def slow_load(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> tuple[Held, list[int]]:
    """Makes the runtime's loads wait; the list fills as they end."""
    held, ended, load = Held(), list[int](), runtime.load

    def slow(read: Read, digest: str) -> FakeSession:
        held.begun.set()
        assert held.goes_on.wait(GUARD_S)
        ended.append(1)
        return load(read, digest)

    monkeypatch.setattr(runtime, "load", slow)
    return held, ended


async def test_a_load_that_fails_when_nobody_waits_any_more_is_no_error_of_asyncios(
    make_engine: MakeEngine,
    make_model: MakeModel,
    runtime: FakeRuntime,
    stored: Stored,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, model = make_engine(), make_model()
    held, _ = slow_load(runtime, monkeypatch)
    with pytest.raises(Expired):
        await engine.classify(model, [lambda _: PIXELS], 0.01)
    del stored[model.backbone_digest]
    loading = list(engine._backbones._loading.values())
    held.goes_on.set()
    await asyncio.wait(loading)
    loading.clear()
    await asyncio.sleep(0)
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
