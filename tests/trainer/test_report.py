"""The report with everything that it can show, and with as little as a job has."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest

from service.domain import LeftOutFile, LeftOutReason, Manifest
from service.ingest.index import summarise
from service.jobs.contract import EpochEnded
from tests.trainer import sample_report
from tests.trainer.conftest import MakeFolder
from trainer import data, evaluate
from trainer.data import Data
from trainer.reporting import page, report
from trainer.reporting.duplicates import NearDuplicates, Twins
from trainer.reporting.findings import Findings, Suspects
from trainer.reporting.label_errors import Suspect

VOID = {"meta", "img", "br", "wbr"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of turn; collects the text that a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def _read(html: str) -> str:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return re.sub(r"\s+", " ", parser.text)


@pytest.fixture
def found(make_folder: MakeFolder) -> Data:
    return data.load(make_folder(per_class=20), validation_fraction=0.5, seed=0, threads=1)


def _probabilities(found: Data) -> np.ndarray:
    """Right but for the first two validation images."""
    targets = found.validation.targets
    answers = np.where(np.arange(len(targets)) < 2, 1 - targets, targets)
    return (np.eye(2)[answers] * 0.8 + 0.1).astype(np.float32)


def _manifest(found: Data, probabilities: np.ndarray, **changes: object) -> Manifest:
    metrics = evaluate.measure(probabilities, found.validation.targets, found.classes)
    about: dict[str, object] = {
        "train_count": len(found.train),
        "validation_count": len(found.validation),
        "validation_accuracy": metrics.accuracy,
        **changes,
    }
    return sample_report.manifest(found.classes, **about)


def _report(found: Data, extras: Findings | None = None, **changes: object) -> report.Report:
    probabilities = _probabilities(found)
    manifest = _manifest(found, probabilities, **changes)
    metrics = evaluate.measure(probabilities, found.validation.targets, found.classes)
    return report.collect(manifest, metrics, found, probabilities, [], extras)


def test_a_page_with_everything_shows_every_section(found: Data) -> None:
    made = sample_report.with_everything(found)
    html = page.to_html(made, found)
    text = _read(html)
    for part in (
        "Is it good enough?", "Can it be trusted?", "What next?", "Test accuracy", "Gate",
        "at least 0.9500 was asked for", "What was left out", "13 of 53 files that were found",
        "damaged, or cannot be read", "Thumbs.db", "Domain adaptation", "77 target images",
        "70.0 %",
        '"mcc classes as frequent as in the target" has the highest criterion, and "mcc classes '
        'equally frequent" was chosen', "more than 0.03", "features unchanged",
        "What the transfer was worth", "all layers fine-tuned", "12.5",
        "What more images would bring", "cannot be said", "quick (ridge) classifier",
        "Calibration", "before the temperature", "Out of distribution", "a method",
        "Classes, on the test images", "Classes, on the validation images", "Labels to check",
        "looks like red", "chance that the folder is wrong 60 %", "Not looked at: red",
        "Validation images that are nearly ones learned from", "alike 0.97",
        "Nearly the same image under two classes", "alike 0.91", "Most confident mistakes",
        "Right answers", "older version 3", "Choice of the backbone", "no weights",
        "Loss by epoch", "0.06607", "0123456789abcdef0123456789abcdef",
    ):  # fmt: skip
        assert part in text, part
    # What is long and says little stands at the end.
    assert text.index("0123456789abcdef") > text.index("How it was made")
    assert "0.0660677" not in text
    # Mistakes but the one whose label is doubted, right answers, two suspects and two pairs.
    assert len(made.mistakes) == made.metrics.count * (1 - made.metrics.accuracy) - 1
    assert html.count("data:image/jpeg;base64,") == len(made.mistakes) + 6 + 2 + 4


def test_no_image_is_a_mistake_and_a_wrong_label_at_once(found: Data) -> None:
    plain = _report(found)
    assert [m.place for m in plain.mistakes] == [0, 1]
    made = _report(found, Findings(suspects=Suspects([], [Suspect(0, 0, 1, 0.9, -0.8, 0.7)])))
    assert [m.place for m in made.mistakes] == [1]
    assert made.suspects[0].chance == made.suspects_expected_wrong == 0.7


def test_the_services_marks_are_comments_that_nobody_sees(found: Data) -> None:
    html = page.to_html(_report(found, model="<!--version-->"), found)
    assert html.count("<!--version-->") == html.count("<!--standing-->") == 1
    assert html.index("</title>") < html.index("<svg")
    assert html.count("<title>") == 1 or html.index("</title>") < html.index("<body>")


def test_files_that_were_left_out_are_grouped_by_reason_and_class(found: Data) -> None:
    files = [
        LeftOutFile(f"red/{n}.gif", "red", LeftOutReason.UNREADABLE, "it is cut short")
        for n in range(7)
    ]
    files += [
        LeftOutFile("blue/0.gif", "blue", LeftOutReason.UNREADABLE, "it is cut short"),
        LeftOutFile("notes.txt", "", LeftOutReason.STRAY, "it lies beside the classes"),
    ]
    out = _report(replace(found, summary=summarise(40, files))).left_out
    assert out is not None
    assert (out.seen, out.used, out.count) == (49, 40, 9)
    assert [(r.reason, r.label, r.count) for r in out.rows] == [
        ("damaged, or cannot be read", "red", 7),
        ("beside the folders of the classes", "", 1),
        ("damaged, or cannot be read", "blue", 1),
    ]
    assert len(out.rows[0].examples) == 5
    assert out.rows[0].examples[0] == "red/0.gif (it is cut short)"
    assert out.reasons == [
        ("damaged, or cannot be read", 8),
        ("beside the folders of the classes", 1),
    ]


def test_every_class_has_intervals_of_its_recall_and_precision(found: Data) -> None:
    made = _report(found)
    first = made.metrics.classes[0]
    assert (first.hits, first.support, first.answered) == (8, 10, 8)
    assert first.recall_low == pytest.approx(0.490, abs=1e-3)
    assert first.recall_high == pytest.approx(0.943, abs=1e-3)
    assert first.precision_low == pytest.approx(0.676, abs=1e-3)
    assert "80 % (49 % to 94 %)" in _read(page.to_html(made, found))


def test_nothing_is_fetched_and_nothing_runs(found: Data) -> None:
    html = page.to_html(sample_report.with_everything(found), found)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", html)
    assert "<script" not in html
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html


def test_a_job_that_found_out_nothing_more_has_a_page_too(found: Data) -> None:
    made = _report(found)
    text = _read(page.to_html(made, found))
    for part in ("Domain adaptation", "What more images", "Gate", "Out of distribution"):
        assert part not in text
    assert "90.0 % of the validation images are classified correctly (18 of 20)" in text
    assert made.calibration is not None
    assert made.advice


def test_the_json_of_a_report_reads_back(found: Data) -> None:
    made = sample_report.with_everything(found)
    encoded = msgspec.json.encode(made)
    assert msgspec.json.decode(encoded, type=report.Report) == made
    plain = msgspec.json.decode(encoded)
    assert plain["format"] == 1
    assert plain["version"] is None


def test_names_like_markup_are_text_everywhere(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=20)
    (folder / "red").rename(folder / "<b>red&")
    found = data.load(folder, validation_fraction=0.5, seed=0, threads=1)
    made = sample_report.with_everything(found)
    named = msgspec.structs.replace(made.manifest, model="a<i>")
    html = page.to_html(msgspec.structs.replace(made, manifest=named), found)
    assert "<b>red" not in html
    assert "a<i>" not in html
    assert "<b>red&" in _read(html)


def test_accuracy_is_told_without_the_images_that_nearly_were_learned_from(found: Data) -> None:
    near = NearDuplicates([Twins(0, 1, 0.99), Twins(7, 2, 0.9)], [])
    made = _report(found, Findings(near_duplicates=near))
    assert "near copy among" not in page.to_html(made, found)
    assert made.accuracy_without_leaked == pytest.approx(17 / 18)
    assert made.leaked_count == 2
    assert made.leaked[0].first.part == "validation"
    assert made.leaked[0].second.part == "train"
    assert _report(found).accuracy_without_leaked is None


def test_a_page_of_which_most_images_have_a_copy_begins_with_it(found: Data) -> None:
    near = NearDuplicates([Twins(i, i, 0.99) for i in range(18)], [])
    made = _report(found, Findings(near_duplicates=near))
    assert made.advice[0].text.startswith("18 of 20 validation images are nearly the same")
    text = _read(page.to_html(made, found))
    assert "18 of 20, the 6 most alike are shown" in text
    assert "What follows is measured on them all and says little of new images" in text
    every = [Twins(i, i, 0.99) for i in range(20)]
    none_left = _report(found, Findings(near_duplicates=NearDuplicates(every, [])))
    assert (none_left.leaked_count, none_left.accuracy_without_leaked) == (20, None)


def test_images_of_both_parts_are_ranked_together_by_their_margin(found: Data) -> None:
    suspects = Suspects([Suspect(1, 0, 1, 0.7, -0.4, 0.3)], [Suspect(0, 0, 1, 0.9, -0.8, 0.6)])
    made = _report(found, Findings(suspects=suspects))
    assert [(s.part, s.place) for s in made.suspects] == [("validation", 0), ("train", 1)]
    assert made.suspects[0].file == found.names[found.validation.paths[0]]


def test_the_page_shows_a_dozen_mistakes_and_the_json_lists_more(found: Data) -> None:
    probabilities = 1 - _probabilities(found)
    metrics = evaluate.measure(probabilities, found.validation.targets, found.classes)
    manifest = _manifest(found, probabilities)
    made = report.collect(manifest, metrics, found, probabilities, [])
    assert len(made.mistakes) == 18
    assert page.to_html(made, found).count("<img") == 12 + 2


def test_images_are_named_as_people_know_them(found: Data) -> None:
    stored = replace(found, names={path: f"ds-1/{name}" for path, name in found.names.items()})
    assert re.fullmatch(r"ds-1/(blue|red)/\d+\.png", _report(stored).mistakes[0].file)


def test_epochs_are_drawn_when_there_are_several(found: Data) -> None:
    probabilities = _probabilities(found)
    metrics = evaluate.measure(probabilities, found.validation.targets, found.classes)
    epochs = [
        EpochEnded(
            epoch=i,
            epochs=3,
            train_loss=1 / i,
            train_accuracy=0.5,
            validation_loss=1 / i,
            validation_accuracy=0.5,
            images_per_second=1,
            eta_s=0,
            learning_rate=0.1,
        )
        for i in (1, 2, 3)
    ]
    manifest = _manifest(found, probabilities)
    text = _read(
        page.to_html(report.collect(manifest, metrics, found, probabilities, epochs), found)
    )
    assert "Loss by epoch" in text
    once = report.collect(manifest, metrics, found, probabilities, epochs[:1])
    assert "Loss by epoch" not in _read(page.to_html(once, found))


def test_many_classes_are_a_heat_map(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=4)
    for n in range(12):
        (folder / f"class{n}").mkdir()
        for image in (folder / "red").iterdir():
            pixels = np.frombuffer(image.read_bytes(), dtype=np.uint8)
            # Trailing bytes make it another file with the same image.
            (folder / f"class{n}" / image.name).write_bytes(pixels.tobytes() + bytes([n]))
    found = data.load(folder, validation_fraction=0.5, seed=0, threads=1)
    probabilities = (np.eye(14)[found.validation.targets] * 0.9 + 0.1 / 14).astype(np.float32)
    metrics = evaluate.measure(probabilities, found.validation.targets, found.classes)
    manifest = _manifest(found, probabilities)
    html = page.to_html(report.collect(manifest, metrics, found, probabilities, []), found)
    assert "class3 answered class3: 2 of 2" in _read(html)
    assert '<table class="confusion">' not in html
