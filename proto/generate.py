"""Generates the committed Python stubs from the .proto files beside this one.

`--check` generates into a temporary folder and fails on any difference, so
stubs are never edited by hand and never stale.
"""

import argparse
import filecmp
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

PROTO = Path(__file__).parent
CLIENT_STUBS = PROTO.parent / "clients/python/src/graft/v1"


def generate(out: Path) -> None:
    """Writes the stubs of package graft.v1 below `out`, as graft/v1/*."""
    sources = sorted(str(path) for path in PROTO.glob("graft/v1/*.proto"))
    google = str(Path(status_pb2.__file__).parents[2])
    wellknown = str(files("grpc_tools") / "_proto")
    with_services = [s for s in sources if "\nservice " in Path(s).read_text()]
    base = ["protoc", f"-I{PROTO}", f"-I{google}", f"-I{wellknown}"]
    plugin = f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}"
    for arguments in (
        [*base, f"--python_out={out}", f"--pyi_out={out}", *sources],
        [*base, plugin, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *with_services],
    ):
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed: " + " ".join(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = Path(folder) / "graft/v1"
        names = {path.name for path in fresh.iterdir()}
        committed = {path.name for path in CLIENT_STUBS.iterdir() if "_pb2" in path.name}
        if check:
            _, differing, missing = filecmp.cmpfiles(fresh, CLIENT_STUBS, names, shallow=False)
            stale = sorted({*differing, *missing, *(committed - names)})
            if stale:
                raise SystemExit(f"stale stubs, run `make stubs`: {', '.join(stale)}")
            return
        for name in committed - names:
            (CLIENT_STUBS / name).unlink()
        for name in names:
            shutil.copyfile(fresh / name, CLIENT_STUBS / name)


if __name__ == "__main__":
    main()
