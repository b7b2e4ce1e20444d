"""What is reported is of images that nothing was learned from or chosen by."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from service.engine.head import Head
from service.ingest.packs import Location
from trainer import divided, groups, measuring
from trainer.answers import Answer, Role
from trainer.data import Data, Part
from trainer.measuring import Measured

CLASSES = ("blue", "red")


def part(count: int, name: str = "image") -> Part:
    digests = tuple(hashlib.sha256(f"{name}{n}".encode()).hexdigest() for n in range(count))
    return Part(
        tuple(Location(Path(f"{name}{n}")) for n in range(count)),
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
        summary=None, digest="", warnings=(),  # type: ignore[arg-type]
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
        def all_of(self, files: Part, _detail: str) -> np.ndarray:
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


def test_a_group_stays_on_the_side_that_it_had_in_the_version_before() -> None:
    old, new = part(20), part(20, "new")
    scenes = tuple(f"scene {n}" for n in range(20))
    both = Part(
        old.locations + new.locations, old.digests + new.digests,
        np.concatenate([old.targets, new.targets]),
        # Each new one is a copy of an old one, and both come in one dataset.
        looks=old.looks * 2, given_groups=scenes * 2, ages=np.zeros(40, np.int64),
    )  # fmt: skip
    sides = np.linspace(0.01, 0.99, 20)
    previous = {
        digest: Answer(Role.LEARNED, "", 0.0, group, "", float(side))
        for group, (digest, side) in enumerate(zip(old.digests, sides, strict=True))
    }
    after = divided.divide(data(both), np.tile(lone(20), (2, 1)), previous)
    np.testing.assert_array_equal(after.sides, np.tile(sides, 2))
    # And from then on, whichever of them is hashed lower.
    again = {
        digest: Answer(Role.LEARNED, "", 0.0, int(group), "", float(side))
        for digest, group, side in zip(both.digests, after.train, after.sides, strict=True)
    }
    third = divided.divide(data(both), np.tile(lone(20), (2, 1)), again)
    np.testing.assert_array_equal(third.sides, after.sides)


def test_what_belonged_together_before_still_does_without_the_names() -> None:
    train = part(20)
    previous = {
        digest: Answer(Role.LEARNED, "", 0.0, n // 2, "", 0.5)
        for n, digest in enumerate(train.digests)
    }
    made = divided.divide(data(train), lone(20), previous)
    assert made.found.count == 10
    assert (made.train[::2] == made.train[1::2]).all()


def test_the_group_of_an_image_that_chose_is_not_measured_on() -> None:
    train = replace(part(20), given_groups=tuple(f"scene {n // 4}" for n in range(20)))
    made = divided.divide(data(train), lone(20), choosers={train.digests[0]})
    assert made.chose.tolist() == [True] * 4 + [False] * 16


def test_a_temperature_is_told_where_every_class_has_one_image() -> None:
    count = 100
    own = replace(part(count), targets=np.arange(count))
    rng = np.random.default_rng(0)
    logits = 5 * rng.normal(size=(count, count))
    logits[np.arange(count), np.arange(count)] += 15
    head = Head(np.zeros((count, 4), np.float32), np.zeros(count, np.float32),
                tuple(map(str, range(count))))  # fmt: skip
    before = Measured("held_out", own, np.arange(count), softmax(logits, axis=1))
    served, found = measuring.tempered(head, before, logits)
    assert served.temperature != 1
    assert found.figure().loss < before.figure().loss


def test_right_on_many_images_and_wrong_on_others_is_not_calibrated() -> None:
    def answered(name: str, count: int, says: float, right: float) -> Measured:
        own = replace(
            part(count, name), targets=(np.arange(count) < right * count).astype(np.int64)
        )
        shares = np.tile([1 - says, says], (count, 1))
        return Measured(name, own, np.arange(count), shares)  # type: ignore[arg-type]

    fine = answered("cross_validation", 1000, 0.9, 0.9)
    assert measuring.is_calibrated([fine]) == (True, "")
    calibrated, why = measuring.is_calibrated([answered("test", 300, 0.9, 0.6), fine])
    assert not calibrated
    assert why.startswith("on 300 images")
    # Too few to say anything leave it at what many say.
    assert measuring.is_calibrated([answered("test", 20, 0.9, 0.9), fine])[0]
