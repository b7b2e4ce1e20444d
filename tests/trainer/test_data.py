"""Bad data is found before training, with names."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from service.class_folders import Examined
from service.domain import DEFAULT_TENANT, RejectedFile
from service.errors import InvalidInput, Reason, WrongState
from service.inference import preprocess
from service.storage.database import Database
from service.storage.datasets import DatasetStore, Limits
from tests.trainer.conftest import MakeFolder
from tests.unit.storage.conftest import decoders
from trainer import data


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        data.load(folder, 0.2, seed=0)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    return caught.value.message


def test_images_are_divided_by_class_in_the_asked_share(make_folder: MakeFolder) -> None:
    loaded = data.load(make_folder(per_class=10), 0.3, seed=0)
    assert loaded.classes == ("blue", "red")
    assert [(c.train, c.validation) for c in loaded.counts()] == [(7, 3), (7, 3)]
    assert loaded.train.decode().shape == (14, 224, 224, 3)
    assert not set(loaded.train.paths) & set(loaded.validation.paths)


def test_the_division_follows_the_seed_and_not_the_files_names(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(per_class=10)
    first = data.load(folder, 0.3, seed=1)
    again = data.load(folder, 0.3, seed=1)
    other = data.load(folder, 0.3, seed=2)
    assert first.validation.paths == again.validation.paths
    assert set(first.validation.paths) != set(other.validation.paths)
    renamed = tmp_path / "renamed"
    for path in folder.rglob("*.png"):
        target = renamed / path.parent.name / f"x{9 - int(path.stem)}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    same = data.load(renamed, 0.3, seed=1)
    assert same.digest == first.digest
    assert same.validation.digests == first.validation.digests
    assert (same.validation.decode() == first.validation.decode()).all()


def test_a_few_bad_files_are_left_out_and_named(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=10)
    whole = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "red" / "notes.txt").write_text("not an image")
    (folder / "blue" / "empty.jpg").touch()
    (folder / "blue" / "page.html").write_text("<!DOCTYPE html>")
    loaded = data.load(folder, 0.2, seed=0)
    details = {file.path: file.detail for file in loaded.rejected}
    assert set(details) == {
        "red/truncated.png",
        "red/notes.txt",
        "blue/empty.jpg",
        "blue/page.html",
    }
    assert "damaged or cut short" in details["red/truncated.png"]
    assert "web page" in details["blue/page.html"]
    assert len(loaded.train) + len(loaded.validation) == 20


def test_too_many_bad_files_stop_the_job_with_the_list(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=6)
    for n in range(6):
        (folder / "red" / f"bad{n}.jpg").write_bytes(b"no")
    message = refusal(folder)
    assert message.startswith("6 of 18 files")
    assert "red/bad0.jpg" in message


def test_one_class_only_is_refused(make_folder: MakeFolder) -> None:
    assert "one class only (red)" in refusal(make_folder(classes=("red",)))


def test_classes_with_too_few_images_are_named(make_folder: MakeFolder) -> None:
    folder = make_folder(classes=("blue", "green", "red"))
    for path in sorted((folder / "green").iterdir())[1:]:
        path.unlink()
    message = refusal(folder)
    assert "green" in message
    assert "blue" not in message


def test_an_image_in_train_and_val_is_not_learned_from(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    make_folder("split/train", per_class=6)
    make_folder("split/val", per_class=3, seed=1)
    shutil.copy(tmp_path / "split/val/red/0.png", tmp_path / "split/train/red/leak.png")
    loaded = data.load(tmp_path / "split", 0.2, seed=0)
    assert [(c.train, c.validation) for c in loaded.counts()] == [(6, 3), (6, 3)]
    assert "leak.png" in loaded.warnings[0]


def test_copies_within_a_named_part_are_used_once(make_folder: MakeFolder) -> None:
    folder = make_folder("all", per_class=6)
    for label in ("blue", "red"):
        for n, part in enumerate(("train", "train", "train", "train", "val", "val")):
            to = folder / part / label
            to.mkdir(parents=True, exist_ok=True)
            image = (folder / label / f"{n}.png").read_bytes()
            (to / f"{n}.png").write_bytes(image)
            (to / f"{n}-again.png").write_bytes(image)
        shutil.rmtree(folder / label)
    loaded = data.load(folder, 0.2, 0)
    assert (len(loaded.train), len(loaded.validation)) == (8, 4)
    assert any("12 files are copies" in warning for warning in loaded.warnings)


def test_copies_are_used_once_when_we_divide(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=6)
    for n in range(6):
        shutil.copy(folder / "red" / f"{n}.png", folder / "red" / f"copy{n}.png")
    loaded = data.load(folder, 0.2, seed=0)
    assert sum(c.train + c.validation for c in loaded.counts()) == 12
    assert "6 files are copies" in loaded.warnings[0]


def test_an_image_under_two_classes_is_left_out_of_both(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=6)
    shutil.copy(folder / "red" / "0.png", folder / "blue" / "red0.png")
    loaded = data.load(folder, 0.2, seed=0)
    assert {file.path for file in loaded.rejected} == {"red/0.png", "blue/red0.png"}
    assert "blue, red" in loaded.rejected[0].detail


def test_an_empty_validation_part_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    make_folder("split/train", per_class=3)
    (tmp_path / "split/val/red").mkdir(parents=True)
    assert "val/ holds no readable image" in refusal(tmp_path / "split")


def test_a_name_that_is_no_text_is_left_out_and_shown_as_far_as_it_goes(
    make_folder: MakeFolder,
) -> None:
    import os

    folder = make_folder(per_class=6)
    whole = (folder / "red" / "0.png").read_bytes()
    target = os.fsencode(folder / "red") + b"/caf\xe9.png"
    with open(target, "wb") as file:  # noqa: PTH123 - bytes name it
        file.write(whole)
    loaded = data.load(folder, 0.2, seed=0)
    assert [file.path for file in loaded.rejected] == ["red/caf\ufffd.png"]


def test_what_the_list_of_files_tells_is_told_before_any_is_read(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    def unread(*_: object) -> tuple[list[Examined[None]], list[RejectedFile]]:
        pytest.fail("a file was read")

    few = make_folder("few", classes=("blue", "green", "red"))
    for path in sorted((few / "green").iterdir())[2:]:
        path.unlink()
    make_folder("split/train")
    (tmp_path / "split/val/red").mkdir(parents=True)
    for folder, says in (
        (make_folder("one", classes=("red",)), "one class only"),
        (few, "fewer than 2 images to learn from.*green"),
        (tmp_path / "split", "val/ holds no readable image"),
    ):
        with pytest.raises(InvalidInput, match=says):
            data.load(folder, 0.2, 0, examine=unread)


def test_images_are_decoded_on_demand_in_the_order_that_is_asked_for(
    make_folder: MakeFolder,
) -> None:
    part = data.load(make_folder(), 0.2, seed=0).train
    everything = part.decode(threads=3)
    assert everything.dtype == np.uint8
    assert (part.decode([3, 0, 3], threads=2) == everything[[3, 0, 3]]).all()
    assert (part.at([3, 0]).decode() == everything[[3, 0]]).all()
    assert part.decode([]).shape == (0, 224, 224, 3)
    part.paths[2].write_bytes(b"changed")
    with pytest.raises(InvalidInput, match=part.paths[2].name):
        part.decode()


def test_a_spread_takes_from_each_class_in_turn(make_folder: MakeFolder) -> None:
    part = data.load(make_folder(per_class=10), 0.2, seed=0).train
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
    assert [file.path for file in target.rejected] == ["red/bad.png"]
    assert target.decode([0]).shape == (1, 224, 224, 3)
    assert target.digest != data.load_unlabelled(folder / "red").digest


def test_the_targets_classes_are_the_sources_and_in_its_order(make_folder: MakeFolder) -> None:
    folder = make_folder(classes=("blue", "red"), per_class=3)
    target = data.load_unlabelled(folder, classes=("red", "green", "blue"))
    assert target.targets is not None
    named = [path.parent.name for path in target.paths]
    assert target.targets.tolist() == [{"red": 0, "blue": 2}[name] for name in named]
    with pytest.raises(InvalidInput, match=r"no class of the source: red; .* are blue, green"):
        data.load_unlabelled(folder, classes=("blue", "green"))


def test_a_target_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(InvalidInput, match=r"notes\.txt"):
        data.load_unlabelled(tmp_path)
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(InvalidInput, match="no files were found"):
        data.load_unlabelled(tmp_path)


def test_data_on_top_of_a_base_is_learned_from_and_the_base_stays_divided_as_it_was(
    make_folder: MakeFolder,
) -> None:
    base = make_folder("base", per_class=20)
    own = make_folder("own", per_class=10, classes=("green", "red"), seed=1)
    alone = data.load(base, 0.2, seed=3)
    grown = data.load(own, 0.2, seed=3, bases=[base])
    assert grown.classes == ("blue", "green", "red")
    assert set(alone.validation.digests) <= set(grown.validation.digests)
    assert set(alone.train.digests) <= set(grown.train.digests)
    assert len(grown.train) + len(grown.validation) == 60
    assert grown.digest != alone.digest
    names = {grown.name(path) for path in grown.validation.paths}
    assert any(name.startswith("base/blue/") for name in names)
    assert any(name.startswith("green/") for name in names)


def test_a_few_more_images_of_a_measured_class_are_all_learned_from(
    make_folder: MakeFolder,
) -> None:
    base = make_folder("base", per_class=20)
    own = make_folder("own", per_class=2, seed=1)
    grown = data.load(own, 0.2, seed=0, bases=[base])
    assert [(c.train, c.validation) for c in grown.counts()] == [(18, 4), (18, 4)]


def test_what_a_base_was_measured_on_is_not_learned_from_under_another_name(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_folder("base", per_class=20)
    held = data.load(base, 0.2, seed=0).validation
    make_folder("own/train", per_class=5, seed=1)
    make_folder("own/val", per_class=2, seed=2)
    shutil.copy(held.paths[0], tmp_path / "own/train" / held.paths[0].parent.name / "again.png")
    grown = data.load(tmp_path / "own", 0.2, seed=0, bases=[base])
    assert not set(held.digests) & set(grown.train.digests)
    assert "again.png" in grown.warnings[0]


def test_a_bases_bad_files_are_named_with_its_folder(make_folder: MakeFolder) -> None:
    base, own = make_folder("base"), make_folder("own", seed=1)
    (base / "red" / "bad.png").write_bytes(b"no")
    (own / "red" / "bad.png").write_bytes(b"no")
    grown = data.load(own, 0.2, seed=0, bases=[base])
    assert [file.path for file in grown.rejected] == ["base/red/bad.png", "red/bad.png"]


def test_an_image_that_comes_again_under_another_class_does_not_shift_its_bases_division(
    make_folder: MakeFolder,
) -> None:
    base = make_folder("base", per_class=20)
    own, last = make_folder("own", per_class=5, seed=1), make_folder("last", per_class=5, seed=2)
    before = data.load(own, 0.2, seed=0, bases=[base])
    again = next(path for path in before.train.paths if path.parent == base / "red")
    shutil.copy(again, last / "blue" / "again.png")
    grown = data.load(last, 0.2, seed=0, bases=[base, own])
    (dropped,) = set(before.train.digests) - set(grown.train.digests)
    assert dropped == before.train.digests[before.train.paths.index(again)]
    assert set(before.validation.digests) <= set(grown.validation.digests)
    assert {file.path for file in grown.rejected} == {f"base/red/{again.name}", "blue/again.png"}
    assert not any("copies" in warning for warning in grown.warnings)


def test_a_base_whose_images_are_not_as_they_were_is_refused(make_folder: MakeFolder) -> None:
    base, own = make_folder("base"), make_folder("own", seed=1)
    last = make_folder("last", seed=2)
    digest = data.load(own, 0.2, seed=0, bases=[base]).digest
    assert data.load(last, 0.2, seed=0, bases=[base, own], base_digest=digest).base_roots
    (base / "red" / "0.png").unlink()
    with pytest.raises(WrongState, match="not as they were") as caught:
        data.load(last, 0.2, seed=0, bases=[base, own], base_digest=digest)
    assert caught.value.reason is Reason.BASE_DATA_GONE


def test_a_targets_digest_is_that_of_the_unlabelled_dataset_that_holds_it(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder("target", per_class=3)
    database = Database(tmp_path / "data")
    limits = Limits(max_upload_bytes=10**6, max_unpacked_bytes=10**6, max_files=100)
    datasets = DatasetStore(
        database, tmp_path / "datasets", decoders(preprocess.open_image), limits
    )
    upload = datasets.begin_upload("", "", tenant=DEFAULT_TENANT, is_unlabelled=True)
    for path in sorted(folder.rglob("*.png")):
        upload.add_image(path.parent.name, path.read_bytes(), path.name, "")
    record = upload.finish()
    root = datasets.path(record.dataset_id)
    assert data.load_unlabelled(folder).digest == record.digest
    assert data.load_unlabelled(root, classes=("blue", "red")).digest == record.digest
    database.close()
