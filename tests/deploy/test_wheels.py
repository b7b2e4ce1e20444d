"""The wheels hold all files of their packages, and nothing else; `make dist-check` tries them."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.queries import ROOT
from tests.e2e.conftest import GUARD_S

PROJECTS = {
    "graftml-stubs": ("proto/python", ["src/graftml_stubs"]),
    "graftml": ("clients/python", ["src/graftml", "src/graftml_cli"]),
    "graftml-server": (".", ["service", "trainer"]),
}
PYTHONS = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}


def built(project: Path, packages: list[str], folder: Path) -> zipfile.ZipFile:
    """Builds a wheel as `make dist` does, from a copy: it leaves files beside the sources."""
    for package in packages:
        shutil.copytree(
            project / package,
            folder / "copy" / package,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (project / name).exists():
            shutil.copy(project / name, folder / "copy")
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('..')"],
        cwd=folder / "copy",
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*-py3-none-any.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_holds_every_file_of_its_packages_and_the_licence(
    name: str, tmp_path: Path
) -> None:
    folder, packages = PROJECTS[name]
    project = ROOT / folder
    with built(project, packages, tmp_path) as wheel:
        held = {entry for entry in wheel.namelist() if ".dist-info/" not in entry}
        (licence,) = (entry for entry in wheel.namelist() if entry.endswith("/LICENSE"))
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = (entry for entry in wheel.namelist() if entry.endswith("/METADATA"))
        told = message_from_bytes(wheel.read(metadata))
    expected = {
        str(path.relative_to((project / package).parent))
        for package in packages
        for path in (project / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
    assert {f"{Path(package).name}/py.typed" for package in packages} <= held
    assert told["Requires-Python"] == ">=3.11"
    assert set(told.get_all("Classifier", [])) >= PYTHONS


def test_the_three_are_released_together() -> None:
    versions = {
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]["version"]
        for folder, _ in PROJECTS.values()
    }
    assert len(versions) == 1


@pytest.mark.parametrize(
    ("sys_platform", "machine", "wanted"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
    ],
)
def test_each_machine_gets_the_one_onnx_runtime_that_has_wheels_for_it(
    sys_platform: str, machine: str, wanted: str
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [
        requirement.name
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name.startswith("onnxruntime")
        and requirement.marker is not None
        and requirement.marker.evaluate({"sys_platform": sys_platform, "platform_machine": machine})
    ]
    assert found == [wanted]
