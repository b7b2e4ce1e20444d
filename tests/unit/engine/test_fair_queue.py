"""The queue's order, by itself: no threads, no sessions."""

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from service.domain import DEFAULT_TENANT
from service.engine.fair_queue import (
    AskedHead,
    Backbone,
    Estimate,
    FairQueue,
    ImageBatch,
    Run,
)
from service.engine.head import Head
from tests.fake_runtime import FakeSession
from tests.keys import key

HEAD = Head(np.zeros((2, 3), np.float32), np.zeros(2, np.float32), ("a", "b"))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def backbone(infer_s: float = 0.0) -> Backbone:
    session = FakeSession()
    session.infer_s = infer_s
    return Backbone(session)


class Batches:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._clock = 0.0

    def __call__(
        self,
        model: str,
        on: Backbone,
        images: int = 1,
        deadline: float = 1000.0,
        image_s: float = 1.0,
        tenant: str = DEFAULT_TENANT,
        more: Sequence[Backbone] = (),
    ) -> ImageBatch:
        self._clock += 1
        content = [lambda _: np.zeros((224, 224, 3), np.uint8)] * images
        answer = self._loop.create_future()
        batch = ImageBatch(
            key(model, tenant), [Run(on), *map(Run, more)], [AskedHead(0, HEAD)], content,
            self._clock, deadline, answer, list,
        )  # fmt: skip
        batch.image_s = image_s
        return batch


@pytest.fixture
def batch(loop: asyncio.AbstractEventLoop) -> Batches:
    return Batches(loop)


def popped(queue: FairQueue, most: int, on: Backbone | None = None, now: float = 0.0) -> list[str]:
    """Pops at most so many images; their models in order."""
    found = []
    while len(found) < most and (item := queue.pop(now, on)) is not None:
        found.append(str(item[0].model))
    return found


def test_models_take_turns_image_by_image(batch: Batches) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(batch("a", on, 5))
    queue.put(batch("b", on, 1))
    queue.put(batch("c", on, 2))
    assert popped(queue, 4) == ["a", "b", "c", "a"]
    assert popped(queue, 10) == ["c", "a", "a", "a"]
    assert queue.waiting == 0


def test_images_of_one_backbone_are_popped_where_it_is_named(batch: Batches) -> None:
    queue, one, other = FairQueue(), backbone(), backbone()
    queue.put(batch("a", one, 2))
    queue.put(batch("b", other, 2))
    assert popped(queue, 9, other) == ["b", "b"]
    assert popped(queue, 9) == ["a", "a"]


def test_a_tenants_backbones_take_turns_and_get_it_no_more(batch: Batches) -> None:
    queue, shared = FairQueue(), backbone()
    for n in range(10):
        queue.put(batch(f"m{n}", backbone(), 2, tenant="many"))
    queue.put(batch("m", shared, 3, tenant="one"))
    first = ["many/m0", "one/m", "many/m1", "one/m", "many/m2", "one/m", "many/m3"]
    assert popped(queue, 7) == first


def test_a_withdrawn_batch_is_never_popped(batch: Batches) -> None:
    queue, on = FairQueue(), backbone()
    leaving, staying = batch("a", on, 3), batch("a", on, 1)
    queue.put(leaving)
    queue.put(staying)
    queue.withdraw(leaving)
    queue.withdraw(leaving)
    assert queue.waiting == 1
    assert queue.pop(0.0) == (staying, 0)
    assert queue.pop(0.0) is None


def test_a_batch_whose_deadline_comes_before_its_answer_could_is_withdrawn(
    batch: Batches,
) -> None:
    queue, on = FairQueue(), backbone(infer_s=0.5)
    late, fine = batch("a", on, 2, deadline=10.2), batch("b", on, 1, deadline=10.6)
    queue.put(late)
    queue.put(fine)
    assert popped(queue, 9, now=10.0) == ["b"]
    assert late.is_withdrawn
    assert queue.waiting == 0


def test_a_batch_needs_the_time_of_all_its_runs_before_its_deadline(batch: Batches) -> None:
    queue, on, other = FairQueue(), backbone(infer_s=0.5), backbone(infer_s=0.4)
    queue.put(batch("a", on, deadline=10.6))
    queue.put(batch("b", on, deadline=10.6, more=[other]))
    queue.put(batch("c", on, deadline=11.0, more=[other]))
    assert popped(queue, 9, now=10.0) == ["a", "c"]


def test_the_last_that_waits_is_withdrawn_by_no_estimate(batch: Batches) -> None:
    queue, on = FairQueue(), backbone(infer_s=0.5)
    queue.put(batch("a", on, 2, deadline=10.2))
    assert popped(queue, 9, now=10.0) == ["a", "a"]
    queue.put(batch("a", on, 2, deadline=10.2))
    assert popped(queue, 9, now=10.3) == []


def test_a_tenant_gets_as_many_seconds_as_another_and_not_as_many_images(
    batch: Batches,
) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(batch("m", on, 16, image_s=0.003, tenant="costly"))
    queue.put(batch("m", on, 200, image_s=0.003, tenant="small"))
    order: list[str] = []
    while (item := queue.pop(0.0)) is not None:
        name = item[0].tenant
        order.append(name)
        # What was measured, in the place of what was estimated.
        queue.charge(name, (0.9 if name == "costly" else 0.003) - 0.003)
    assert order[:2] == ["costly", "small"]
    assert order[:201].count("costly") == 1, "one of the costly, then all of the small"


def test_a_tenant_that_used_an_idle_engine_owes_nothing_for_it(batch: Batches) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(batch("m", on, 100, tenant="early"))
    popped(queue, 98)
    queue.put(batch("m", on, 4, tenant="late"))
    assert popped(queue, 6) == [*["late/m", "early/m"] * 2, "late/m", "late/m"]


def test_nobody_saves_turns_up_by_waiting_for_nothing(batch: Batches) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(batch("m", on, 1, tenant="rare"))
    queue.put(batch("m", on, 100, tenant="busy"))
    popped(queue, 51)
    queue.put(batch("m", on, 50, tenant="rare"))
    assert popped(queue, 20).count("busy/m") >= 9


def test_what_goes_first_counts_a_models_share_and_no_more(batch: Batches) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(batch("flooding", on, 100))
    queue.put(batch("calm", on, 2))
    # Three of its own turns: three of the flood's, and the two of the calm one.
    assert queue.queued_ahead_s(batch("new", on, 3)) == pytest.approx(5.0)
    assert queue.queued_ahead_s(batch("flooding", on, 1)) == pytest.approx(102.0)


def test_room_is_made_by_the_newest_batch_of_the_model_with_most_waiting(
    batch: Batches,
) -> None:
    queue, on = FairQueue(), backbone()
    first, second = batch("flooding", on, 3), batch("flooding", on, 3)
    for each in (first, second, batch("calm", on, 2)):
        queue.put(each)
    assert queue.batch_to_shed(key("new"), 1) is second
    assert queue.batch_to_shed(key("flooding"), 1) is None
    assert queue.batch_to_shed(key("new"), 6) is None, "it would have as many itself"


def test_tenants_take_turns_however_many_models_they_have(batch: Batches) -> None:
    queue, on = FairQueue(), backbone()
    for n in range(100):
        queue.put(batch(f"m{n}", on, tenant="many"))
    queue.put(batch("m", on, 4, tenant="one"))
    queue.put(batch("plain", on, 2))
    # Four of its own before the new one, and of each other tenant as many seconds at most.
    assert queue.queued_ahead_s(batch("m", on, 1, tenant="one")) == pytest.approx(4 + 5 + 2)
    assert queue.queued_ahead_s(batch("m", on, 3, tenant="new")) == pytest.approx(3 + 3 + 2)
    first = popped(queue, 9)
    assert first == [
        "many/m0", "one/m", "plain", "many/m1", "one/m", "plain", "many/m2", "one/m", "many/m3",
    ]  # fmt: skip
    assert popped(queue, 200) == ["one/m", *(f"many/m{n}" for n in range(4, 100))]
    assert queue.waiting == 0


def test_what_goes_first_of_another_tenant_is_counted_in_seconds(batch: Batches) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(batch("m", on, 16, image_s=0.9, tenant="costly"))
    assert queue.queued_ahead_s(batch("m", on, 2, image_s=0.01, tenant="new")) == pytest.approx(
        0.02
    )


def test_room_is_made_by_the_tenant_with_most_waiting_whatever_its_models_have(
    batch: Batches,
) -> None:
    queue, on = FairQueue(), backbone()
    many = [batch(f"m{n}", on, tenant="many") for n in range(100)]
    for each in (*many, batch("m", on, 8, tenant="one")):
        queue.put(each)
    refused = queue.batch_to_shed(key("m", "one"), 8)
    assert refused in many
    assert queue.batch_to_shed(key("new", "many"), 1) is None, "it has most itself, one of each"
    first, second = batch("m", on, 40, tenant="one"), batch("m", on, 40, tenant="one")
    queue.put(first)
    queue.put(second)
    # 88 of one, and 100 of the many: with 20 more it would have the most itself.
    assert queue.batch_to_shed(key("other", "one"), 20) is second
    assert queue.batch_to_shed(key("other", "one"), 8) in many


def test_a_batch_that_was_begun_is_not_refused_any_more(batch: Batches) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(batch("flooding", on, 5))
    queue.pop(0.0)
    assert queue.batch_to_shed(key("new"), 1) is None


def test_an_estimate_follows_what_is_measured_and_returns_when_nothing_is() -> None:
    estimate = Estimate(0.01)
    estimate.add(2.0, 0.0)
    assert estimate.at(0.0) == pytest.approx(0.013), "one slow sample counts as four at most"
    for _ in range(100):
        estimate.add(0.05, 0.0)
    assert estimate.at(0.0) == pytest.approx(0.05, rel=0.01)
    assert estimate.at(10.0) == pytest.approx(0.03, rel=0.01)
    assert estimate.at(600.0) == pytest.approx(0.01)
