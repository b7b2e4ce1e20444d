"""Images that belong together, by made-up features and hashes, and by digits as they are."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from service.engine import preprocess
from trainer import groups
from trainer.groups import Groups

Floats = np.ndarray


class Made:
    """Scenes of some frames, each frame with noise and some bits of its hash turned."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.features: list[Floats] = []
        self.looks: list[int] = []
        self.targets: list[int] = []
        self.scenes: list[int] = []

    def add(self, target: int, frames: int, noise: float = 0.35, bits: int = 8) -> "Made":
        centre = np.random.default_rng(1000 + target).normal(size=128) + 3
        scene, look = self.rng.normal(size=128), int(self.rng.integers(2**63))
        for _ in range(frames):
            self.features.append(centre + scene + noise * self.rng.normal(size=128))
            turned = self.rng.choice(64, size=bits, replace=False)
            self.looks.append(look ^ sum(1 << int(bit) for bit in turned))
            self.targets.append(target)
            self.scenes.append(max(self.scenes, default=-1) + (not _))
        return self

    def many(self, scenes: int, frames: int, target: int = 0) -> "Made":
        for _ in range(scenes):
            self.add(target, frames)
        return self

    def find(self, given: dict[int, str] | None = None) -> Groups:
        names = [""] * len(self.targets)
        for place, name in (given or {}).items():
            names[place] = name
        return groups.find(
            np.array(self.features, np.float32),
            np.array(self.looks, np.uint64),
            np.array(self.targets),
            names,
        )


def test_unrelated_images_stay_alone() -> None:
    found = Made().many(300, 1).many(100, 1, target=1).find()
    assert found.of.tolist() == list(range(400))
    assert found.twin_share == 0
    assert found.pairs.shape == (0, 2)


@pytest.mark.parametrize(
    ("scenes", "frames", "others"),
    [(60, 1, 3), (40, 5, 0), (2, 10, 0), (3, 6, 100), (2, 12, 0), (1, 10, 40)],
)
def test_frames_of_a_scene_are_one_group_however_many_scenes_there_are(
    scenes: int, frames: int, others: int
) -> None:
    """Where most images have a twin, too, and where a class is two or three bursts alone."""
    made = Made()
    for target in range(3):
        made.many(scenes, frames, target).many(others, 4 if scenes == 60 else 1, target)
    found = made.find()
    assert found.of.tolist() == made.scenes
    sizes = np.bincount(made.scenes)
    assert found.twin_share == pytest.approx(sizes[sizes > 1].sum() / len(made.scenes))
    assert (sizes * (sizes - 1) // 2).sum() == len(found.pairs)
    assert (np.diff(found.similarities) <= 0).all()
    assert found.similarities.min() > 0.5


def test_digits_by_many_hands_are_no_copies() -> None:
    digits, targets = load_digits(return_X_y=True)
    looks = []
    for digit in digits[:600]:
        file = io.BytesIO()
        Image.fromarray((digit.reshape(8, 8) * 15).astype(np.uint8)).save(file, "PNG")
        looks.append(int(preprocess.inspect(file.getvalue()).look, 16))
    found = groups.find(
        digits[:600].astype(np.float32), np.array(looks, np.uint64), targets[:600], [""] * 600
    )
    assert found.twin_share <= 0.01


def test_a_hash_settles_what_features_leave_open_and_one_that_all_have_says_nothing() -> None:
    made = Made().many(80, 1).add(0, 2, noise=0.9, bits=1)
    assert made.find().of[-1] == made.find().of[-2]
    made.looks[-1] = made.looks[0]
    assert made.find().twin_share == 0
    made.looks = [0] * len(made.looks)
    assert made.find().twin_share == 0


def chain() -> Made:
    """Makes 60 images after 100 others, each like the one before it."""
    made = Made().many(160, 1)
    centre = np.random.default_rng(1000).normal(size=128) + 3
    for place in range(101, 160):
        before = made.features[place - 1] - centre
        made.features[place] = centre + 0.9 * before + 0.436 * made.rng.normal(size=128)
    return made


def test_a_chain_of_images_each_like_the_next_is_no_group() -> None:
    found = chain().find()
    assert found.twin_share > 0.2
    assert np.bincount(found.of).max() <= 10


def test_a_copy_under_another_class_is_found_and_what_two_classes_share_is_not() -> None:
    made = Made().many(60, 1).many(60, 1, target=1)
    made.features.append(made.features[7] + 0.2 * made.rng.normal(size=128))
    made.looks.append(made.looks[7] ^ 3)
    made.targets.append(1)
    found = made.find()
    assert found.pairs.tolist() == [[7, 120]]
    assert found.of[120] == 7
    assert found.count == 120


def test_named_images_are_one_group_and_copies_of_theirs_join_it() -> None:
    made = Made().many(60, 1).add(0, 3).many(40, 1, target=1)
    found = made.find({5: "p1", 30: "p1", 62: "p1", 80: "p1", 81: "p2", 9: "p2"})
    assert np.flatnonzero(found.of == found.of[5]).tolist() == [5, 30, 60, 61, 62, 80]
    assert np.flatnonzero(found.of == found.of[9]).tolist() == [9, 81]
    assert found.twin_share == pytest.approx(3 / 103)


def test_whoever_named_groups_is_believed_but_where_two_are_the_same_picture() -> None:
    made = Made().many(80, 1).add(0, 2, noise=0.55, bits=14).add(0, 2, noise=0.05, bits=1)
    assert made.find().count == 82
    found = made.find({80: "a", 81: "b", 82: "c", 83: "d"})
    assert found.of[80] != found.of[81]
    assert found.of[82] == found.of[83]


def test_the_same_picture_is_found_in_a_class_that_is_all_alike() -> None:
    made = Made().many(80, 1).many(80, 1, target=1)
    # Of two kinds of difference alone: whatever one image shows, another shows by chance.
    two = 9 * made.rng.normal(size=(2, 128))
    for place in range(80, 160):
        made.features[place] = made.rng.normal(size=2) @ two + made.features[place] / 9
    made.features[81], made.looks[81] = made.features[80], made.looks[80]
    found = made.find()
    assert found.of[81] == found.of[80]


@pytest.mark.parametrize("sizes", [[], [1], [2], [1, 1, 1], [2, 1], [3, 2]])
def test_few_images_are_no_trouble(sizes: list[int]) -> None:
    made = Made()
    for target, size in enumerate(sizes):
        made.many(size, 1, target)
    found = groups.find(
        np.array(made.features, np.float32).reshape(-1, 128),
        np.array(made.looks, np.uint64),
        np.array(made.targets, np.int64),
        [""] * len(made.targets),
    )
    assert found.count == sum(sizes) == len(found.of)


def test_images_that_are_all_the_same_are_no_trouble() -> None:
    same = np.ones((30, 8), np.float32)
    found = groups.find(same, np.zeros(30, np.uint64), np.arange(30) % 2, [""] * 30)
    assert len(found.of) == 30


def test_neither_blocks_nor_bounds_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made().many(50, 4)
    made.many(30, 3, target=1)
    monkeypatch.setattr(groups, "_BLOCK", 7)
    assert made.find().of.tolist() == made.scenes
    # Frames follow one another.
    monkeypatch.setattr(groups, "_NEAREST", 10)
    monkeypatch.setattr(groups, "MAX_ACROSS", 10)
    assert made.find().of.tolist() == made.scenes
    monkeypatch.setattr(groups, "MAX_PAIRS", 5)
    found = made.find()
    assert len(found.pairs) == 5


def test_a_film_is_one_group_and_a_long_chain_is_parted_where_it_hangs_together_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups, "_LARGEST", 20)
    monkeypatch.setattr(groups, "_KEPT", 10)
    film = Made().many(40, 2).add(0, 60)
    assert film.find().of.tolist() == film.scenes
    assert 1 < np.bincount(chain().find().of).max() <= 20


def blurred(order: np.random.Generator | None = None, scenes: int = 12) -> Made:
    """Makes frames that change as much as scenes differ, side by side or in another order."""
    made = Made()
    for target in range(2):
        for _ in range(scenes):
            made.add(target, 6, noise=1.1, bits=30)
    places = np.arange(len(made.scenes)) if order is None else order.permutation(len(made.scenes))
    made.features = [made.features[place] for place in places]
    made.looks = [made.looks[place] for place in places]
    made.targets = [made.targets[place] for place in places]
    made.scenes = [made.scenes[place] for place in places]
    return made


def _together(found: Groups, scenes: list[int]) -> tuple[float, float]:
    """Returns the shares of pairs of a scene that are in a group, and the other way round."""
    of, scene = found.of, np.array(scenes)
    upper = np.triu_indices(len(of), 1)
    is_group, is_scene = ((each[:, None] == each)[upper] for each in (of, scene))
    return is_group[is_scene].mean(), is_scene[is_group].mean() if is_group.any() else 1.0


def test_neighbours_join_where_the_order_tells_and_only_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, mixed = blurred(), blurred(np.random.default_rng(1))
    recall, precision = _together(made.find(), made.scenes)
    assert recall > 0.85
    assert precision > 0.85
    in_disorder = mixed.find()
    assert _together(in_disorder, mixed.scenes)[0] < 0.4
    monkeypatch.setattr(groups, "_ORDERED", 2)
    assert mixed.find().of.tolist() == in_disorder.of.tolist()
    assert _together(made.find(), made.scenes)[0] < 0.4


def test_large_kinds_that_lie_together_are_no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    for _ in range(6):
        made.add(0, 60, noise=1.1, bits=30)
    found = made.find()
    monkeypatch.setattr(groups, "_ORDERED", 2)
    assert made.find().of.tolist() == found.of.tolist()


def _digests(count: int) -> list[str]:
    return [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(count)]


def test_a_group_s_side_is_that_of_its_oldest_image_in_every_job() -> None:
    digests = _digests(6)
    of, ages = np.array([0, 1, 0, 2, 2, 1]), np.array([1, 0, 0, 1, 1, 2])
    numbers = groups.sides(of, digests, ages)
    assert numbers[0] == numbers[2]
    assert numbers[3] == numbers[4]
    assert len(set(numbers.tolist())) == 3
    assert ((numbers >= 0) & (numbers < 1)).all()
    # The oldest alone, in another order and under other numbers.
    oldest = [2, 1, 3 if digests[3] < digests[4] else 4]
    alone = groups.sides(np.array([5, 3, 9]), [digests[i] for i in oldest], np.zeros(3, np.int64))
    assert alone.tolist() == numbers[oldest].tolist()


def test_sides_are_drawn_evenly() -> None:
    count = 2000
    numbers = groups.sides(np.arange(count), _digests(count), np.zeros(count, np.int64))
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] - 200).max() < 60


def test_a_class_that_is_one_film_is_one_group() -> None:
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1], 20)
    features = (
        rng.normal(size=(40, 64)).astype(np.float32) + 4 * np.eye(64, dtype=np.float32)[targets]
    )
    one = rng.integers(0, 2**64, 2, dtype=np.uint64)[targets]
    # Frames differ in some bits, and films in about half of all.
    flipped = np.uint64(1) << rng.integers(0, 64, (3, 40), dtype=np.uint64)
    looks = one ^ flipped[0] ^ flipped[1] ^ flipped[2]
    found = groups.find(features, looks, targets, [""] * 40)
    assert found.count == 2
    assert found.twin_share == 1
    named = groups.find(features, looks, targets, [str(n) for n in range(40)])
    assert named.count == 40
    # Where all images have much the same layout, a class having its own says nothing.
    close = looks & np.uint64(0xFFFF)
    assert groups.find(features, close, targets, [""] * 40).count > 30
