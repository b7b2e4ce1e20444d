"""Counts of calls: what is added, what is left out, what leaves."""

from service.engine.statistics import NOTHING, Spent, Statistics


def make(max_versions: int = 10) -> Statistics:
    return Statistics(max_versions, clock=lambda: 1234.5)


def record(statistics: Statistics, model: str, version: int = 1, *, ok: bool = True) -> None:
    statistics.tally(model, version).record(
        images=3,
        ok=ok,
        queue_s=0.25,
        decode_s=0.5,
        infer_s=1.0,
        total_s=2.0,
    )


def test_an_answered_call_adds_its_images_and_every_stage() -> None:
    statistics = make()
    record(statistics, "pets")
    record(statistics, "pets")
    counts = statistics.of("pets", 1)
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
    statistics = make()
    record(statistics, "pets", ok=False)
    counts = statistics.of("pets", 1)
    assert counts.fail == Spent(1, 2.0)
    assert (counts.images, counts.success, counts.queue, counts.last_s) == (
        0,
        Spent(),
        Spent(),
        0,
    )


def test_versions_are_counted_apart_and_unknown_ones_are_zero() -> None:
    statistics = make()
    record(statistics, "pets", 2)
    assert statistics.of("pets", 1) == NOTHING
    assert set(statistics.all()) == {("pets", 2)}


def test_the_version_that_was_not_asked_for_longest_leaves() -> None:
    statistics = make(max_versions=2)
    for model in ("a", "b", "a", "c"):
        record(statistics, model)
    assert set(statistics.all()) == {("a", 1), ("c", 1)}
    assert statistics.of("a", 1).success.count == 2


def test_a_forgotten_version_is_unknown_and_what_ends_later_counts_in_vain() -> None:
    statistics = make()
    record(statistics, "pets", 1)
    record(statistics, "pets", 2)
    under_way = statistics.tally("pets", 1)
    statistics.forget("pets", 1)
    under_way.record(images=1, ok=True, queue_s=0, decode_s=0, infer_s=0, total_s=1)
    assert set(statistics.all()) == {("pets", 2)}
    record(statistics, "pets", 1)
    assert statistics.of("pets", 1).success.count == 1


def test_what_was_handed_out_does_not_change() -> None:
    statistics = make()
    record(statistics, "pets")
    before = statistics.all()
    record(statistics, "pets")
    assert before["pets", 1].success.count == 1
