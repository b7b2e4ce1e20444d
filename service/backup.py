"""Copies a data folder while a server works on it, and makes a data folder of such a copy.

The database first, as one state of it; then the blobs that its rows name, which never change and
which the collector leaves alone for an hour after their last row went. A backup that is there
already is brought up to date: only blobs that are new are copied, and the old state stands until
the new one is whole. Every blob that is copied, either way, is compared with its digest. Pretrained
weights, caches and what running jobs write are left out; they come again.
"""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.errors import Unavailable
from service.jobs import replicas
from service.storage import collector, database, fsync, storage_errors
from service.storage.blobs import BlobFolder, DigestMismatch

BLOBS = "blobs"
_NEW = ".new"
_STAGED = "restore.new"
_NOT_IN_THE_WAY = {database.LOCK, _STAGED, "lost+found"}
"""What an empty data folder may hold: a lock, a restore that did not end, a volume's own."""


class NoCopy(Exception):  # noqa: N818 - named for what happened
    """Raised where there is no whole copy; says why."""


@dataclass(frozen=True)
class Copied:
    """Counts what a copy has, and what of it was copied now."""

    blobs: int
    size_bytes: int
    new_blobs: int
    new_bytes: int


def back_up(data_dir: Path, blobs_dir: Path, target: Path) -> Copied:
    """Makes a backup, or brings it up to date; raises NoCopy, OSError."""
    if not (data_dir / database.FILE).is_file():
        raise NoCopy(
            f"{data_dir} holds no {database.FILE}: it is not a data folder of Graft; name yours "
            "with --data-dir"
        )
    target.mkdir(parents=True, exist_ok=True)
    for path in target.iterdir():
        # As a backup that was interrupted leaves it; a data folder has more.
        if path.name != BLOBS and not path.name.startswith(database.FILE):
            raise NoCopy(
                f"{target} holds {path.name} and is not a backup: name a folder of its own"
            )
    # With the journal of one that was killed, which would be taken for the new one's.
    for path in target.glob(database.FILE + _NEW + "*"):
        path.unlink()
    new = target / (database.FILE + _NEW)
    with _damage_of(data_dir):
        names = _copy_database(data_dir, new)
    kept = BlobFolder(target / BLOBS)
    kept.sweep(older_than_s=0)
    copied = _copy_blobs(names, BlobFolder(blobs_dir), kept)
    fsync.sync_tree(target)
    new.replace(target / database.FILE)
    # Not before: until then they are the old state's.
    for name in list(kept.names()):
        if name not in names:
            kept.delete(name)
    fsync.sync_folder(target)
    return copied


def restore(source: Path, data_dir: Path, blobs_dir: Path) -> Copied:
    """Makes a data folder of a backup; raises NoCopy, OSError.

    The folder may be there and must be empty. It gets its database last, so that no server
    serves from half of a copy.
    """
    if not (source / database.FILE).is_file():
        raise NoCopy(f"{source} holds no {database.FILE}: it is not a backup")
    address = f"{(source / database.FILE).resolve().as_uri()}?mode=ro"
    with _damage_of(source), closing(sqlite3.connect(address, uri=True)) as copy:
        names = _needed(copy, source)
    with _claimed(data_dir):
        staged = data_dir / _STAGED
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            is_inside = blobs_dir == data_dir / BLOBS
            into = BlobFolder(staged / BLOBS if is_inside else blobs_dir)
            if not is_inside:
                # What was damaged may be why there is a restore.
                _drop_damaged(names, into)
            copied = _copy_blobs(names, BlobFolder(source / BLOBS), into)
            shutil.copyfile(source / database.FILE, staged / database.FILE)
            fsync.sync_tree(staged)
            for name in (BLOBS, database.FILE) if (staged / BLOBS).exists() else (database.FILE,):
                (staged / name).rename(data_dir / name)
                fsync.sync_folder(data_dir)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return copied


def _copy_database(data_dir: Path, new: Path) -> set[str]:
    """Copies one state of a database, and returns the objects of all blobs that it needs."""
    with (
        closing(sqlite3.connect(data_dir / database.FILE)) as original,
        closing(sqlite3.connect(new)) as copy,
    ):
        original.backup(copy)
        # A single file from here on, without a log beside it.
        copy.execute("PRAGMA journal_mode = DELETE")
        names = _needed(copy, data_dir)
        # Nobody died of the jobs that run: they are not to count as crashed.
        replicas.mark_all_draining(copy)
        copy.commit()
    return names


def _needed(copy: sqlite3.Connection, folder: Path) -> set[str]:
    """Returns the objects that rows name; raises NoCopy where it is not whole, or not ours."""
    copy.row_factory = sqlite3.Row
    (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise _damaged(folder, found)
    if not database.is_current(copy):
        raise NoCopy(f"{folder} was made by another version of Graft: use that version for it")
    return collector.needed_objects(copy)


def _copy_blobs(names: set[str], source: BlobFolder, into: BlobFolder) -> Copied:
    """Copies the objects that are not there yet."""
    size_bytes = new_bytes = new_blobs = 0
    for name in sorted(names):
        if (size := into.size(name)) is None:
            try:
                into.put(name, source.path(name), name.partition("-")[0])
            except FileNotFoundError:
                raise NoCopy(
                    f"{source.path(name)} is missing: it was deleted meanwhile, or is lost; try "
                    "once more"
                ) from None
            except DigestMismatch:
                raise NoCopy(
                    f"{source.path(name)} is damaged: take it from another backup, or delete what "
                    "needs it"
                ) from None
            size = into.size(name) or 0
            new_blobs, new_bytes = new_blobs + 1, new_bytes + size
        size_bytes += size
    return Copied(len(names), size_bytes, new_blobs, new_bytes)


def _drop_damaged(names: set[str], folder: BlobFolder) -> None:
    for name in names:
        path = folder.path(name)
        if path.exists() and fsync.digest_of(path) != name.partition("-")[0]:
            folder.delete(name)


@contextmanager
def _claimed(data_dir: Path) -> Iterator[None]:
    """Keeps servers out of a data folder that is empty; raises NoCopy."""
    held = {path.name for path in data_dir.iterdir()} if data_dir.exists() else set()
    in_the_way = sorted(held - _NOT_IN_THE_WAY)
    with ExitStack() as stack:
        # No file of ours in a folder that is somebody else's.
        if database.LOCK in held or not in_the_way:
            try:
                stack.enter_context(database.kept_from_servers(data_dir))
            except Unavailable:
                raise NoCopy(f"a server uses {data_dir}: stop it, or restore beside it") from None
        if in_the_way:
            raise NoCopy(
                f"{data_dir} holds {in_the_way[0]}: restore into an empty folder; move what is "
                "there away, and keep it until the server runs again"
            )
        yield


@contextmanager
def _damage_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        if storage_errors.is_damage(error):
            raise _damaged(folder, error) from None
        raise NoCopy(f"the database of {folder} cannot be copied: {error}") from None


def _damaged(folder: Path, why: object) -> NoCopy:
    return NoCopy(
        f"the database of {folder} is damaged ({why}): keep every backup, use the last good one"
    )
