"""The framing of long images is chosen by a sample of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from service.domain import Framing
from service.engine.head import Floats
from service.ingest.packs import Location
from trainer import framing
from trainer.data import Files, Part
from trainer.framing import Comparison

CLASSES = 3
WIDTH = 6


def balanced(count: int) -> Part:
    names = tuple(f"{n * 7919 % 1000:03}" for n in range(count))
    locations = tuple(Location(Path(name)) for name in names)
    looks = tuple(f"{int(look):x}" for look in np.random.default_rng(0).integers(0, 2**62, count))
    return Part(locations, names, np.arange(count) % CLASSES, looks=looks)


class Known:
    """Features of which one framing tells the classes; counts the images that were asked for."""

    blocks = (WIDTH,)

    def __init__(self, part: Part, better: Framing | None) -> None:
        self.asked: dict[Framing, set[str]] = {"crop": set(), "whole": set()}
        self._rows: dict[Framing, dict[str, Floats]] = {}
        for seed, each in enumerate(framing.BOTH):
            rows = np.random.default_rng(seed).normal(size=(len(part), WIDTH)).astype(np.float32)
            if each == better:
                rows[np.arange(len(part)), part.targets] += 3
            self._rows[each] = dict(zip(part.digests, rows, strict=True))

    def all_of(self, files: Files, detail: str = "", further: Sequence[Framing] = ()) -> Floats:
        for each in (files.decoding.framing, *further):
            self.asked[each] |= {*files.digests}
        rows = self._rows[files.decoding.framing]
        return np.stack([rows[digest] for digest in files.digests])


@pytest.mark.parametrize("better", framing.BOTH)
def test_a_sample_chooses_what_tells_more_of_all(better: Framing) -> None:
    part = balanced(300)
    known = Known(part, better)
    found = framing.compare(part, known, 1)  # type: ignore[arg-type]
    assert found is not None
    assert found.best == better
    assert found.is_sure(part.digests, np.arange(300) % 10)
    assert known.asked["crop"] == known.asked["whole"]
    assert len(known.asked["crop"]) == 96


def test_the_middle_is_seen_where_all_of_the_images_tells_no_more() -> None:
    part = balanced(300)
    found = framing.compare(part, Known(part, None), 1)  # type: ignore[arg-type]
    assert found is not None
    assert found.best == "crop"


def test_a_choice_that_hangs_on_the_images_of_one_fold_is_not_sure() -> None:
    digests = tuple("abcdef")
    even, one = np.ones(6), np.array([5.0, 1, 1, 1, 1, 1])
    dealt = np.arange(6) // 2
    assert Comparison(digests, {"crop": [2 * even], "whole": [even]}).is_sure(digests, dealt)
    assert not Comparison(digests, {"crop": [one], "whole": [even]}).is_sure(digests, dealt)
    # What is always learned from is measured by nothing that it chose.
    always = np.array([-1, -1, 0, 0, 1, 1])
    assert Comparison(digests, {"crop": [one], "whole": [even]}).is_sure(digests, always)


def test_a_sample_holds_as_many_of_each_class_and_mostly_stays_when_images_come() -> None:
    targets = np.concatenate([np.arange(200) % 4, np.zeros(400, np.int64)])
    digests = [f"{n * 7919 % 6007:04}" for n in range(600)]
    places = framing.sample(targets, digests)
    assert np.bincount(targets[places]).tolist() == [24, 24, 24, 24]
    before = framing.sample(targets[:500], digests[:500])
    assert len(np.intersect1d(places, before)) > 80


def test_all_of_few_images_are_compared() -> None:
    assert len(framing.sample(np.arange(143) % 2, [str(n) for n in range(143)])) == 0
    part = balanced(90)
    assert framing.compare(part, Known(part, "crop"), 1) is None  # type: ignore[arg-type]


def test_of_many_classes_some_are_compared() -> None:
    targets = np.repeat(np.arange(300), 3)
    places = framing.sample(targets, [f"{n:04}" for n in range(900)])
    sizes = np.bincount(targets[places], minlength=300)
    assert sizes.sum() == np.minimum(96, 24 * 3)
    assert set(sizes.tolist()) == {0, 3}
