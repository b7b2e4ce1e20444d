"""Trainers report how far a stage is, and how long it may still take."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from service.contract import ModelBased, Progressed
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from tests.trainer.test_model_based import Trained
from trainer import baselines, compute
from trainer.methods import model_based
from trainer.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def test_the_pace_is_not_known_at_first() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.remaining_s(10) is None
    clock.now += 0.5
    pace.reached(5)
    assert pace.remaining_s(10) is None
    clock.now += 0.5
    pace.reached(10)
    assert pace.remaining_s(10) == pytest.approx(1.0)


def test_the_pace_is_that_of_the_last_while() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now += 1
    pace.reached(1000)  # all kept from an earlier job
    for done in range(1001, 1101):
        clock.now += 1
        pace.reached(done)
    assert pace.unit_s == pytest.approx(1.0)
    assert pace.remaining_s(7) == pytest.approx(7.0)


def test_what_does_not_get_on_has_no_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now += 100
    pace.reached(0)
    assert pace.remaining_s(1) is None


def progress(told: Told) -> list[Any]:
    return [record for record in told if isinstance(record, Progressed)]


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_based, "_PROGRESS_S", -1.0)


@pytest.mark.usefixtures("every_step")
def test_training_tells_each_step_and_is_done_at_its_end_alone(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    method = ModelBased(epochs=3, batch_size=4)
    Trained(make_folder(per_class=8), make_spec, method, told).run()
    stages = [record.stage for record in progress(told)]
    assert stages == sorted(stages, key=["preparing", "training"].index)
    training = [record for record in progress(told) if record.stage == "training"]
    fractions = [record.fraction for record in training]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert max(fractions[:-1]) < 1.0
    assert max(r.fraction for r in progress(told) if r.stage == "preparing") < 1.0
    steps = training[0].steps // 3
    assert {record.steps for record in training} == {3 * steps}
    # Each step of each epoch, its beginning and its validation.
    told_steps = [record.step for record in training]
    assert {*range(3 * steps + 1)} == {*told_steps}
    assert training[-1].remaining_s == 0.0
    # The second epoch knows how long the first one took.
    later = [r for r in training[:-1] if r.step > steps]
    assert all(r.remaining_s is not None and r.remaining_s >= 0 for r in later)


@pytest.mark.usefixtures("every_step")
def test_epochs_that_find_no_time_do_not_put_the_bar_back(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever reads the clock sees a second more, and a step was planned to take none.
    seconds = itertools.count()
    monkeypatch.setattr(
        model_based, "time", SimpleNamespace(monotonic=lambda: float(next(seconds)))
    )
    monkeypatch.setattr(compute, "step_s", lambda *_: 1e-6)
    method = ModelBased(epochs=40, batch_size=4, precision="fp32")
    _, used, *_ = Trained(make_folder(per_class=8), make_spec, method, told).run(100.0)
    assert 1 < used["epochs"] < 40
    training = [record for record in progress(told) if record.stage == "training"]
    fractions = [record.fraction for record in training]
    assert fractions == sorted(fractions)
    assert (fractions[-1], training[-1].step) == (1.0, training[-1].steps)


def test_a_comparison_is_a_part_of_the_check() -> None:
    told = Told()
    send = baselines._within_checking(told.append, "from_scratch", 1, 2)
    for stage, fraction in (("preparing", 0.9), ("training", 0.0), ("training", 1.0)):
        send(Progressed(stage, fraction))
    low, high = baselines.JUDGING
    middle = (low + high) / 2
    assert [(r.stage, r.fraction, r.detail) for r in progress(told)] == [
        ("checking", pytest.approx(middle), "for comparison: from scratch"),
        ("checking", pytest.approx(middle), "for comparison: from scratch"),
        ("checking", pytest.approx(high), "for comparison: from scratch"),
    ]
