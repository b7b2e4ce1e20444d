"""Every table is named by the files of its one owner: the others ask it.

The check of a data folder reads all of them, and the schema makes them.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service"
SCHEMA = SERVICE / "storage" / "migrations"
OWNERS = {
    "jobs": "jobs",
    "job_events": "jobs",
    "job_labels": "jobs",
    "replicas": "jobs",
    "blobs": "storage",
    "changes": "storage/changes.py",
    "counters": "storage/changes.py",
}
"""A folder or a file below service/; every table that is not named here is of storage."""
CHECK = SERVICE / "fsck.py"


def tables() -> set[str]:
    """The tables and views that the schema makes."""
    found = set()
    for script in SCHEMA.glob("*.sql"):
        found |= set(re.findall(r"CREATE (?:TABLE|VIEW) (\w+)", script.read_text("utf-8")))
    return found


def naming(table: str) -> list[Path]:
    """The files whose SQL names a table."""
    pattern = re.compile(rf"\b(?:FROM|JOIN|INTO|UPDATE|TABLE)\s+{table}\b(?!\s*import)")
    return [
        path
        for path in sorted(SERVICE.rglob("*.py"))
        if path != CHECK and pattern.search(path.read_text("utf-8"))
    ]


def owner_of(table: str) -> Path:
    return SERVICE / OWNERS.get(table, "storage")


@pytest.mark.parametrize("table", sorted(tables()))
def test_a_table_is_named_by_its_owner_alone(table: str) -> None:
    found = naming(table)
    assert found, "nobody names it"
    assert [path for path in found if not path.is_relative_to(owner_of(table))] == []


def test_every_owner_has_a_table() -> None:
    assert set(OWNERS) <= tables()
