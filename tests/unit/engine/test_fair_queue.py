"""The queue's order, by itself: no threads, no sessions."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from service.engine.fair_queue import Backbone, Call, FairQueue
from service.engine.fake_runtime import FakeSession
from service.engine.head import Head

HEAD = Head(np.zeros((2, 3), np.float32), np.zeros(2, np.float32), ("a", "b"))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def backbone(image_s: float = 0.0) -> Backbone:
    return Backbone(FakeSession(), image_s)


class Calls:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._clock = 0.0

    def __call__(self, model: str, on: Backbone, images: int = 1, deadline: float = 1000.0) -> Call:
        self._clock += 1
        content = [lambda _: np.zeros((224, 224, 3), np.uint8)] * images
        return Call(model, on, HEAD, content, self._clock, deadline, self._loop.create_future())


@pytest.fixture
def call(loop: asyncio.AbstractEventLoop) -> Calls:
    return Calls(loop)


def taken(queue: FairQueue, most: int, now: float = 0.0) -> list[str]:
    return [call.model for call, _ in queue.take(lambda _: most, now)[0]]


def test_models_take_turns_image_by_image(call: Calls) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(call("a", on, 5))
    queue.put(call("b", on, 1))
    queue.put(call("c", on, 2))
    assert taken(queue, 4) == ["a", "b", "c", "a"]
    assert taken(queue, 10) == ["c", "a", "a", "a"]
    assert queue.waiting == 0


def test_a_batch_is_of_one_backbone_and_backbones_take_turns(call: Calls) -> None:
    queue, one, other = FairQueue(), backbone(), backbone()
    queue.put(call("a", one, 4))
    queue.put(call("b", other, 2))
    assert [taken(queue, 2) for _ in range(3)] == [["a", "a"], ["b", "b"], ["a", "a"]]


def test_a_call_that_left_is_never_taken(call: Calls) -> None:
    queue, on = FairQueue(), backbone()
    leaving = call("a", on, 3)
    queue.put(leaving)
    queue.put(call("a", on, 1))
    queue.leave(leaving)
    queue.leave(leaving)
    assert queue.waiting == 1
    batch, _ = queue.take(lambda _: 8, 0.0)
    assert [c is leaving for c, _ in batch] == [False]
    assert taken(queue, 8) == []


def test_a_call_whose_deadline_comes_before_its_answer_could_is_handed_back(call: Calls) -> None:
    queue, on = FairQueue(), backbone(image_s=0.5)
    late, fine = call("a", on, 2, deadline=10.2), call("b", on, 1, deadline=10.6)
    queue.put(late)
    queue.put(fine)
    batch, expired = queue.take(lambda _: 8, 10.0)
    assert [c for c, _ in batch] == [fine]
    assert expired == [late]
    assert (queue.waiting, queue.backlog_s) == (0, 0.0)


def test_what_goes_first_counts_a_models_share_and_no_more(call: Calls) -> None:
    queue, on = FairQueue(), backbone(image_s=1.0)
    queue.put(call("flooding", on, 100))
    queue.put(call("calm", on, 2))
    # Three of its own rounds: three of the flood's, and the two of the calm one.
    assert queue.ahead_s("new", 3) == pytest.approx(5.0)
    assert queue.ahead_s("flooding", 1) == pytest.approx(102.0)


def test_room_is_made_by_the_newest_call_of_the_model_with_most_waiting(call: Calls) -> None:
    queue, on = FairQueue(), backbone()
    first, second = call("flooding", on, 3), call("flooding", on, 3)
    for each in (first, second, call("calm", on, 2)):
        queue.put(each)
    assert queue.newest_of_longest("new", 1) is second
    assert queue.newest_of_longest("flooding", 1) is None
    assert queue.newest_of_longest("new", 6) is None, "it would have as many itself"


def test_tenants_take_turns_however_many_models_they_have(call: Calls) -> None:
    queue, on = FairQueue(), backbone(image_s=1.0)
    for n in range(100):
        queue.put(call(f"many/m{n}", on))
    queue.put(call("one/m", on, 4))
    queue.put(call("plain", on, 2))
    # Three of its own, and of each other tenant as many at most.
    assert queue.ahead_s("one/m", 1) == pytest.approx(4 + 5 + 2)
    assert queue.ahead_s("new/m", 3) == pytest.approx(3 + 3 + 2)
    first = taken(queue, 9)
    assert first == [
        "many/m0", "one/m", "plain", "many/m1", "one/m", "plain", "many/m2", "one/m", "many/m3",
    ]  # fmt: skip
    assert taken(queue, 200) == ["one/m", *(f"many/m{n}" for n in range(4, 100))]
    assert queue.waiting == 0


def test_room_is_made_by_the_tenant_with_most_waiting_whatever_its_models_have(
    call: Calls,
) -> None:
    queue, on = FairQueue(), backbone()
    many = [call(f"many/m{n}", on) for n in range(100)]
    for each in (*many, call("one/m", on, 8)):
        queue.put(each)
    refused = queue.newest_of_longest("one/m", 8)
    assert refused in many
    assert queue.newest_of_longest("many/new", 1) is None, "it has most itself, one of each"
    first, second = call("one/m", on, 40), call("one/m", on, 40)
    queue.put(first)
    queue.put(second)
    # 88 of one, and 100 of the many: with 20 more it would have the most itself.
    assert queue.newest_of_longest("one/other", 20) is second
    assert queue.newest_of_longest("one/other", 8) in many


def test_a_call_that_was_begun_is_not_refused_any_more(call: Calls) -> None:
    queue, on = FairQueue(), backbone()
    queue.put(call("flooding", on, 5))
    queue.take(lambda _: 1, 0.0)
    assert queue.newest_of_longest("new", 1) is None


def test_the_backlog_is_what_was_expected_when_calls_came(call: Calls) -> None:
    queue, on = FairQueue(), backbone(image_s=2.0)
    queue.put(call("a", on, 3))
    on.image_s = 5.0
    queue.put(call("b", on, 1))
    assert queue.backlog_s == pytest.approx(11.0)
    taken(queue, 2)
    assert queue.backlog_s == pytest.approx(4.0)
    taken(queue, 8)
    assert queue.backlog_s == 0.0
