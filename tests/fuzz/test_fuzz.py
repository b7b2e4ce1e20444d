"""A few hundred inputs of each target, the same every time, and every case that was found."""

import importlib
from pathlib import Path

import pytest

from tests.fuzz import promise
from tests.fuzz.__main__ import TARGETS
from tests.fuzz.mutation import check
from tests.fuzz.promise import CASES, Broken, Target

EXAMPLES = 80

# As `service.engine.preprocess` has it, whose filters pytest takes back for each test.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")


def target(name: str) -> Target:
    found: Target = importlib.import_module(f"tests.fuzz.{name}").TARGET
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_and_what_is_made_of_it_keeps_the_promise(name: str) -> None:
    of = target(name)
    for data in of.seeds():
        of.keeps_its_promise(data)
    assert check(of, EXAMPLES) >= EXAMPLES


@pytest.mark.parametrize(
    ("name", "case"), [(path.parent.name, path) for path in sorted(CASES.glob("*/*"))]
)
def test_what_once_broke_a_promise_keeps_it(name: str, case: Path) -> None:
    target(name).keeps_its_promise(case.read_bytes())


def test_an_error_that_is_not_ours_breaks_the_promise() -> None:
    def run(data: bytes) -> None:
        raise KeyError(data)

    with pytest.raises(KeyError):
        Target("any", run, list, ()).keeps_its_promise(b"")


def test_what_takes_too_much_memory_or_time_breaks_the_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fine = Target("any", lambda data: None, list, ())
    fine.keeps_its_promise(b"")
    monkeypatch.setattr(promise, "_peak_bytes", iter([0, 501 * 2**20]).__next__)
    with pytest.raises(Broken, match="MiB"):
        fine.keeps_its_promise(b"")
    monkeypatch.undo()
    monkeypatch.setattr(promise, "MAX_S", -1.0)
    with pytest.raises(Broken, match="it took"):
        fine.keeps_its_promise(b"")
