"""The lock of the image fits what our distributions require, whole and by hashes. No network."""

import importlib.util
import re
import tomllib
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.queries import DEPLOY, ROOT

LOCKS = DEPLOY / "locks"
FILES = {"cpu": ("cpu.txt", "cpu-torch.txt"), "gpu": ("gpu.txt",)}
# What PyTorch requires of the usual index's build, and not without CUDA.
OF_CUDA = re.compile(r"(nvidia|cuda)-|triton")


def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", DEPLOY / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCK = lock()


@dataclass(frozen=True)
class Pin:
    """One package of a lock."""

    version: Version
    marker: str
    hashes: tuple[str, ...]


def pins(*names: str) -> dict[str, Pin]:
    """The packages of some lock files, by name."""
    found: dict[str, Pin] = {}
    for name in names:
        text = (LOCKS / name).read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            requirement, *hashes = re.split(r"\s+--hash=", line.strip())
            pin = Requirement(requirement)
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert pin.name not in found
            found[canonicalize_name(pin.name)] = Pin(
                Version(exact.version), str(pin.marker or ""), tuple(hashes)
            )
    return found


def environment_of_image() -> dict[str, str]:
    """That the markers are evaluated in, for no extra."""
    here = {key: str(value) for key, value in default_environment().items()}
    return here | {
        "python_version": LOCK.PYTHON,
        "python_full_version": f"{LOCK.PYTHON}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }


def unmet(requirements: list[str], locked: dict[str, Pin]) -> list[str]:
    """Those of the requirements that hold in the image and that no pin satisfies."""
    image, found = environment_of_image(), []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate(image):
            continue
        pin = locked.get(canonicalize_name(requirement.name))
        if pin is None or not requirement.specifier.contains(pin.version, prereleases=True):
            found.append(text)
    return found


@pytest.mark.parametrize("device", FILES)
def test_each_requirement_of_the_projects_is_satisfied_by_a_pin(device: str) -> None:
    wanted = list(LOCK.requirements(ROOT, device))
    names = {canonicalize_name(Requirement(line).name) for line in wanted}
    assert ("onnxruntime" in names) == (device == "cpu")
    assert ("onnxruntime-gpu" in names) == (device == "gpu")
    assert ("openvino" in names) == (device == "cpu")
    assert {"torch", "grpcio", "googleapis-common-protos"} <= names
    assert not names & {"graftml", "graftml-server", "graftml-stubs"}
    assert unmet(wanted, pins(*FILES[device])) == []


@pytest.mark.parametrize("device", FILES)
def test_what_the_pinned_packages_require_is_pinned_too(device: str) -> None:
    """Nothing is installed but what is listed; read from those that are installed here as well."""
    locked, seen = pins(*FILES[device]), 0
    for name, pin in locked.items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(installed.version).public != pin.version.public:
            continue
        seen += 1
        wanted = [
            text
            for text in installed.requires or []
            if device == "gpu" or name != "torch" or not OF_CUDA.match(text)
        ]
        assert unmet(wanted, locked) == [], name
    assert seen > len(locked) / 2


def test_what_our_own_packages_are_built_with_is_pinned() -> None:
    assert unmet(LOCK.build_requirements(ROOT), pins("build.txt")) == []


@pytest.mark.parametrize("name", ["build.txt", "cpu.txt", "gpu.txt"])
def test_every_pin_has_hashes(name: str) -> None:
    for package, pin in pins(name).items():
        assert pin.hashes, package
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in pin.hashes)


def test_pytorch_without_cuda_is_of_the_same_version_and_brings_none() -> None:
    cpu, torch, gpu = pins("cpu.txt"), pins("cpu-torch.txt"), pins("gpu.txt")
    assert set(torch) == {"torch", "torchvision"}
    assert all(torch[name].version.public == gpu[name].version.public for name in torch)
    assert [name for name in cpu if OF_CUDA.match(name)] == []
    assert [name for name in gpu if OF_CUDA.match(name)]
    # What both have is the same.
    assert {name: cpu[name] for name in cpu.keys() & gpu} == {
        name: gpu[name] for name in cpu.keys() & gpu
    }


def test_no_lock_says_where_packages_come_from() -> None:
    for file in LOCKS.iterdir():
        text = file.read_text()
        assert "://" not in text
        assert "index" not in text


def test_a_requirement_that_is_not_met_is_noticed() -> None:
    locked = {"numpy": Pin(Version("2.4.6"), "", ())}
    wanted = ["numpy>=2.0,<3", "numpy<2", "scipy", 'other; sys_platform == "win32"']
    assert unmet(wanted, locked) == ["numpy<2", "scipy"]


def test_every_requirement_has_a_lower_and_an_upper_bound() -> None:
    open_ended = []
    for path in (ROOT / project for project in LOCK.PROJECTS):
        found = tomllib.loads(path.read_text())
        project = found["project"]
        lists = [
            project["dependencies"],
            *project.get("optional-dependencies", {}).values(),
            found["build-system"]["requires"],
        ]
        for requirement in (Requirement(text) for group in lists for text in group):
            operators = {specifier.operator for specifier in requirement.specifier}
            if "==" not in operators and not ({">=", ">"} & operators and {"<"} & operators):
                open_ended.append(str(requirement))
    assert open_ended == []
