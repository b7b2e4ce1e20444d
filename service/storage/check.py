"""The stores held against the disk: models, aliases, files and datasets.

Reads and changes nothing. Every function gives what is broken, a line each, and
goes through tables by pages: memory does not grow with the data folder. What the
stores leave behind while they work, or when they are killed, is looked for by
`leftovers` alone.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from service.contract import HEAD_FILE, MANIFEST_FILE, decode_manifest
from service.domain import LATEST, ClassCount, tenant_of
from service.ingest import index
from service.ingest.index import IndexedImage
from service.ingest.names import shown
from service.ingest.reader import IMAGES_FOLDER, INDEX_FILE
from service.storage import artifacts, database, durable
from service.storage.database import Connection

DatabaseError = sqlite3.DatabaseError
"""Raised by every function for a database that cannot be read."""
UNKNOWN_FORMAT = "database: has format"
"""How the line begins after which no other makes sense."""

_PAGE = 500
_FILE = "graft.sqlite3"

_NO_ROW = "is there, and no row of the database names it"


@contextmanager
def read_only(data_dir: Path) -> Iterator[Connection]:
    """The database of a data folder, which a server may have open as well.

    Knows the SQL function `tenant_of`. Raises FileNotFoundError where there is none.
    """
    path = data_dir / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"{data_dir} holds no {_FILE}: it is no data folder of Graft")
    # Read-only too, SQLite would leave files of its own beside a database that nobody has open,
    # and a server that runs as another user could not open them.
    is_alone = not path.with_name(f"{_FILE}-wal").exists()
    address = f"{path.resolve().as_uri()}?{'immutable=1' if is_alone else 'mode=ro'}"
    with closing(sqlite3.connect(address, uri=True, isolation_level=None, timeout=10.0)) as opened:
        opened.row_factory = sqlite3.Row
        opened.create_function("tenant_of", 1, tenant_of, deterministic=True)
        yield opened


def is_held(data_dir: Path) -> bool:
    """Whether a server holds the data folder. Tries the lock for an instant."""
    try:
        file = os.open(data_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared: two checks do not take each other for servers.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def database_problems(connection: Connection) -> Iterator[str]:
    """What SQLite itself finds; of another format alone where the tables are not those known."""
    (written,) = connection.execute("PRAGMA user_version").fetchone()
    if written != (known := database.known_format()):
        yield (
            f"{UNKNOWN_FORMAT} {written}, and this check knows {known}: use the check of the Graft "
            "that wrote it, or start this one's server on it once"
        )
        return
    for (line,) in connection.execute("PRAGMA integrity_check(100)"):
        if line != "ok":
            yield f"database: {line}"
    for broken in connection.execute("PRAGMA foreign_key_check").fetchall():
        yield f"database: {_row_named(connection, broken[0], broken[1])} refers to no row of " + (
            str(broken[2])
        )


def model_problems(connection: Connection) -> Iterator[str]:
    """Numbers, aliases and their moves, and whose the models are."""
    for row in connection.execute(
        "SELECT name, last_version, MAX(version) AS newest FROM models"
        " LEFT JOIN versions ON model = name GROUP BY name"
        " HAVING newest IS NULL OR newest > last_version"
    ):
        if row["newest"] is None:
            yield f"model {row['name']}: has no version"
        else:
            yield (
                f"model {row['name']}: has version {row['newest']}, and {row['last_version']} is "
                "noted as the last one given"
            )
    for row in connection.execute(
        "SELECT name, tenant FROM models WHERE tenant <> tenant_of(name)"
    ):
        yield f"model {row['name']}: belongs to tenant {row['tenant']}, which its key does not say"
    yield from _alias_problems(connection)


def artifact_problems(
    connection: Connection, folder: Path, *, reads_contents: bool = True
) -> Iterator[str]:
    """Every version's files, and every backbone's; with their digests if contents are read."""
    for row in _pages(connection, "SELECT rowid AS place, * FROM versions", -1):
        place = f"version {row['version']} of {row['model']}"
        for what in _version_problems(row, folder / "versions", reads_contents):
            yield f"{place}: {what}"
    for row in _pages(
        connection,
        "SELECT backbone_digest AS place FROM versions UNION SELECT digest FROM exported_backbones"
        " UNION SELECT digest FROM registered_backbones",
        "",
    ):
        path = folder / "backbones" / f"{row['place']}.onnx"
        if not path.is_file():
            yield f"backbone {row['place']}: its file is missing"
        elif reads_contents and (actual := _digest(path)) != row["place"]:
            yield f"backbone {row['place']}: its file has digest {actual}"


def dataset_problems(
    connection: Connection, folder: Path, *, reads_contents: bool = True, workers: int = 1
) -> Iterator[str]:
    """Every dataset's folder: its images, their sizes and, if contents are read, its digest."""
    for row in _pages(connection, "SELECT dataset_id AS place, * FROM datasets", ""):
        for what in _dataset_problems(row, folder / row["dataset_id"], reads_contents, workers):
            yield f"dataset {row['dataset_id']}: {what}"


def leftovers(connection: Connection, data_dir: Path) -> Iterator[str]:
    """Files and folders that no row names. None after a clean stop; a start sweeps them."""
    for temporary in ("artifacts/tmp", "datasets/tmp"):
        for path in _entries(data_dir / temporary):
            yield f"{temporary}/{shown(path.name)}: was left behind"
    for place, query, name_of in (
        ("artifacts/versions", "SELECT 1 FROM versions WHERE artifact_digest = ?", _whole_name),
        (
            "artifacts/backbones",
            "SELECT 1 FROM versions WHERE backbone_digest = ?1"
            " UNION ALL SELECT 1 FROM exported_backbones WHERE digest = ?1"
            " UNION ALL SELECT 1 FROM registered_backbones WHERE digest = ?1 LIMIT 1",
            _backbone_name,
        ),
        ("datasets", "SELECT 1 FROM datasets WHERE dataset_id = ?", _whole_name),
    ):
        for path in _entries(data_dir / place):
            if path.name == "tmp" and place == "datasets":
                continue
            if connection.execute(query, (name_of(path),)).fetchone() is None:
                yield f"{place}/{shown(path.name)}: {_NO_ROW}"


def _alias_problems(connection: Connection) -> Iterator[str]:
    for row in connection.execute(
        "SELECT a.model, a.alias, a.version, (SELECT m.version FROM alias_moves AS m"
        " WHERE m.model = a.model AND m.alias = a.alias ORDER BY move DESC LIMIT 1) AS moved,"
        " v.version AS there, v.is_candidate FROM aliases AS a"
        " LEFT JOIN versions AS v ON v.model = a.model AND v.version = a.version"
    ):
        place = f"alias {row['alias']} of {row['model']}"
        if row["there"] is None:
            yield f"{place}: points to version {row['version']}, which is not there"
        if row["moved"] != row["version"]:
            moved = "there is none" if row["moved"] is None else f"that was to {row['moved']}"
            yield f"{place}: points to {row['version']} and not where its last move went: {moved}"
        if row["alias"] == LATEST and row["is_candidate"]:
            yield f"{place}: points to version {row['version']}, a candidate"
    for row in connection.execute(
        "SELECT DISTINCT model, alias FROM alias_moves"
        " EXCEPT SELECT model, alias FROM aliases ORDER BY model, alias"
    ):
        yield f"alias {row['alias']} of {row['model']}: has moved, and there is no such alias"
    for row in connection.execute(
        "SELECT DISTINCT model, alias, version FROM alias_moves AS m WHERE NOT EXISTS"
        " (SELECT 1 FROM versions AS v WHERE v.model = m.model AND v.version = m.version)"
    ):
        yield (
            f"alias {row['alias']} of {row['model']}: can be rolled back to version "
            f"{row['version']}, which is not there"
        )
    for row in connection.execute(
        "SELECT DISTINCT model FROM versions WHERE is_candidate = 0"
        " EXCEPT SELECT model FROM aliases WHERE alias = ?",
        (LATEST,),
    ):
        yield f"model {row['model']}: has published versions and no alias {LATEST}"


def _version_problems(row: Any, versions: Path, reads_contents: bool) -> Iterator[str]:
    folder = versions / row["artifact_digest"]
    names = {path.name for path in _entries(folder)}
    wanted = set(artifacts.VERSION_FILES)
    for name in sorted(wanted - names):
        yield f"its {name} is missing"
    for name in sorted(names - wanted):
        yield f"its folder holds {shown(name)}, which is none of its files"
    if not reads_contents or not wanted <= names:
        return
    digests = {name: _digest(folder / name) for name in artifacts.VERSION_FILES}
    if digests[HEAD_FILE] != row["head_digest"]:
        yield f"its {HEAD_FILE} has digest {digests[HEAD_FILE]}, not {row['head_digest']}"
    if (actual := artifacts.digest_of_version(digests)) != row["artifact_digest"]:
        yield f"its files together have digest {actual}, not {row['artifact_digest']}"
    try:
        manifest = decode_manifest((folder / MANIFEST_FILE).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        yield f"its {MANIFEST_FILE} cannot be read: {error}"
        return
    if (manifest.job_id, manifest.backbone_digest) != (row["job_id"], row["backbone_digest"]):
        yield (
            f"its {MANIFEST_FILE} is of {manifest.job_id} on backbone {manifest.backbone_digest}, "
            f"not of {row['job_id']} on {row['backbone_digest']}"
        )


def _dataset_problems(row: Any, folder: Path, reads_contents: bool, workers: int) -> Iterator[str]:
    folder = folder.resolve()
    images = folder / IMAGES_FOLDER
    try:
        read = index.load(folder / INDEX_FILE)
        size_bytes = sum((images / image.path).stat().st_size for image in read.images)
        count = sum(1 for _ in _entries(images))
    except (OSError, msgspec.DecodeError) as error:
        yield f"its index or its images cannot be read: {error}"
        return
    if (len(read.images), count, size_bytes) != (
        row["image_count"], row["image_count"], row["size_bytes"],
    ):  # fmt: skip
        yield (
            f"its folder holds {count} files, and its index {len(read.images)} images of "
            f"{size_bytes} bytes together, not {row['image_count']} of {row['size_bytes']}"
        )
    # The tenant comes before it, where there is one.
    wanted = row["digest"].rpartition("/")[2]
    digest = index.digest_of(read.images, is_labelled=read.is_labelled)
    if digest != wanted or read.is_labelled == bool(row["is_unlabelled"]):
        yield f"its index has digest {digest}, not {wanted}"
    try:
        counts = msgspec.json.decode(row["classes_json"], type=list[ClassCount])
    except msgspec.DecodeError as error:
        yield f"its classes cannot be read: {error}"
        return
    if read.is_labelled and counts != index.count_classes(read.images):
        yield "its classes are not those of its images"
    if not reads_contents:
        return

    def is_whole(image: IndexedImage) -> bool:
        return _digest(images / image.path) == image.digest

    with ThreadPoolExecutor(workers) as pool:
        rotten = [
            image.name
            for image, whole in zip(read.images, pool.map(is_whole, read.images), strict=True)
            if not whole
        ]
    if rotten:
        yield f"{len(rotten)} of its images are not what was stored, such as {shown(rotten[0])}"


def _row_named(connection: Connection, table: str, rowid: int | None) -> str:
    columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
    keys = [column["name"] for column in columns if column["pk"]]
    query = f"SELECT {', '.join(keys)} FROM {table} WHERE rowid = ?"  # nosec B608  # noqa: S608 - our tables
    row = connection.execute(query, (rowid,)).fetchone()
    return f"{table} ({', '.join(f'{key} {row[key]}' for key in keys)})" if row else table


def _pages(connection: Connection, query: str, before: int | str) -> Iterator[Any]:
    """The query's rows by its column `place`, which is unique and greater than `before`."""
    # No statement stays open while files are read, so that a server's log can be cut.
    while True:
        page = connection.execute(
            f"SELECT * FROM ({query}) WHERE place > ? ORDER BY place LIMIT ?",  # nosec B608  # noqa: S608
            (before, _PAGE),
        ).fetchall()
        yield from page
        if len(page) < _PAGE:
            return
        before = page[-1]["place"]


def _digest(path: Path) -> str:
    try:
        return durable.digest_of(path)
    except OSError as error:
        return f"none, for it cannot be read ({error.strerror})"


def _entries(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield folder / entry.name
    except FileNotFoundError:
        return


def _whole_name(path: Path) -> str:
    return path.name


def _backbone_name(path: Path) -> str:
    return path.stem if path.suffix == ".onnx" else ""
