"""Progress of a trainer: which of it is kept, with the time of its stage."""

from service.contract import Progressed
from service.jobs.attempt import ShownProgress


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_says_how_long_it_has_taken() -> None:
    clock = Clock()
    shown = ShownProgress(clock)
    clock.now += 3
    first = shown.next(Progressed("training", 0.0, "epoch 1 of 2", 0, 8))
    clock.now += 2
    second = shown.next(Progressed("training", 0.25, "epoch 1 of 2", 2, 8, 6.0))
    clock.now += 1
    third = shown.next(Progressed("exporting", 0.0))
    assert first == Progressed("training", 0.0, "epoch 1 of 2", 0, 8, None, 0.0)
    assert second == Progressed("training", 0.25, "epoch 1 of 2", 2, 8, 6.0, 2.0)
    assert third == Progressed("exporting", 0.0)


def test_small_steps_are_kept_where_the_last_one_is_long_ago() -> None:
    clock = Clock()
    shown = ShownProgress(clock)
    assert shown.next(Progressed("training", 0.0)) is not None
    kept = 0
    for step in range(1, 101):
        clock.now += 1
        kept += shown.next(Progressed("training", step / 100_000)) is not None
    assert kept == 6
    clock.now += 1000
    # What does not get on is no progress, however long ago the last one is.
    assert shown.next(Progressed("training", 100 / 100_000)) is not None
    clock.now += 1000
    assert shown.next(Progressed("training", 100 / 100_000)) is None


def test_a_part_of_a_stage_begins_anew() -> None:
    clock = Clock()
    shown = ShownProgress(clock)
    shown.next(Progressed("features", 0.2, "training images"))
    clock.now += 9
    end = shown.next(Progressed("features", 1.0, "training images"))
    clock.now += 1
    anew = shown.next(Progressed("features", 0.1, "validation images"))
    assert end is not None
    assert anew is not None
    assert (end.elapsed_s, anew.elapsed_s) == (9.0, 0.0)
