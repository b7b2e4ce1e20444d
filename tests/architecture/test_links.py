"""Every relative link in the Markdown files leads to a file, and to a heading in it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
PATH = re.compile(r"(?<![\w./-])(?:docs|deploy)/[\w/.-]+\.(?:md|svg|yaml|yml|py)\b")


FOLDERS = ("bench", "clients", "deploy", "docs", "proto", "service", "tests", "trainer")


def _files(suffixes: set[str]) -> list[str]:
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return sorted(
        str(path.relative_to(ROOT))
        for path in (*ROOT.glob("*"), *inside)
        if path.suffix in suffixes and not {"node_modules", ".venv"} & set(path.parts)
    )


PAGES = _files({".md"})


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text("utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        plain = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        anchor, number = plain, 1
        while anchor in found:
            anchor, number = f"{plain}-{number}", number + 1
        found.add(anchor)
    return found


def links(text: str) -> list[str]:
    return LINK.findall(CODE.sub("", FENCE.sub("", text)))


def test_there_are_pages_and_links() -> None:
    assert {"README.md", "docs/README.md", "docs/tutorial.md", "CONTRIBUTING.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page: str) -> None:
    here = ROOT / page
    broken = []
    for target in links(here.read_text("utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (here.parent / name).resolve() if name else here
        if not there.exists() or (
            anchor and there.suffix == ".md" and anchor not in anchors(there)
        ):
            broken.append(target)
    assert broken == []


def test_every_document_is_reached_from_the_index() -> None:
    """docs/README.md lists every page of docs/, so that none is lost."""
    listed = {
        (ROOT / "docs" / target.partition("#")[0]).resolve()
        for target in links((ROOT / "docs/README.md").read_text("utf-8"))
    }
    pages = {(ROOT / page).resolve() for page in PAGES if page.startswith("docs/")}
    assert pages - listed - {(ROOT / "docs/README.md").resolve()} == set()


def test_documents_that_the_source_names_exist() -> None:
    named = {
        (source, name)
        for source in _files({".py", ".proto", ".toml", ".yml", ".yaml"})
        for name in PATH.findall((ROOT / source).read_text("utf-8"))
    }
    assert {(source, name) for source, name in named if not (ROOT / name).exists()} == set()
