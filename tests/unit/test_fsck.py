"""The check of a data folder: a sound one is clean, and each thing that is broken is reported."""

import hashlib
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from service import fsck
from service.__main__ import main
from service.ingest import index as indexes
from service.ingest.index import Index
from service.storage.database import Database

Break = Callable[[Path], object]


def test_a_sound_folder_is_clean_and_stays_as_it_was(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(data.rglob("*"))
    assert fsck.problems(data) == []
    assert main(["check", str(data)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    # Of the models and versions that were deleted, and of packs that were written again.
    assert re.search(r"^[1-9]\d* blobs that no row needs: the server deletes them", printed.err)
    assert sorted(data.rglob("*")) == before


def test_everything_is_there(data: Path) -> None:
    """Else this file would say little."""
    with closing(sqlite3.connect(data / "graft.sqlite3")) as connection:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
        empty = {
            name
            for (name,) in tables.fetchall()
            if not connection.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0]
        }
    assert empty == {"version_sources", "job_labels", "version_labels"}


def test_what_an_open_database_has_in_its_log_is_seen(data: Path) -> None:
    with closing(Database(data)) as database:
        with database.transaction() as connection:
            connection.execute("UPDATE models SET last_version = 0 WHERE name = 'ants'")
        found = fsck.problems(data)
    assert [line for line in found if "model default/ants" in line]


def test_blobs_are_looked_for_where_they_lie(data: Path, tmp_path: Path) -> None:
    (data / "blobs").rename(tmp_path / "elsewhere")
    assert fsck.problems(data)
    assert main(["check", str(data), f"--blobs-dir={tmp_path}/elsewhere"]) == 0


@contextmanager
def opened(data: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(data / "graft.sqlite3")) as connection, connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("DROP TRIGGER jobs_legal_transition")
        yield connection


def sql(*statements: str) -> Break:
    def run(data: Path) -> None:
        with opened(data) as connection:
            for statement in statements:
                assert connection.execute(statement).rowcount, statement

    return run


def object_of(data: Path, query: str) -> Path:
    """Returns the file of the first blob whose digest a query gives."""
    with closing(sqlite3.connect(data / "graft.sqlite3")) as connection:
        digest, generation = connection.execute(
            f"SELECT digest, generation FROM blobs WHERE digest IN ({query})"
        ).fetchone()
    return data / "blobs" / str(digest[:2]) / f"{digest}-{generation}"


def remove(query: str) -> Break:
    return lambda data: object_of(data, query).unlink()


def cut(query: str) -> Break:
    return lambda data: os.truncate(object_of(data, query), 3)


def flip(query: str) -> Break:
    def run(data: Path) -> None:
        path = object_of(data, query)
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])

    return run


def lose_permission(query: str) -> Break:
    """Puts a folder in the place of a file, which not even root can read as one."""

    def run(data: Path) -> None:
        path = object_of(data, query)
        size = path.stat().st_size
        path.unlink()
        path.mkdir()
        sql(f"UPDATE blobs SET size_bytes = {path.stat().st_size} WHERE size_bytes = {size}")(data)

    return run


def replace_blob(data: Path, table: str, column: str, key: str, content: bytes) -> None:
    """Has rows name a whole blob of another content than the one that they should."""
    digest = hashlib.sha256(content).hexdigest()
    path = data / "blobs" / digest[:2] / f"{digest}-new"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with opened(data) as connection:
        connection.execute(
            "INSERT INTO blobs VALUES (?, ?, 'new', 0, NULL)", (digest, len(content))
        )
        assert connection.execute(
            f"UPDATE {table} SET {column} = ? WHERE {key}", (digest,)
        ).rowcount


def edit_index(change: Callable[[Index], Index]) -> Break:
    def run(data: Path) -> None:
        path = object_of(data, PETS_INDEX)
        edited = data / "edited"
        indexes.save(change(indexes.load(path)), edited)
        replace_blob(data, "datasets", "index_digest", PETS, edited.read_bytes())
        edited.unlink()

    return run


def edit_images(**changes: object) -> Break:
    """Changes the first image of the index."""

    def change(index: Index) -> Index:
        first, *others = index.images
        changed = msgspec.structs.replace(first, **changes)
        return msgspec.structs.replace(index, images=[changed, *others])

    return edit_index(change)


def give_anothers_manifest(data: Path) -> None:
    content = object_of(
        data, "SELECT manifest_digest FROM versions WHERE model = 'ants'"
    ).read_bytes()
    replace_blob(data, "versions", "manifest_digest", "version = 2", content + b" ")


PETS = "image_count = 2 AND erased_count = 1 AND classes_json LIKE '%dog%'"
PETS_INDEX = f"SELECT index_digest FROM datasets WHERE {PETS}"
PACK = "SELECT digest FROM dataset_packs"
HEAD = "SELECT head_digest FROM versions"
ENDED = "(SELECT MIN(job_id) FROM jobs WHERE state = 'SUCCEEDED')"
FAILED = "(SELECT job_id FROM jobs WHERE state = 'FAILED')"
QUEUED = "(SELECT job_id FROM jobs WHERE state = 'QUEUED')"

BROKEN: dict[str, tuple[Break, str]] = {
    # blobs
    "a head is gone": (remove(HEAD), "blob .*: is missing; head_digest of versions .default, "),
    "a backbone is gone": (
        remove("SELECT digest FROM exported_backbones"),
        "blob .*: is missing; backbone_digest of versions",
    ),
    "a registered backbone is gone": (
        remove("SELECT digest FROM registered_backbones"),
        "blob .*: is missing; .* onnx/tiny",
    ),
    "a pack is gone": (remove(PACK), "blob .*: is missing; digest of dataset_packs"),
    "a report is cut": (
        cut("SELECT report_html_digest FROM versions"),
        r"blob .*: has 3 bytes, not \d+; report_html_digest of versions",
    ),
    "the answers are damaged": (
        flip("SELECT answers_digest FROM versions"),
        "blob .*: is damaged: its content has digest .*; answers_digest of versions",
    ),
    "a head cannot be read": (lose_permission(HEAD), r"blob .*: cannot be read \(Is a directory"),
    "a blob's row is gone": (
        sql(f"DELETE FROM blobs WHERE digest IN ({HEAD})"),
        r"database: row \d+ of versions refers to no row of blobs",
    ),
    # versions
    "a manifest is damaged": (
        flip("SELECT manifest_digest FROM versions WHERE model = 'ants'"),
        "version 1 of default/ants: its manifest cannot be read",
    ),
    "a version has another's manifest": (
        give_anothers_manifest,
        "version 2 of default/birds: its manifest is of ants, job-",
    ),
    "a version is of a failed job": (
        sql(f"UPDATE versions SET job_id = {FAILED} WHERE model = 'ants'"),
        "version 1 of default/ants: was made by job-.*, which ended otherwise",
    ),
    "a version's job tells of another": (
        sql(f"UPDATE jobs SET version = 7 WHERE job_id = {ENDED}"),
        "version 1 of default/birds: was made by job-.*, which ended otherwise",
    ),
    "a number could be given twice": (
        sql("UPDATE models SET last_version = 2 WHERE name = 'birds'"),
        "model default/birds: has version 3, and 2 is noted",
    ),
    "a model is empty": (
        sql("INSERT INTO models VALUES ('acme', 'none', 1, 1)"),
        "model acme/none: has version None, and 1 is noted",
    ),
    # aliases
    "an alias points nowhere": (
        sql("UPDATE aliases SET version = 9 WHERE alias = 'prod'"),
        r"database: row \d+ of aliases refers to no row of versions",
    ),
    "an alias points off its moves": (
        sql("UPDATE aliases SET version = 1 WHERE alias = 'prod'"),
        "the alias prod points to version 1 and not where its last move went",
    ),
    "an alias has no move": (
        sql("DELETE FROM alias_moves WHERE alias = 'prod'"),
        "the alias prod points to version 2 and not where its last move went",
    ),
    "a move leads nowhere": (
        sql("UPDATE alias_moves SET version = 9 WHERE alias = 'prod' AND version = 1"),
        "the alias prod can be rolled back to version 9, which is not there",
    ),
    "latest is lost": (
        sql("DELETE FROM aliases WHERE model = 'ants'"),
        "model default/ants: has published versions, and latest points to none",
    ),
    "latest is a candidate": (
        sql("UPDATE versions SET is_candidate = 1 WHERE model = 'birds' AND version = 3"),
        "model default/birds: has published versions, and latest points to none",
    ),
    # jobs
    "an event is missing": (
        sql(f"DELETE FROM job_events WHERE job_id = {ENDED} AND sequence = 3"),
        "job-.*: has 4 events, and its last number is 5",
    ),
    "the last event is missing": (
        sql(f"DELETE FROM job_events WHERE job_id = {ENDED} AND sequence = 5"),
        "is SUCCEEDED, and its last event of a state tells of RUNNING",
    ),
    "the first event of an open job is missing": (
        sql(f"DELETE FROM job_events WHERE job_id = {QUEUED} AND sequence = 1"),
        "job-.*: has 3 events, and its last number is 4",
    ),
    "a job has no event": (
        sql(f"DELETE FROM job_events WHERE job_id = {ENDED}"),
        "job-.*: has 0 events, and its last number is 5",
    ),
    "an event is damaged": (
        sql(f"UPDATE job_events SET payload_json = '{{' WHERE job_id = {ENDED} AND sequence = 2"),
        "job-.*: an event of it cannot be read",
    ),
    "a job ended out of the queue": (
        sql(f"UPDATE job_events SET sequence = 0 WHERE job_id = {ENDED} AND sequence = 2"),
        "its events tell of SUCCEEDED after QUEUED",
    ),
    "a job published another version": (
        sql(
            "UPDATE job_events SET payload_json = REPLACE(payload_json, '\"version\":1',"
            f" '\"version\":7') WHERE job_id = {ENDED} AND sequence = 4"
        ),
        r"is SUCCEEDED with version 1, not \[7\]",
    ),
    "a job runs under nobody": (
        sql("UPDATE jobs SET state = 'RUNNING' WHERE state = 'QUEUED'"),
        "job-.*: is RUNNING, its owner None, .*: these do not fit",
    ),
    "a job that waits is owned": (
        sql("UPDATE jobs SET owner = 'me' WHERE state = 'QUEUED'"),
        "job-.*: is QUEUED, its owner me, .*: these do not fit",
    ),
    "a job failed for nothing": (
        sql("UPDATE jobs SET error_reason = NULL WHERE state = 'FAILED'"),
        "job-.*: is FAILED, .* its error None, .*: these do not fit",
    ),
    "a job has not ended": (
        sql(f"UPDATE jobs SET end_time_s = NULL WHERE job_id = {ENDED}"),
        "job-.*: is SUCCEEDED, .* its end None: these do not fit",
    ),
    "a ranking has no result": (
        sql("UPDATE jobs SET result_json = NULL WHERE kind = 'ranking'"),
        "job-.*: is SUCCEEDED, .*: these do not fit",
    ),
    "a job's state is unknown": (
        sql(f"UPDATE jobs SET state = 'LOST' WHERE job_id = {FAILED}"),
        "is LOST, and its last event of a state tells of FAILED",
    ),
    "a job that ended holds": (
        sql(f"UPDATE holds SET holder = {FAILED} WHERE kind = 'dataset'"),
        "ds-.*: is a dataset held by job-.*, which is not a job that waits or runs",
    ),
    "an unknown job holds": (
        sql("UPDATE holds SET holder = 'job-x' WHERE kind = 'backbone'"),
        ": is a backbone held by job-x, which is not a job that waits or runs",
    ),
    "a waiting job's dataset is gone": (
        sql("DELETE FROM datasets WHERE dataset_id IN (SELECT name FROM holds)"),
        "ds-.*: is a dataset that job-.* needs, and is not there",
    ),
    # datasets
    "an index is gone": (remove(PETS_INDEX), "dataset ds-.*: its index or its images cannot be"),
    "an index is damaged": (flip(PETS_INDEX), "dataset ds-.*: its index or its images cannot be"),
    "an index is another dataset's": (
        sql("UPDATE datasets SET digest = 'd' || dataset_id"),
        "dataset ds-.* of default: its index has digest .*, not d",
    ),
    "an index has images more": (
        edit_index(lambda index: msgspec.structs.replace(index, images=index.images * 2)),
        "its index has 4 images of 28 bytes, and 2 erased ones, and its row says 2, 14, and 1",
    ),
    "an erased image is counted": (
        sql(f"UPDATE datasets SET image_count = 3 WHERE {PETS}"),
        "its index has 2 images of .* bytes, and 1 erased ones, and its row says 3,",
    ),
    "an index names a pack that its dataset's rows do not": (
        sql("DELETE FROM dataset_packs"),
        "dataset ds-.*: its images lie in other packs than its rows say",
    ),
    "rows name a pack that no image lies in": (
        sql(
            "INSERT INTO dataset_packs SELECT tenant, dataset_id, index_digest FROM datasets"
            f" WHERE {PETS}"
        ),
        "dataset ds-.*: its images lie in other packs than its rows say",
    ),
    "an image lies beyond its pack": (
        edit_images(offset=100_000),
        "dataset ds-.*: 1 of its images lie in no pack of it",
    ),
    "an image lies before its pack": (
        edit_images(offset=-1),
        "dataset ds-.*: 1 of its images lie in no pack of it",
    ),
    "an image lies elsewhere in its pack": (
        edit_images(offset=0),
        "dataset ds-.*: 1 of its images are not what their digests say",
    ),
    "an image has another's digest": (
        edit_images(digest="0" * 64),
        "dataset ds-.*: 1 of its images are not what their digests say",
    ),
    "an image in a pack is damaged": (
        lambda data: object_of(data, PACK).write_bytes(
            object_of(data, PACK).read_bytes().replace(b"PIC", b"pic")
        ),
        r"dataset ds-.*: \d of its images are not what their digests say",
    ),
    # the database
    "its format is not ours": (
        sql("INSERT INTO counters VALUES ('x', 1)", "PRAGMA application_id = 99"),
        "database: was made by another version of Graft",
    ),
    "a page is damaged": (lambda data: os.truncate(data / "graft.sqlite3", 9000), "database: "),
    "it is no database": (
        lambda data: (data / "graft.sqlite3").write_bytes(b"no database" * 1000),
        "database: cannot be read",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_reported(
    what: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it, reported = BROKEN[what]
    break_it(data)
    assert main(["check", str(data)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.search(reported, line)], lines


def test_contents_are_not_read_where_that_is_not_asked_for(data: Path) -> None:
    flip(HEAD)(data)
    edit_images(digest="0" * 64)(data)
    assert main(["check", str(data), "--quick"]) == 0
    assert main(["check", str(data)]) == 1


def test_an_image_is_read_a_piece_at_a_time(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck, "_PIECE_BYTES", 2)
    assert fsck.problems(data) == []


def test_blobs_are_compared_page_by_page(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsck, "_PAGE", 1)
    assert fsck.problems(data) == []
    for path in (data / "blobs").glob("??/*"):
        path.unlink()
    with closing(sqlite3.connect(data / "graft.sqlite3")) as connection:
        (count,) = connection.execute("SELECT COUNT(*) FROM blobs").fetchone()
    missing = [line for line in fsck.problems(data) if line.startswith("blob ")]
    assert len(missing) == len(set(missing)) == count - len(unneeded(data))


def unneeded(data: Path) -> set[str]:
    """The digests that no row names, by the schema as it is."""
    columns = {
        "datasets": ["index_digest"],
        "dataset_packs": ["digest"],
        "versions": [f"{part}_digest" for part in (
            "manifest", "head", "backbone", "answers", "report_json", "report_html")],
        "exported_backbones": ["digest", "reference_digest"],
        "registered_backbones": ["digest"],
    }  # fmt: skip
    with closing(sqlite3.connect(data / "graft.sqlite3")) as connection:
        digests = {digest for (digest,) in connection.execute("SELECT digest FROM blobs")}
        for table, names in columns.items():
            for row in connection.execute(f"SELECT {', '.join(names)} FROM {table}"):
                digests -= set(row)
    return digests


def test_orphans_are_counted_and_no_problem(data: Path) -> None:
    before = fsck.orphans(data)
    assert before["blobs that no row needs"] == len(unneeded(data)) > 0
    (data / "blobs" / "ab").mkdir(exist_ok=True)
    (data / "blobs" / "ab" / ("ab" * 32 + "-0000")).touch()
    (data / "work" / "jobs" / "job-gone").mkdir(parents=True)
    with closing(sqlite3.connect(data / "graft.sqlite3")) as connection:
        (waits,) = connection.execute(QUEUED.strip("()")).fetchone()
    (data / "work" / "jobs" / waits).mkdir()
    assert fsck.orphans(data) == {
        **before, "objects without a row": 1, "folders of jobs that have ended": 1,
    }  # fmt: skip
    assert fsck.problems(data) == []


def test_of_a_running_server_only_what_stays_broken_is_reported(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, moved = object_of(data, "SELECT report_html_digest FROM versions"), data / "moved"
    report.rename(moved)
    remove("SELECT digest FROM registered_backbones")(data)
    # Of this module alone: any other thread may sleep meanwhile.
    repaired = SimpleNamespace(sleep=lambda _: moved.rename(report))
    monkeypatch.setattr("service.fsck.time", repaired)
    (line,) = fsck.problems(data, is_running=True)
    assert "onnx/tiny" in line


def test_many_problems_are_cut_off(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fsck, "MAX_PROBLEMS", 3)
    shutil.rmtree(data / "blobs")
    assert main(["check", str(data)]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    assert "3 or more problems" in printed.err


def test_what_is_no_data_folder_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path)]) == 2
    assert "not a data folder" in capsys.readouterr().err
