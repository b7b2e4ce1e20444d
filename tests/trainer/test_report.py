"""The report with everything that it can show, and with as little as a job has."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest

from service.domain import LeftOutFile, LeftOutReason
from service.ingest.index import summarise
from service.ops.escaping import escaped
from tests.trainer import sample_report
from trainer import evaluate
from trainer.data import Data
from trainer.evaluate import Metrics
from trainer.measuring import Measured
from trainer.reporting import page, report
from trainer.reporting.findings import Findings, Grouped, Suspects, Twins
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
def found(tmp_path: Path) -> Data:
    """Twenty images to learn from and twenty to measure on, of two classes."""
    return sample_report.data(tmp_path / "images", 2, per_class=20)


def _measured(found: Data, **about: object) -> Measured:
    """Right but for the first two validation images."""
    targets = found.validation.targets
    answers = np.where(np.arange(len(targets)) < 2, 1 - targets, targets)
    probabilities = np.eye(2)[answers] * 0.8 + 0.1
    made = Measured("validation", found.validation, np.arange(len(targets)), probabilities)
    return replace(made, **about)  # type: ignore[arg-type]


def _metrics(of: Measured, found: Data) -> Metrics:
    return evaluate.measure(of.probabilities, of.part.targets, found.classes, of.groups)


def _report(
    found: Data,
    extras: Findings | None = None,
    of: Measured | None = None,
    epochs: int = 0,
    **changes: object,
) -> report.Report:
    of = of or _measured(found)
    metrics = _metrics(of, found)
    manifest = sample_report.manifest(found.classes, **changes)
    return report.collect(
        manifest, found, [of], metrics, sample_report.epochs(epochs), extras, ["because"]
    )


def _page(made: report.Report, found: Data) -> str:
    return _read(page.to_html(made, found, [_measured(found)]))


def test_a_page_with_everything_shows_every_section(found: Data) -> None:
    made = sample_report.with_everything(found)
    html = page.to_html(made, found, sample_report.measured(found))
    text = _read(html)
    for part in (
        "Is it good enough?", "Can it be trusted?", "What next?",
        "62 % of the images have a near copy", "measured on 20 images of val/",
        "Accuracy on each set of images",
        "measured on 19 images in 5 rounds, each time on images that were held out",
        "not calibrated", "an error of 9.1 points, where chance explains 4.2",
        "in 61 groups of images that belong together",
        "Decisions in training", "too few for it to gain anything",
        "Gate", "at least 0.9500 was asked for", "undecided", "320",
        "Left-out files", "13 of 53 files that were found",
        "damaged, or cannot be read", "Thumbs.db", "Domain adaptation", "77 target images",
        "70 % of the source's class structure", "for images of the target alone",
        '"mcc classes as frequent as in the target" has the highest criterion, and "mcc classes '
        'equally frequent" was chosen', "more than 0.03", "proxy A-distance",
        "before adaptation",
        "Comparisons", "all layers fine-tuned", "12.5",
        "Calibration", "before temperature scaling", "Out of distribution", "a method",
        "How many answers to act on", "AUROC", "Labels to check",
        "What each decision would give", "thresholds (the version's)", "No answer",
        "thresholds: Annual crop_00 0.75, others 0.5",
        "looks like HerbaceousVegetation_01", "chance that the folder is wrong 60 %",
        "Not checked: HerbaceousVegetation_01",
        "Nearly the same image under two classes", "alike 0.91", "Most confident mistakes",
        "Correct answers", "older version 3", "Choice of the backbone", "no weights",
        "Loss by epoch", "0.06607", "0123456789abcdef0123456789abcdef",
    ):  # fmt: skip
        assert part in text, part
    # The long digests, which say little, stand at the end.
    assert text.index("0123456789abcdef") > text.index("Details")
    assert "0.0660677" not in text
    assert made.metrics is not None
    # Mistakes but the one whose label is doubted, right answers, two suspects and one pair.
    assert len(made.mistakes) == round(made.metrics.count * (1 - made.metrics.accuracy)) - 1
    assert html.count("data:image/jpeg;base64,") == len(made.mistakes) + 6 + 2 + 2


def test_a_job_that_could_measure_nothing_says_so(found: Data) -> None:
    made = sample_report.with_nothing_measured(found)
    assert (made.basis, made.metrics, made.calibration) == (None, None, None)
    text = _read(page.to_html(made, found, []))
    assert "The accuracy is not known: no image could be held out" in text
    assert "Accuracy not known" in text
    for part in ("Confusion", "Classes", "Mistakes", "mistakes", "Calibration", "Labels", "%."):
        assert part not in text, part


def test_figures_of_the_source_are_listed_and_never_the_headline(found: Data) -> None:
    source = _measured(found, measured_on="source", rounds=5)
    about = sample_report.manifest(found.classes, calibrated=False, figures=[source.figure()])
    made = report.collect(about, found, [source], None, [])
    assert made.basis is None
    assert made.mistakes == []
    text = _read(page.to_html(made, found, [source]))
    assert "20 images of the source in 5 rounds" in text
    assert "it says little of the target 90.0 %" in text


def test_training_images_that_could_not_be_held_out_are_counted(found: Data) -> None:
    part = found.train.take(np.arange(1, len(found.train)))
    of = _measured(found)
    of = replace(
        of, measured_on="cross_validation", part=part, groups=of.groups[1:],
        probabilities=of.probabilities[1:], rounds=5,
    )  # fmt: skip
    made = _report(found, of=of)
    assert made.basis is not None
    assert made.basis.unanswered == 1
    assert "1 image was left out" in _read(page.to_html(made, found, [of]))
    assert made.mistakes[0].file == found.train.names[made.mistakes[0].place + 1]


def test_images_of_a_target_have_the_names_of_the_target(found: Data) -> None:
    of = _measured(found, measured_on="target")
    of = replace(of, part=replace(of.part, names=tuple(f"target/{n}.jpg" for n in range(99))))
    about = sample_report.manifest(found.classes)
    made = report.collect(about, found, [of], _metrics(of, found), [])
    assert made.mistakes[0].file == "target/0.jpg"


def test_no_image_is_a_mistake_and_a_wrong_label_at_once(found: Data) -> None:
    assert [m.place for m in _report(found).mistakes] == [0, 1]
    suspects = Suspects({"validation": [Suspect(0, 0, 1, 0.9, -0.8, 0.7)]})
    made = _report(found, Findings(suspects=suspects))
    assert [m.place for m in made.mistakes] == [1]
    assert made.suspects[0].chance == made.suspects_expected_wrong == 0.7


def test_the_services_marks_are_comments_that_nobody_sees(found: Data) -> None:
    html = page.to_html(_report(found, model="<!--version-->"), found, [_measured(found)])
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


def test_the_page_shows_the_interval_of_each_class(found: Data) -> None:
    assert "80 % (49 % to 94 %)" in _page(_report(found), found)


def test_nothing_is_fetched_and_nothing_runs(found: Data) -> None:
    made = sample_report.with_everything(found)
    html = page.to_html(made, found, sample_report.measured(found))
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", html)
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert html.index(policy) < html.index("<title>") < html.index("<style>")


def test_names_of_files_turn_no_text_and_reach_no_terminal(found: Data) -> None:
    evil = "red/\x1b]52;c;aGk=\x07\u202egnp\x9b\u2028.gif"
    files = [LeftOutFile(evil, "red", LeftOutReason.UNREADABLE, "it is cut short")]
    html = page.to_html(
        _report(replace(found, summary=summarise(40, files))), found, [_measured(found)]
    )
    assert r"red/\x1b]52;c;aGk=\x07\u202egnp\x9b\u2028.gif" in _read(html)
    assert escaped(html, keep="\n") == html
    assert "url(" not in html
    assert "@import" not in html


def test_a_job_that_found_out_nothing_more_has_a_page_too(found: Data) -> None:
    made = _report(found)
    text = _page(made, found)
    for part in ("Domain adaptation", "Accuracy on each set", "Gate", "Out of distribution"):
        assert part not in text
    assert "90.0 % are classified correctly (18 of 20), measured on 20 images of val/" in text
    assert made.calibration is not None
    assert made.decisions == ["because"]


def test_the_json_of_a_report_reads_back(found: Data) -> None:
    made = sample_report.with_everything(found)
    encoded = msgspec.json.encode(made)
    assert msgspec.json.decode(encoded, type=report.Report) == made
    plain = msgspec.json.decode(encoded)
    assert plain["format"] == 1
    assert plain["version"] is None


def test_a_report_of_a_thousand_classes_fits_into_a_message(tmp_path: Path) -> None:
    k = 1000
    found = sample_report.data(tmp_path / "images", 2, per_class=8)
    targets = np.arange(4 * k) % k
    one, count = found.train, len(targets)
    part = replace(
        one, locations=one.locations[:1] * count, digests=one.digests[:1] * count,
        names=one.names[:1] * count, targets=targets,
    )  # fmt: skip
    many = replace(
        found,
        classes=tuple(f"a species with a rather long name {n:04}" for n in range(k)),
        train=part,
        validation=part.take(np.empty(0, np.int64)),
        test=part.take(np.empty(0, np.int64)),
    )
    of = Measured("cross_validation", part, np.arange(4 * k), sample_report.answers(targets, k))
    metrics = evaluate.measure(of.probabilities, targets, many.classes, of.groups)
    about = sample_report.manifest(many.classes, figures=[of.figure()])
    made = report.collect(about, many, [of], metrics, [])
    assert made.metrics is not None
    assert made.metrics.confusion == []
    assert len(made.confused) == 200
    counts = [one.count for one in made.confused]
    assert counts == sorted(counts, reverse=True)
    assert made.confused[0].count == np.array(metrics.confusion)[~np.eye(k, dtype=bool)].max()
    # Half of what gRPC takes where nothing else is set.
    assert len(msgspec.json.format(msgspec.json.encode(made))) < 2 * 2**20
    text = _read(page.to_html(made, many, [of]))
    assert "The 200 of 1000 classes with the lowest recall" in text


def test_names_like_markup_are_text_everywhere(found: Data) -> None:
    marked = replace(found, classes=("<b>red&", found.classes[1]))
    made = sample_report.with_everything(marked)
    named = msgspec.structs.replace(made.manifest, model="a<i>")
    html = page.to_html(
        msgspec.structs.replace(made, manifest=named), marked, sample_report.measured(marked)
    )
    assert "<b>red" not in html
    assert "a<i>" not in html
    assert "<b>red&" in _read(html)


def test_a_page_of_which_most_images_have_a_copy_begins_with_it(found: Data) -> None:
    made = _report(found, Findings(grouped=Grouped(images=40, groups=12, copied=30)))
    assert made.advice[0].text.startswith("75 % of the images have a near copy: they are 12 scenes")
    text = _page(made, found)
    assert text.index("12 scenes rather than 40 images") < text.index("classified correctly")


def test_pairs_under_two_classes_are_named_by_part_and_place(found: Data) -> None:
    made = _report(found, Findings(contradictions=[Twins(3, 35, 0.9)]))
    (pair,) = made.contradictions
    assert (pair.first.part, pair.first.place) == ("train", 3)
    assert pair.first.label == found.classes[0]
    assert pair.first.file == found.train.names[3]
    assert (pair.second.part, pair.second.place) == ("validation", 15)
    assert pair.second.label == found.classes[1]
    assert pair.second.file == found.validation.names[15]


def test_suspects_of_all_sets_are_ranked_together_by_their_margin(found: Data) -> None:
    suspects = Suspects(
        {
            "cross_validation": [Suspect(1, 0, 1, 0.7, -0.4, 0.3)],
            "validation": [Suspect(0, 0, 1, 0.9, -0.8, 0.6)],
        }
    )
    sets = sample_report.measured(found)
    metrics = _metrics(sets[0], found)
    about = sample_report.manifest(found.classes)
    made = report.collect(about, found, sets, metrics, [], Findings(suspects=suspects))
    assert [(s.measured_on, s.place) for s in made.suspects] == [
        ("validation", 0),
        ("cross_validation", 1),
    ]
    assert [s.file for s in made.suspects] == [
        found.validation.names[0],
        found.train.names[1],
    ]


def test_the_page_shows_a_dozen_mistakes_and_the_json_lists_more(found: Data) -> None:
    of = _measured(found)
    of = replace(of, probabilities=1 - of.probabilities)
    made = _report(found, of=of)
    assert len(made.mistakes) == 18
    assert page.to_html(made, found, [of]).count("<img") == 12 + 2


def test_epochs_are_drawn_when_there_are_several(found: Data) -> None:
    several = _report(found, epochs=3)
    assert "Loss by epoch" in _page(several, found)
    assert "Loss by epoch" not in _page(_report(found, epochs=1), found)
    unmeasured = [
        msgspec.structs.replace(e, validation_loss=None, validation_accuracy=None)
        for e in several.epochs
    ]
    text = _page(msgspec.structs.replace(several, epochs=unmeasured), found)
    assert "Loss by epoch" in text
    assert "held-out images" not in text
