"""Counts of calls: what is added, what is left out, what leaves."""

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from service.engine.fair_queue import AskedHead, Backbone, Classified, ImageBatch, Run
from service.engine.head import Head
from service.engine.ledger import NOTHING, Account, Ledger, Spent
from service.ops.metrics import Metrics
from tests.fake_runtime import FakeSession
from tests.keys import key


def make(max_versions: int = 10) -> Ledger:
    return Ledger(Metrics({"version": "test"}), max_versions, clock=lambda: 1234.5)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def answer(account: Account, loop: asyncio.AbstractEventLoop) -> None:
    """Records a call of three images that took two seconds."""
    head = Head(np.zeros((2, 3), np.float32), np.zeros(2, np.float32), ("a", "b"))
    batch = ImageBatch(
        key("pets"), [Run(Backbone(FakeSession()))], [AskedHead(0, head)], [], 0.0, 60.0,
        loop.create_future(), list,
    )  # fmt: skip
    batch.images = [lambda _: np.zeros((224, 224, 3), np.uint8)] * 3
    one = Classified(np.zeros(2, np.float32), np.zeros(3, np.float32), ("a", "b"), 0)
    batch.outcomes = dict.fromkeys(range(3), (one,))
    batch.queue_s, batch.decode_s, batch.infer_s = [0.25, 0.1], [0.2, 0.5], [[1.0, 1.0]]
    account.answered(batch, 0, "digest", 2.0)


def test_an_answered_call_adds_its_images_and_the_slowest_of_every_stage(
    loop: asyncio.AbstractEventLoop,
) -> None:
    ledger = make()
    answer(ledger.account(key("pets"), 1), loop)
    answer(ledger.account(key("pets"), 1), loop)
    counts = ledger.of(key("pets"), 1)
    assert (counts.images, counts.last_s) == (6, 1234.5)
    assert counts.success == Spent(2, 4.0)
    assert (counts.queue, counts.decode, counts.infer) == (
        Spent(2, 0.5),
        Spent(2, 1.0),
        Spent(2, 2.0),
    )
    assert counts.rest == Spent(2, 0.5)
    assert counts.fail == Spent()


def test_a_failed_call_counts_as_failed_alone() -> None:
    ledger = make()
    ledger.account(key("pets"), 1).failed(2.0)
    counts = ledger.of(key("pets"), 1)
    assert counts.fail == Spent(1, 2.0)
    assert (counts.images, counts.success, counts.queue, counts.last_s) == (
        0,
        Spent(),
        Spent(),
        0,
    )


def test_versions_are_counted_apart_and_unknown_ones_are_zero(
    loop: asyncio.AbstractEventLoop,
) -> None:
    ledger = make()
    answer(ledger.account(key("pets"), 2), loop)
    assert ledger.of(key("pets"), 1) == NOTHING
    assert set(ledger.all()) == {(key("pets"), 2)}


def test_the_version_that_was_not_asked_for_longest_leaves(loop: asyncio.AbstractEventLoop) -> None:
    ledger = make(max_versions=2)
    for model in ("a", "b", "a", "c"):
        answer(ledger.account(key(model), 1), loop)
    assert set(ledger.all()) == {(key("a"), 1), (key("c"), 1)}
    assert ledger.of(key("a"), 1).success.count == 2


def test_a_forgotten_version_is_unknown_and_what_ends_later_counts_in_vain(
    loop: asyncio.AbstractEventLoop,
) -> None:
    ledger = make()
    answer(ledger.account(key("pets"), 1), loop)
    answer(ledger.account(key("pets"), 2), loop)
    under_way = ledger.account(key("pets"), 1)
    ledger.keep_only(key("pets"), [2], ledger.recorded(key("pets")))
    answer(under_way, loop)
    assert set(ledger.all()) == {(key("pets"), 2)}
    answer(ledger.account(key("pets"), 1), loop)
    assert ledger.of(key("pets"), 1).success.count == 1


def test_what_came_since_the_versions_were_read_stays(loop: asyncio.AbstractEventLoop) -> None:
    metrics = Metrics({"version": "test"})
    ledger = Ledger(metrics)
    answer(ledger.account(key("pets"), 1), loop)
    recorded = ledger.recorded(key("pets"))
    answer(ledger.account(key("pets"), 2), loop)
    ledger.keep_only(key("pets"), [], recorded)
    assert set(ledger.all()) == {(key("pets"), 2)}
    labels = {"model": str(key("pets")), "outcome": "ok"}
    assert metrics.registry.get_sample_value("graft_images_total", labels) == 6
    ledger.keep_only(key("pets"), [], ledger.recorded(key("pets")))
    assert metrics.registry.get_sample_value("graft_images_total", labels) is None


def test_what_was_handed_out_does_not_change(loop: asyncio.AbstractEventLoop) -> None:
    ledger = make()
    answer(ledger.account(key("pets"), 1), loop)
    before = ledger.all()
    answer(ledger.account(key("pets"), 1), loop)
    assert before[key("pets"), 1].success.count == 1
