"""The shapes that folders of labelled images may have."""

from pathlib import Path

import pytest

from service import class_folders
from service.class_folders import ImageFile
from service.errors import InvalidInput, Reason


def lay(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def found(root: Path) -> list[tuple[str, str, str]]:
    return [(f.split, f.label, f.path.name) for f in class_folders.find(root)]


def test_a_folder_for_each_class_names_no_split(tmp_path: Path) -> None:
    lay(tmp_path, "cat/1.png", "dog/deep/down/2.png")
    assert found(tmp_path) == [("", "cat", "1.png"), ("", "dog", "2.png")]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_train_and_val_name_the_split(tmp_path: Path, val: str) -> None:
    lay(tmp_path, "train/cat/1.png", "train/dog/2.png", f"{val}/cat/3.png")
    assert found(tmp_path) == [
        ("train", "cat", "1.png"),
        ("train", "dog", "2.png"),
        ("val", "cat", "3.png"),
    ]


def test_one_folder_around_it_all_is_stepped_into(tmp_path: Path) -> None:
    lay(tmp_path, "wrapping/images/cat/1.png", "wrapping/images/dog/2.png")
    assert [label for _, label, _ in found(tmp_path)] == ["cat", "dog"]


def test_a_single_class_is_no_wrapping(tmp_path: Path) -> None:
    lay(tmp_path, "cat/1.png", "cat/2.png")
    assert [label for _, label, _ in found(tmp_path)] == ["cat", "cat"]


def test_hidden_files_and_links_are_passed_over(tmp_path: Path) -> None:
    lay(tmp_path, "cat/1.png", "cat/.DS_Store", "dog/2.png", ".git/x", "__MACOSX/cat/1.png")
    (tmp_path / "dog" / "link.png").symlink_to("/etc/hostname")
    (tmp_path / "linked").symlink_to(tmp_path / "cat")
    assert found(tmp_path) == [("", "cat", "1.png"), ("", "dog", "2.png")]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), "no files were found"),
        (("1.png", "2.png"), "no files were found"),
        (("train/cat/1.png", "holiday/2.png"), "beside train/ there are the folders holiday"),
    ],
)
def test_another_shape_is_refused_with_the_right_one(
    tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        class_folders.find(lay(tmp_path, *names))
    assert caught.value.reason is Reason.DATASET_UNUSABLE


def test_the_digest_is_of_what_images_show_and_where_they_belong(tmp_path: Path) -> None:
    def digest(*names: str) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, data in (n.split("=") for n in names):
            path = lay(root, name) / name
            path.write_text(data)
        files = class_folders.find(root)
        read, _ = class_folders.examine(files, lambda data: data, root, map)
        return class_folders.digest(read)

    first = digest("cat/1.png=a", "dog/2.png=b")
    assert first == digest("cat/other.png=a", "dog/names.png=b")
    assert first != digest("dog/1.png=a", "cat/2.png=b")
    assert first != digest("train/cat/1.png=a", "train/dog/2.png=b")


def test_a_file_that_is_too_large_is_rejected_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, "cat/1.png", "dog/2.png")
    monkeypatch.setattr(class_folders, "MAX_FILE_BYTES", 3)
    read, rejected = class_folders.examine(
        [ImageFile("", "cat", tmp_path / "cat/1.png")], lambda data: data, tmp_path, map
    )
    assert not read
    assert "larger than 3 bytes" in rejected[0].detail
