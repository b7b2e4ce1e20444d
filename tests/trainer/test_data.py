"""Bad data is found before training, with names."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from service.errors import InvalidInput, Reason
from tests.trainer.conftest import MakeFolder
from trainer import data


def refusal(folder: Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        data.load(folder, 0.2, seed=0)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    return caught.value.message


def test_pictures_are_divided_by_class_in_the_asked_share(make_folder: MakeFolder) -> None:
    loaded = data.load(make_folder(per_class=10), 0.3, seed=0)
    assert loaded.classes == ("blue", "red")
    assert [(c.train, c.validation) for c in loaded.counts()] == [(7, 3), (7, 3)]
    assert loaded.train.pixels.shape == (14, 224, 224, 3)
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
    assert (same.validation.pixels == first.validation.pixels).all()


def test_a_few_bad_files_are_left_out_and_named(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=10)
    whole = (folder / "red" / "0.png").read_bytes()
    (folder / "red" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "red" / "notes.txt").write_text("not a picture")
    (folder / "blue" / "empty.jpg").touch()
    Image.new("RGB", (9, 9)).save(folder / "blue" / "placeholder.gif")
    loaded = data.load(folder, 0.2, seed=0)
    details = {file.path: file.detail for file in loaded.rejected}
    assert set(details) == {
        "red/truncated.png",
        "red/notes.txt",
        "blue/empty.jpg",
        "blue/placeholder.gif",
    }
    assert "damaged or cut short" in details["red/truncated.png"]
    assert "GIF" in details["blue/placeholder.gif"]
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


def test_classes_with_too_few_pictures_are_named(make_folder: MakeFolder) -> None:
    folder = make_folder(classes=("blue", "green", "red"))
    for path in sorted((folder / "green").iterdir())[1:]:
        path.unlink()
    message = refusal(folder)
    assert "green" in message
    assert "blue" not in message


def test_a_picture_in_train_and_val_is_not_learned_from(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    make_folder("split/train", per_class=6)
    make_folder("split/val", per_class=3, seed=1)
    shutil.copy(tmp_path / "split/val/red/0.png", tmp_path / "split/train/red/leak.png")
    loaded = data.load(tmp_path / "split", 0.2, seed=0)
    assert [(c.train, c.validation) for c in loaded.counts()] == [(6, 3), (6, 3)]
    assert "leak.png" in loaded.warnings[0]


def test_copies_are_used_once_when_we_divide(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=6)
    for n in range(6):
        shutil.copy(folder / "red" / f"{n}.png", folder / "red" / f"copy{n}.png")
    loaded = data.load(folder, 0.2, seed=0)
    assert sum(c.train + c.validation for c in loaded.counts()) == 12
    assert "6 files are copies" in loaded.warnings[0]


def test_a_picture_under_two_classes_is_left_out_of_both(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=6)
    shutil.copy(folder / "red" / "0.png", folder / "blue" / "red0.png")
    loaded = data.load(folder, 0.2, seed=0)
    assert {file.path for file in loaded.rejected} == {"red/0.png", "blue/red0.png"}
    assert "blue, red" in loaded.rejected[0].detail


def test_an_empty_validation_part_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    make_folder("split/train", per_class=3)
    (tmp_path / "split/val/red").mkdir(parents=True)
    assert "val/ holds no readable picture" in refusal(tmp_path / "split")


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
