"""Costly images, callers that leave and failures: what they do to others, on a fake clock."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from service.domain import ImageDecoding
from service.engine.engine import Decode, ModelFiles
from service.engine.preprocess import Encoded, Pixels
from service.errors import Exhausted, Expired, InvalidInput, Reason
from service.ops.metrics import Metrics
from tests.fake_runtime import FakeRuntime
from tests.keys import key
from tests.unit.engine.conftest import GUARD_S, MakeEngine, MakeModel

PIXELS = np.full((224, 224, 3), (255, 0, 0), np.uint8)


class Clock:
    """Stands still but for what is spent."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.decoded: list[str] = []

    def __call__(self) -> float:
        return self.now

    def image(self, seconds: float, name: str = "") -> Decode:
        """An image that takes so long to be decoded."""

        def decode(_: ImageDecoding) -> Pixels:
            self.decoded.append(name)
            self.now += seconds
            return PIXELS

        return decode


class Held:
    """A worker's image, which is decoded when the test says so."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def __call__(self, _: ImageDecoding) -> Pixels:
        self.begun.set()
        assert self.goes_on.wait(GUARD_S)
        return PIXELS

    async def until_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, GUARD_S)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def of(tenant: str, files: ModelFiles) -> ModelFiles:
    return dataclasses.replace(files, model=key(files.model.name, tenant))


async def until_waiting(metrics: Metrics, images: int) -> None:
    while (metrics.registry.get_sample_value("graft_queue_depth") or 0) < images:  # noqa: ASYNC110
        await asyncio.sleep(0)  # a few turns


async def test_an_idle_engine_takes_every_call_whatever_images_cost_before(
    make_engine: MakeEngine, make_model: MakeModel, clock: Clock
) -> None:
    engine, model = make_engine(clock), make_model()
    for _ in range(20):
        await engine.classify(model, [clock.image(10_000)], 1e9)
    for _ in range(30):
        await engine.classify(model, [clock.image(0)], GUARD_S)


async def test_one_tenants_slow_images_have_no_call_of_another_refused(
    make_engine: MakeEngine, make_model: MakeModel, clock: Clock, metrics: Metrics
) -> None:
    engine, model = make_engine(clock), make_model()
    slow, fast = of("acme", model), of("zoo", model)
    await engine.classify(slow, [clock.image(10_000)] * 40, 1e9)
    held = Held()
    running = asyncio.create_task(engine.classify(slow, [held], 1e9))
    await held.until_begun()
    with pytest.raises(Exhausted, match="later than their deadline"):
        await engine.classify(slow, [clock.image(0)] * 40, GUARD_S)
    waiting = asyncio.create_task(engine.classify(fast, [clock.image(0)] * 40, GUARD_S))
    await until_waiting(metrics, 40)
    held.goes_on.set()
    await asyncio.gather(running, waiting)


async def test_one_slow_image_of_its_own_has_no_call_refused(
    make_engine: MakeEngine, make_model: MakeModel, clock: Clock, metrics: Metrics
) -> None:
    engine, model = make_engine(clock), make_model()
    await engine.classify(model, [clock.image(10_000)], 1e9)
    held = Held()
    running = asyncio.create_task(engine.classify(model, [held], 1e9))
    await held.until_begun()
    waiting = asyncio.create_task(engine.classify(model, [clock.image(0)] * 40, GUARD_S))
    await until_waiting(metrics, 40)
    held.goes_on.set()
    await asyncio.gather(running, waiting)


async def test_images_of_a_call_that_was_left_are_not_decoded(
    make_engine: MakeEngine, make_model: MakeModel, clock: Clock
) -> None:
    engine, model = make_engine(clock, max_batch=64), make_model()
    held = Held()
    leaving = asyncio.create_task(
        engine.classify(model, [held, *[clock.image(0, "left")] * 63], GUARD_S)
    )
    await held.until_begun()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    held.goes_on.set()
    await engine.classify(model, [clock.image(0, "mine")], GUARD_S)
    assert clock.decoded == ["mine"]


async def test_images_past_their_deadline_are_not_decoded(
    make_engine: MakeEngine, make_model: MakeModel, clock: Clock
) -> None:
    engine, model = make_engine(clock, max_batch=64), make_model()
    images = [clock.image(1, "first"), *[clock.image(1, "other")] * 9]
    late = asyncio.create_task(engine.classify(model, images, 3.5))
    with pytest.raises(Expired):
        await late
    assert len(clock.decoded) <= 4


async def test_a_batch_ends_when_it_has_taken_its_time(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, clock: Clock
) -> None:
    engine, model = make_engine(clock, max_batch=64), make_model()
    await engine.classify(model, [clock.image(0.01)] * 9, GUARD_S)
    session = runtime.session(model.backbone_digest)
    assert session.batches == [3, 3, 3]
    session.batches.clear()
    session.infer_s = 0.02
    other = dataclasses.replace(make_model("other", "b1"))
    runtime.session(other.backbone_digest).infer_s = 0.02
    await engine.classify(other, [clock.image(0.01)] * 4, GUARD_S)
    assert max(runtime.session(other.backbone_digest).batches) <= 2, "inference counts too"


async def test_a_worker_leaves_the_others_their_part_of_what_waits(
    make_engine: MakeEngine,
    make_model: MakeModel,
    runtime: FakeRuntime,
    clock: Clock,
    metrics: Metrics,
) -> None:
    engine, model = make_engine(clock, threads=2, max_batch=64), make_model()
    session = runtime.session(model.backbone_digest)
    session.hold()
    first, second = Held(), Held()
    calls = [asyncio.create_task(engine.classify(model, [held], 1e9)) for held in (first, second)]
    await first.until_begun()
    await second.until_begun()
    calls.append(asyncio.create_task(engine.classify(model, [clock.image(0)] * 16, 1e9)))
    await until_waiting(metrics, 16)
    first.goes_on.set()
    second.goes_on.set()
    session.release()
    await asyncio.gather(*calls)
    assert max(session.batches) <= 9, "half of sixteen, beside the one that was begun"


async def test_a_costly_image_holds_up_none_that_was_decoded_before_it(
    make_engine: MakeEngine, make_model: MakeModel, clock: Clock, metrics: Metrics
) -> None:
    class Costly(Encoded):
        pixels = 50_000_000  # type: ignore[assignment]
        answered_before = -1

        def __call__(self, _: ImageDecoding) -> Pixels:
            # The loop answers while this waits.
            assert answered.wait(GUARD_S), "it was decoded before the others were answered"
            return PIXELS

    engine, model = make_engine(clock), make_model()
    held, answered = Held(), threading.Event()
    small, costly = of("zoo", model), of("acme", model)
    calls = [asyncio.create_task(engine.classify(of("other", model), [held], GUARD_S))]
    await held.until_begun()
    # Both may be in the next batch, in this order.
    calls.append(asyncio.create_task(engine.classify(small, [clock.image(0)], GUARD_S)))
    calls[-1].add_done_callback(lambda _: answered.set())
    await until_waiting(metrics, 1)
    calls.append(asyncio.create_task(engine.classify(costly, [Costly(b"")], GUARD_S)))
    await until_waiting(metrics, 2)
    held.goes_on.set()
    await asyncio.gather(*calls)


async def test_costly_images_of_one_tenant_delay_another_by_one_of_them(
    make_engine: MakeEngine, make_model: MakeModel, clock: Clock, metrics: Metrics
) -> None:
    engine, model = make_engine(clock), make_model()
    costly, small = of("acme", model), of("zoo", model)
    held = Held()
    calls = [asyncio.create_task(engine.classify(small, [held], 1e9))]
    await held.until_begun()
    calls.append(
        asyncio.create_task(engine.classify(costly, [clock.image(0.9, "costly")] * 16, 1e9))
    )
    calls += [
        asyncio.create_task(engine.classify(small, [clock.image(0.003, "small")], 1e9))
        for _ in range(40)
    ]
    await until_waiting(metrics, 56)
    held.goes_on.set()
    await asyncio.gather(*calls)
    last = max(turn for turn, name in enumerate(clock.decoded) if name == "small")
    assert clock.decoded[:last].count("costly") <= 2


async def test_every_call_of_a_failed_batch_gets_an_error_of_its_own(
    make_engine: MakeEngine,
    make_model: MakeModel,
    runtime: FakeRuntime,
    clock: Clock,
    metrics: Metrics,
) -> None:
    engine, model = make_engine(clock), make_model()
    held = Held()

    def bad(decoding: ImageDecoding) -> Pixels:
        held(decoding)
        raise InvalidInput(Reason.IMAGE_UNREADABLE, "so that it is not run")

    running = asyncio.create_task(engine.classify(model, [bad], GUARD_S))
    await held.until_begun()
    calls = [
        asyncio.create_task(engine.classify(model, [clock.image(0)], GUARD_S)) for _ in range(4)
    ]
    await until_waiting(metrics, 4)
    runtime.session(model.backbone_digest).fail_next = RuntimeError("kernel")
    held.goes_on.set()
    await running
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all("kernel" in str(error) for error in errors)
    assert len({id(error) for error in errors}) == 4


async def test_an_image_that_fails_by_a_fault_of_ours_fails_its_own_call_alone(
    make_engine: MakeEngine, make_model: MakeModel, clock: Clock, metrics: Metrics
) -> None:
    def broken(_: ImageDecoding) -> Pixels:
        raise ZeroDivisionError("ours")

    engine, model = make_engine(clock), make_model()
    held = Held()
    running = asyncio.create_task(engine.classify(model, [held], GUARD_S))
    await held.until_begun()
    failing = asyncio.create_task(engine.classify(model, [broken, clock.image(0)], GUARD_S))
    fine = asyncio.create_task(engine.classify(model, [clock.image(0)], GUARD_S))
    await until_waiting(metrics, 3)
    held.goes_on.set()
    with pytest.raises(RuntimeError, match="ours"):
        await failing
    await asyncio.gather(running, fine)
