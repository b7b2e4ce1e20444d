"""What the server says to people is true for whoever reads it: of a command, a library, a stub."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto" / "graft" / "v1"
CALLS = {
    name for path in PROTO.glob("*.proto") for name in re.findall(r"rpc (\w+)\(", path.read_text())
}
NAMED = re.compile(rf"\b({'|'.join(CALLS)})\b")


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """The strings of several words that are no docstrings."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            is_text = isinstance(child, ast.Constant) and isinstance(child.value, str)
            if is_text and " " in child.value and not isinstance(node, ast.Expr):
                yield child


@pytest.mark.parametrize(
    "folder", ["service/auth", "service/engine", "service/ingest", "service/jobs", "service/rpc",
               "service/storage", "trainer"],
)  # fmt: skip
def test_no_message_names_a_call_that_only_some_readers_know(folder: str) -> None:
    named = [
        f"{path.relative_to(ROOT)}:{text.lineno}: {text.value}"
        for path in (ROOT / folder).rglob("*.py")
        for text in texts(ast.parse(path.read_text()))
        if NAMED.search(text.value) and "_pb2" not in path.name
    ]
    assert named == []
