"""What is reported is of images that nothing was learned from or chosen by."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from service.inference.head import Head
from trainer import divided, groups, measuring
from trainer.data import Data, Part
from trainer.divided import Divided
from trainer.measuring import Measured

CLASSES = ("blue", "red")


def part(count: int, name: str = "image") -> Part:
    digests = tuple(hashlib.sha256(f"{name}{n}".encode()).hexdigest() for n in range(count))
    return Part(
        tuple(Path(f"{name}{n}") for n in range(count)),
        digests,
        np.arange(count) % 2,
        looks=tuple(digest[:16] for digest in digests),
        given_groups=("",) * count,
        ages=np.zeros(count, np.int64),
    )


def lone(count: int, seed: int = 0) -> np.ndarray:
    """Features of images that have nothing to do with each other."""
    return np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)


def data(train: Part, validation: Part | None = None, test: Part | None = None) -> Data:
    none = train.none()
    return Data(
        classes=CLASSES, train=train, validation=validation or none, test=test or none,
        summary=None, digest="", warnings=(), names={}, own=frozenset(),  # type: ignore[arg-type]
    )  # fmt: skip


def test_images_that_chose_the_backbone_are_not_measured_on() -> None:
    train = part(40)
    made = divided.divide(data(train), lone(40), choosers=set(train.digests[:10]))
    answers = np.full((40, 2), 0.5, np.float32)
    answers[39] = np.nan
    (found,) = measuring.cross_validated(train, made.train, answers, ~made.chose, 5)
    assert found.part.digests == train.digests[10:39]
    assert found.figure().count == 29
    assert measuring.cross_validated(train, made.train, answers, np.zeros(40, np.bool_), 5) == []


def test_a_validation_image_whose_copy_was_learned_from_is_not_measured_on() -> None:
    train, validation = part(40), part(20, "validation")
    features = lone(60)
    # The same look and nearly the same features.
    copied = replace(validation, looks=(train.looks[0], *validation.looks[1:]))
    features[40] = features[0] + 0.001
    whole = data(train, copied)
    made = divided.divide(whole, features)
    assert made.validation[0] == made.train[0]
    head = Head(np.zeros((2, 64), np.float32), np.zeros(2, np.float32), CLASSES)

    class Given:
        def of(self, files: Part, _detail: str) -> np.ndarray:
            return lone(len(files))

    (found,) = measuring.given(made, made.train, head, Given())  # type: ignore[arg-type]
    assert found.measured_on == "validation"
    assert found.part.digests == validation.digests[1:]
    assert found.copies == 1


def test_a_temperature_is_told_by_other_images_than_it_is_reported_of() -> None:
    count = 200
    rng = np.random.default_rng(0)
    own = part(count)
    logits = 8 * rng.normal(size=(count, 2))
    logits[np.arange(count), own.targets] += 6
    head = Head(np.zeros((2, 4), np.float32), np.zeros(2, np.float32), CLASSES)
    before = Measured("held_out", own, np.arange(count), softmax(logits, axis=1))
    served, found = measuring.tempered(head, before, logits)
    assert served.temperature > 1
    assert found.figure().loss < before.figure().loss
    # The answers of each fold have a temperature of their own, near that which serves.
    inverse = np.log(found.probabilities[:, 0] / found.probabilities[:, 1]) / (
        logits[:, 0] - logits[:, 1]
    )
    assert len(np.unique(inverse.round(9))) > 1
    np.testing.assert_allclose(inverse, 1 / served.temperature, rtol=0.2)
    assert (found.probabilities.argmax(axis=1) == logits.argmax(axis=1)).all()


def test_nothing_measured_is_nothing_calibrated() -> None:
    calibrated, why = measuring.is_calibrated([])
    assert not calibrated
    assert "nothing was measured" in why
    of_source = Measured("source", part(4), np.arange(4), np.full((4, 2), 0.5))
    assert measuring.is_calibrated([of_source]) == (calibrated, why)


@pytest.mark.parametrize("known", [True, False])
def test_a_group_keeps_the_side_of_its_oldest_member(known: bool) -> None:
    old, new = part(30), part(30, "new")
    digests = [*old.digests, *new.digests]
    pairs = np.tile(np.arange(30), 2)
    ages = np.repeat([0, 1 if known else 0], 30)
    together = groups.sides(pairs, digests, ages)
    alone = groups.sides(np.arange(30), old.digests, np.zeros(30, np.int64))
    assert (together[:30] == together[30:]).all()
    assert (together[:30] == alone).all() == known


def test_a_version_before_makes_its_images_the_oldest() -> None:
    old, new = part(20), part(20, "new")
    both = Part(
        old.paths + new.paths, old.digests + new.digests,
        np.concatenate([old.targets, new.targets]),
        # Each new one is a copy of an old one, and both come in one dataset.
        looks=old.looks * 2, given_groups=tuple(f"scene {n}" for n in range(20)) * 2,
        ages=np.zeros(40, np.int64),
    )  # fmt: skip
    before: Divided = divided.divide(
        data(replace(old, given_groups=both.given_groups[:20])), lone(20)
    )
    after = divided.divide(data(both), np.tile(lone(20), (2, 1)), previous=set(old.digests))
    np.testing.assert_array_equal(after.sides[:20], before.sides)
    np.testing.assert_array_equal(after.sides[20:], before.sides)
