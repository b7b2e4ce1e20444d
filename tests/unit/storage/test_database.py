import errno
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest

from service.domain import TRANSITIONS, JobState
from service.errors import Damaged, Exhausted, GraftError, Internal, Reason, Unavailable
from service.storage import storage_errors
from service.storage.database import Database

TABLE = "CREATE TABLE t (x INTEGER NOT NULL UNIQUE);"


@pytest.fixture
def small(tmp_path: Path) -> Database:
    return Database(tmp_path / "small", [TABLE])


def numbers(database: Database) -> list[int]:
    with database.read() as connection:
        return [row["x"] for row in connection.execute("SELECT x FROM t ORDER BY x")]


def add(database: Database, number: int) -> None:
    with database.transaction() as connection:
        connection.execute("INSERT INTO t VALUES (?)", (number,))


def test_what_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Database(tmp_path, [TABLE])
    add(first, 1)
    first.close()
    second = Database(tmp_path, [TABLE])
    assert numbers(second) == [1]
    second.close()


def test_an_error_rolls_the_whole_transaction_back(small: Database) -> None:
    def fail() -> None:
        with small.transaction() as connection:
            connection.execute("INSERT INTO t VALUES (1)")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert numbers(small) == []
    add(small, 2)
    assert numbers(small) == [2]
    small.close()


def test_a_reader_sees_one_state_while_a_writer_goes_on(small: Database) -> None:
    add(small, 1)
    with small.read() as connection:
        connection.execute("SELECT x FROM t").fetchall()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(add, small, 2).result(60)
        assert [row["x"] for row in connection.execute("SELECT x FROM t")] == [1]
    assert numbers(small) == [1, 2]
    small.close()


def test_a_reader_cannot_write(small: Database) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"), small.read() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
    small.close()


def test_writers_from_many_threads_take_turns(small: Database) -> None:
    def count(_: int) -> None:
        with small.transaction() as connection:
            (highest,) = connection.execute("SELECT COALESCE(MAX(x), 0) FROM t").fetchone()
            connection.execute("INSERT INTO t VALUES (?)", (highest + 1,))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(40)))
    assert numbers(small) == list(range(1, 41))
    small.close()


def test_a_follow_up_runs_after_the_commit_and_not_after_a_rollback(small: Database) -> None:
    seen: list[list[int]] = []
    with small.transaction() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
        small.after_commit(lambda: seen.append(numbers(small)))
        assert seen == []

    def fail() -> None:
        with small.transaction():
            small.after_commit(lambda: seen.append([]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    add(small, 2)
    assert seen == [[1]]
    small.close()


def test_a_follow_up_that_fails_leaves_the_commit_and_the_others_alone(small: Database) -> None:
    ran = threading.Event()
    with small.transaction() as connection:
        connection.execute("INSERT INTO t VALUES (1)")
        small.after_commit(lambda: 1 / 0)  # type: ignore[arg-type]
        small.after_commit(ran.set)
    assert ran.is_set()
    assert numbers(small) == [1]
    small.close()


def test_a_full_disk_is_told_and_the_database_goes_on_when_there_is_room(small: Database) -> None:
    with small.transaction() as connection:
        connection.execute("CREATE TABLE big (x BLOB)")
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(Exhausted) as caught, small.transaction() as connection:
        connection.execute("INSERT INTO big VALUES (zeroblob(1000000))")
    assert caught.value.reason is Reason.STORAGE_FULL
    with small.transaction() as connection:
        connection.execute("PRAGMA max_page_count = 100000")
        connection.execute("INSERT INTO big VALUES (zeroblob(1000000))")
    small.close()


def test_a_data_folder_takes_one_server_at_a_time(tmp_path: Path) -> None:
    first = Database(tmp_path)
    with pytest.raises(Unavailable, match="another server uses the data folder"):
        Database(tmp_path)
    first.close()
    Database(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/data", Path("/proc/data")):
        with pytest.raises(Unavailable, match=r"cannot be written .* name another with --data-dir"):
            Database(folder)


def test_a_killed_server_leaves_no_lock_and_no_half_transaction(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from service.storage.database import Database\n"
        f"database = Database(Path({str(tmp_path)!r}), [{TABLE!r}])\n"
        "with database.transaction() as c: c.execute('INSERT INTO t VALUES (1)')\n"
        "with database.transaction() as c:\n"
        "    c.execute('INSERT INTO t VALUES (2)')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=300)
    assert done.returncode == -9
    database = Database(tmp_path, [TABLE])
    assert numbers(database) == [1]
    database.close()


def test_an_older_database_is_migrated_step_by_step(tmp_path: Path) -> None:
    old = Database(tmp_path, [TABLE])
    add(old, 7)
    old.close()
    new = Database(tmp_path, [TABLE, "ALTER TABLE t ADD COLUMN y INTEGER;", "UPDATE t SET y = x;"])
    with new.read() as connection:
        assert tuple(connection.execute("SELECT x, y FROM t").fetchone()) == (7, 7)
    new.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    Database(tmp_path, [TABLE]).close()
    bad = "ALTER TABLE t ADD COLUMN y INTEGER; INSERT INTO nowhere VALUES (1);"
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        Database(tmp_path, [TABLE, bad])
    again = Database(tmp_path, [TABLE])
    with again.read() as connection:
        assert [row["name"] for row in connection.execute("PRAGMA table_info(t)")] == ["x"]
    again.close()


@pytest.mark.parametrize(
    "other",
    [
        [TABLE, "CREATE TABLE u (x INTEGER);"],  # newer
        ["CREATE TABLE t (x TEXT);"],  # of as many steps, and not the same ones
    ],
)
def test_a_database_of_another_version_is_refused_and_left_alone(
    tmp_path: Path, other: list[str]
) -> None:
    Database(tmp_path, other).close()
    with pytest.raises(Internal, match="was made by another version of Graft: start that version"):
        Database(tmp_path, [TABLE])
    Database(tmp_path, other).close()


def test_comments_and_white_space_make_no_other_database(tmp_path: Path) -> None:
    Database(tmp_path, [TABLE]).close()
    Database(tmp_path, [f"-- What it holds.\n  {TABLE}\n"]).close()


def test_a_closed_database_says_that_the_service_stops(small: Database) -> None:
    small.close()
    small.close()
    with pytest.raises(Unavailable) as caught, small.read():
        pass
    assert caught.value.reason is Reason.SHUTTING_DOWN
    with pytest.raises(Unavailable), small.transaction():
        pass


@pytest.mark.parametrize(("old", "new"), list(product(JobState, JobState)))
def test_the_database_allows_the_transitions_of_the_domain_alone(
    database: Database, old: JobState, new: JobState
) -> None:
    def values(state: JobState) -> tuple[str, int, str | None, float | None, str | None]:
        failed = "INTERNAL" if state is JobState.FAILED else None
        ended = 1.0 if state.is_final else None
        owner = "replica" if state is JobState.RUNNING else None
        return state.value, int(state is JobState.SUCCEEDED), failed, ended, owner

    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO jobs (job_id, tenant, kind, message, model, device, request_json,"
            " create_time_s, last_event_s, last_sequence, size_bytes, state, version,"
            " error_reason, end_time_s, owner)"
            " VALUES ('j', 't', 'fine_tune', x'', 'm', 'cpu', '', 0, 0, 1, 0, ?, ?, ?, ?, ?)",
            values(old),
        )

    def move() -> None:
        with database.transaction() as connection:
            connection.execute(
                "UPDATE jobs SET state = ?, version = ?, error_reason = ?, end_time_s = ?,"
                " owner = ?",
                values(new),
            )

    if new in TRANSITIONS.get(old, ()):
        move()
    else:
        with pytest.raises(sqlite3.IntegrityError, match="illegal transition"):
            move()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Database, sqlite3.Connection]]:
    """A database that waits no time for another connection, and that connection."""
    database = Database(tmp_path / "held", [TABLE], busy_timeout_s=0.01)
    other = sqlite3.connect(tmp_path / "held" / "graft.sqlite3", isolation_level=None)
    yield database, other
    other.close()
    database.close()


def test_while_another_process_holds_the_database_writers_are_told_and_readers_go_on(
    held: tuple[Database, sqlite3.Connection],
) -> None:
    database, other = held
    add(database, 1)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Unavailable) as caught:
        add(database, 2)
    assert caught.value.reason is Reason.STORAGE_BUSY
    assert caught.value.retry_after_s == 0.01
    # One connection more than there was.
    with database.read() as first, database.read() as second:
        rows = [c.execute("SELECT x FROM t").fetchone()["x"] for c in (first, second)]
    assert rows == [1, 1]
    other.execute("ROLLBACK")
    add(database, 3)
    assert numbers(database) == [1, 3]


def test_an_error_of_a_full_or_read_only_disk_within_a_transaction_is_told(small: Database) -> None:
    for code, reason in (
        (errno.ENOSPC, Reason.STORAGE_FULL),
        (errno.EDQUOT, Reason.STORAGE_FULL),
        (errno.EROFS, Reason.STORAGE_BUSY),
    ):
        with pytest.raises(GraftError) as caught, small.transaction():
            raise OSError(code, os.strerror(code))
        assert caught.value.reason is reason
    with pytest.raises(PermissionError), small.transaction():
        raise PermissionError(errno.EACCES, "no")
    small.close()


def test_a_file_that_is_no_database_is_damage_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "graft.sqlite3"
    file.write_bytes(b"no database at all" * 1000)
    with pytest.raises(Damaged, match="put the data folder back from a backup"):
        Database(tmp_path, [TABLE])
    assert file.read_bytes().startswith(b"no database")


def test_a_page_that_was_written_over_is_found_at_the_start(tmp_path: Path) -> None:
    database = Database(tmp_path, [TABLE])
    with database.transaction() as connection:
        connection.executemany("INSERT INTO t VALUES (?)", [(x,) for x in range(10_000)])
    database.close()
    with (tmp_path / "graft.sqlite3").open("rb+") as file:
        file.seek(5 * 4096)
        file.write(bytes(4096))
    with pytest.raises(Damaged, match="is damaged"):
        Database(tmp_path, [TABLE])


def test_an_input_error_is_one_of_a_full_disk_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
    assert storage_errors.of_database(error, tmp_path, 1.0) is None
    assert list(tmp_path.iterdir()) == []

    def full(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    told = storage_errors.of_database(error, tmp_path, 1.0)
    assert told is not None and told.reason is Reason.STORAGE_FULL
    assert list(tmp_path.iterdir()) == []
