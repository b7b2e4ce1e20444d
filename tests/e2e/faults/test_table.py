"""docs/evidence/faults.md is held against the code: nothing is missing on either side."""

import ast
import re
from pathlib import Path

from tests.e2e.faults.house import HERE, ROOT

TABLE = (ROOT / "docs" / "evidence" / "faults.md").read_text()
ROWS = [line.split("|")[1:-1] for line in TABLE.splitlines() if line.startswith("| ")]
OWN = Path(__file__)


def quoted(cells: list[str]) -> set[str]:
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def known_tests() -> dict[str, str]:
    """The tests of this folder, and the text of each with all that it names of its file."""
    found = {}
    for file in HERE.glob("test_*.py"):
        if file == OWN:
            continue
        text = file.read_text()
        parts = {name: node for node in ast.parse(text).body for name in defined(node)}
        for name in parts:
            if name.startswith("test_"):
                found[name] = "\n".join(
                    segment(text, parts[each]) for each in sorted(reached(name, parts))
                )
    return found


def defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def segment(text: str, node: ast.stmt) -> str:
    """The source with its decorators."""
    decorators = getattr(node, "decorator_list", [])
    return "\n".join(ast.get_source_segment(text, each) or "" for each in (*decorators, node))


def reached(name: str, parts: dict[str, ast.stmt]) -> set[str]:
    """The names of the file that this one leads to: its lists, fixtures and steps."""
    found, left = set(), [name]
    while left:
        each = left.pop()
        if each in found:
            continue
        found.add(each)
        names = {
            node.id if isinstance(node, ast.Name) else node.arg
            for node in ast.walk(parts[each])
            if isinstance(node, ast.Name | ast.arg)
        }
        left += [other for other in names & parts.keys() if not other.startswith("test_")]
    return found


def points() -> set[str]:
    """All that the code names."""
    named = re.compile(r'failpoints\.reach(?:\(|, )"([^"]+)"')
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
        if re.search(rf"(?<![\w.]){re.escape(point)}(?![\w.])", texts[name]) is None
    ]
    assert not strangers


def test_a_point_that_only_another_test_of_the_file_names_is_missed() -> None:
    text = 'MINE = ["a.b"]\n\n@given(MINE)\ndef test_one(): ...\n\ndef test_two(): "c.d"\n'
    parts = {name: node for node in ast.parse(text).body for name in defined(node)}
    assert reached("test_one", parts) == {"test_one", "MINE"}
    assert "c.d" not in segment(text, parts["test_one"])
