"""The report with everything that it can show, and with as little as a job has."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest

from service.domain import (
    GateCheck,
    LeftOutFile,
    LeftOutReason,
    Manifest,
    Parity,
    ReadSummary,
)
from service.jobs.contract import BackbonesRanked, EpochEnded, RankedBackbone
from tests.trainer.conftest import MakeFolder
from trainer import data, evaluate
from trainer.data import Data
from trainer.reporting import comparisons, findings, page, report
from trainer.reporting.comparisons import Measured
from trainer.reporting.duplicates import NearDuplicates, Twins
from trainer.reporting.findings import Adaptation, Adapted, Findings, Gap, Growth, Suspects
from trainer.reporting.label_errors import Suspect

VOID = {"meta", "img", "br"}


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


def _manifest(found: Data, probabilities: np.ndarray) -> Manifest:
    metrics = evaluate.measure(probabilities, found.validation.targets, found.classes)
    return Manifest(
        model="colours",
        job_id="job-1",
        method="feature_based",
        backbone="efficientnet_lite0",
        weights="random:0",
        backbone_digest="ab" * 32,
        feature_dim=8,
        classes=list(found.classes),
        temperature=1.3,
        train_count=len(found.train),
        validation_count=len(found.validation),
        validation_accuracy=metrics.accuracy,
        validation_loss=metrics.loss,
        dataset_digest=found.digest,
        seed=0,
        hyperparameters={"l2": 0.1},
        preprocess={},
        parity=Parity(1e-6, 1.0, 8),
        opset=17,
        device="cpu",
        precision="fp32",
        provider="cpu",
        versions={"python": "3.11"},
        started_at="2026-01-02T03:04:05+00:00",
        duration_s=0.9,
    )


def _report(found: Data, extras: Findings | None = None, **changes: object) -> report.Report:
    probabilities = _probabilities(found)
    manifest = msgspec.structs.replace(_manifest(found, probabilities), **changes)
    metrics = evaluate.measure(probabilities, found.validation.targets, found.classes)
    return report.collect(manifest, metrics, found, probabilities, [], extras)


def _everything(found: Data) -> Findings:
    rng = np.random.default_rng(0)
    probabilities, targets = _probabilities(found), found.validation.targets
    worked_out = findings.examine(
        probabilities=probabilities,
        targets=targets,
        train_targets=found.train.targets,
        classes=2,
        train_features=rng.normal(size=(len(found.train), 8)).astype(np.float32),
        features=rng.normal(size=(len(targets), 8)).astype(np.float32),
        baselines=[Measured("full_fine_tune", np.eye(2)[targets], seconds=12.5)],
    )
    return replace(
        worked_out,
        suspects=Suspects([Suspect(1, 0, 1, 0.93, -0.9)], [Suspect(0, 0, 1, 0.8, -0.7)]),
        near_duplicates=NearDuplicates([Twins(1, 3, 0.97)], [Twins(2, 15, 0.91)]),
        adaptation=Adaptation(
            technique="auto",
            published="mcc",
            candidates=[Adapted(technique="source_only"), Adapted(technique="mcc", criterion=0.7)],
            criterion="a criterion",
            gaps=[Gap("proxy_a_distance", 1.5, 0.5), Gap("mmd", 0.2, None)],
            is_negative=False,
            target_images=77,
            target_accuracy=0.8,
            source_only_target_accuracy=0.7,
        ),
        backbones=BackbonesRanked(
            [RankedBackbone(backbone="resnet18", weights="w", problem="no weights")], "because", 9
        ),
        out_of_distribution=findings.out_of_distribution(rng.random(20), 0.9, "a method", "source"),
        growth=Growth(
            base_model="older",
            base_version=3,
            base_images=10,
            added_images=5,
            added_classes=["violet"],
            comparison=comparisons.compare(Measured("base", probabilities), probabilities, targets),
        ),
    )


def test_a_page_with_everything_shows_every_section(found: Data) -> None:
    gate = [GateCheck(name="accuracy", passed=False, value=0.9, bound=0.95, detail="too low")]
    made = _report(found, _everything(found), gate_checks=gate)
    html = page.to_html(made, found)
    text = _read(html)
    for part in (
        "Is it good enough?", "Can it be trusted?", "What next?", "Gate", "too low",
        "Domain adaptation", "77 target images", "features unchanged",
        "What the transfer was worth", "all layers fine-tuned", "12.5",
        "What more images would bring", "cannot be said", "Calibration", "before the temperature",
        "Out of distribution", "a method", "Probably under the wrong class", "looks like red",
        "Validation images that nearly were learned from", "alike 0.97",
        "Nearly the same image under two classes", "alike 0.91", "Most confident mistakes",
        "Right answers", "older version 3", "violet", "Choice of the backbone", "no weights",
    ):  # fmt: skip
        assert part in text, part
    # Two mistakes, six right answers, two suspects and two pairs.
    assert html.count("data:image/jpeg;base64,") == 2 + 6 + 2 + 4


def test_nothing_is_fetched_and_nothing_runs(found: Data) -> None:
    html = page.to_html(_report(found, _everything(found)), found)
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
    assert "90.0 % of 20 validation images are answered right" in text
    assert made.calibration is not None
    assert made.advice


def test_the_json_of_a_report_reads_back_and_an_older_one_does_too(found: Data) -> None:
    made = _report(found, _everything(found))
    encoded = msgspec.json.encode(made)
    assert msgspec.json.decode(encoded, type=report.Report) == made
    plain = msgspec.json.decode(encoded)
    assert plain["format"] == 1
    first = {"format", "manifest", "metrics", "epochs", "data", "summary", "warnings", "mistakes",
             "examples"}  # fmt: skip
    older = {key: plain[key] for key in first}
    del older["metrics"]["balanced_accuracy"]
    read = msgspec.json.decode(msgspec.json.encode(older), type=report.Report)
    assert read.advice == []
    _read(page.to_html(read, found))


def test_names_like_markup_are_text_everywhere(make_folder: MakeFolder) -> None:
    folder = make_folder(per_class=20)
    (folder / "red").rename(folder / "<b>red&")
    found = data.load(folder, validation_fraction=0.5, seed=0, threads=1)
    html = page.to_html(_report(found, _everything(found), model="a<i>"), found)
    assert "<b>red" not in html
    assert "a<i>" not in html
    assert "<b>red&" in _read(html)


def test_accuracy_is_told_without_the_images_that_nearly_were_learned_from(found: Data) -> None:
    near = NearDuplicates([Twins(0, 1, 0.99), Twins(7, 2, 0.9)], [])
    made = _report(found, Findings(near_duplicates=near))
    assert made.accuracy_without_leaked == pytest.approx(17 / 18)
    assert made.leaked_count == 2
    assert made.leaked[0].first.part == "validation"
    assert made.leaked[0].second.part == "train"
    assert _report(found).accuracy_without_leaked is None


def test_images_of_both_parts_are_ranked_together_by_their_margin(found: Data) -> None:
    suspects = Suspects([Suspect(1, 0, 1, 0.7, -0.4)], [Suspect(0, 0, 1, 0.9, -0.8)])
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


def test_what_was_left_out_is_counted_and_the_first_files_are_listed(found: Data) -> None:
    files = [LeftOutFile("red/<b>.txt", "red", LeftOutReason.WRONG_FORMAT, "is no image")]
    summary = ReadSummary(seen=50, used=40, files=files)
    made = _report(replace(found, summary=summary))
    assert made.summary == summary
    text = _read(page.to_html(made, found))
    assert "10 of 50, the first 1 are listed" in text
    assert "red/<b>.txt" in text


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
