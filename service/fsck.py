"""Checks a data folder (`graft-server check`): returns a line for each problem.

Three questions: does every row that needs another find it (references), is every blob that a row
names there and whole, and what its row says (digests), and what is there that nothing needs
(orphans, which are no problem: the collector deletes them). Rows are judged in one state of the
database, files after it. On a live server a problem is reported only if two scans, some seconds
apart, find it; the first may have caught a deletion in progress. Changes nothing, and takes no
lock.
"""

import hashlib
import itertools
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from service.contract import decode_manifest
from service.domain import TRANSITIONS
from service.ingest import index as indexes
from service.jobs import records
from service.jobs.records import Published, StateChanged
from service.ops.cpus import available_cores
from service.storage import database, fsync
from service.storage.blobs import BlobFolder
from service.storage.collector import needed

RESCAN_S = 5.0
MAX_PROBLEMS = 1000
_PAGE = 500
_PIECE_BYTES = 2**20

_CONDITIONS = {
    "model {0}/{1}: has version {2}, and {3} is noted as the last one given": (
        "SELECT m.tenant, m.name, MAX(v.version) AS newest, m.last_version FROM models AS m"
        " LEFT JOIN versions AS v ON (v.tenant, v.model) = (m.tenant, m.name)"
        " GROUP BY m.tenant, m.name HAVING newest IS NULL OR newest > m.last_version"
    ),
    "model {0}/{1}: the alias {2} points to version {3} and not where its last move went": (
        "SELECT tenant, model, alias, version FROM aliases AS a WHERE version IS NOT"
        " (SELECT version FROM alias_moves AS m WHERE (m.tenant, m.model, m.alias) ="
        " (a.tenant, a.model, a.alias) ORDER BY move DESC LIMIT 1)"
    ),
    "model {0}/{1}: the alias {2} can be rolled back to version {3}, which is not there": (
        "SELECT tenant, model, alias, version FROM alias_moves EXCEPT SELECT m.tenant, m.model,"
        " m.alias, m.version FROM alias_moves AS m JOIN versions USING (tenant, model, version)"
    ),
    "model {0}/{1}: has published versions, and latest points to none of them": (
        "SELECT tenant, model FROM versions WHERE is_candidate = 0 EXCEPT"
        " SELECT v.tenant, v.model FROM versions AS v JOIN aliases USING (tenant, model, version)"
        " WHERE alias = 'latest' AND is_candidate = 0"
    ),
    "version {2} of {0}/{1}: was made by {3}, which ended otherwise": (
        "SELECT v.tenant, v.model, v.version, v.job_id FROM versions AS v JOIN jobs AS j"
        " USING (job_id) WHERE (j.state, j.tenant, j.model, j.version) <>"
        " ('SUCCEEDED', v.tenant, v.model, v.version)"
    ),
    "{0}: has {1} events, and its last number is {2}": (
        "SELECT job_id, COUNT(sequence) AS n, last_sequence FROM jobs LEFT JOIN job_events"
        " USING (job_id) GROUP BY job_id HAVING MAX(sequence) IS NOT last_sequence"
        # The first ones of a job that has ended may be past their retention.
        " OR n <> MAX(sequence) - MIN(sequence) + 1"
        " OR (end_time_s IS NULL AND MIN(sequence) <> 1)"
    ),
    # As the schema says, too: but SQLite looks at no CHECK of a database that it may not write.
    "{0}: is {1}, its owner {2}, its version {3}, its error {4}, its end {5}: these do not fit": (
        "SELECT job_id, state, owner, version, error_reason, end_time_s FROM jobs WHERE"
        " (state = 'RUNNING') <> (owner IS NOT NULL) OR (state = 'FAILED') <>"
        " (error_reason IS NOT NULL) OR (state IN ('QUEUED', 'RUNNING')) <> (end_time_s IS NULL)"
        " OR (state = 'SUCCEEDED') <> (CASE kind WHEN 'fine_tune' THEN version > 0"
        " ELSE result_json IS NOT NULL END)"
    ),
    "{0}: is a {1} held by {2}, which is not a job that waits or runs": (
        "SELECT name, h.kind, holder FROM holds AS h LEFT JOIN jobs ON job_id = holder"
        " WHERE job_id IS NULL OR end_time_s IS NOT NULL"
    ),
    "{0}: is a dataset that {1} needs, and is not there": (
        "SELECT name, holder FROM holds AS h LEFT JOIN datasets AS d ON (d.tenant, dataset_id) ="
        " (h.tenant, name) WHERE kind = 'dataset' AND dataset_id IS NULL"
    ),
}
"""Queries that find what is wrong, by how it is reported."""


def problems(
    data_dir: Path,
    blobs_dir: Path | None = None,
    *,
    is_running: bool = False,
    reads_contents: bool = True,
) -> list[str]:
    """Returns the problems of a data folder, at most 1000 lines; empty for a sound one.

    Its blobs lie in `blobs_dir`, else in the folder itself. A server may use it where it
    `is_running`. Without `reads_contents` no blob is read and compared with its digest. Raises
    FileNotFoundError where there is no database.
    """

    def scan() -> list[str]:
        found: list[str] = []
        with _read_only(data_dir) as connection:
            scanned = _problems(connection, _store(data_dir, blobs_dir), reads_contents)
            try:
                found.extend(itertools.islice(scanned, MAX_PROBLEMS))
            except sqlite3.DatabaseError as error:
                found.append(f"database: cannot be read: {error}")
        return found

    found = scan()
    if is_running and found:
        time.sleep(RESCAN_S)
        again = set(scan())
        found = [line for line in found if line in again]
    return found


def orphans(data_dir: Path, blobs_dir: Path | None = None) -> dict[str, int]:
    """Counts what nothing needs: rows of blobs, objects without a row, and folders of jobs.

    Raises sqlite3.DatabaseError for a database that cannot be read, or of another format.
    """
    with _read_only(data_dir) as connection:
        known = {f"{row[0]}-{row[1]}" for row in connection.execute(
            "SELECT digest, generation FROM blobs")}  # fmt: skip
        (spare,) = connection.execute(
            f"SELECT COUNT(*) FROM blobs WHERE NOT {needed(connection)}"  # nosec B608  # noqa: S608
        ).fetchone()
        open_jobs = {row[0] for row in connection.execute(
            "SELECT job_id FROM jobs WHERE end_time_s IS NULL")}  # fmt: skip
    folders = data_dir / "work" / "jobs"
    left = {path.name for path in folders.iterdir()} if folders.is_dir() else set()
    stray = sum(name not in known for name in _store(data_dir, blobs_dir).names())
    return {
        "blobs that no row needs": spare,
        "objects without a row": stray,
        "folders of jobs that have ended": len(left - open_jobs),
    }


def _store(data_dir: Path, blobs_dir: Path | None) -> BlobFolder:
    return BlobFolder(blobs_dir or data_dir / "blobs")


def _problems(
    connection: database.Connection, store: BlobFolder, reads_contents: bool
) -> Iterator[str]:
    if not database.is_current(connection):
        yield "database: was made by another version of Graft: use that version's check"
        return
    connection.execute("BEGIN")
    for (line,) in connection.execute("PRAGMA integrity_check(100)"):
        if line != "ok":
            yield f"database: {line}"
    for broken in connection.execute("PRAGMA foreign_key_check").fetchall():
        yield f"database: row {broken[1]} of {broken[0]} refers to no row of {broken[2]}"
    for report, query in _CONDITIONS.items():
        for row in connection.execute(query):
            yield report.format(*row)
    yield from _job_problems(connection)
    # Files take a while, and as long as one state is read a server's log of writes grows.
    connection.execute("COMMIT")
    yield from _blob_problems(connection, store, reads_contents)
    yield from _version_problems(connection, store)
    yield from _dataset_problems(connection, store, reads_contents)


def _job_problems(connection: database.Connection) -> Iterator[str]:
    """Compares each job with its events, which tell its life again."""
    rows = connection.execute(
        "SELECT j.job_id, j.state, j.version, e.sequence, e.payload_json FROM jobs AS j"
        " JOIN job_events AS e ON e.job_id = j.job_id ORDER BY j.job_id, e.sequence"
    )
    for job_id, group in itertools.groupby(rows, key=lambda row: row["job_id"]):
        found = list(group)
        try:
            payloads = [records.decode(row["payload_json"]) for row in found]
        except msgspec.DecodeError as error:
            yield f"{job_id}: an event of it cannot be read: {error}"
            continue
        states = [payload.state for payload in payloads if isinstance(payload, StateChanged)]
        for before, after in itertools.pairwise(states):
            if after not in TRANSITIONS.get(before, ()):
                yield f"{job_id}: its events tell of {after} after {before}"
        state = found[0]["state"]
        if states and states[-1] != state:
            yield f"{job_id}: is {state}, and its last event of a state tells of {states[-1]}"
        published = [payload.version for payload in payloads if isinstance(payload, Published)]
        if published and published != [found[0]["version"]]:
            yield f"{job_id}: is {state} with version {found[0]['version']}, not {published}"


def _blob_problems(
    connection: database.Connection, store: BlobFolder, reads_contents: bool
) -> Iterator[str]:
    """Compares the blobs that rows name with their files, a page at a time."""
    page_after = (
        f"SELECT * FROM blobs WHERE digest > ? AND {needed(connection)} ORDER BY digest LIMIT ?"  # nosec B608  # noqa: S608
    )
    last = ""
    with ThreadPoolExecutor(available_cores()) as pool:
        while rows := connection.execute(page_after, (last, _PAGE)).fetchall():
            last = rows[-1]["digest"]
            found = pool.map(partial(_problem_of, store, reads_contents), rows)
            for row, problem in zip(rows, found, strict=True):
                if problem:
                    yield f"blob {row['digest']}: {problem}; {_user(connection, row['digest'])}"


def _problem_of(store: BlobFolder, reads_contents: bool, blob: Any) -> str:
    """Says what is wrong with a blob's file, or nothing."""
    try:
        if (size := _path(store, blob).stat().st_size) != blob["size_bytes"]:
            return f"has {size} bytes, not {blob['size_bytes']}"
        if reads_contents and (found := fsync.digest_of(_path(store, blob))) != blob["digest"]:
            return f"is damaged: its content has digest {found}"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _user(connection: database.Connection, digest: str) -> str:
    """Describes the first row that names a blob, for people."""
    for table, column in database.references_to(connection, "blobs"):
        query = f"SELECT * FROM {table} WHERE {column} = ? LIMIT 1"  # nosec B608  # noqa: S608 - names of our schema
        if (row := connection.execute(query, (digest,)).fetchone()) is not None:
            return f"{column} of {table} ({', '.join(str(value) for value in tuple(row)[:3])})"
    return "no row needs it any more"


def _version_problems(connection: database.Connection, store: BlobFolder) -> Iterator[str]:
    """Compares each version with its manifest."""
    for row in connection.execute(
        "SELECT * FROM versions JOIN blobs ON digest = manifest_digest"
    ).fetchall():
        place = f"version {row['version']} of {row['tenant']}/{row['model']}"
        try:
            manifest = decode_manifest(_path(store, row).read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            yield f"{place}: its manifest cannot be read: {error}"
            continue
        told = (manifest.model, manifest.job_id, manifest.backbone_digest)
        if told != (row["model"], row["job_id"], row["backbone_digest"]):
            yield f"{place}: its manifest is of {told[0]}, {told[1]}, backbone {told[2]}"


def _dataset_problems(
    connection: database.Connection, store: BlobFolder, reads_contents: bool
) -> Iterator[str]:
    """Compares each dataset with its index, and the index with its packs."""
    for row in connection.execute(
        "SELECT d.*, generation FROM datasets AS d JOIN blobs AS b ON b.digest = index_digest"
    ).fetchall():
        place = f"dataset {row['dataset_id']} of {row['tenant']}"
        packs = {
            pack["digest"]: (_path(store, pack), pack["size_bytes"])
            for pack in connection.execute(
                "SELECT blobs.* FROM dataset_packs JOIN blobs USING (digest)"
                " WHERE tenant = ? AND dataset_id = ?",
                (row["tenant"], row["dataset_id"]),
            )
        }
        index = store.path(f"{row['index_digest']}-{row['generation']}")
        try:
            for problem in _index_problems(row, index, packs, reads_contents):
                yield f"{place}: {problem}"
        except (OSError, msgspec.DecodeError) as error:
            yield f"{place}: its index or its images cannot be read: {error}"


def _index_problems(
    row: Any, path: Path, packs: Mapping[str, tuple[Path, int]], reads_contents: bool
) -> Iterator[str]:
    """Compares an index with its row and its packs, an image at a time."""
    digest = indexes.load_header(path).digest
    if digest != row["digest"]:
        yield f"its index has digest {digest}, not {row['digest']}"
    images, size_bytes, erased, used, wrong = 0, 0, 0, set(), Counter[str]()
    for image in indexes.iterate(path):
        if image.is_erased:
            erased += 1
            continue
        images, size_bytes = images + 1, size_bytes + image.size
        used.add(image.pack)
        pack, pack_bytes = packs.get(image.pack, (None, 0))
        if not 0 <= image.offset <= image.offset + image.size <= pack_bytes:
            wrong["lie in no pack of it"] += 1
        elif reads_contents and pack and _digest_at(pack, image.offset, image.size) != image.digest:
            wrong["are not what their digests say"] += 1
    found = f"{images} images of {size_bytes} bytes, and {erased} erased ones"
    noted = f"{row['image_count']}, {row['size_bytes']}, and {row['erased_count']}"
    if (images, size_bytes, erased) != (row["image_count"], row["size_bytes"], row["erased_count"]):
        yield f"its index has {found}, and its row says {noted}"
    if used != packs.keys():
        yield "its images lie in other packs than its rows say"
    for what, count in wrong.items():
        yield f"{count} of its images {what}"


def _digest_at(path: Path, offset: int, size: int) -> str:
    """Returns the sha256 of a part of a file, which is read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (piece := file.read(min(size, _PIECE_BYTES))):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()


def _path(store: BlobFolder, blob: Any) -> Path:
    """Returns the file of a row with a digest and a generation."""
    return store.path(f"{blob['digest']}-{blob['generation']}")


@contextmanager
def _read_only(data_dir: Path) -> Iterator[database.Connection]:
    path = data_dir / "graft.sqlite3"
    if not path.is_file():
        raise FileNotFoundError(
            f"{data_dir} holds no graft.sqlite3: it is not a data folder of Graft"
        )
    # Read-only too, SQLite would leave files of its own beside a database that nobody has open,
    # and a server that runs as another user could not open them.
    is_alone = not path.with_name("graft.sqlite3-wal").exists()
    address = f"{path.resolve().as_uri()}?{'immutable=1' if is_alone else 'mode=ro'}"
    with closing(sqlite3.connect(address, uri=True, isolation_level=None, timeout=10.0)) as opened:
        opened.row_factory = sqlite3.Row
        yield opened
