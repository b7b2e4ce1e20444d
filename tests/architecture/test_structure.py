"""docs/explanation/structure.md lists every module of the service where it lies."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service"
STRUCTURE = (ROOT / "docs" / "explanation" / "structure.md").read_text("utf-8")
ENTRY = re.compile(r"^    (\w+/|\w+\.py) (.*(?:\n {20}.*)*)", re.MULTILINE)


def entries() -> dict[str, str]:
    """What is said of each package and of each lone module of the service, by its name."""
    listed = STRUCTURE.partition("\nservice/ ")[2].partition("\ntrainer/ ")[0]
    return dict(ENTRY.findall(listed))


def test_packages_and_lone_modules_are_those_that_there_are() -> None:
    there = {path.name for path in SERVICE.glob("*.py") if path.name != "__init__.py"}
    there |= {f"{path.parent.name}/" for path in SERVICE.glob("*/__init__.py")}
    assert entries().keys() == there


@pytest.mark.parametrize("package", [path.parent.name for path in SERVICE.glob("*/__init__.py")])
def test_every_module_of_a_package_is_named(package: str) -> None:
    names = {path.stem for path in (SERVICE / package).glob("*.py")} - {"__init__", "__main__"}
    names |= {path.parent.name for path in (SERVICE / package).glob("*/__init__.py")}
    assert names - set(re.findall(r"\w+", entries()[f"{package}/"])) == set()


def test_every_table_has_an_owner() -> None:
    schema = (SERVICE / "storage" / "migrations" / "0001_first.sql").read_text("utf-8")
    tables = set(re.findall(r"^CREATE TABLE (\w+)", schema, re.MULTILINE))
    rows = re.findall(r"^\| (`.*?`) \| `\w+/", STRUCTURE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == tables
