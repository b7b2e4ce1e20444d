"""README.md and docs/tutorial.md work as they stand: every command, and what each prints."""

from pathlib import Path

import pytest

from tests.e2e import documents
from tests.e2e.conftest import ROOT

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who follows one document after the other."""
    return tmp_path_factory.mktemp("reader")


def test_the_readme_works_as_it_stands(reader: Path) -> None:
    wrong = documents.follow(ROOT / "README.md", reader)
    assert not wrong, "\n".join(wrong)


def test_the_tutorial_works_as_it_stands(reader: Path) -> None:
    if not (reader / "demo").exists():
        with documents.shell(reader) as opened:
            output, code = opened.run("make demo")
        assert code == 0, output
    wrong = documents.follow(ROOT / "docs/tutorial.md", reader)
    assert not wrong, "\n".join(wrong)


def test_what_differs_from_run_to_run_may_differ_and_nothing_else() -> None:
    shown = "digits version 1: 0.977 [0.96 to 0.99] over 600 images\n...\nreport.html:  0.08 MiB"
    said = "digits version 1: 0.981 [0.97 to 1.00] over 600 images\na\nb\nreport.html: 1.2 MiB\n"
    assert documents.is_as_shown(shown, said)
    assert documents.is_as_shown(shown, said.replace("a\nb\n", ""))
    for wrong in ("version 1", "600 images", "report.html", "MiB"):
        assert not documents.is_as_shown(shown, said.replace(wrong, "another"))
    assert not documents.is_as_shown(shown, said + "one more\n")
