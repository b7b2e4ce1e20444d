"""Who forgets to say for which tenant gets an error from mypy, not somebody's data."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STORES = [path for room in ("storage", "jobs") for path in (ROOT / "service" / room).rglob("*.py")]


def tenants(tree: ast.AST) -> list[tuple[int, str, bool]]:
    """Each parameter and field `tenant`: its line, its type, whether it may be left out."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            plain = [*node.posonlyargs, *node.args]
            has_default = [False] * (len(plain) - len(node.defaults)) + [True] * len(node.defaults)
            has_default += [default is not None for default in node.kw_defaults]
            for arg, is_optional in zip([*plain, *node.kwonlyargs], has_default, strict=True):
                if arg.arg == "tenant":
                    kind = ast.unparse(arg.annotation) if arg.annotation else ""
                    found.append((arg.lineno, kind, is_optional))
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "tenant":
            found.append((node.lineno, ast.unparse(node.annotation), node.value is not None))
    return found


def test_nothing_in_the_stores_chooses_a_tenant_by_omission() -> None:
    found = [(path, *one) for path in STORES for one in tenants(ast.parse(path.read_text()))]
    assert len(found) > 20
    assert [
        f"{path.relative_to(ROOT)}:{line}"
        for path, line, kind, is_optional in found
        if kind != "str" or is_optional
    ] == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(a, tenant: str = 'default'): ...",
        "def f(a, *, b=0, tenant: str = 'default', c): ...",
        "def f(tenant: str | None): ...",
        "class A:\n    tenant: str = 'default'",
    ],
)
def test_one_that_did_would_be_found(text: str) -> None:
    ((_, kind, is_optional),) = tenants(ast.parse(text))
    assert kind != "str" or is_optional
