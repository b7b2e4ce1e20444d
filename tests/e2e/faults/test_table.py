"""docs/faults.md is held against the code: nothing is missing on either side."""

import ast
import re
from pathlib import Path

from tests.e2e.faults.house import HERE, ROOT

TABLE = (ROOT / "docs" / "faults.md").read_text()
ROWS = [line.split("|")[1:-1] for line in TABLE.splitlines() if line.startswith("| ")]
OWN = Path(__file__)


def quoted(cells: list[str]) -> set[str]:
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def known_tests() -> dict[str, str]:
    """The tests of this folder, and the text of the file that each is in."""
    found = {}
    for file in HERE.glob("test_*.py"):
        text = file.read_text()
        for node in ast.parse(text).body:
            is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_test and node.name.startswith("test_") and file != OWN:
                found[node.name] = text
    return found


def points() -> set[str]:
    """All that the code names."""
    named = re.compile(r'faults\.reach(?:\(|, )"([^"]+)"')
    files = [file for room in ("service", "trainer") for file in (ROOT / room).rglob("*.py")]
    return {point for file in files for point in named.findall(file.read_text())}


def test_every_test_has_a_row_and_every_row_a_test() -> None:
    assert quoted([row[-1] for row in ROWS]) == set(known_tests())


def test_every_point_has_a_row_and_every_row_a_point() -> None:
    assert quoted([row[0] for row in ROWS]) - {"*"} == points()


def test_the_test_of_a_row_names_its_point() -> None:
    texts = known_tests()
    strangers = [
        (point, name)
        for first, *_, last in ROWS
        for point in quoted([first])
        for name in quoted([last])
        if f"{point}" not in texts[name]
    ]
    assert not strangers
