"""From probabilities to answers, by a head's decision or another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.domain import ARGMAX, Decision
from service.engine import head as heads
from service.engine.head import Head
from service.errors import Damaged, InvalidInput

BALANCED = Decision(rule="balanced")
HEAD = Head(
    np.ones((3, 4), np.float32),
    np.zeros(3, np.float32),
    ("ants", "bees", "crickets"),
    prior=np.array([0.8, 0.15, 0.05], np.float32),
)
SHARES = np.array(
    [[0.7, 0.2, 0.1], [0.9, 0.06, 0.04], [0.5, 0.48, 0.02], [0.4, 0.3, 0.3]], np.float32
)


def thresholds(others: float = 0.0, **named: float) -> Decision:
    return Decision(rule="thresholds", thresholds=named, default_threshold=others)


@pytest.mark.parametrize(
    ("decision", "answers"),
    [
        (ARGMAX, [0, 0, 0, 0]),
        # 0.7 / 0.8, 0.2 / 0.15, 0.1 / 0.05, and so on.
        (BALANCED, [2, 0, 1, 2]),
        # The next one that reaches its own threshold is taken.
        (thresholds(ants=0.75), [1, 0, 1, 1]),
        (thresholds(ants=0.75, bees=0.25), [2, 0, 1, 1]),
        (thresholds(0.45), [0, 0, 0, -1]),
        (thresholds(0.45, bees=0.3), [0, 0, 0, 1]),
        (thresholds(0.9, ants=0.0), [0, 0, 0, 0]),
        (thresholds(1.0), [-1, -1, -1, -1]),
        # What is as large as the threshold reaches it, though 0.7 of 32 bits is less than 0.7.
        (thresholds(0.7), [0, 0, -1, -1]),
    ],
)
def test_a_decision_chooses_among_the_classes(decision: Decision, answers: list[int]) -> None:
    before = SHARES.copy()
    assert HEAD.decide(SHARES, decision).tolist() == answers
    assert replace(HEAD, decision=decision).decide(SHARES).tolist() == answers
    assert (before == SHARES).all()
    # As exactly of what is computed in double precision.
    assert HEAD.decide(SHARES.astype(np.float64), decision).tolist() == answers


def test_balanced_answers_by_the_classes_shares_alone() -> None:
    assert replace(HEAD, prior=None).decide(SHARES, BALANCED).tolist() == [0, 0, 0, 0]
    unseen = replace(HEAD, prior=np.array([0.5, 0.5, 0.0], np.float32))
    assert unseen.decide(np.array([[0.1, 0.1, 0.8]], np.float32), BALANCED).tolist() == [0]


def test_a_head_keeps_its_decision_and_its_shares_through_a_file(tmp_path: Path) -> None:
    decision = thresholds(0.25, crickets=0.1, ants=0.9)
    heads.save(replace(HEAD, decision=decision), tmp_path / "head")
    loaded = heads.load((tmp_path / "head").read_bytes())
    assert loaded.decision == decision
    assert loaded.prior is not None
    assert HEAD.prior is not None
    np.testing.assert_array_equal(loaded.prior, HEAD.prior)
    # The same rule is the same bytes, in whatever order it was told.
    heads.save(replace(HEAD, decision=thresholds(0.25, ants=0.9, crickets=0.1)), tmp_path / "same")
    assert (tmp_path / "head").read_bytes() == (tmp_path / "same").read_bytes()


@pytest.mark.parametrize("prior", [[0.5, 0.5], [1.5, -0.5, 0.0], [np.nan, 0.5, 0.5]])
def test_shares_that_are_none_of_the_classes_are_refused(prior: list[float]) -> None:
    with pytest.raises(ValueError, match="not a share of each of 3 classes"):
        replace(HEAD, prior=np.array(prior, np.float32))


@pytest.mark.parametrize(
    ("text", "damage"), [('"argmax"', '"dice"'), ('"thresholds": {}', '"thresholds": {"ants": 7}')]
)
def test_a_rule_that_nobody_knows_makes_the_head_unloadable(
    tmp_path: Path, text: str, damage: str
) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "head"
    heads.save(HEAD, path)
    data = path.read_bytes()
    about = heads._metadata(data)["head"]
    assert text in about
    save_file(load_file(path), path, metadata={"head": about.replace(text, damage)})
    with pytest.raises(Damaged):
        heads.load(path.read_bytes())


@pytest.mark.parametrize(
    ("decision", "field"),
    [
        (thresholds(1.01), "decision.thresholds.others"),
        (thresholds(float("nan")), "decision.thresholds.others"),
        (thresholds(ants=-0.1), "decision.thresholds.classes[ants]"),
        (thresholds(ants=float("inf")), "decision.thresholds.classes[ants]"),
        (thresholds(**{f"c{n}": 0.5 for n in range(1001)}), "decision.thresholds.classes"),
    ],
)
def test_a_threshold_that_is_no_probability_is_refused_by_its_name(
    decision: Decision, field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        decision.check("decision")
    assert caught.value.field == field


def test_a_threshold_of_a_class_that_is_not_there_is_refused() -> None:
    thresholds(0.5, ants=0.1).check_classes(HEAD.classes, "decision")
    with pytest.raises(InvalidInput, match="'wasps'; its classes are 'ants', 'bees'") as caught:
        thresholds(0.5, ants=0.1, wasps=0.2).check_classes(HEAD.classes, "decision")
    assert caught.value.field == "decision.thresholds.classes"
