"""The service as in its container: a root that cannot be written, a user of no rights.

No image is built: the real service runs in a mount namespace of its own, in which
everything but the data folder, a folder that stands for /tmp, and shared memory is
read-only, as the image's user where that one can read this checkout.
"""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from graftml import Client

from tests.deploy.queries import ROOT
from tests.deploy.test_images import environment_of_image, of_runtime
from tests.e2e.conftest import GUARD_S, ServiceProcess

UID = int(of_runtime("USER")[0].split(":")[0])
# The image's /data and /tmp.
DATA, TEMPORARY = "/mnt/data", "/mnt/tmp"
WRITABLE = {DATA, TEMPORARY, "/dev/shm"}

CONTAINED = """
set -eu
data=$1 temporary=$2 user=$3; shift 3
awk '{print $5}' /proc/self/mountinfo | while read -r at; do
  case $at in /proc|/proc/*) ;; *) mount -o remount,bind,ro "$at" ;; esac
done
mount -t tmpfs root /mnt
mkdir /mnt/data /mnt/tmp
mount --bind "$data" /mnt/data
mount --bind "$temporary" /mnt/tmp
mount -o remount,bind,rw /mnt/data
mount -o remount,bind,rw /mnt/tmp
OPENED
mount -o remount,bind,ro /mnt
mount -t tmpfs -o mode=1777 shm /dev/shm
exec setpriv --reuid="$user" --regid="$user" --clear-groups --no-new-privs \\
  --inh-caps=-all --bounding-set=-all "$@"
"""
"""Given the data folder, the temporary one, a user, and what to run."""


def cannot_contain() -> str:
    """Why a mount namespace cannot be had here; empty when it can."""
    missing = [name for name in ("unshare", "setpriv", "mount", "awk") if not shutil.which(name)]
    if missing:
        return f"{missing[0]} is not on the PATH"
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "x", "/mnt"],
        capture_output=True,
        timeout=GUARD_S,
        check=False,
    )
    return "" if tried.returncode == 0 else "a mount namespace takes root's rights here"


WHY_NOT = cannot_contain()


def opened() -> str:
    """Shell lines that let others reach what is run where a folder above it is closed to them."""
    kept: dict[Path, list[Path]] = {}
    for path in sorted({ROOT, Path(sys.prefix), Path(sys.base_prefix)}):
        closed = [folder for folder in path.parents if not folder.stat().st_mode & stat.S_IXOTH]
        if closed:
            kept.setdefault(closed[-1], []).append(path)
    lines = []
    for above, paths in kept.items():
        aside = [f"/mnt/{len(lines)}-{number}" for number in range(len(paths))]
        pairs = [(at, shlex.quote(str(path))) for at, path in zip(aside, paths, strict=True)]
        lines += [f"mkdir {at}; mount --bind {path} {at}" for at, path in pairs]
        lines += [f"mount -t tmpfs -o mode=755 opened {shlex.quote(str(above))}"]
        lines += [f"mkdir -p {path}; mount --bind {at} {path}" for at, path in pairs]
        lines += [f"mount -o remount,bind,ro {shlex.quote(str(above))}"]
    return "\n".join(lines)


@pytest.mark.e2e
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_nothing_is_written_but_to_the_data_folder_and_nobody_else_may_read_that(
    tmp_path: Path, digits: Path
) -> None:
    data, temporary = tmp_path / "data", tmp_path / "tmp"
    for folder in (data, temporary):
        folder.mkdir()
        os.chown(folder, UID, UID)
    own = {k: v for k, v in environment_of_image().items() if not k.startswith("GRAFT_")}
    # So few that training is short.
    few = [(label, path) for label in "01" for path in sorted((digits / label).iterdir())[:6]]
    service = ServiceProcess(
        Path(DATA),
        "--warm-trainers=0",
        prefix=["unshare", "--mount", "--propagation=private", "sh", "-c",
                CONTAINED.replace("OPENED", opened()), "sh",
                str(data), str(temporary), str(UID)],
        environment=own | {"HOME": TEMPORARY, "TMPDIR": TEMPORARY, "PATH": os.environ["PATH"]},
        cwd=Path("/"),
    )  # fmt: skip
    try:
        inside = Path(f"/proc/{service.process.pid}")
        assert writable(inside) == WRITABLE
        assert capabilities(inside) == {0}
        assert inside.stat().st_uid == UID
        with Client(service.address, timeout_s=GUARD_S) as client:
            client.wait_ready(timeout_s=GUARD_S)
            version = client.fine_tune(few, name="digits").wait(timeout_s=GUARD_S)
            (answer,) = client.predict(few[0][1], model="digits")
            assert client.get_report("digits")
        assert version.version == answer.version == 1
        assert list((inside / "root" / "dev" / "shm").iterdir()) == []
    finally:
        code = service.end()
    said = "".join(service.seen)
    assert code == 0, said
    assert "Read-only file system" not in said
    assert "Permission denied" not in said
    # What was put there meanwhile is gone, but for a folder that PyTorch makes and does not use.
    left = [path.name for path in temporary.rglob("*")]
    assert [name for name in left if not name.startswith("torchinductor_")] == []
    assert open_to_others(data) == []


def writable(process: Path) -> set[str]:
    """The mounts that a process may write to, the kernel's own left out."""
    rows = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    # Of several at one place the last one lies on top.
    on_top = {row[4]: row[5].split(",") for row in rows}
    return {at for at, how in on_top.items() if "rw" in how and not at.startswith("/proc")}


def capabilities(process: Path) -> set[int]:
    """What of root's rights a process has, or can ever get."""
    rows = (line.split() for line in (process / "status").read_text().splitlines())
    return {int(row[1], 16) for row in rows if row[0].startswith("Cap")}


def open_to_others(folder: Path) -> list[str]:
    found = [folder, *folder.rglob("*")]
    assert len(found) > 10
    return [str(path) for path in found[1:] if path.lstat().st_mode & 0o077]
