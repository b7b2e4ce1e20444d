"""A database whose file is written over while it is open: told, and written to no more."""

import logging
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from service.errors import Damaged, Reason
from service.storage import storage_errors
from service.storage.database import Database

TABLES = "CREATE TABLE t (x INTEGER NOT NULL UNIQUE); CREATE TABLE whole (x TEXT);"
PAGE_BYTES = 4096


def pages_of(connection: sqlite3.Connection, *names: str) -> list[int]:
    wanted = ",".join("?" * len(names))
    query = f"SELECT rootpage FROM sqlite_master WHERE tbl_name IN ({wanted})"
    return [page for (page,) in connection.execute(query, names)]


def noise(page: bytes) -> bytes:
    return random.Random(0).randbytes(len(page))


def write_over(file: Path, *tables: str, becomes: Callable[[bytes], bytes] = noise) -> None:
    """Changes the tables' first pages; what a server keeps of the file is old by then."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        pages = pages_of(connection, *tables) if tables else [1]
        connection.execute("CREATE TABLE other (x)")
        connection.execute("DROP TABLE other")
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        with file.open("rb+") as opened:
            for page in pages:
                opened.seek((page - 1) * PAGE_BYTES)
                changed = becomes(opened.read(PAGE_BYTES))
                opened.seek((page - 1) * PAGE_BYTES)
                opened.write(changed)


def add(database: Database, table: str) -> None:
    with database.transaction() as connection:
        connection.execute(f"INSERT INTO {table} VALUES (5)")


def count(database: Database, table: str) -> int:
    with database.read() as connection:
        return int(connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path, [TABLES])
    with database.transaction() as connection:
        connection.executemany("INSERT INTO t VALUES (?)", [(x,) for x in range(10, 2000)])
        connection.execute("INSERT INTO whole VALUES ('here')")
    yield database
    database.close()


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(Damaged) as caught:
        call()
    assert caught.value.reason is Reason.STORAGE_DAMAGED
    return caught.value.message


@pytest.mark.parametrize("seen_by", [count, add])
def test_damage_is_told_to_callers_without_a_path_and_logged_once_with_what_to_do(
    database: Database,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    seen_by: Callable[[Database, str], object],
) -> None:
    write_over(tmp_path / "graft.sqlite3", "t")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            message = refused(lambda: seen_by(database, "t"))
            assert "its operator has restored it" in message
            assert str(tmp_path) not in message
    (told,) = caplog.messages
    assert f"the database {tmp_path / 'graft.sqlite3'} is damaged" in told
    assert "put the data folder back from a backup" in told


def test_a_damaged_file_is_not_written_to_and_what_is_whole_in_it_is_read(
    database: Database, tmp_path: Path
) -> None:
    write_over(tmp_path / "graft.sqlite3", "t")
    # Until somebody comes upon the damage, nobody knows of it.
    add(database, "whole")
    refused(lambda: count(database, "t"))
    refused(lambda: add(database, "whole"))
    assert count(database, "whole") == 2


def test_a_transaction_that_comes_upon_damage_is_rolled_back(
    database: Database, tmp_path: Path
) -> None:
    write_over(tmp_path / "graft.sqlite3", "t")

    def change() -> None:
        with database.transaction() as connection:
            connection.execute("INSERT INTO whole VALUES ('lost')")
            connection.execute("INSERT INTO t VALUES (5)")

    refused(change)
    assert count(database, "whole") == 1


def test_a_database_without_its_first_page_is_damaged(database: Database, tmp_path: Path) -> None:
    write_over(tmp_path / "graft.sqlite3")
    refused(lambda: count(database, "whole"))
    refused(lambda: add(database, "whole"))


def test_a_page_whose_row_does_not_fit_it_is_found_when_it_is_read(
    database: Database, tmp_path: Path
) -> None:
    def past_the_end(page: bytes) -> bytes:
        # The place of its one row follows the header's eight bytes.
        return page[:8] + (PAGE_BYTES - 2).to_bytes(2, "big") + page[10:]

    write_over(tmp_path / "graft.sqlite3", "whole", becomes=past_the_end)
    refused(lambda: count(database, "whole"))


def test_text_that_nobody_can_have_written_is_damage(database: Database, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "graft.sqlite3", isolation_level=None)) as connection:
        connection.execute("UPDATE whole SET x = CAST(x'ff00' AS TEXT)")

    def read() -> None:
        with database.read() as connection:
            connection.execute("SELECT x FROM whole").fetchone()

    refused(read)


def no_text(page: bytes) -> bytes:
    """The schema's page with a name in it that is none."""
    place = page.index(b"tablewhole")
    return page[:place] + b"table\xcc\xff\xfe\xcc\xcc" + page[place + 10 :]


def test_a_disk_that_cannot_read_a_page_back_is_damage_and_other_errors_of_it_are_not(
    tmp_path: Path,
) -> None:
    for code, is_damage in (
        (sqlite3.SQLITE_IOERR_CORRUPTFS, True),
        (sqlite3.SQLITE_CORRUPT_INDEX, True),
        (sqlite3.SQLITE_IOERR_READ, False),
        (sqlite3.SQLITE_ERROR, False),
    ):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = code
        assert storage_errors.is_damage(error) is is_damage
        told = storage_errors.of_database(error, tmp_path, 1.0)
        assert (told is not None and told.reason is Reason.STORAGE_DAMAGED) is is_damage


def test_a_start_on_a_damaged_file_names_it(database: Database, tmp_path: Path) -> None:
    write_over(tmp_path / "graft.sqlite3", "t")
    database.close()
    assert str(tmp_path) in refused(lambda: Database(tmp_path, [TABLES]))


def removed(file: Path) -> None:
    file.unlink()


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.replace(file)


def emptied(file: Path) -> None:
    file.write_bytes(b"")
