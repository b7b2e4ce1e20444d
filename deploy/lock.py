"""Writes the image's lock: every package of other people's, by version and by its files' hashes.

    python deploy/lock.py, in the project's root, with uv on the PATH

Owns `deploy/locks/`, and says what the image needs, from the two pyproject.toml, so
that there is no second list to keep. Versions are those of the environment that
it runs in, for these were tested; what is not installed there is the newest that
fits. To move on: make the environment anew, test, and lock.

The image for the CPU has onnxruntime and the extra `openvino`, that for GPUs
onnxruntime-gpu, the same package with CUDA, whatever machine they are for. PyTorch
without CUDA comes from an index of its own, whose files are others than the usual
index's: `cpu-torch.txt` has their versions, and their hashes too when TORCH_INDEX_URL
names that index.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

PROJECTS = (
    Path("proto/python/pyproject.toml"),
    Path("pyproject.toml"),
)
LOCKS = Path("deploy/locks")
_RUNTIME = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}
PYTHON = "3.11"
"""That of the image."""

HEADER = "# Made by `make lock`, not edited by hand.\n"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_TORCH = re.compile(r"torch(vision)?==")
# What PyTorch requires of the usual index's build alone.
_CUDA = re.compile(r"(nvidia|cuda)-|triton==")


def requirements(root: Path, device: str) -> Iterator[str]:
    """The requirements of both distributions for `cpu` or `gpu`, ours left out."""
    projects = [tomllib.loads((root / path).read_text("utf-8"))["project"] for path in PROJECTS]
    ours = {project["name"] for project in projects}
    for project in projects:
        extras = project.get("optional-dependencies", {}).get("openvino", [])
        for requirement in project["dependencies"] + (extras if device == "cpu" else []):
            name = _name(requirement)
            if name == _RUNTIME[device]:
                # On whatever machine the image is for.
                yield requirement.partition(";")[0]
            elif name not in ours and name not in _RUNTIME.values():
                yield requirement


def build_requirements(root: Path) -> list[str]:
    """What our own two packages are built with."""
    projects = (tomllib.loads((root / path).read_text("utf-8")) for path in PROJECTS)
    return sorted({line for project in projects for line in project["build-system"]["requires"]})


def _name(requirement: str) -> str:
    found = _NAME.match(requirement)
    assert found is not None, requirement
    return found[0]


def _tested() -> list[str]:
    """The installed versions, as constraints; without the part that says which build it is."""
    pins = {
        found.metadata["Name"].lower(): found.version.partition("+")[0]
        for found in metadata.distributions()
        if not found.metadata["Name"].startswith("graftml")
    }
    if "onnxruntime-gpu" in pins:
        pins["onnxruntime"] = pins["onnxruntime-gpu"]
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def _locked(wanted: Iterable[str], constraints: Iterable[str], *options: str) -> list[str]:
    """One text for each package: its version and marker, then its hashes, a line each."""
    with TemporaryDirectory() as folder:
        listed, held = Path(folder) / "wanted.in", Path(folder) / "held.txt"
        listed.write_text("\n".join(wanted), "utf-8")
        held.write_text("\n".join(constraints), "utf-8")
        done = subprocess.run(
            ["uv", "pip", "compile", listed, "--constraint", held, "--universal",
             "--python-version", PYTHON, "--generate-hashes", "--only-binary", ":all:",
             "--no-header", "--no-annotate", "--quiet", *options],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"uv found no versions that fit:\n{done.stderr}")
    packages = re.split(r"\n(?=\S)", done.stdout.strip())
    # The lock is for Linux as it is.
    return [package.replace(" ; sys_platform == 'linux' \\", " \\") for package in packages]


def _write(name: str, packages: Iterable[str]) -> None:
    (LOCKS / name).write_text(HEADER + "\n".join(packages) + "\n", "utf-8")


def main() -> None:
    """Makes all locks anew."""
    root, tested = Path.cwd(), _tested()
    LOCKS.mkdir(exist_ok=True)
    _write("build.txt", _locked(build_requirements(root), tested))
    _write("gpu.txt", _locked(requirements(root, "gpu"), tested))

    packages = _locked(requirements(root, "cpu"), tested)
    torch = [package.split()[0] for package in packages if _TORCH.match(package)]
    _write("cpu.txt", (p for p in packages if not _TORCH.match(p) and not _CUDA.match(p)))
    index = os.environ.get("TORCH_INDEX_URL", "")
    if index:
        torch = _locked(torch, (), "--no-deps", "--index-url", index)
    _write("cpu-torch.txt", torch)


if __name__ == "__main__":
    main()
