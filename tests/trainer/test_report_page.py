"""The page fits: nothing is cut off or wider than the screen, with few classes and with many.

The last test asks a browser, in one start for all pages and widths.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.trainer import sample_report
from trainer.reporting import page

CLASSES = (2, 10, 40)
WIDTHS = (1400, 800, 400)
DASH = "\N{EN DASH}"
GUARD_S = 300.0
"""What ends a browser that hangs, and decides nothing."""
CHECK = """
<script>
const found = [];
function check(frame) {
  const page = frame.contentDocument, root = page.documentElement, name = frame.title;
  if (root.scrollWidth > frame.clientWidth) found.push(`${name}: ${root.scrollWidth} wide`);
  for (const e of page.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect(), style = frame.contentWindow.getComputedStyle(e);
    const what = `${name}: ${e.tagName} ${(e.textContent || "").trim().slice(0, 40)}`;
    // Headings of tables that are stacked are for screen readers.
    const head = e.closest("thead");
    if (head && frame.contentWindow.getComputedStyle(head).position === "absolute") continue;
    if (box.width && (box.right > frame.clientWidth + 1 || box.left < -1)) found.push(what);
    if (e instanceof frame.contentWindow.SVGElement) {
      const plot = e.closest("svg").getBoundingClientRect();
      if (e.tagName === "text" && (box.left < plot.left - 1 || box.right > plot.right + 1
          || box.top < plot.top - 1 || box.bottom > plot.bottom + 1)) {
        found.push(what + " leaves its plot");
      }
      continue;
    }
    if (style.overflowX !== "visible" && e.scrollWidth > e.clientWidth + 1) {
      found.push(what + " is cut off");
    }
    if (["TD", "TH", "FIGCAPTION", "LI", "DD"].includes(e.tagName)
        && e.scrollWidth > e.clientWidth + 1) found.push(what + " runs over");
  }
  // Names and counts in a plot do not lie on each other.
  for (const plot of page.querySelectorAll("svg")) {
    const texts = [...plot.querySelectorAll("text")];
    const boxes = texts.map(t => t.getBoundingClientRect());
    for (const line of plot.querySelectorAll("line.grid")) {
      const g = line.getBoundingClientRect();
      boxes.forEach((b, i) => {
        if (g.left < b.right - 2 && b.left < g.right - 2 && g.top < b.bottom - 3
            && b.top < g.bottom - 3) {
          found.push(`${name}: "${texts[i].textContent}" is struck through`);
        }
      });
    }
    for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
      const a = boxes[i], b = boxes[j], by = 2;
      if (a.left < b.right - by && b.left < a.right - by && a.top < b.bottom - by * 2
          && b.top < a.bottom - by * 2) {
        found.push(`${name}: "${texts[i].textContent}" lies on "${texts[j].textContent}"`);
      }
    }
  }
}
onload = () => {
  const frames = [...document.querySelectorAll("iframe")];
  frames.forEach(check);
  document.getElementById("found").textContent = JSON.stringify({found, pages: frames.length});
};
</script><pre id="found"></pre>
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    made = {}
    for count in CLASSES:
        found = sample_report.data(tmp_path_factory.mktemp("images") / str(count), count)
        sets = sample_report.measured(found)
        made[count] = page.to_html(sample_report.with_everything(found), found, sets)
    return made


@pytest.mark.parametrize("classes", CLASSES)
def test_no_part_of_a_page_hides_what_does_not_fit(pages: dict[int, str], classes: int) -> None:
    style = pages[classes].partition("<style>")[2].partition("</style>")[0]
    for rule in re.findall(r"([^{}]+)\{([^{}]*)\}", style):
        if "thead" in rule[0]:
            # Out of sight where each cell names its column itself.
            continue
        assert not re.search(r"overflow(-x)?: *(hidden|auto|scroll)", rule[1]), rule[0]
        assert "text-overflow" not in rule[1]


@pytest.mark.parametrize("classes", CLASSES)
def test_every_cell_of_a_table_that_is_stacked_names_its_column(
    pages: dict[int, str], classes: int
) -> None:
    tables = re.findall(r"<table( class=\"[a-z ]+\")?[^>]*>(.*?)</table>", pages[classes], re.S)
    assert len(tables) > 6
    for kind, body in tables:
        if "confusion" in kind:
            continue
        assert "stack" in kind
        for row in re.findall(r"<tr>(.*?)</tr>", body.partition("<tbody>")[2], re.S):
            for attributes in re.findall(r"<td([^>]*)>", row)[1:]:
                # Words speak for themselves.
                assert "data-th=" in attributes or "words" in attributes, row


@pytest.mark.parametrize("classes", CLASSES)
def test_no_table_has_a_column_of_dashes_alone(pages: dict[int, str], classes: int) -> None:
    for body in re.findall(r"<tbody>(.*?)</tbody>", pages[classes], re.S):
        rows = [
            re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)
            for row in re.findall(r"<tr>.*?</tr>", body, re.S)
        ]
        assert all(any(cell != DASH for cell in column) for column in zip(*rows, strict=True))


def test_a_matrix_of_many_classes_is_the_pairs_that_are_confused_and_a_map(
    pages: dict[int, str],
) -> None:
    assert "Classes that are most often confused" in pages[40]
    assert "confusion" not in pages[40].partition("</style>")[2].replace("Confusion", "")
    assert "most often confused" not in pages[10]
    assert '<table class="confusion"' in pages[10]


def test_names_break_at_their_divisions() -> None:
    assert page._breakable("person/pic_012.jpg") == "person/<wbr>pic_<wbr>012.jpg"
    assert page._breakable("HerbaceousVegetation") == "Herbaceous<wbr>Vegetation"
    assert page._breakable("<b>-x") == "&lt;b&gt;-<wbr>x"


def test_text_of_plots_stays_inside_of_them(pages: dict[int, str]) -> None:
    plots = re.findall(r"<svg.*?</svg>", "".join(pages.values()), re.S)
    assert len(plots) > 15
    for plot in plots:
        root = ElementTree.fromstring(plot)
        *_, width, height = (float(n) for n in root.get("viewBox", "").split())
        for text in root.iter("text"):
            size = 6.2 * len(text.text or "")
            start = {"start": 0.0, "middle": size / 2, "end": size}[text.get("text-anchor", "")]
            left = float(text.get("x", 0)) - start
            assert left >= -4, text.text
            assert left + size <= width + 4, text.text
            assert 8 <= float(text.get("y", 0)) <= height, text.text


def test_a_browser_finds_nothing_cut_off(pages: dict[int, str], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed: nothing to lay pages out")
    frames = [
        f'<iframe title="{classes} classes at {width} px" style="width: {width}px; height: 900px; '
        f'border: 0; display: block" srcdoc="{html.escape(content)}"></iframe>'
        for classes, content in pages.items()
        for width in WIDTHS
    ]
    together = tmp_path / "all.html"
    together.write_text("<!doctype html><meta charset=utf-8>" + CHECK + "".join(frames))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,1000", "--dump-dom",
        together.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=GUARD_S, check=True)
    told = re.search(rb'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert told, done.stderr[-2000:]
    answer = json.loads(html.unescape(told.group(1).decode()))
    assert answer["pages"] == len(CLASSES) * len(WIDTHS)
    assert not answer["found"], "\n".join(answer["found"])
