"""A version's answers come back as they were kept."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainer import answers
from trainer.answers import Role, Rows


def digests(count: int, name: str) -> list[str]:
    return [hashlib.sha256(f"{name}{n}".encode()).hexdigest() for n in range(count)]


def rows(role: Role, name: str, probabilities: np.ndarray | None, count: int = 3) -> Rows:
    zeros = np.zeros(count, np.int64)
    answered = None if probabilities is None else probabilities.argmax(axis=1)
    return Rows(role, digests(count, name), zeros, np.arange(count), probabilities, answered)


def test_roles_and_answers_come_back(tmp_path: Path) -> None:
    file = tmp_path / "answers.safetensors"
    shares = np.full((3, 40), 0.01)
    shares[[0, 1, 2], [39, 0, 17]] = 0.61
    names = [f"class {n}" for n in range(40)]
    answers.save(
        file,
        names,
        [
            rows(Role.OUT_OF_FOLD, "own", shares),
            rows(Role.HELD_OUT, "held", shares[::-1]),
            rows(Role.LEARNED, "lone", None, count=1),
            rows(Role.LEARNED, "none", None, count=0),
        ],
    )
    known = answers.load(file)
    assert [known[digest].answered for digest in digests(3, "own")] == [
        "class 39", "class 0", "class 17",
    ]  # fmt: skip
    assert [known[digest].role for digest in digests(3, "held")] == [Role.HELD_OUT] * 3
    assert known[digests(1, "own")[0]].probability == pytest.approx(0.61, abs=1e-3)
    (lone,) = digests(1, "lone")
    assert (known[lone].role, known[lone].answered) == (Role.LEARNED, None)
    assert len(known) == 7


def test_what_a_decision_answered_comes_back_be_it_none_or_less_probable(tmp_path: Path) -> None:
    file = tmp_path / "answers.safetensors"
    shares = np.full((3, 40), 0.01)
    shares[:, 7] = 0.61
    whole = rows(Role.OUT_OF_FOLD, "own", shares)
    answers.save(
        file, [f"c{n}" for n in range(40)], [replace(whole, answers=np.array([7, 39, -1]))]
    )
    known = [answers.load(file)[digest] for digest in digests(3, "own")]
    assert [each.answered for each in known] == ["c7", "c39", ""]
    assert [each.probability for each in known] == pytest.approx([0.61] * 3, abs=1e-3)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_is_said_to_be(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "answers.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        answers.load(file)


def test_a_number_that_is_no_class_is_damage_too(tmp_path: Path) -> None:
    file = tmp_path / "answers.safetensors"
    answers.save(file, ["a", "b"], [rows(Role.OUT_OF_FOLD, "own", np.array([[0.1, 0.9]] * 3))])
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'[\\"a\\", \\"b\\"]', b'[\\"a\\"     ]'))
    assert file.read_bytes() != whole
    with pytest.raises(ValueError, match="damaged"):
        answers.load(file)


def test_sides_and_groups_come_back(tmp_path: Path) -> None:
    file = tmp_path / "answers.safetensors"
    kept = Rows(Role.LEARNED, digests(2, "own"), np.zeros(2, np.int64), np.array([7, 7]),
                sides=np.array([0.25, np.nan]))  # fmt: skip
    answers.save(file, ["a"], [kept])
    first, second = (answers.load(file)[digest] for digest in digests(2, "own"))
    assert (first.group, first.side, second.group) == (7, 0.25, 7)
    assert np.isnan(second.side)
