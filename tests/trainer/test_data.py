"""Bad data is found before training, with names."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from service.domain import LeftOutReason
from service.errors import InvalidInput, Reason
from service.ingest import index as indexes
from service.ingest import reader
from tests.trainer.conftest import MakeFolder, left_out
from trainer import data, division
from trainer import groups as groups_of
from trainer.data import Source


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        data.load(folder)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    return caught.value.message


def test_images_that_name_no_part_are_all_to_learn_from(make_folder: MakeFolder) -> None:
    loaded = data.load(make_folder(per_class=10))
    assert loaded.classes == ("blue", "red")
    assert [(c.train, c.validation, c.test) for c in loaded.counts()] == [(10, 0, 0)] * 2
    assert loaded.train.decode().shape == (20, 224, 224, 3)


def test_the_digest_follows_the_images_and_not_their_names(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(per_class=10)
    first = data.load(folder)
    renamed = tmp_path / "renamed"
    for path in folder.rglob("*.png"):
        target = renamed / path.parent.name / f"x{9 - int(path.stem)}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    same = data.load(renamed)
    assert same.digest == first.digest
    assert set(same.train.digests) == set(first.train.digests)


@pytest.mark.parametrize("per_class", [1, 2])
def test_one_and_two_images_a_class_can_be_learned(make_folder: MakeFolder, per_class: int) -> None:
    loaded = data.load(make_folder(per_class=per_class))
    assert [c.train for c in loaded.counts()] == [per_class, per_class]


def held(
    digests: Sequence[str], targets: Sequence[int], groups: Sequence[int], fraction: float = 0.2
) -> set[str]:
    """Digests of what is held out."""
    sides = groups_of.sides(np.array(groups), digests, np.zeros(len(digests), np.int64))
    mask = division.held_out(np.array(targets), np.array(groups), sides, fraction)
    return {digest for digest, is_held in zip(digests, mask, strict=True) if is_held}


def digests_of(names: Iterable[object]) -> list[str]:
    return [hashlib.sha256(str(name).encode()).hexdigest() for name in names]


def test_what_is_held_out_stays_held_out_whatever_comes_on_top() -> None:
    digests = digests_of(range(400))
    targets = [n % 2 for n in range(400)]
    before = held(digests[:300], targets[:300], range(300))
    after = held(digests, targets, range(400))
    assert before == after & set(digests[:300])
    assert 0.15 < len(after) / 400 < 0.25
    assert before < held(digests[:300], targets[:300], range(300), fraction=0.4)


def test_what_belongs_together_lies_on_one_side() -> None:
    digests = digests_of(range(400))
    groups = [n // 4 for n in range(400)]
    kept = held(digests, [n // 200 for n in range(400)], groups)
    by_group = Counter(groups[digests.index(digest)] for digest in kept)
    assert by_group
    assert set(by_group.values()) == {4}


def test_a_class_is_never_held_out_whole() -> None:
    digests = digests_of(range(40))
    for count in range(1, 5):
        targets = [0] * (40 - count) + [1] * count
        kept = held(digests, targets, range(40), fraction=0.9)
        assert any(digest not in kept for digest in digests[40 - count :])


def test_an_index_gives_the_same_images_as_the_folder_and_nothing_is_listed(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(per_class=10)
    read = reader.read_folder(folder)
    indexes.save(read, tmp_path / "index.json")
    shutil.copy(folder / "red" / "0.png", folder / "red" / "later.txt")
    indexed = Source(folder, tmp_path / "index.json")
    loaded = data.load(indexed)
    (folder / "red" / "later.txt").unlink()
    plain = data.load(folder)
    assert (loaded.digest, loaded.summary) == (plain.digest, plain.summary)
    assert loaded.digest == read.digest
    assert loaded.train.locations == plain.train.locations
    assert loaded.train.names == plain.train.names == tuple(i.name for i in read.images)


def test_a_few_bad_files_are_left_out_and_told(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=10)
    whole = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "blue" / "empty.jpg").touch()
    (folder / "blue" / "page.html").write_text("<!DOCTYPE html>")
    loaded = data.load(folder)
    details = {file.path: file.detail for file in loaded.summary.files}
    assert set(details) == {"red/truncated.png", "blue/empty.jpg", "blue/page.html"}
    assert "damaged or cut short" in details["red/truncated.png"]
    assert "web page" in details["blue/page.html"]
    assert (loaded.summary.seen, loaded.summary.used) == (23, 20)
    assert len(loaded.train) == 20


def test_one_class_only_is_refused(make_folder: MakeFolder) -> None:
    assert "1 class (red)" in refusal(make_folder(classes=("red",)))


def test_an_image_in_train_and_val_is_not_learned_from(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    make_folder("split/train", per_class=6)
    make_folder("split/val", per_class=3, seed=1)
    shutil.copy(tmp_path / "split/val/red/0.png", tmp_path / "split/train/red/leak.png")
    loaded = data.load(tmp_path / "split")
    assert [(c.train, c.validation) for c in loaded.counts()] == [(6, 3), (6, 3)]
    assert left_out(loaded.summary, LeftOutReason.COPY) == {"train/red/leak.png"}


def test_copies_are_used_once(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=6)
    for n in range(6):
        shutil.copy(folder / "red" / f"{n}.png", folder / "red" / f"copy{n}.png")
    loaded = data.load(folder)
    assert sum(c.train for c in loaded.counts()) == 12
    assert len(left_out(loaded.summary, LeftOutReason.COPY)) == 6


def test_an_image_under_two_classes_is_left_out_of_both(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=6)
    shutil.copy(folder / "red" / "0.png", folder / "blue" / "red0.png")
    loaded = data.load(folder)
    paths = {folder / "red" / "0.png", folder / "blue" / "red0.png"}
    assert not paths & {at.path for at in loaded.train.locations}
    assert left_out(loaded.summary, LeftOutReason.CONTRADICTION) == {"red/0.png", "blue/red0.png"}


def test_all_three_parts_stay_as_they_are_named(make_folder: MakeFolder, tmp_path: Path) -> None:
    for seed, (part, count) in enumerate((("training", 6), ("Valid", 3), ("TEST", 2))):
        make_folder(f"split/{part}", per_class=count, seed=seed)
    loaded = data.load(tmp_path / "split")
    counts = [(c.train, c.validation, c.test) for c in loaded.counts()]
    assert counts == [(6, 3, 2), (6, 3, 2)]


def test_a_copy_of_a_test_image_is_neither_learned_from_nor_chosen_by(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    for seed, part in enumerate(("train", "val", "test")):
        make_folder(f"split/{part}", per_class=5, seed=seed)
    split = tmp_path / "split"
    shutil.copy(split / "test/red/0.png", split / "train/red/leak.png")
    shutil.copy(split / "test/red/1.png", split / "val/red/leak.png")
    shutil.copy(split / "test/red/2.png", split / "test/red/again.png")
    loaded = data.load(split)
    assert [(c.train, c.validation, c.test) for c in loaded.counts()] == [(5, 5, 5), (5, 5, 5)]
    # Of equals in one part, the first by name stays.
    copies = {"train/red/leak.png", "val/red/leak.png", "test/red/again.png"}
    assert left_out(loaded.summary, LeftOutReason.COPY) == copies


def test_a_class_that_is_tested_and_not_learned_is_refused(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    make_folder("split/train", per_class=5)
    make_folder("split/test", per_class=2, classes=("blue", "green", "red"), seed=1)
    message = refusal(tmp_path / "split")
    assert message.startswith("the classes 'green' are in val/ or test/ alone")


def test_images_are_decoded_on_demand_in_the_order_that_is_asked_for(
    make_folder: MakeFolder,
) -> None:
    part = data.load(make_folder()).train
    everything = part.decode(threads=3)
    assert everything.dtype == np.uint8
    assert (part.decode([3, 0, 3], threads=2) == everything[[3, 0, 3]]).all()
    assert (part.at([3, 0]).decode() == everything[[3, 0]]).all()
    assert part.decode([]).shape == (0, 224, 224, 3)
    changed = part.locations[2].path
    changed.write_bytes(b"changed")
    with pytest.raises(InvalidInput, match=changed.name):
        part.decode()


def test_a_spread_takes_from_each_class_in_turn(make_folder: MakeFolder) -> None:
    part = data.load(make_folder(per_class=10)).train
    places = part.spread(5)
    assert part.targets[places].tolist() == [0, 1, 0, 1, 0]
    assert len(part.spread(100)) == len(part)


def test_the_targets_images_lie_at_any_depth(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=4)
    (folder / "blue" / "0.png").rename(folder / "above.png")
    (folder / "red" / "deep").mkdir()
    (folder / "red" / "0.png").rename(folder / "red" / "deep" / "0.png")
    (folder / "red" / "bad.png").write_bytes(b"no")
    target = data.load_unlabelled(folder)
    assert len(target) == 8
    assert target.targets is None
    assert left_out(target.summary) == {"red/bad.png"}
    by_path = {at.path: name for at, name in zip(target.locations, target.names, strict=True)}
    assert by_path[folder / "red" / "deep" / "0.png"] == "red/deep/0.png"
    assert target.decode([0]).shape == (1, 224, 224, 3)
    assert target.digest != data.load_unlabelled(folder / "red").digest


def test_the_targets_classes_are_the_sources_and_in_its_order(make_folder: MakeFolder) -> None:
    folder = make_folder(classes=("blue", "red"), per_class=3)
    target = data.load_unlabelled(folder, classes=("red", "green", "blue"))
    assert target.targets is not None
    named = [at.path.parent.name for at in target.locations]
    assert target.targets.tolist() == [{"red": 0, "blue": 2}[name] for name in named]
    with pytest.raises(InvalidInput, match=r"not a class of the source: red; .* are blue, green"):
        data.load_unlabelled(folder, classes=("blue", "green"))


def test_images_of_no_known_class_lie_beside_the_folders_or_in_one_called_unlabelled(
    make_folder: MakeFolder,
) -> None:
    folder = make_folder(classes=("blue", "green", "red"), per_class=2)
    (folder / "green").rename(folder / "Unlabelled")
    (folder / "red" / "0.png").rename(folder / "above.png")
    target = data.load_unlabelled(folder, classes=("blue", "red"))
    assert target.targets is not None
    found = dict(zip(target.names, target.targets, strict=True))
    assert found == {
        "above.png": -1, "Unlabelled/0.png": -1, "Unlabelled/1.png": -1,
        "blue/0.png": 0, "blue/1.png": 0, "red/1.png": 1,
    }  # fmt: skip


def test_a_target_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(InvalidInput, match=r"notes\.txt"):
        data.load_unlabelled(tmp_path)
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(InvalidInput, match="no files were found"):
        data.load_unlabelled(tmp_path)


def test_a_target_of_one_image_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=1, classes=("red",))
    with pytest.raises(InvalidInput, match="1 image, and 2 or more"):
        data.load_unlabelled(folder)


def test_a_targets_digest_does_not_follow_where_the_images_came_from(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder("target", per_class=3)
    read = reader.read_folder(folder, is_labelled=False)
    indexes.save(read, tmp_path / "index.json")
    indexed = Source(folder, tmp_path / "index.json")
    assert data.load_unlabelled(folder).digest == read.digest
    assert data.load_unlabelled(indexed, classes=("blue", "red")).digest == read.digest
    # Never that of a dataset to learn from.
    assert data.load(folder).digest != read.digest
