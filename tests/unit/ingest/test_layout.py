"""The shapes that datasets may have: classes, parts, and what is left out, from names alone."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain import LeftOutReason, PartName
from service.errors import InvalidInput, Reason
from service.ingest.labels import check_given
from service.ingest.layout import Arranged, Entry, Kind, arrange
from service.ingest.packs import Location

ANTS = ("ants/1.png", "bees/2.png")


def entry(text: str, kind: Kind = Kind.FILE) -> Entry:
    """Makes an entry; one that ends in a slash is a folder, one in "@" a link."""
    if text.endswith("/"):
        return Entry(tuple(text.rstrip("/").split("/")), Kind.FOLDER)
    if text.endswith("@"):
        return Entry(tuple(text.rstrip("@").split("/")), Kind.LINK)
    return Entry(tuple(text.split("/")), kind, Location(Path(text)))


def arranged(*names: str | Entry, is_labelled: bool = True, **options: bool) -> Arranged:
    entries = [name if isinstance(name, Entry) else entry(name) for name in names]
    return arrange(entries, is_labelled=is_labelled, **options)


def files(found: Arranged) -> list[tuple[str, str, str]]:
    return [(file.part, file.label, file.name) for file in found.files]


def left_out(found: Arranged) -> dict[str, tuple[str, str]]:
    return {row.path: (row.reason, row.label) for row in found.left_out}


def refusal(*names: str | Entry, **options: bool) -> str:
    with pytest.raises(InvalidInput) as caught:
        arranged(*names, **options)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    return caught.value.message


def test_a_folder_for_each_class_names_no_part() -> None:
    found = arranged("dog/deep/down/2.png", "cat/1.png")
    assert files(found) == [("", "cat", "cat/1.png"), ("", "dog", "dog/deep/down/2.png")]
    assert [file.depth for file in found.files] == [0, 2]
    assert [str(file.location.path) for file in found.files] == ["cat/1.png", "dog/deep/down/2.png"]


@pytest.mark.parametrize(
    ("first", "second", "parts"),
    [
        ("train", "val", ("train", "val")),
        ("Training", "VALID", ("train", "val")),
        ("train", "validation", ("train", "val")),
        ("train", "test", ("train", "test")),
        ("TRAIN", "Testing", ("train", "test")),
    ],
)
def test_two_folders_of_parts_side_by_side_name_the_parts(
    first: str, second: str, parts: tuple[PartName, PartName]
) -> None:
    found = arranged(f"{first}/cat/1", f"{first}/dog/2", f"{second}/cat/3", "README.md")
    assert files(found) == sorted(
        [
            (parts[0], "cat", f"{first}/cat/1"),
            (parts[0], "dog", f"{first}/dog/2"),
            (parts[1], "cat", f"{second}/cat/3"),
        ]
    )
    assert left_out(found) == {"README.md": (LeftOutReason.STRAY, "")}


def test_two_names_of_one_part_are_that_part_beside_another() -> None:
    found = arranged("train/cat/1", "training/cat/2", "val/cat/3")
    assert [file.part for file in found.files] == ["train", "train", "val"]


@pytest.mark.parametrize(
    "names",
    [
        ("train/1.png", "bus/2.png"),
        ("train/1.png", "val/2.png"),
        ("train/cat/1.png", "training/cat/2.png"),
        ("test/cat/1.png", "bus/2.png"),
    ],
)
def test_folders_called_like_parts_are_classes_where_no_two_parts_hold_folders(
    names: tuple[str, ...],
) -> None:
    found = arranged(*names)
    assert files(found) == sorted(("", name.split("/")[0], name) for name in names)


def test_what_lies_beside_the_folders_of_parts_is_a_stray() -> None:
    found = arranged("train/cat/1", "val/cat/2", "holiday/3.png", "holiday/deep/4.png", "val/5.png")
    assert left_out(found) == dict.fromkeys(
        ("holiday/3.png", "holiday/deep/4.png", "val/5.png"), (LeftOutReason.STRAY, "")
    )


@pytest.mark.parametrize("beside", [(), ("LICENSE.txt", "all/README.md")])
def test_folders_around_it_all_are_stepped_into(beside: tuple[str, ...]) -> None:
    found = arranged("all/images/cat/1.png", "all/images/dog/2.png", *beside)
    assert [file.label for file in found.files] == ["cat", "dog"]
    assert left_out(found) == dict.fromkeys(beside, (LeftOutReason.STRAY, ""))


def test_folders_of_parts_may_lie_in_a_folder_around_them() -> None:
    found = arranged("all/train/cat/1.png", "all/val/cat/2.png")
    assert [(file.part, file.label) for file in found.files] == [("train", "cat"), ("val", "cat")]


def test_one_folder_of_a_part_is_a_folder_around_the_classes() -> None:
    found = arranged("train/cat/1.png", "train/dog/2.png")
    assert [(file.part, file.label) for file in found.files] == [("", "cat"), ("", "dog")]


@pytest.mark.parametrize("names", [("cat/1.png", "cat/2.png"), ("cat/1.png", "cat/deep/2.png")])
def test_a_single_class_is_no_folder_around_others(names: tuple[str, ...]) -> None:
    assert [file.label for file in arranged(*names).files] == ["cat", "cat"]


def test_hidden_and_system_names_and_links_are_left_out_with_their_reasons() -> None:
    found = arranged(
        "cat/1.png", "cat/.DS_Store", "dog/2.png", ".git/x", ".git/y/z", "__MACOSX/cat/1.png",
        "cat/@eaDir/1.jpg", "dog/Thumbs.DB", "dog/link.png@",
        entry("dog/pipe", Kind.OTHER), entry("dog/locked", Kind.DENIED),
    )  # fmt: skip
    assert [file.name for file in found.files] == ["cat/1.png", "dog/2.png"]
    assert left_out(found) == {
        # Of a hidden folder, the folder alone.
        "cat/.DS_Store": (LeftOutReason.HIDDEN, ""),
        ".git/": (LeftOutReason.HIDDEN, ""),
        "__MACOSX/": (LeftOutReason.SYSTEM, ""),
        "cat/@eaDir/": (LeftOutReason.SYSTEM, ""),
        "dog/Thumbs.DB": (LeftOutReason.SYSTEM, ""),
        "dog/link.png": (LeftOutReason.LINK, "dog"),
        "dog/pipe": (LeftOutReason.LINK, "dog"),
        "dog/locked": (LeftOutReason.UNREADABLE, "dog"),
    }


def test_a_link_beside_the_classes_was_a_file_or_a_class() -> None:
    found = arranged(*ANTS, "notes.txt@")
    assert left_out(found) == {"notes.txt": (LeftOutReason.LINK, "")}
    assert "'wasps' is a link, which is not followed" in refusal(*ANTS, "wasps@")


def test_a_name_that_is_no_utf_8_is_left_out_as_a_file_and_refused_as_a_class() -> None:
    found = arranged(*ANTS, "ants/caf\udce9.png")
    assert left_out(found) == {"ants/caf\ufffd.png": (LeftOutReason.UNREADABLE, "ants")}
    assert "not UTF-8" in refusal(*ANTS, "caf\udce9/1.png")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), "no files were found"),
        (("1.png", "2.png"), "no folder of a class beside '1.png', '2.png'"),
        ((".git/x",), "no files were found.*1 were left out, such as '.git/'"),
        ((*ANTS, "wasps/"), "the class 'wasps' has no images: the folder 'wasps' is empty"),
        ((*ANTS, "wasps/.x"), "'wasps' has no images: .* such as 'wasps/.x' .a hidden file"),
        ((*ANTS, "wasps/a@"), "'wasps' has no images: .* such as 'wasps/a' .a link"),
        ((*ANTS, Entry(("wasps",), Kind.DENIED)), "the folder 'wasps' may not be read"),
        (("train/ants/1", "val/wasps/"), "the part val/ holds no images"),
        (("train/ants/1", "test/2"), "'train' holds folders and 'test' beside it holds none"),
        (("val/ants/1", "test/ants/2"), "the parts test/ and val/ and none to learn from"),
    ],
)
def test_another_shape_is_refused_with_what_is_wrong(
    names: tuple[str | Entry, ...], says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        arranged(*names)
    assert caught.value.reason is Reason.DATASET_UNUSABLE


@pytest.mark.parametrize("names", [("cat", "cat/1"), ("cat/1", "cat"), ("cat@", "cat/1")])
def test_a_name_that_is_a_file_and_a_folder_is_refused(names: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput, match="a file and a folder at once") as caught:
        arranged(*names, "dog/1")
    assert caught.value.reason is Reason.ARCHIVE_UNREADABLE


def test_class_names_are_kept_in_one_form_without_blanks_around_them() -> None:
    found = arranged(" cafe\u0301\u00a0/1.png", "dog/2.png")
    assert [file.label for file in found.files] == ["caf\u00e9", "dog"]


@pytest.mark.parametrize(
    "other", ["ants ", " ants", "an\u200bts", "\ufeffants", "ants\u00ad", "ants\u3000"]
)
def test_class_names_that_look_the_same_are_refused_with_both(other: str) -> None:
    message = refusal(*ANTS, f"{other}/3.png")
    assert "look the same" in message
    assert "'ants'" in message
    assert ascii(other) in message
    refusal(*ANTS, f"{other}/3.png", case_sensitive=True)


def test_a_letter_in_two_forms_is_two_names_that_look_the_same() -> None:
    assert "look the same" in refusal("caf\u00e9/1", "cafe\u0301/2")


def test_class_names_that_differ_in_case_alone_are_two_only_where_that_was_asked_for() -> None:
    assert "upper and lower case alone" in refusal(*ANTS, "Ants/3.png")
    # Also where they stand in different parts, and then with their places.
    message = refusal("train/ants/1", "val/Ants/2")
    assert "train/ants" in message
    assert "val/Ants" in message
    found = arranged(*ANTS, "Ants/3.png", case_sensitive=True)
    assert [file.label for file in found.files] == ["Ants", "ants", "bees"]


@pytest.mark.parametrize("label", ["x" * 129, "a\nb", "a\u202eb", "a\\b"])
def test_a_folder_that_cannot_be_a_class_is_refused(label: str) -> None:
    assert "rename the folder" in refusal(*ANTS, f"{label}/1.png")


def test_without_labels_no_file_is_a_stray_and_folders_are_taken_as_they_look() -> None:
    found = arranged(
        "1.png", "cat/deep/2.png", "a\nb/3.png", "Unlabelled/4.png", "Cat/5.png", "empty/",
        "caf\udce9/6.png", ".x", "link@", is_labelled=False,
    )  # fmt: skip
    assert files(found) == [
        ("", "", "1.png"),
        ("", "", "Unlabelled/4.png"),
        ("", "", "a\nb/3.png"),
        ("", "Cat", "Cat/5.png"),
        ("", "cat", "cat/deep/2.png"),
    ]
    assert left_out(found) == {
        ".x": (LeftOutReason.HIDDEN, ""),
        "caf\ufffd/6.png": (LeftOutReason.UNREADABLE, ""),
        "link": (LeftOutReason.LINK, "link"),
    }


def test_without_labels_parts_are_passed_through() -> None:
    found = arranged("train/cat/1", "val/dog/2", "3.png", is_labelled=False)
    assert [(file.part, file.label) for file in found.files] == [("", ""), ("", "cat"), ("", "dog")]


def test_without_labels_there_must_be_a_file_all_the_same() -> None:
    for names in ((), ("cat/",), (".hidden",), ("link@",)):
        assert "no files were found" in refusal(*names, is_labelled=False)


def test_a_label_that_came_with_an_image_is_checked_as_it_is_kept() -> None:
    check_given(" cat ", is_labelled=True)
    check_given("", is_labelled=False)
    for label in ("", "  ", "a/b", ".x"):
        with pytest.raises(InvalidInput) as caught:
            check_given(label, is_labelled=True)
        assert caught.value.reason is Reason.INVALID_FIELD


WORDS = st.sampled_from(
    ["ants", "bees", "train", "val", "test", ".git", "Thumbs.db", "@eaDir", "1.png", "2.jpg", "x"]
)
NAMES = st.lists(WORDS, min_size=1, max_size=4).map(tuple)
KINDS = st.sampled_from([Kind.FILE, Kind.FILE, Kind.FILE, Kind.LINK, Kind.OTHER, Kind.DENIED])


@given(st.dictionaries(NAMES, KINDS, max_size=12), st.booleans())
def test_every_entry_is_a_file_or_left_out_once(
    kinds: dict[tuple[str, ...], Kind], is_labelled: bool
) -> None:
    try:
        found = arrange(
            [Entry(name, kind, Location(Path(*name))) for name, kind in kinds.items()],
            is_labelled=is_labelled,
        )
    except InvalidInput:
        return
    told = Counter([file.name for file in found.files] + [row.path for row in found.left_out])
    assert set(told.values()) <= {1}
    for name in kinds:
        # Itself, or the hidden or system folder that it lies in.
        above = {"/".join(name[:depth]) for depth in range(1, len(name) + 1)}
        assert above & {path.rstrip("/") for path in told}


def test_what_looks_as_if_another_level_was_meant_is_told() -> None:
    assert arranged(*ANTS).warnings == []
    (stepped,) = arranged("photos/ants/1.png", "photos/bees/2.png").warnings
    assert "'photos' was stepped into" in stepped and "'ants', 'bees'" in stepped
    sites = [f"{site}/{label}/1.png" for site in ("north", "south") for label in ("ants", "bees")]
    (repeated,) = arranged(*sites).warnings
    assert "folders of the same names ('ants', 'bees')" in repeated
    assert arranged(*sites, "north/2.png").warnings == []
    assert arranged("ants/june/1.png", "bees/july/2.png").warnings == []


def test_a_link_is_a_class_unless_it_is_named_like_a_file() -> None:
    assert left_out(arranged(*ANTS, "a.JPG@", "notes.md@")) == {
        "a.JPG": (LeftOutReason.LINK, ""), "notes.md": (LeftOutReason.LINK, ""),
    }  # fmt: skip
    assert "'wasps.v2' is a link" in refusal(*ANTS, "wasps.v2@")
