"""Watches that nothing opens, renames or deletes a file inside a transaction."""

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.storage.database import Connection, Database

_EVENTS = {
    "open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir",
    "os.truncate", "os.link", "os.symlink", "os.chmod",
}  # fmt: skip
_NOT_YET = "service/storage/datasets.py"
"""Datasets are folders still, which are renamed and removed in transactions."""
_here = threading.local()
"""Of each thread: `inside` a transaction, and the `found` list to which it belongs."""


def _on_event(event: str, arguments: tuple[object, ...]) -> None:
    found: list[str] | None = getattr(_here, "found", None)
    if found is None or event not in _EVENTS:
        return
    path, root = str(arguments[0]), _here.root
    # What is imported, or quoted in a traceback, is not a file of the service's.
    if path.startswith(root):
        where = "".join(traceback.format_stack(limit=12)[:-1])
        if _NOT_YET in where:
            return
        found.append(f"{event} {path} inside a transaction:\n{where}")


# It cannot be taken away again, and does nothing outside transactions.
sys.addaudithook(_on_event)


@pytest.fixture(autouse=True)
def no_files_in_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test in whose transactions a file below its folder was touched."""
    found: list[str] = []
    begin = Database.transaction

    @contextmanager
    def watched(database: Database, scope: str = "") -> Iterator[Connection]:
        with begin(database, scope) as connection:
            _here.root, _here.found = str(tmp_path), found
            try:
                yield connection
            finally:
                _here.found = None

    monkeypatch.setattr(Database, "transaction", watched)
    yield
    assert not found, "\n".join(found)
