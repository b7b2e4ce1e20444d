"""Imports run one way; the law stands in docs/explanation/structure.md."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each room of the service may import the rooms listed, and itself.
LEAVES = {"backbones", "contract", "domain", "errors", "ops", "prepared", "quantisation"}
LAW = {
    "errors": set(),
    "ops": set(),
    "backbones": {"errors"},
    "quantisation": set(),
    "domain": {"errors", "quantisation"},
    "contract": {"backbones", "domain", "errors"},
    "prepared": {"contract"},
    "config": {"backbones", "contract"},
    "settings": {"backbones", "config"},
    "scratch": {"config"},
    "stores": {
        "config",
        "engine",
        "ingest",
        "jobs",
        "ops",
        "scratch",
        "storage",
    },
    "engine": {"domain", "errors", "ops"},
    "ingest": {"domain", "engine", "errors", "ops"},
    "storage": {"ingest", *LEAVES},
    "jobs": {"ingest", "storage", *LEAVES},
    "auth": {"config", "domain", "errors", "ops"},
    "rpc": {"auth", "engine", "ingest", "jobs", "storage", *LEAVES},
    "app": {
        "auth",
        "config",
        "engine",
        "ingest",
        "jobs",
        "rpc",
        "storage",
        "stores",
        *LEAVES,
    },
    "fsck": {"contract", "domain", "ingest", "jobs", "ops", "storage"},
    "doctor": {"config", "engine", "ops"},
    "backup": {"errors", "jobs", "storage"},
    "commands": {
        "app",
        "auth",
        "backup",
        "config",
        "doctor",
        "errors",
        "fsck",
        "ops",
        "scratch",
        "settings",
    },
    "__main__": {"commands", "config"},
}
TRAINER_MAY = {
    "backbones", "contract", "domain", "engine", "errors", "ingest", "ops", "prepared",
    "quantisation",
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
    """Lists the packages and lone modules of the service among what is imported."""
    parts = [name.split(".") for name in names if name.startswith("service.")]
    return {part[1] for part in parts if not part[1].startswith("_")}


@pytest.mark.parametrize("file", files("service"), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_of_the_service_imports_only_what_the_law_allows(file: Path) -> None:
    room = file.relative_to(ROOT / "service").parts[0].removesuffix(".py")
    if room == "__init__":
        assert not rooms(imported(file))
        return
    assert rooms(imported(file)) <= LAW[room] | {room}


@pytest.mark.parametrize("package", ["service", "clients/python/src/graftml"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    above = (ROOT / package).parent
    modules = {
        ".".join(file.relative_to(above).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files(package)
    }
    # `from service import errors` names its package, too.
    packages = {module for module, file in modules.items() if file.name == "__init__.py"}
    others = modules.keys() - packages
    TopologicalSorter(
        {module: (imported(file) & others) - {module} for module, file in modules.items()}
    ).prepare()


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
        ("onnxruntime", {"service/engine", "service/app.py", "trainer/quantise.py"}),
        ("openvino", {"service/engine"}),
        ("grpc", {"service/auth", "service/rpc"}),
        ("graftml", set()),
        ("graftml_stubs", {"service/auth", "service/rpc", "service/app.py"}),
        (
            "sqlite3",
            {
                "service/storage",
                "service/engine/feature_cache.py",
                "service/backup.py",
                "service/commands/check.py",
                "service/fsck.py",
            },
        ),
        ("prometheus_client", {"service/ops/metrics.py", "service/ops/metrics_server.py"}),
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


@pytest.mark.parametrize(
    ("imports", "others"),
    [
        ("import service.app, service.__main__", ["trainer", "scipy"]),
        ("from trainer import warm; warm.prepare()", []),
    ],
    ids=["the serving process", "a waiting trainer"],
)
def test_what_starts_without_torch(imports: str, others: list[str]) -> None:
    heavy = ["torch", "torchvision", "timm", "sklearn", "onnx", *others]
    program = f"{imports}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "[]", done.stderr


WITH_TORCH = {
    *("backbones", "checkpoint", "compute", "download", "export", "folding", "images", "maps"),
    *("device_views", "parts", "tails", "timm_networks", "uploads", "adaptation.losses"),
    *("methods.model_based", "methods.network_adaptation"),
}
"""Modules of the trainer that import torch with themselves: of what trains or exports."""


def test_modules_of_the_trainer_import_torch_where_it_trains_or_exports() -> None:
    def with_torch(file: Path) -> bool:
        """Whether importing the module imports it: at the top, and not for types alone."""
        names = {
            alias.name if isinstance(node, ast.Import) else str(node.module)
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        return any(name.split(".")[0] in ("torch", "timm", "torchvision") for name in names)

    found = {
        ".".join(file.relative_to(ROOT / "trainer").with_suffix("").parts)
        for file in files("trainer")
        if with_torch(file)
    }
    assert found == WITH_TORCH


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
