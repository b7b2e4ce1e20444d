"""Imports run one way; the law stands in docs/structure.md."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each room of the service may import the rooms listed, and itself.
LEAVES = {"backbones", "domain", "errors", "control_groups", "telemetry", "faults"}
LAW = {
    "backbones": {"errors"},
    "control_groups": set(),
    "faults": set(),
    "errors": set(),
    "domain": {"errors"},
    "telemetry": set(),
    "free_memory": set(),
    "metrics_server": set(),
    "config": {"backbones", "jobs.contract"},
    "scratch": {"config"},
    "inference": {"domain", "errors", "telemetry"},
    "ingest": {"control_groups", "domain", "errors", "faults", "inference"},
    "storage": {"ingest", "jobs.contract", *LEAVES},
    "jobs": {"ingest", "storage", *LEAVES},
    "rpc": {"inference", "ingest", "jobs", "storage", *LEAVES},
    "door": {"rpc", "config", *LEAVES},
    "tokens": {"rpc", "domain", "errors"},
    "app": {
        "door",
        "rpc",
        "inference",
        "ingest",
        "jobs",
        "storage",
        "config",
        "free_memory",
        "metrics_server",
        "scratch",
        *LEAVES,
    },
    "check": {"jobs", "storage"},
    "__main__": {"app", "config", "scratch", "telemetry", "errors", "faults"},
}
TRAINER_MAY = {
    "backbones", "jobs.contract", "inference", "ingest", "control_groups", "domain", "errors",
    "faults",
}  # fmt: skip


@cache
def imported(file: Path) -> set[str]:
    """Full names of every module that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def files(*folders: str) -> list[Path]:
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    assert found
    return found


def rooms(names: set[str]) -> set[str]:
    """What of the service is imported: "inference", or "jobs.contract" for that file alone."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != "service" or len(parts) < 2 or parts[1].startswith("_"):
            continue
        is_contract = parts[1:3] == ["jobs", "contract"]
        found.add("jobs.contract" if is_contract else parts[1])
    # `from service.jobs import contract` names its package too.
    return found - {"jobs"} if "jobs.contract" in found and not _jobs_beside(names) else found


def _jobs_beside(names: set[str]) -> bool:
    return any(
        name.startswith("service.jobs.") and not name.startswith("service.jobs.contract")
        for name in names
    )


@pytest.mark.parametrize("file", files("service"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_of_the_service_imports_only_what_the_law_allows(file: Path) -> None:
    room = file.relative_to(ROOT / "service").parts[0].removesuffix(".py")
    if room == "__init__":
        assert not rooms(imported(file))
        return
    allowed = LAW[room] | {room}
    if "jobs" in allowed:
        allowed = allowed | {"jobs.contract"}
    assert rooms(imported(file)) <= allowed


@pytest.mark.parametrize("file", files("trainer"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_trainer_imports_only_its_contract_and_what_serves(file: Path) -> None:
    assert rooms(imported(file)) <= TRAINER_MAY


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("torch", {"trainer"}),
        ("trainer", {"trainer"}),
        ("torchvision", {"trainer"}),
        ("timm", {"trainer/backbones.py", "trainer/timm_networks.py"}),
        ("huggingface_hub", {"trainer/download.py"}),
        ("sklearn", {"trainer"}),
        ("onnxruntime", {"service/inference", "service/app.py", "trainer/quantise.py"}),
        ("openvino", {"service/inference"}),
        ("grpc", {"service/rpc"}),
        ("graft", {"service/rpc", "service/app.py"}),
        ("sqlite3", {"service/storage", "service/jobs", "trainer/feature_cache.py"}),
        ("prometheus_client", {"service/telemetry.py", "service/metrics_server.py"}),
    ],
)
def test_a_library_lives_in_its_room_alone(module: str, allowed: set[str]) -> None:
    users = {
        str(file.relative_to(ROOT))
        for file in files("service", "trainer")
        if any(name == module or name.startswith(module + ".") for name in imported(file))
    }
    strangers = {user for user in users if not any(user.startswith(room) for room in allowed)}
    assert not strangers


def test_the_serving_process_starts_without_torch() -> None:
    heavy = ["torch", "torchvision", "timm", "sklearn", "trainer", "onnx", "scipy"]
    program = (
        "import sys, service.app, service.__main__;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_no_file_is_longer_than_500_lines() -> None:
    own = [
        f for f in files("service", "trainer", "clients", "bench", "tests") if "_pb2" not in f.name
    ]
    long = {
        str(f.relative_to(ROOT)): n
        for f in own
        if ".venv" not in f.parts and (n := len(f.read_text().splitlines())) > 500
    }
    assert not long
