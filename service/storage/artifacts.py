"""The files of published models, named by what is in them.

`backbones/SHA256.onnx` is shared by all versions on it; `versions/DIGEST/`
holds a version's head, answers, manifest and reports. A file or folder gets its name
when it is whole and flushed, never before, and is never changed after. Knows no
database: the model store says what is live.
"""

import hashlib
import logging
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from service.contract import (
    ANSWERS_FILE,
    BACKBONE_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    REPORT_HTML_FILE,
    REPORT_JSON_FILE,
    decode_manifest,
)
from service.domain import ImageDecoding, Manifest, ModelFiles
from service.errors import Aborted, Damaged, Reason
from service.ops import failpoints
from service.storage import durable

_MAX_MANIFEST_BYTES = 16 * 2**20
"""One of 100 000 classes fits."""
VERSION_FILES = (HEAD_FILE, ANSWERS_FILE, MANIFEST_FILE, REPORT_JSON_FILE, REPORT_HTML_FILE)
"""What the folder of a version holds."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredVersion:
    """A version whose files are in place and that is not published yet."""

    manifest: Manifest
    artifact_digest: str
    head_digest: str
    head_path: Path
    backbone_digest: str
    backbone_path: Path
    source: Path
    """The trainer's folder that it was copied from."""

    def files(self, model: str) -> ModelFiles:
        """Returns the files that the engine loads, for the model with a key."""
        return ModelFiles(
            name=model,
            version=0,
            backbone_digest=self.backbone_digest,
            backbone_path=self.backbone_path,
            head_digest=self.head_digest,
            head_path=self.head_path,
            decoding=self.manifest.decoding,
        )


def digest_of_version(digests: Mapping[str, str]) -> str:
    """What the folder of a version is called, from the digest of each of its files."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


class Artifacts:
    """The folder of artifacts; every method may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        self._backbones = folder / "backbones"
        self._versions = folder / "versions"
        # On the same file system as what it is renamed to.
        self._temporary = folder / "tmp"
        for inner in (self._backbones, self._versions, self._temporary):
            durable.make_folder(inner)

    def files(self, row: Any, decoding: ImageDecoding) -> ModelFiles:
        """Returns where the files of a row of the table versions lie."""
        return ModelFiles(
            name=row["model"],
            version=row["version"],
            backbone_digest=row["backbone_digest"],
            backbone_path=self.backbone_path(row["backbone_digest"]),
            head_digest=row["head_digest"],
            head_path=self.head_path(row["artifact_digest"]),
            decoding=decoding,
        )

    def backbone_path(self, digest: str) -> Path:
        """Where a backbone lies, or would."""
        return self._backbones / f"{digest}.onnx"

    def head_path(self, artifact_digest: str) -> Path:
        """Where a version's head lies, or would."""
        return self._versions / artifact_digest / HEAD_FILE

    def answers_path(self, artifact_digest: str) -> Path:
        """Where a version's answers lie, or would."""
        return self._versions / artifact_digest / ANSWERS_FILE

    def version_bytes(self, artifact_digest: str) -> int:
        """What a version's own files take; 0 where there are none."""
        return sum(_size(self._versions / artifact_digest / name) for name in VERSION_FILES)

    def backbone_bytes(self, digest: str) -> int:
        """What a backbone's file takes; 0 where there is none."""
        return _size(self.backbone_path(digest))

    def new_folder(self) -> Path:
        """Makes a folder for what is not to stay; the next start deletes what is left."""
        folder = self._temporary / secrets.token_hex(8)
        folder.mkdir()
        return folder

    def put_backbone(self, source: Path, digest: str) -> None:
        """Copies a file in whose sha256 is `digest`, unless it is there and whole."""
        # Also over one that was damaged since: all versions on it are served again then.
        if self.has_backbone(digest):
            return
        temporary = self._temporary / secrets.token_hex(8)
        try:
            durable.copy(source, temporary)
            failpoints.reach("artifacts.backbone_copied")
            temporary.rename(self.backbone_path(digest))
            failpoints.reach("artifacts.backbone_renamed")
        finally:
            temporary.unlink(missing_ok=True)
        durable.sync_folder(self._backbones)

    def put(self, out_dir: Path) -> StoredVersion:
        """Copies a trainer's result in; doing it again changes nothing.

        Raises Aborted (TRAINING_FAILED) when the result is not whole, Exhausted
        (STORAGE_FULL) when the disk is.
        """
        with durable.full_disk_told():
            manifest = _manifest(out_dir)
            self._put_backbone(out_dir, manifest.backbone_digest)
            artifact_digest, head_digest = self._put_version(out_dir)
        return StoredVersion(
            manifest=manifest,
            artifact_digest=artifact_digest,
            head_digest=head_digest,
            head_path=self.head_path(artifact_digest),
            backbone_digest=manifest.backbone_digest,
            backbone_path=self.backbone_path(manifest.backbone_digest),
            source=out_dir,
        )

    def digests_of(self, out_dir: Path) -> tuple[str, str]:
        """What `put` calls a result's version and backbone; "" for one that it would not store."""
        try:
            digests = {name: durable.digest_of(out_dir / name) for name in VERSION_FILES}
            version = digest_of_version(digests)
        except OSError:
            version = ""
        try:
            backbone = _manifest(out_dir).backbone_digest
        except (OSError, Aborted):
            backbone = ""
        # A trainer's word, which becomes a file's name.
        return version, backbone if _DIGEST.fullmatch(backbone) else ""

    def has_backbone(self, digest: str) -> bool:
        """Whether a backbone is there and whole; reads all of it."""
        try:
            return durable.digest_of(self.backbone_path(digest)) == digest
        except OSError:
            return False

    def restore(self, stored: StoredVersion) -> None:
        """Puts a version again if its files were deleted with another's since."""
        if not (stored.head_path.exists() and stored.backbone_path.exists()):
            self.put(stored.source)

    def report(self, artifact_digest: str, *, html: bool) -> bytes:
        """A version's report, UTF-8; raises Damaged (MODEL_UNLOADABLE) when it cannot be read."""
        name = REPORT_HTML_FILE if html else REPORT_JSON_FILE
        try:
            return (self._versions / artifact_digest / name).read_bytes()
        except OSError as error:
            raise Damaged(
                Reason.MODEL_UNLOADABLE,
                "the version's report cannot be read: publish the version again",
            ) from error

    def remove(self, *, versions: Iterable[str] = (), backbones: Iterable[str] = ()) -> None:
        """Deletes files that nothing refers to any more; what is gone already is fine."""
        for digest in versions:
            _remove_folder(self._versions / digest, self._temporary)
        for digest in backbones:
            self.backbone_path(digest).unlink(missing_ok=True)

    def sweep(self, *, versions: Collection[str], backbones: Collection[str]) -> None:
        """Deletes all but the named: what a crash left between files and database.

        For the start alone: it would take what is being put from under its owner.
        """
        _empty(self._temporary)
        failpoints.reach("artifacts.sweeping")
        dead = [path for path in self._versions.iterdir() if path.name not in versions]
        for folder in dead:
            _remove_folder(folder, self._temporary)
        unused = [path for path in self._backbones.iterdir() if path.stem not in backbones]
        for path in unused:
            path.unlink()
        if dead or unused:
            log.warning("swept %d unpublished versions, %d backbones", len(dead), len(unused))

    def _put_backbone(self, out_dir: Path, digest: str) -> None:
        source = out_dir / BACKBONE_FILE
        if not source.exists():
            if not self.has_backbone(digest):
                raise _not_whole(
                    f"it brings no {BACKBONE_FILE}, and backbone {digest} is not known, or damaged"
                )
            return
        if (actual := durable.digest_of(source)) != digest:
            raise _not_whole(f"{BACKBONE_FILE} has digest {actual}, the manifest says {digest}")
        self.put_backbone(source, digest)

    def _put_version(self, out_dir: Path) -> tuple[str, str]:
        temporary = self._temporary / secrets.token_hex(8)
        temporary.mkdir()
        try:
            digests = {}
            for name in VERSION_FILES:
                try:
                    digests[name] = durable.copy(out_dir / name, temporary / name)
                except FileNotFoundError:
                    raise _not_whole(f"{name} is missing") from None
            artifact_digest = digest_of_version(digests)
            durable.sync_folder(temporary)
            failpoints.reach("artifacts.version_copied")
            try:
                temporary.rename(self._versions / artifact_digest)
            except OSError:
                # The same content is there already; a folder is never renamed onto a full one.
                if not self.head_path(artifact_digest).exists():
                    raise
            durable.sync_folder(self._versions)
            failpoints.reach("artifacts.version_renamed")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return artifact_digest, digests[HEAD_FILE]


def _manifest(out_dir: Path) -> Manifest:
    try:
        if (size := (out_dir / MANIFEST_FILE).stat().st_size) > _MAX_MANIFEST_BYTES:
            raise _not_whole(f"{MANIFEST_FILE} has {size} bytes")
        return decode_manifest((out_dir / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        raise _not_whole(f"{MANIFEST_FILE} is missing") from None
    except msgspec.DecodeError as error:
        raise _not_whole(f"{MANIFEST_FILE} cannot be read: {error}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _not_whole(what: str) -> Aborted:
    return Aborted(Reason.TRAINING_FAILED, f"the trainer's result is not whole: {what}")


def _remove_folder(folder: Path, temporary: Path) -> None:
    # Renamed first, so that a crash leaves it under no name that counts.
    doomed = temporary / secrets.token_hex(8)
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    failpoints.reach("artifacts.moved_away")
    shutil.rmtree(doomed, ignore_errors=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
