"""What is measured goes by the version's decision; what other decisions would give is told."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.contract import (
    ANSWERS_FILE,
    HEAD_FILE,
    REPORT_HTML_FILE,
    REPORT_JSON_FILE,
    DomainAdaptation,
    FeatureBased,
    Finished,
    Gate,
    JobSpec,
    ModelBased,
)
from service.domain import ARGMAX, Decision, GateCheck, Manifest
from service.engine import head as heads
from service.engine.head import Head
from service.errors import InvalidInput
from tests.trainer.conftest import MakeFolder, MakeSpec, Told, incumbent, make_small, source_of
from trainer import answers, evaluate
from trainer.data import Part
from trainer.measuring import Measured
from trainer.reporting import rules
from trainer.train import run

BALANCED = Decision(rule="balanced")


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images, nine dark ones for each light one, whose brightnesses overlap."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("imbalanced")
    for label, middle, count in (("dark", 110, 270), ("light", 143, 30)):
        (folder / label).mkdir()
        for n in range(count):
            pixels = rng.normal(rng.normal(middle, 15), 25, (48, 48, 1)).repeat(3, axis=2)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / f"{n}.png")
    return folder


RECALL = Gate(class_recalls={"light": 0.6})
Ran = tuple[Manifest, dict[str, Any]]


class Jobs:
    """Runs jobs on the imbalanced images, one of each decision."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self.told: dict[str, Told] = {}

    def run(self, name: str, folder: Path | None = None, **changes: object) -> Ran:
        """Returns a job's manifest and its report."""
        self.told[name] = Told()
        fields: dict[str, object] = {
            "job_id": "job-1",
            "model": "greys",
            "data": source_of(folder or self.folder),
            "out_dir": str(self.out / name),
            "method": FeatureBased(),
            "weights_dir": str(self.out / "weights"),
            "feature_cache": str(self.out / "features.sqlite"),
            "device": "cpu",
            "provider": "cpu",
            "threads": 1,
        }
        manifest = run(JobSpec(**{**fields, **changes}), self.told[name].append)  # type: ignore[arg-type]
        return manifest, json.loads((self.out / name / REPORT_JSON_FILE).read_bytes())


@pytest.fixture(scope="module")
def jobs(imbalanced: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with pytest.MonkeyPatch.context() as patched:
        make_small(patched)
        yield Jobs(imbalanced, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def argmax(jobs: Jobs) -> Ran:
    return jobs.run("argmax", gate=RECALL)


@pytest.fixture(scope="module")
def balanced(jobs: Jobs) -> Ran:
    return jobs.run("balanced", gate=RECALL, decision=BALANCED)


def check(manifest: Manifest) -> GateCheck:
    (found,) = manifest.gate_checks
    return found


def recall(report: dict[str, Any], label: str) -> float:
    found: float = next(c["recall"] for c in report["metrics"]["classes"] if c["label"] == label)
    return found


def test_balanced_recognises_a_rare_class_and_passes_a_gate_that_argmax_fails(
    jobs: Jobs, argmax: Ran, balanced: Ran
) -> None:
    (plain, before), (manifest, after) = argmax, balanced
    assert recall(before, "light") < 0.5 < recall(after, "light")
    assert (check(plain).verdict, check(manifest).verdict) == ("failed", "passed")
    assert check(manifest).value == recall(after, "light")

    # One decision, in all that is told of the version.
    assert (plain.decision, manifest.decision) == (ARGMAX, BALANCED)
    head = heads.load((jobs.out / "balanced" / HEAD_FILE).read_bytes())
    assert head.decision == BALANCED
    assert head.prior is not None
    assert head.prior.tolist() == pytest.approx([0.9, 0.1])
    assert manifest.headline is not None
    metrics = after["metrics"]
    assert manifest.headline.accuracy == metrics["accuracy"] < before["metrics"]["accuracy"]
    assert jobs.told["balanced"][-1] == Finished(metrics["accuracy"], 300)
    assert sum(map(sum, metrics["confusion"])) == 300
    assert metrics["confusion"][1][1] == 30 * recall(after, "light")
    known = answers.load(jobs.out / "balanced" / ANSWERS_FILE).values()
    right = [one.answered == one.label for one in known]
    assert np.mean(right) == metrics["accuracy"]
    # What does not go by it: the probabilities, and all that is told of them.
    for name in ("loss", "macro_auroc", "calibration_error"):
        assert metrics[name] == before["metrics"][name]
    assert after["calibration"] == before["calibration"]


def test_the_report_says_what_each_rule_would_give_and_recommends_balanced_to_argmax_alone(
    jobs: Jobs, argmax: Ran, balanced: Ran
) -> None:
    plain, even = argmax[1], balanced[1]
    own = Decision(rule="thresholds", thresholds={"light": 0.2}, default_threshold=0.95)
    _, strict = jobs.run("thresholds", decision=own)

    def rows(report: dict[str, Any]) -> dict[str, Any]:
        return {row["rule"]: row for row in report["rules"]["rows"]}

    assert list(rows(plain)) == list(rows(even)) == ["argmax", "balanced"]
    assert list(rows(strict)) == ["argmax", "balanced", "thresholds"]
    for report, rule in ((plain, "argmax"), (even, "balanced"), (strict, "thresholds")):
        row, metrics = rows(report)[rule], report["metrics"]
        assert [name for name, each in rows(report).items() if each["is_own"]] == [rule]
        for name in ("accuracy", "balanced_accuracy"):
            ends = [metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]]
            assert list(row[name].values()) == pytest.approx(ends)
        least = min(metrics["classes"], key=lambda one: one["recall"])
        assert row["least_recall"]["value"] == pytest.approx(least["recall"])
        assert row["least_recall_class"] == least["label"]
        assert row["unanswered"]["value"] == metrics["unanswered"] / 300
    assert rows(plain)["balanced"]["accuracy"] == rows(even)["balanced"]["accuracy"]

    def advice(report: dict[str, Any]) -> list[str]:
        return [one["text"] for one in report["advice"] if "Decide by `balanced`" in one["text"]]

    (told,) = advice(plain)
    assert "for one image of light there are 9 of dark" in told
    assert not advice(even)
    assert not advice(strict)
    page = (jobs.out / "thresholds" / REPORT_HTML_FILE).read_text()
    assert "<b>thresholds</b> (the version's)" in page


def test_an_answer_with_none_is_not_right_and_is_counted(jobs: Jobs) -> None:
    decision = Decision(rule="thresholds", default_threshold=0.95)
    manifest, report = jobs.run("with none", decision=decision)
    metrics = report["metrics"]
    known = answers.load(jobs.out / "with none" / ANSWERS_FILE).values()
    none = [one for one in known if one.answered == ""]
    assert 0 < metrics["unanswered"] == len(none) < 300
    assert all(one.probability < 0.95 for one in none)
    assert manifest.headline is not None
    right = [one.answered == one.label for one in known]
    assert manifest.headline.accuracy == pytest.approx(np.mean(right))
    assert metrics["coverage"][0]["coverage"] == pytest.approx(1 - len(none) / 300)
    assert f"{len(none)} of the others are answered with none" in report["advice"][0]["text"]
    shown = [*report["mistakes"], *report["examples"]]
    assert all(one["probability"] >= 0.95 for one in shown)


def test_versions_are_compared_by_the_decision_of_each(jobs: Jobs, argmax: Ran) -> None:
    before, plain = argmax
    gate = Gate(not_worse_than="latest")
    behind = incumbent(jobs.out / "argmax", before)
    manifest, report = jobs.run("after argmax", decision=BALANCED, gate=gate, **behind)
    now, then = (r["metrics"]["accuracy"] for r in (report, plain))
    assert f"accuracy {now:.4f} against {then:.4f} of" in check(manifest).detail
    assert "identically" not in check(manifest).detail


@pytest.mark.parametrize("is_seen", [True, False], ids=["kept", "asked now"])
def test_the_version_before_answers_by_its_own_decision(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    small_network: None,
    tmp_path: Path,
    is_seen: bool,
) -> None:
    folder, out = make_folder(per_class=12), str(tmp_path / "first")
    never = Decision(rule="thresholds", default_threshold=1.0)
    behind = incumbent(
        tmp_path / "first", run(make_spec(folder, out_dir=out, decision=never), told.append)
    )
    asked = folder if is_seen else make_folder("others", per_class=12, seed=7)
    gate = Gate(not_worse_than="latest")
    manifest = run(make_spec(asked, gate=gate, **behind), told.append)
    assert "is right on 0.0% of 24 images" in check(manifest).detail


def test_a_threshold_of_a_class_that_the_images_do_not_have_fails_the_job(jobs: Jobs) -> None:
    decision = Decision(rule="thresholds", thresholds={"light": 0.5, "lihgt": 0.5})
    with pytest.raises(InvalidInput, match="'lihgt'; its classes are 'dark', 'light'") as caught:
        jobs.run("of nothing", decision=decision)
    assert caught.value.field == "decision.thresholds.classes"


def test_a_network_decides_by_the_shares_of_the_images_that_it_learned_from(
    jobs: Jobs, tmp_path: Path
) -> None:
    for label, count in (("dark", 54), ("light", 6)):
        (tmp_path / "fewer" / label).mkdir(parents=True)
        for n in range(count):
            shutil.copy(jobs.folder / label / f"{n}.png", tmp_path / "fewer" / label)
    method = ModelBased(epochs=1)
    manifest, report = jobs.run(
        "network", tmp_path / "fewer", method=method, decision=BALANCED, validation_fraction=0.3
    )
    head = heads.load((jobs.out / "network" / HEAD_FILE).read_bytes())
    assert head.prior is not None
    held = report["metrics"]["classes"]
    learned = [54 - held[0]["support"], 6 - held[1]["support"]]
    assert sum(learned) == manifest.train_count < 60
    assert head.prior.tolist() == pytest.approx([n / sum(learned) for n in learned])


@pytest.mark.parametrize("technique", ["coral", "auto"])
def test_an_adapted_version_is_measured_by_its_decision(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    small_network: None,
    tmp_path: Path,
    technique: str,
) -> None:
    source, target = make_folder("source", per_class=12), make_folder("target", 12, seed=5)
    method = DomainAdaptation(technique=technique, evaluate_on_target=True)  # type: ignore[arg-type]
    # No probability reaches 1, or hardly one.
    spec = make_spec(
        source,
        method=method,
        target=source_of(target),
        decision=Decision(rule="thresholds", default_threshold=1.0),
    )
    manifest = run(spec, told.append)
    report = json.loads((tmp_path / "out" / REPORT_JSON_FILE).read_bytes())
    assert manifest.headline is not None
    assert (manifest.headline.measured_on, manifest.headline.accuracy) == ("target", 0)
    # What it is compared with answers with none, too.
    assert report["adaptation"]["comparison"]["accuracy"] == 0
    head = heads.load((tmp_path / "out" / HEAD_FILE).read_bytes())
    assert head.prior is not None
    assert head.prior.tolist() == [0.5, 0.5]


# Figures by hand


def test_answers_with_none_are_in_no_column_and_not_acted_on() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.45, 0.55]])
    targets, answered = np.array([0, 0, 1, 1]), np.array([0, -1, 1, 0])
    found = evaluate.measure(probabilities, targets, ("a", "b"), answers=answered)
    assert (found.accuracy, found.unanswered) == (0.5, 1)
    assert found.confusion == [[1, 0], [1, 1]]
    a, b = found.classes
    assert (a.answered, a.hits, a.unanswered, a.recall, a.precision) == (2, 1, 1, 0.5, 0.5)
    assert (b.answered, b.hits, b.unanswered, b.recall, b.precision) == (1, 1, 0, 0.5, 1)
    # 2 hits / (2 images + 2 answers), and 2 / (2 + 1).
    assert found.macro_f1 == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert [(row.threshold, row.answered, row.right) for row in found.coverage] == [
        (0.0, 3, 2), (0.5, 2, 2), (0.8, 1, 1),
    ]  # fmt: skip
    assert found.loss == evaluate.measure(probabilities, targets, ("a", "b")).loss


def beside(probabilities: np.ndarray, targets: np.ndarray, prior: list[float]) -> rules.Rules:
    k = len(prior)
    zeros = np.zeros((k, 1), np.float32)
    head = Head(zeros, zeros[:, 0], tuple("abcd"[:k]), prior=np.array(prior, np.float32))
    part = Part((), (), targets)
    return rules.compared(head, Measured("test", part, np.arange(len(targets)), probabilities))


def overlapping(rng: np.random.Generator, counts: tuple[int, int], apart: float) -> rules.Rules:
    """Draws images of two classes whose probabilities are right for nine of one to one."""
    targets = np.repeat([0, 1], counts)
    x = rng.normal(targets * apart, 1)
    odds = 9 * np.exp(-apart * (x - apart / 2))
    return beside(
        np.stack([odds, np.ones_like(odds)], 1) / (1 + odds)[:, None], targets, [0.9, 0.1]
    )


def test_balanced_is_recommended_where_it_is_shown_to_win_and_classes_are_imbalanced() -> None:
    rng = np.random.default_rng(0)
    found = overlapping(rng, (450, 50), 2.0)
    assert found.imbalance is not None
    gain = found.imbalance.gain
    assert 0.05 < gain.low < gain.value < gain.high < 0.5
    row = {each.rule: each.balanced_accuracy.value for each in found.rows}
    assert gain.value == pytest.approx(row["balanced"] - row["argmax"])
    assert "for one image of b there are 9 of a" in rules.advised(found)
    # Where nothing overlaps there is nothing to win.
    assert rules.advised(overlapping(rng, (450, 50), 20.0)) == ""
    # One image of the rare class shows nothing, though the rule makes all the difference to it.
    lone = beside(
        np.array([[0.99, 0.01]] * 30 + [[0.6, 0.4]]), np.array([0] * 30 + [1]), [0.9, 0.1]
    )
    assert lone.imbalance is not None
    assert lone.imbalance.gain.value == 0.5
    assert lone.imbalance.gain.low < 0
    assert rules.advised(lone) == ""
    even = beside(np.array([[0.6, 0.4]] * 30), np.repeat([0, 1], (15, 15)), [0.8, 0.2])
    assert (even.imbalance, rules.advised(even)) == (None, "")


def test_the_interval_of_what_balanced_gains_holds_the_truth_as_often_as_it_says() -> None:
    rng, apart = np.random.default_rng(1), 1.5
    many = overlapping(rng, (180_000, 20_000), apart).imbalance
    assert many is not None
    held = 0
    for _ in range(300):
        one = overlapping(rng, (90, 10), apart).imbalance
        assert one is not None
        held += one.gain.low <= many.gain.value <= one.gain.high
    assert held >= 0.92 * 300
