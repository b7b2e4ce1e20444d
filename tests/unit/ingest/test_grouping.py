"""Groups of images by their names."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidInput, Reason
from service.ingest.grouping import MAX_STARS, NamedGroups
from service.ingest.index import IndexedImage
from service.ingest.names import file_name


def _image(name: str, depth: int = 0, group: str = "") -> IndexedImage:
    return IndexedImage(name, "ants", "", "00", group=group, depth=depth)


@pytest.mark.parametrize(
    ("pattern", "name", "group"),
    [
        ("{group}_*", "p012_left_1.jpg", "p012"),
        ("video_{group}_*.jpg", "video_01_0003.jpg", "01"),
        ("video_{group}_*.jpg", "video_01_0003.png", ""),
        ("exp*_num_{group}.jpg", "exp1_num_108719.jpg", "108719"),
        ("*_{group}.jpg", "a_b_c.jpg", "b_c"),
        ("{group}_*", "_1.jpg", ""),
        ("{group}-{x}.jpg", "a-{x}.jpg", "a"),
        ("a.{group}.b", "axcab", ""),
        ("a{group}a", "aa", ""),
        ("caf\u00e9-{group}.*", "cafe\u0301-7.jpg", "7"),
        ("{group}", "whole.jpg", "whole.jpg"),
    ],
)
def test_a_pattern_tells_the_group_from_a_file_s_name(pattern: str, name: str, group: str) -> None:
    groups = NamedGroups(name_pattern=pattern)
    assert groups.of(_image(f"train/ants/deep/{name}", depth=1)) == group
    # One that came by itself: its number is none of its sender's name.
    assert groups.of(_image(file_name(name, 12))) == group


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.text("abc", max_size=12))
def test_a_pattern_matches_as_the_same_regular_expression_does(texts: list[str], name: str) -> None:
    pattern = "*".join(texts) + "{group}b*a" if texts else "{group}b*"
    known = re.escape(pattern).replace(r"\*", "(?:.*?)").replace(r"\{group\}", "(.+?)")
    found = re.fullmatch(known, name)
    assert NamedGroups(name_pattern=pattern).of(_image(name or "-")) == (found[1] if found else "")


def test_the_worst_name_for_a_pattern_is_settled_at_once() -> None:
    groups = NamedGroups(name_pattern="a*a*a*a*a{group}b")
    # A regular expression would try some 255 to the power of 5 divisions, for days.
    assert groups.of(_image("a" * 255)) == ""


def test_the_nth_folder_below_the_class_s_names_the_group() -> None:
    image = _image("pets/train/ants/site 1/day 2/7.jpg", depth=2)
    assert [NamedGroups(folder_level=level).of(image) for level in (1, 2, 3)] == [
        "site 1", "day 2", "",
    ]  # fmt: skip
    assert NamedGroups(folder_level=1).of(_image("train/ants/7.jpg")) == ""


def test_what_an_image_came_with_goes_before_its_name() -> None:
    image = _image("ants/p1_2.jpg", group="given")
    assert NamedGroups(name_pattern="{group}_*").of(image) == "given"
    assert NamedGroups().of(image) == "given"
    assert NamedGroups().of(_image("ants/p1_2.jpg")) == ""


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("frame_*", "exactly once"),
        ("{group}_{group}", "exactly once"),
        ("{Group}_1", "exactly once"),
        ("a{group}" + "b*" * (MAX_STARS + 1), "more than 4 stars"),
        ("{group}*", "side by side"),
        ("a**{group}", "side by side"),
        ("site/{group}_*", "folder_level"),
        ("{group}" + "x" * 255, "more than 255"),
    ],
)
def test_a_pattern_that_tells_nothing_clear_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem) as caught:
        NamedGroups(name_pattern=pattern)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.field == "grouping.name_pattern"


def test_two_ways_at_once_and_levels_that_no_folder_has_are_refused() -> None:
    for level, pattern in ((1, "{group}_*"), (-1, ""), (33, "")):
        with pytest.raises(InvalidInput) as caught:
            NamedGroups(level, pattern)
        assert caught.value.field == "grouping.folder_level"
