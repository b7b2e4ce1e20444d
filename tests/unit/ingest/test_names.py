"""Names that strangers give to files and classes."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.ingest.names import file_name, label_problem


@given(st.text(max_size=300), st.integers(1, 10**6))
def test_any_name_becomes_a_short_one_on_one_line_of_its_own(said: str, place: int) -> None:
    name = file_name(said, place)
    assert name.count("/") <= 1
    assert name.isprintable() or not any(c in name for c in "\0\n\r")
    assert not name.startswith(".")
    assert len(os.fsencode(name)) <= 255
    assert name in (f"image {place}",) or name.startswith(f"{place:06d}/")


@given(st.text(max_size=200))
def test_a_label_that_passes_can_be_a_folder_below_its_parent(label: str) -> None:
    if not label_problem(label):
        path = Path("/root") / label
        assert path.parent == Path("/root")
        assert path.name == label
        assert len(os.fsencode(label)) <= 255


@pytest.mark.parametrize("char", "\0\n\x1b\x7f\x85\u2028\u2029\u202a\u202e\u2066\u2069/\\")
def test_a_class_s_name_holds_nothing_that_shows_it_as_another(char: str) -> None:
    assert label_problem(f"cat{char}tac")


@pytest.mark.parametrize(
    "label", ["caf\u00e9", "\u0645\u06cc\u200c\u062e", "\U0001f469\u200d\U0001f680", "x" * 128]
)
def test_a_class_s_name_may_be_in_any_script(label: str) -> None:
    assert not label_problem(label)
