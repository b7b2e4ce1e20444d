"""Nothing that comes from outside is ever run: what reads files and text that others made."""

import ast
import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = [
    path
    for folder in ("service", "trainer", "clients/python/src")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "_pb2" not in path.name
]

# Each runs what it is given, or opens what its input names.
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads",
    "shelve.open", "dill.load", "joblib.load", "cloudpickle.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "os.system", "os.popen", "subprocess.getoutput",
    "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
    "tarfile.TarFile.extractall", "shutil.unpack_archive", "tempfile.mktemp",
    # Reads the files that a model names as its external data.
    "onnx.load", "onnx.load_model", "onnx.load_external_data_for_model",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "extract"}
FORBIDDEN_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "xml"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a file by its full name, "torch.load", whatever it was imported as."""
    return list(_calls(parsed(path)))


def _calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := _dotted(node.func)):
            first, _, rest = name.partition(".")
            whole = names.get(first, first)
            yield (f"{whole}.{rest}" if rest else whole), node


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else f"?.{node.attr}"
    return ""


def test_nothing_calls_what_runs_its_input() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path in OWN
        for name, node in calls(path)
        if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS
    ]
    assert found == []


def test_nothing_imports_what_can_do_little_else() -> None:
    found = set()
    for path in OWN:
        for node in ast.walk(parsed(path)):
            modules = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            )  # fmt: skip
            found |= {
                f"{path.relative_to(ROOT)} {module}"
                for module in modules
                if module.split(".")[0] in FORBIDDEN_MODULES
            }
    assert found == set()


def keywords(node: ast.Call) -> dict[str, object]:
    return {
        word.arg: word.value.value
        for word in node.keywords
        if word.arg and isinstance(word.value, ast.Constant)
    }


def test_weights_are_loaded_without_running_code() -> None:
    loads = [
        (f"{path.relative_to(ROOT)}:{node.lineno}", keywords(node))
        for path in OWN
        for name, node in calls(path)
        if name == "torch.load"
    ]
    assert len(loads) >= 2
    assert [where for where, given in loads if given.get("weights_only") is not True] == []


def test_arrays_are_loaded_without_pickles() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in OWN
        for name, node in calls(path)
        if name == "numpy.load" and keywords(node).get("allow_pickle") is True
    ]
    assert found == []


def test_no_shell_is_asked() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in OWN
        for name, node in calls(path)
        if keywords(node).get("shell") is True or name.endswith("create_subprocess_shell")
    ]
    assert found == []


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.proof,)


def test_a_pickle_that_runs_code_would(tmp_path: Path) -> None:
    # Or the tests that it does not run elsewhere would prove nothing.
    proof = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "from os import system as s\ns('ls')",
        "import torch as t\nt.jit.load('x')",
        "import onnx\nonnx.load('m')",
        "a.b().extractall('.')",
    ],
)
def test_what_is_forbidden_is_seen_whatever_it_is_called(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.py"
    path.write_text(text)
    assert any(
        name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS
        for name, _ in calls(path)
    )
