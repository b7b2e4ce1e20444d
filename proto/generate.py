"""Generates the committed Python stubs from the .proto files beside this one.

`--check` generates into a temporary folder and fails on any difference, so
stubs are never edited by hand and never stale.
"""

import argparse
import filecmp
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

PROTO = Path(__file__).parent
ROOT = PROTO.parent


@dataclass(frozen=True)
class Package:
    """One package's .proto files and its stubs."""

    sources: str
    """Their folder below proto/."""
    module: str
    """The folder that protoc knows them by: their descriptors are named for it."""
    stubs: Path
    """Where the stubs are committed."""
    imported: str
    """The stubs' Python package."""


PACKAGES = (
    # `graft` is another project's name among Python's packages.
    Package("graft/v1", "graft/v1", PROTO / "python/src/graftml_stubs/v1", "graftml_stubs.v1"),
    # The server's own: a client has its protocol's stubs, and two copies of a package
    # cannot share a process.
    Package(
        "open_inference",
        "service/rpc/open_inference",
        ROOT / "service/rpc/open_inference",
        "service.rpc.open_inference",
    ),
)


def generate(package: Package, out: Path) -> Path:
    """Writes the package's stubs below `out`; returns their folder."""
    sources = sorted((PROTO / package.sources).glob("*.proto"))
    mapped = f"-I{package.module}={PROTO / package.sources}"
    google = str(Path(status_pb2.__file__).parents[2])
    wellknown = str(files("grpc_tools") / "_proto")
    base = ["protoc", mapped, f"-I{google}", f"-I{wellknown}"]
    plugin = f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}"
    names = [f"{package.module}/{s.name}" for s in sources]
    services = [f"{package.module}/{s.name}" for s in sources if "\nservice " in s.read_text()]
    for arguments in (
        [*base, f"--python_out={out}", f"--pyi_out={out}", *names],
        [*base, plugin, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *services],
    ):
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed: " + " ".join(arguments))
    fresh = out / package.module
    protoc_import = re.compile(rf"^from {package.module.replace('/', '[.]')} import", re.MULTILINE)
    for stub in fresh.iterdir():
        stub.write_text(protoc_import.sub(f"from {package.imported} import", stub.read_text()))
    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when stale")
    check = parser.parse_args().check
    stale = []
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            fresh = generate(package, Path(folder))
            names = {path.name for path in fresh.iterdir()}
            committed = {path.name for path in package.stubs.iterdir() if "_pb2" in path.name}
            if check:
                _, differing, missing = filecmp.cmpfiles(fresh, package.stubs, names, shallow=False)
                stale += sorted({*differing, *missing, *(committed - names)})
                continue
            for name in committed - names:
                (package.stubs / name).unlink()
            for name in names:
                shutil.copyfile(fresh / name, package.stubs / name)
    if stale:
        raise SystemExit(f"stale stubs, run `make generate`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
