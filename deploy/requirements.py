"""Prints what the image needs from other people, one requirement a line, for `cpu` or `gpu`.

Reads it from the two pyproject.toml, so that there is no second list to keep. On
the CPU onnxruntime stands in for onnxruntime-gpu, the same package without CUDA,
and the extra `openvino` comes along.
Our own packages are left out, since the image builds them itself.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECTS = (Path("clients/python/pyproject.toml"), Path("pyproject.toml"))


def requirements(root: Path, device: str) -> Iterator[str]:
    """The requirements of both distributions, ours left out."""
    projects = [tomllib.loads((root / path).read_text("utf-8"))["project"] for path in PROJECTS]
    ours = {project["name"] for project in projects}
    for project in projects:
        extras = project.get("optional-dependencies", {}).get("openvino", [])
        for requirement in project["dependencies"] + (extras if device == "cpu" else []):
            name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
            if name in ours:
                continue
            if name == "onnxruntime-gpu" and device == "cpu":
                yield requirement.replace(name, "onnxruntime", 1)
            else:
                yield requirement


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("cpu", "gpu"):
        sys.exit("usage: requirements.py cpu|gpu, in the project's root")
    print("\n".join(requirements(Path.cwd(), sys.argv[1])))
