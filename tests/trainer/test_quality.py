"""What jobs reach on real photographs with real ImageNet features."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from scipy.stats import rankdata

from service.contract import (
    HEAD_FILE,
    REPORT_JSON_FILE,
    DomainAdaptation,
    FeatureBased,
    JobSpec,
)
from service.domain import Manifest
from service.engine import head as heads
from service.engine.feature_cache import FeatureCache
from service.engine.head import Head
from service.engine.providers import choose_provider
from service.engine.runtime import OnnxRuntime
from tests import photographs
from tests.trainer.conftest import source_of
from trainer import data as datasets
from trainer.backbone_file import BackboneFile
from trainer.features import Features
from trainer.reporting.report import Report
from trainer.train import run


class Runs:
    """Jobs that share a backbone and what is known of images."""

    def __init__(self, folder: Path, known: dict[str, object]) -> None:
        self.folder, self.known = folder, known
        self.cache = folder / "features.sqlite"

    def run(self, data: Path, **changes: object) -> tuple[Manifest, Report, Path]:
        out = self.folder / f"out-{len(list(self.folder.iterdir()))}"
        fields: dict[str, object] = {
            "job_id": "job-1",
            "model": "photos",
            "data": source_of(data),
            "out_dir": str(out),
            "method": FeatureBased(),
            **self.known,
            "weights_dir": str(self.folder / "weights"),
            "device": "cpu",
            "provider": "auto",
            "precision": "auto",
            "threads": 1,
            "feature_cache": str(self.cache),
        }
        manifest = run(JobSpec(**{**fields, **changes}), lambda _: None)  # type: ignore[arg-type]
        report = msgspec.json.decode((out / REPORT_JSON_FILE).read_bytes(), type=Report)
        return manifest, report, out

    def features(self, folder: Path, manifest: Manifest) -> np.ndarray:
        """Of every image below a folder, as served; kept for the jobs, as theirs are for it."""
        runtime = OnnxRuntime(choose_provider("auto"), 2, is_narrow=True)
        cache = FeatureCache(self.cache, 2**30)
        digest = manifest.backbone_digest
        files: dict[str, str] = self.known["files"]  # type: ignore[assignment]
        features = Features(BackboneFile(Path(files[digest]), runtime, digest), cache, 2)
        try:
            return features.of(datasets.load_unlabelled(folder, 2))
        finally:
            cache.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, default_forms: dict[str, object]) -> Runs:
    return Runs(tmp_path_factory.mktemp("quality"), default_forms)


@pytest.fixture(scope="module")
def ants_and_bees(
    runs: Runs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, Report, Head]:
    # Its one GIF is not a photo of an ant, but a picture that says "image not found".
    folder = tmp_path_factory.mktemp("photos") / "hymenoptera_data"
    shutil.copytree(
        photographs.folder("hymenoptera_data"), folder, ignore=shutil.ignore_patterns("*.gif")
    )
    manifest, report, out = runs.run(folder)
    return manifest, report, heads.load((out / HEAD_FILE).read_bytes())


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second image of a class: as many as tell what adaptation is worth."""
    given, half = photographs.folder("pacs-small"), tmp_path_factory.mktemp("pacs")
    for label in given.glob("*/*"):
        folder = half / label.relative_to(given)
        folder.mkdir(parents=True)
        for photo in sorted(label.iterdir())[::2]:
            shutil.copyfile(photo, folder / photo.name)
    return half


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """How often an image from outside scores higher than one from inside."""
    ranks = rankdata(np.concatenate([inside, outside]))[len(inside) :]
    n, m = len(outside), len(inside)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def test_frozen_features_tell_ants_from_bees(
    ants_and_bees: tuple[Manifest, Report, Head],
) -> None:
    manifest, _, _ = ants_and_bees
    validation, crossed = manifest.figures
    assert (validation.measured_on, crossed.measured_on) == ("validation", "cross_validation")
    # Two sends of one photo are one group: what was learned from is not measured on.
    assert 150 <= validation.count <= 153
    assert min(validation.accuracy, crossed.accuracy) >= 0.94


def test_confidence_is_calibrated(ants_and_bees: tuple[Manifest, Report, Head]) -> None:
    manifest, report, head = ants_and_bees
    assert manifest.calibrated
    assert head.is_calibrated
    assert report.metrics is not None
    assert report.metrics.count >= 150
    assert report.metrics.calibration_error < 0.05


def test_images_of_other_things_are_told_from_ants_and_bees(
    runs: Runs, ants_and_bees: tuple[Manifest, Report, Head], pacs: Path
) -> None:
    manifest, _, head = ants_and_bees
    outliers = head.outliers
    assert outliers is not None

    def scores(folder: Path) -> np.ndarray:
        features = runs.features(folder, manifest)
        return outliers.scores(features, head.log_probabilities(features))

    inside = scores(photographs.folder("hymenoptera_data") / "val")
    for domain in ("photo", "cartoon"):
        outside = scores(pacs / domain)
        assert auroc(inside, outside) > 0.95
        assert (outside > 1).mean() > 0.9
    assert (inside > 1).mean() < 0.12


def test_adaptation_pays_in_both_directions_between_photos_and_cartoons(
    runs: Runs, pacs: Path
) -> None:
    reached = []
    for source, target in (("photo", "cartoon"), ("cartoon", "photo")):
        manifest, report, _ = runs.run(
            pacs / source,
            method=DomainAdaptation(evaluate_on_target=True),
            target=source_of(pacs / target),
        )
        adaptation = report.adaptation
        assert adaptation is not None
        assert adaptation.doubt == ""
        (figure,) = manifest.figures
        assert figure.measured_on == "target"
        assert adaptation.comparison is not None
        assert adaptation.comparison.verdict == "better"
        reached.append(figure.accuracy)
    assert np.mean(reached) >= 0.76


def test_where_there_is_no_gap_nothing_is_lost(runs: Runs, pacs: Path) -> None:
    photo = pacs / "photo"
    manifest, report, _ = runs.run(
        photo,
        method=DomainAdaptation(evaluate_on_target=True),
        target=source_of(photo),
    )
    assert report.adaptation is not None
    assert report.adaptation.doubt == "not_better"
    assert manifest.technique == "source_only"
