"""How the whole suite runs: on one thread a process, the longest first, without flushing disks."""

import functools
import os
import sqlite3
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

# Before anything imports NumPy or PyTorch. As many files are tested at once as there are cores,
# and threads of one process beside another's spin while they wait for each other: twice the
# processor time, and many times the clock's. Processes that are started inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Hundreds of processes are started, and each would compile all of our sources once more.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

_LONGEST_FIRST = ("e2e", "trainer", "rpc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the folders whose files take longest first: at the end only short files are left."""

    def place(item: pytest.Item) -> int:
        folders = item.path.parts
        return next((n for n, name in enumerate(_LONGEST_FIRST) if name in folders), 9)

    items.sort(key=place)


class Unflushed(sqlite3.Connection):
    """A connection that leaves flushing to the system."""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        wanted = "PRAGMA synchronous = OFF" if sql.startswith("PRAGMA synchronous") else sql
        return super().execute(wanted, *values)


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Has this process wait for no disk: only a power cut would show it.

    tests/e2e/faults/test_power_cut.py does, on servers, which are processes of their own.
    """
    from service.storage import fsync

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        patched.setattr(fsync, "_libc", SimpleNamespace(syncfs=lambda _: 0))
        connect = functools.partial(sqlite3.connect, factory=Unflushed)
        patched.setattr(sqlite3, "connect", connect)
        yield
