"""The measurement of decisions: what is drawn, what it finds, what it writes."""

import numpy as np

from bench.quality import decisions
from tests.bench.test_quality import made


def test_pairs_learn_from_nine_to_one_and_are_asked_what_was_held_out() -> None:
    whole = made(3, 90, 1, 0.35, 0)
    tasks = list(decisions.tasks({"made": whole}, 8))
    assert len({(a, b) for _, a, b, _ in tasks}) == 6
    outcomes = [decisions.measure(whole, *task[1:]) for task in tasks]
    found = [o for o in outcomes if o is not None]
    assert len(found) == len(tasks)
    for one in found:
        assert one.prior.tolist() == [0.9, 0.1]
        assert (one.rare, one.rare_images) == (1, 30)
    # Classes that overlap: the rare one is taken for the other, unless its share is allowed for.
    assert np.mean([o.balanced[1] for o in found]) > np.mean([o.argmax[1] for o in found]) + 0.1
    assert np.mean([o.gain for o in found]) > 0
    # Another draw is of other images.
    assert len({tuple(o.argmax) for o in found}) > 4

    text = decisions.section(found).markdown()
    assert "| made | 8 | 240 |" in text
    assert "*all pairs*" in text


def test_a_set_that_came_imbalanced_is_taken_as_it_is_too() -> None:
    whole = made(2, 60, 1, 0.5, 1)
    lopsided = whole.at(np.arange(60 + 10))
    tasks = list(decisions.tasks({"made": lopsided}, 1))
    assert tasks == [("made", 0, 1, 0), ("made", -1, -1, 0)]
    found = decisions.measure(lopsided, -1, -1, 0)
    assert found is not None
    assert not found.is_pair
    assert "made as it came" in decisions.section([found]).markdown()
    # Too few of the rare one to learn from.
    assert not list(decisions.tasks({"made": whole.at(np.arange(60 + 5))}, 1))[:-1]
