import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from service import prepared
from service.contract import (
    ANSWERS_FILE,
    BACKBONE_FILE,
    DEFAULT_BACKBONE,
    HEAD_FILE,
    MANIFEST_FILE,
    REFERENCE_FILE,
    ExportedBackbone,
    ExportSpec,
    FeatureBased,
    ImageSource,
    Incumbent,
    JobSpec,
    Manifest,
    RankSpec,
    Record,
    encode,
    form_name,
)
from service.domain import LeftOutReason, ReadSummary
from service.ingest.backbone_process import Asked, BackboneChecks
from tests.extractors import MEAN, SIZE, STD, layered, write
from trainer.job import FLOAT_FILE

GUARD_S = 600.0
"""What ends a test that hangs, and decides nothing: no machine is so slow."""
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}

_PRETRAINED_SEED = 1000

MakeFolder = Callable[..., Path]

WITHOUT_TORCH = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", *sys.argv[2:]):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refused())
import msgspec
from pathlib import Path
from typing import Any
from service.contract import JobSpec, RankSpec, encode
from trainer import ranking, train
for told in Path(sys.argv[1]).read_bytes().splitlines():
    try:
        train.run(msgspec.json.decode(told, type=JobSpec), lambda record: None)
    except msgspec.ValidationError:
        ranked = ranking.rank(msgspec.json.decode(told, type=RankSpec), lambda record: None)
        sys.stdout.buffer.write(encode(ranked))
"""


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes noisy images of one colour a class: easy to tell apart, none alike."""

    def make(
        name: str = "images",
        per_class: int = 6,
        classes: tuple[str, ...] = ("blue", "red"),
        seed: int = 0,
        side: int = 48,
    ) -> Path:
        rng = np.random.default_rng(seed)
        for label in classes:
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for n in range(per_class):
                coarse = rng.normal(0, 20, (4, 4, 3)).repeat(side // 4, 0).repeat(side // 4, 1)
                noise = coarse + rng.normal(0, 30, (side, side, 3))
                pixels = (np.array(COLOURS[label]) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
        return tmp_path / name

    return make


def source_of(folder: Path) -> ImageSource:
    """Names a folder of images in a spec."""
    return ImageSource(folder=str(folder))


MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def make_spec(tmp_path: Path) -> MakeSpec:
    def make(folder: Path, **changes: object) -> JobSpec:
        fields: dict[str, object] = {
            "job_id": "job-1",
            "model": "colours",
            "data": source_of(folder),
            "out_dir": str(tmp_path / "out"),
            "method": FeatureBased(),
            "weights_dir": str(tmp_path / "weights"),
            "device": "cpu",
            "provider": "cpu",
            "threads": 1,
        }
        return JobSpec(**{**fields, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def registered_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three layers, as the service keeps it when somebody registers it."""
    folder = tmp_path_factory.mktemp("registered")
    given, file = write(folder / "given.onnx", layered()), folder / "kept.onnx"
    asked = Asked(size=SIZE, mean=MEAN, std=STD)
    BackboneChecks(os.environ).check(given, file, asked, lambda: None)
    return file


def registered(file: Path) -> dict[str, Any]:
    """A registered backbone as a spec names it, and its file."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    weights = f"sha256:{digest[:16]}"
    return {
        "backbone": "onnx/tiny",
        "weights": weights,
        "exported": [ExportedBackbone(weights, digest, "MIT")],
        "files": {digest: str(file)},
    }


@pytest.fixture(scope="session")
def default_forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The forms of the default backbone as a spec names them, and their files.

    Those that this environment keeps of these sources; else they are made and kept in it.
    """
    folder = prepared.environment_folder()
    found = prepared.find(folder, DEFAULT_BACKBONE)
    if found is None:
        from trainer import export

        out = tmp_path_factory.mktemp("default")
        spec = ExportSpec(
            backbone=DEFAULT_BACKBONE, out_dir=str(out), weights_dir=str(out), precision="auto"
        )
        found = export.run(spec), out
        if prepared.is_own_environment():
            with suppress(OSError):
                prepared.keep(folder, DEFAULT_BACKBONE, found[0], out)
    exported, kept = found
    files = {form.digest: str(kept / f"{form.digest}.onnx") for form in exported.forms}
    (reference,) = (form.reference for form in exported.forms if form.reference)
    files[reference] = str(kept / REFERENCE_FILE)
    return {"exported": exported.forms, "files": files}


def incumbent(out: Path, manifest: Manifest, **changes: object) -> dict[str, object]:
    """A version as a spec names it, and its files on this machine."""
    named = {
        manifest.backbone_digest: out / BACKBONE_FILE,
        hashlib.sha256((out / HEAD_FILE).read_bytes()).hexdigest(): out / HEAD_FILE,
        "answers": out / ANSWERS_FILE,
    }
    backbone, head, answers = named
    found = Incumbent(
        version=1, backbone_digest=backbone, head_digest=head, answers_digest=answers, **changes
    )  # type: ignore[arg-type]
    return {"incumbent": found, "files": {key: str(path) for key, path in named.items()}}


def exported_of(manifest: Manifest, out: Path) -> dict[str, object]:
    """The forms of a backbone that an earlier job made as a spec names them, and their files."""
    paths = [out / BACKBONE_FILE, out / REFERENCE_FILE]
    if manifest.serving_precision == "int8":
        paths.append(out / FLOAT_FILE)
    files = {hashlib.sha256(path.read_bytes()).hexdigest(): str(path) for path in paths}
    backbone, reference, *floating = files
    assert backbone == manifest.backbone_digest
    known = [ExportedBackbone(manifest.weights, each, reference=reference) for each in floating]
    if floating:
        known.append(ExportedBackbone(form_name(manifest.weights, "int8"), backbone))
    else:
        known.append(ExportedBackbone(manifest.weights, backbone, reference=reference))
    return {"exported": known, "files": files}


def without_torch(specs: Sequence[JobSpec | RankSpec], tmp_path: Path, *refused: str) -> str:
    """Runs jobs and rankings where PyTorch cannot be imported; returns what they printed."""
    file = tmp_path / "spec.json"
    file.write_bytes(b"\n".join(map(encode, specs)))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(file), *refused],
        capture_output=True,
        text=True,
        check=False,
        timeout=GUARD_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def made_without_torch(spec: JobSpec, tmp_path: Path, *refused: str) -> Manifest:
    without_torch([spec], tmp_path, *refused)
    return manifest_of(spec)


def manifest_of(spec: JobSpec) -> Manifest:
    """Reads what a job that was done left."""
    return msgspec.json.decode((Path(spec.out_dir) / MANIFEST_FILE).read_bytes(), type=Manifest)


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a network of a few thousand weights behind every backbone's name.

    For jobs of which something else is looked at than what a real network is worth:
    its training, its export and its check take milliseconds.
    """
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what the fixture `small_network` does, for as long as is said."""
    # Imported late: many files here need no torch.
    from tests.trainer.small_network import small_backbone
    from trainer import backbones

    def load(_backbone: str, weights: str, seed: int, _folder: Path) -> backbones.Backbone:
        return small_backbone(seed if weights == "random" else _PRETRAINED_SEED)

    monkeypatch.setattr(backbones, "load", load)
    monkeypatch.setattr(backbones, "classifier", lambda *_: None)


class Told(list[Record]):
    """Collects records."""

    def of(self, kind: type) -> list[Record]:
        return [record for record in self if isinstance(record, kind)]


@pytest.fixture
def told() -> Told:
    return Told()


def left_out(summary: ReadSummary, reason: LeftOutReason | None = None) -> set[str]:
    """Names what was left out, for whatever reason or for one."""
    return {file.path for file in summary.files if reason in (None, file.reason)}
