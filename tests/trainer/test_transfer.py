"""Jobs as a whole: what beside accuracy they find out, and what they ask of a version."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from service.contract import (
    BACKBONE_FILE,
    HEAD_FILE,
    REPORT_HTML_FILE,
    REPORT_JSON_FILE,
    Base,
    DomainAdaptation,
    Finished,
    Gate,
    Incumbent,
    ModelBased,
    Note,
    PretrainedBackbone,
)
from service.domain import Manifest
from service.engine import head as heads
from service.errors import InvalidInput
from tests.trainer.conftest import MakeFolder, MakeSpec, Told, incumbent, source_of
from trainer import job
from trainer.reporting.report import Report
from trainer.train import run

pytestmark = pytest.mark.usefixtures("small_network")


def report_of(out: Path) -> Report:
    return msgspec.json.decode((out / REPORT_JSON_FILE).read_bytes(), type=Report)


def measured_on_target(manifest: Manifest, count: int) -> None:
    (figure,) = manifest.figures
    assert (figure.measured_on, figure.count) == ("target", count)


def darkened(folder: Path, to: Path) -> Path:
    """The same images at dusk, as another domain."""
    for path in folder.rglob("*.png"):
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(Image.open(path)).astype(np.float32) * 0.45
        Image.fromarray(pixels.astype(np.uint8)).save(target)
    return to


def test_a_version_knows_what_its_training_images_look_like(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    run(make_spec(make_folder(per_class=8)), told.append)
    outliers = heads.load((tmp_path / "out" / HEAD_FILE).read_bytes()).outliers
    assert outliers is not None
    assert outliers.means.shape == (2, 16)
    found = report_of(tmp_path / "out").out_of_distribution
    assert found is not None
    assert found.threshold == 1.0
    assert found.false_alarms == 0.05
    assert "Mahalanobis" in found.method
    # Of 16 images none tells so rare a false alarm; nobody asked for it.
    (note,) = (n for n in told.of(Note) if "threshold of outliers" in n.text)  # type: ignore[attr-defined]
    assert note.level == "info"


def test_a_rate_of_false_alarms_that_few_images_cannot_tell_is_warned_of(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    manifest = run(make_spec(make_folder(per_class=8), outlier_false_alarm_rate=0.01), told.append)
    (note,) = (n for n in told.of(Note) if "threshold of outliers" in n.text)  # type: ignore[attr-defined]
    assert note.level == "warning"
    assert manifest.hyperparameters["outlier_false_alarm_rate"] == 0.01
    found = report_of(tmp_path / "out").out_of_distribution
    assert found is not None
    assert found.false_alarms == 0.01
    assert found.flagged <= 1


def test_a_gate_is_checked_and_told_of_in_manifest_and_report(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=8)
    first = run(make_spec(folder, out_dir=str(tmp_path / "first")), told.append)
    assert first.gate_checks == []
    before = incumbent(tmp_path / "first", first)
    # Nothing differs so little, and nothing is so fast.
    gate = Gate(
        min_accuracy=0.5, not_worse_than="latest", max_parity_difference=-1.0, max_latency_ms=0.0
    )
    manifest = run(make_spec(folder, gate=gate, **before), told.append)
    passed = {check.name: check.passed for check in manifest.gate_checks}
    assert passed == {"accuracy": True, "not_worse": True, "parity": False, "latency": False}
    assert len(manifest.gate_failures) == 2
    assert [c.name for c in report_of(tmp_path / "out").manifest.gate_checks] == list(passed)
    page = (tmp_path / "out" / REPORT_HTML_FILE).read_text()
    assert all(detail in page for detail in manifest.gate_failures)


def test_a_version_before_that_cannot_be_asked_any_more_passes_no_gate(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    gone = Incumbent(version=1, backbone_digest="1", head_digest="2", answers_digest="3")
    spec = make_spec(make_folder(), gate=Gate(not_worse_than="prod"), incumbent=gone)
    (check,) = run(spec, told.append).gate_checks
    assert not check.passed
    assert "could not be compared" in check.detail
    assert any("may be gone" in n.text for n in told if isinstance(n, Note))


def test_baselines_are_measured_on_the_same_images(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    spec = make_spec(
        make_folder(per_class=6),
        method=ModelBased(epochs=1, batch_size=4),
        baselines=["linear_probe", "from_scratch", "nearest_class_mean"],
        time_budget_s=3600.0,
    )
    run(spec, told.append)
    compared = {c.name: c for c in report_of(tmp_path / "out").comparisons}
    assert set(compared) == {
        "linear_probe", "from_scratch", "nearest_class_mean", "majority_class"
    }  # fmt: skip
    assert compared["linear_probe"].seconds is not None
    assert compared["linear_probe"].accuracy == 1.0


def test_the_backbone_is_chosen_on_the_job_s_own_images(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "_RANKING_S", 3600.0)
    spec = make_spec(
        make_folder(per_class=8),
        backbone="auto",
        backbones=[
            PretrainedBackbone(backbone="efficientnet_lite0", weights="random"),
            PretrainedBackbone(backbone="efficientnet_lite0"),
        ],
    )
    manifest = run(spec, told.append)
    ranked = report_of(tmp_path / "out").backbones
    assert ranked is not None
    assert (manifest.backbone, manifest.weights) == (
        ranked.ranking[0].backbone,
        ranked.ranking[0].weights,
    )
    assert len(ranked.ranking) == 2
    assert all(row.log_loss is not None for row in ranked.ranking)
    assert "choosing the backbone" in manifest.stages_s


def test_a_version_grows_by_images_and_a_class(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    old = make_folder("old", per_class=6)
    new = make_folder("new", per_class=6, classes=("green", "red"), seed=5)
    cache = str(tmp_path / "features.sqlite")
    run(make_spec(old, out_dir=str(tmp_path / "first"), feature_cache=cache), told.append)
    spec = make_spec(new, base=Base("colours", 1), base_data=[source_of(old)], feature_cache=cache)
    manifest = run(spec, told.append)
    assert manifest.classes == ["blue", "green", "red"]
    assert manifest.base == Base("colours", 1)
    growth = report_of(tmp_path / "out").growth
    assert growth is not None
    assert (growth.base_images, growth.added_images) == (12, 12)
    assert growth.added_classes == ["green"]


@pytest.fixture
def domains(make_folder: MakeFolder, tmp_path: Path) -> tuple[Path, Path]:
    source = make_folder("source", per_class=10, classes=("blue", "green", "red"))
    other = make_folder("other", per_class=8, classes=("blue", "green", "red"), seed=9)
    return source, darkened(other, tmp_path / "target")


def test_adaptation_needs_no_label_of_the_target(
    domains: tuple[Path, Path], make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    source, target = domains
    flat = tmp_path / "flat"
    flat.mkdir()
    for n, path in enumerate(sorted(target.rglob("*.png"))):
        shutil.copy(path, flat / f"{n}.png")
    spec = make_spec(source, method=DomainAdaptation(), target=source_of(flat))
    manifest = run(spec, told.append)
    assert manifest.method == "domain_adaptation"
    # Of the target nothing is known, so nothing is claimed.
    assert [figure.measured_on for figure in manifest.figures] == ["source"]
    assert manifest.headline is None
    assert not manifest.calibrated
    assert told[-1] == Finished(None, 0)
    found = report_of(tmp_path / "out").adaptation
    assert found is not None
    assert found.target_images == 24
    assert found.comparison is None
    assert {gap.measure for gap in found.gaps} == {"proxy_a_distance", "mmd", "frechet_distance"}
    assert found.candidates[0].technique == "source_only"
    assert found.published == manifest.technique
    made = report_of(tmp_path / "out")
    assert made.suspects == []
    assert made.out_of_distribution is not None
    assert made.out_of_distribution.images == "target images kept aside for this"
    page = (tmp_path / "out" / REPORT_HTML_FILE).read_text()
    assert "images of the source in" in page
    assert "The accuracy on the target is not known" in page


def test_labels_of_some_of_the_target_measure_and_teach_nothing(
    domains: tuple[Path, Path], make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    source, target = domains
    heads_seen = []
    for name, is_labelled in (("labelled", True), ("not", False)):
        method = DomainAdaptation(evaluate_on_target=is_labelled)
        out = tmp_path / name
        spec = make_spec(source, method=method, target=source_of(target), out_dir=str(out))
        manifest = run(spec, told.append)
        heads_seen.append(heads.load((out / HEAD_FILE).read_bytes()))
        if is_labelled:
            measured_on_target(manifest, 24)
            found = report_of(out).adaptation
            assert found is not None
            assert found.comparison is not None
    np.testing.assert_array_equal(heads_seen[0].weight, heads_seen[1].weight)


def test_images_without_a_class_may_lie_beside_labelled_ones_of_the_target(
    domains: tuple[Path, Path], make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    source, target = domains
    (target / "green").rename(target / "unlabelled")
    method = DomainAdaptation(evaluate_on_target=True)
    manifest = run(make_spec(source, method=method, target=source_of(target)), told.append)
    measured_on_target(manifest, 16)
    found = report_of(tmp_path / "out").adaptation
    assert found is not None
    assert found.target_images == 24


def test_a_class_that_the_source_lacks_is_named(
    domains: tuple[Path, Path], make_spec: MakeSpec, told: Told
) -> None:
    source, target = domains
    (target / "green").rename(target / "violet")
    method = DomainAdaptation(evaluate_on_target=True)
    with pytest.raises(InvalidInput, match="violet"):
        run(make_spec(source, method=method, target=source_of(target)), told.append)


def test_a_technique_of_the_whole_network_gives_a_version_too(
    domains: tuple[Path, Path],
    make_spec: MakeSpec,
    told: Told,
    tmp_path: Path,
) -> None:
    source, target = domains
    spec = make_spec(
        source,
        method=DomainAdaptation(
            technique="cdan",
            evaluate_on_target=True,
            always_adapt=True,
            epochs=1,
            batch_size=8,
        ),
        target=source_of(target),
        backbone="resnet18",
        weights="random",
    )
    manifest = run(spec, told.append)
    assert manifest.technique == "cdan"
    # On what it was not adapted to.
    assert manifest.headline is not None
    assert manifest.headline.measured_on == "target"
    assert 0 < manifest.headline.count < 24
    found = report_of(tmp_path / "out").adaptation
    assert found is not None
    assert found.comparison is not None


def test_images_beside_the_class_folders_of_a_target_are_adapted_to(
    domains: tuple[Path, Path], make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    source, target = domains
    for n, path in enumerate(sorted((target / "green").iterdir())):
        path.rename(target / f"loose-{n}.png")
    (target / "green").rmdir()
    method = DomainAdaptation(evaluate_on_target=True)
    manifest = run(make_spec(source, method=method, target=source_of(target)), told.append)
    found = report_of(tmp_path / "out").adaptation
    assert found is not None
    assert found.target_images == 24
    measured_on_target(manifest, 16)


def test_nothing_is_measured_on_target_images_that_were_learned_from(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    folder = make_folder(per_class=10)
    method = DomainAdaptation(evaluate_on_target=True)
    manifest = run(make_spec(folder, method=method, target=source_of(folder)), told.append)
    assert manifest.headline is None
    assert any("nothing is measured on them" in n.text for n in told if isinstance(n, Note))


def test_a_target_of_one_image_is_refused_with_words(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    source = make_folder(per_class=6)
    target = tmp_path / "target"
    target.mkdir()
    shutil.copy(next(source.rglob("*.png")), target / "only.png")
    spec = make_spec(source, method=DomainAdaptation(), target=source_of(target))
    with pytest.raises(InvalidInput, match="2 or more are needed"):
        run(spec, told.append)


def test_a_baseline_that_fails_costs_no_version(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("trainer.baselines._trained", fail)
    run(make_spec(make_folder(), baselines=["from_scratch"]), told.append)
    assert any("could not be measured" in n.text for n in told if isinstance(n, Note))


def test_a_linear_probe_beside_a_trained_network_stays_on_the_pretrained_one(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    spec = make_spec(
        make_folder(per_class=6),
        method=ModelBased(recipe="classic", epochs=1),
        backbone="resnet18",
        weights="random",
        baselines=["linear_probe"],
    )
    run(spec, told.append)
    frozen, trained = tmp_path / "out" / "frozen.onnx", tmp_path / "out" / BACKBONE_FILE
    assert frozen.exists()
    assert frozen.read_bytes() != trained.read_bytes()
