"""Whole jobs in this process, on small images."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from service.contract import (
    BACKBONE_FILE,
    HEAD_FILE,
    Augmentation,
    DataFound,
    EpochEnded,
    FeatureBased,
    Finished,
    Gate,
    Method,
    ModelBased,
    Note,
)
from service.domain import Manifest
from service.engine import export as exporting
from service.engine import head as heads
from service.engine import preprocess
from service.errors import GraftError, InvalidInput, Reason, WrongState
from tests.trainer.conftest import (
    MakeFolder,
    MakeSpec,
    Told,
    exported_of,
    made_without_torch,
    source_of,
)
from trainer import backbones, compute, data, export, job, stages, train
from trainer.methods import model_based
from trainer.recipes import settings

BLANK = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)


def run(spec: object, told: Told) -> Manifest:
    return train.run(spec, told.append)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_network")
def test_feature_based_transfer_end_to_end(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(classes=("blue", "green", "red"), per_class=8)
    spec = make_spec(folder, labels={"team": "birds"})
    manifest = run(spec, told)
    out = Path(spec.out_dir)

    (figure,) = manifest.figures
    assert (figure.measured_on, figure.accuracy) == ("cross_validation", 1.0)
    assert manifest.headline == figure
    assert manifest.parity.max_difference < 1e-3
    assert (manifest.parity.top1_agreement, manifest.parity.images) == (1.0, 8)
    # All are learned from, and each is measured by heads that did not learn from it.
    assert (manifest.train_count, figure.count) == (24, 24)
    assert (manifest.method, manifest.backbone) == ("feature_based", "efficientnet_lite0")
    assert manifest.hyperparameters["l2_chosen_by"] == "cross-validation"
    assert manifest.labels == {"team": "birds"}
    assert {"python", "torch", "onnxruntime-gpu"} <= set(manifest.versions)
    assert msgspec.json.decode((out / "manifest.json").read_bytes(), type=Manifest) == manifest

    assert told[-1] == Finished(1.0, 24)
    assert len(told.of(EpochEnded)) == 1
    assert len(told.of(DataFound)) == 1

    # The composed file gives the head's own answer, with nothing but ONNX Runtime and PIL.
    head = heads.load((out / HEAD_FILE).read_bytes())
    backbone = (out / BACKBONE_FILE).read_bytes()
    composed = exporting.compose(backbone, head, {"model": "colours"}, manifest.decoding)
    session = onnxruntime.InferenceSession(composed, providers=["CPUExecutionProvider"])
    pixels = np.stack(
        [np.asarray(Image.open(p).convert("RGB").resize((224, 224))) for p in folder.rglob("*.png")]
    )
    (probabilities,) = session.run(None, {session.get_inputs()[0].name: pixels})
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    answered = [labels[i] for i in probabilities.argmax(axis=1)]
    assert answered == [p.parent.name for p in folder.rglob("*.png")]
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)

    # A second job shares the first one's backbone and gives the same head.
    again_out, known = tmp_path / "again", exported_of(manifest, out)
    again = run(make_spec(folder, out_dir=str(again_out), **known), Told())
    assert again.backbone_digest == manifest.backbone_digest
    assert not (again_out / BACKBONE_FILE).exists()
    assert (again_out / HEAD_FILE).read_bytes() == (out / HEAD_FILE).read_bytes()


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("weights", ["random", ""], ids=["all layers", "the last stages"])
def test_model_based_transfer_trains_the_network_and_tells_every_epoch(
    weights: str, make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    folder = make_folder(per_class=8)
    (folder / "red" / "notes.txt").write_text("no image")
    spec = make_spec(
        folder,
        method=ModelBased(epochs=3, batch_size=4, learning_rate=0.01, precision="fp32"),
        backbone="resnet18",
        weights=weights,
        augmentation=Augmentation(mirror=False),
    )
    manifest = run(spec, told)
    epochs = [e for e in told.of(EpochEnded) if isinstance(e, EpochEnded)]
    assert [e.epoch for e in epochs] == [1, 2, 3]
    assert all(e.images_per_second > 0 and np.isfinite(e.train_loss) for e in epochs)
    assert epochs[-1].eta_s == 0
    assert manifest.weights == ("random:0" if weights else "IMAGENET1K_V1")
    assert manifest.method == "model_based"
    used = manifest.hyperparameters
    assert (used["keeps_maps"], used["train_from_stage"]) == (
        (False, "") if weights else (True, "top")
    )
    assert (used["mirror"], used["min_scale"]) == (False, 0.08 if weights else 0.4)
    assert manifest.parity.max_difference < 1e-3
    # The last epoch's average is what serves: no epoch was chosen.
    (figure,) = manifest.figures
    assert figure.measured_on == "held_out"
    assert figure.accuracy == pytest.approx(epochs[-1].validation_accuracy)
    assert manifest.train_count + figure.count == 16
    notes = [n.text for n in told.of(Note) if isinstance(n, Note)]
    assert any("never pretrained" in text for text in notes) == bool(weights)

    report = json.loads((Path(spec.out_dir) / "report.json").read_bytes())
    assert len(report["epochs"]) == 3
    assert report["left_out"]["rows"][0]["examples"][0].startswith("red/notes.txt (")
    page = (Path(spec.out_dir) / "report.html").read_text()
    assert "<polyline" in page
    assert "data:image/jpeg;base64," in page
    assert "red/<wbr>notes.txt" in page
    # Self-contained: nothing is fetched, nothing runs.
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.usefixtures("small_network")
def test_a_class_named_like_markup_is_text_in_the_report(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    folder = make_folder(per_class=4)
    (folder / "red").rename(folder / "<b>red&")
    spec = make_spec(folder, backbone="resnet18", weights="random", method=FeatureBased(l2=0.1))
    run(spec, told)
    page = (Path(spec.out_dir) / "report.html").read_text()
    assert "<b>red" not in page
    assert "&lt;b&gt;red&amp;" in page


@pytest.mark.usefixtures("small_network")
def test_an_export_that_differs_from_pytorch_is_not_published(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.to_onnx

    def sabotaged(backbone: torch.nn.Module, path: Path) -> None:
        with torch.no_grad():
            backbone.mean += 20
            real(backbone, path)
            backbone.mean -= 20

    monkeypatch.setattr(export, "to_onnx", sabotaged)
    spec = make_spec(make_folder(per_class=5), method=FeatureBased(l2=1e-4))
    with pytest.raises(GraftError) as caught:
        run(spec, told)
    assert caught.value.reason is Reason.PARITY_FAILED
    assert not (Path(spec.out_dir) / "manifest.json").exists()
    assert not told.of(Finished)


@pytest.mark.usefixtures("small_network")
def test_the_same_seed_gives_the_same_model(
    make_folder: MakeFolder, make_spec: MakeSpec, tmp_path: Path
) -> None:
    folder = make_folder(per_class=4)
    heads_of = []
    for n, seed in enumerate((-5, -5, 6)):
        out = tmp_path / f"out{n}"
        spec = make_spec(
            folder,
            out_dir=str(out),
            seed=seed,
            method=ModelBased(epochs=1, batch_size=4, precision="fp32"),
            backbone="resnet18",
            weights="random",
            threads=1,
        )
        run(spec, Told())
        heads_of.append((out / HEAD_FILE).read_bytes())
    assert heads_of[0] == heads_of[1] != heads_of[2]


def test_frozen_stages_and_batch_norm_stay_as_they_were(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=4)
    method = ModelBased(
        recipe="classic",
        epochs=1,
        batch_size=4,
        learning_rate=0.1,
        train_from_stage="layer4",
        freeze_batch_norm=True,
    )
    spec = make_spec(folder, method=method, backbone="timm/test_resnet", weights="random")
    backbone = backbones.load("timm/test_resnet", "random", 0, tmp_path)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    loaded = data.load(folder)
    part = loaded.train
    model_based.train(
        spec, method, part, part.none(), loaded.classes, backbone, pytest.fail, None, told.append
    )
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(name.startswith("trunk.layer4") and ".bn" not in name for name in changed)


@pytest.mark.usefixtures("small_network")
def test_a_loss_that_is_no_number_ends_the_job_with_advice(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    method = ModelBased(recipe="classic", epochs=3, learning_rate=1e30)
    spec = make_spec(make_folder(per_class=4), method=method, backbone="resnet18", weights="random")
    with pytest.raises(GraftError, match="lower learning rate") as caught:
        run(spec, told)
    assert caught.value.reason is Reason.TRAINING_FAILED


@pytest.mark.usefixtures("small_network")
def test_epochs_are_planned_to_fit_the_time_budget(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beside steps and a budget of days it does not matter how long anything takes here.
    monkeypatch.setattr(compute, "step_s", lambda *_: 100_000.0)
    spec = make_spec(
        make_folder(per_class=4),
        method=ModelBased(recipe="classic", epochs=10_000, batch_size=4),
        backbone="resnet18",
        weights="random",
        time_budget_s=1_000_000.0,
    )
    manifest = run(spec, told)
    # Of 2 steps each, in the 850 000 s that export, check and report leave.
    assert manifest.hyperparameters["epochs"] == len(told.of(EpochEnded)) == 4
    assert any("time budget" in n.text for n in told.of(Note) if isinstance(n, Note))


@pytest.mark.usefixtures("small_network")
def test_cuda_that_is_not_there_is_said(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WrongState) as caught:
        run(make_spec(make_folder(), device="cuda"), told)
    assert caught.value.reason is Reason.DEVICE_UNAVAILABLE


def test_the_classic_recipe_is_the_one_that_users_know() -> None:
    classic = settings(ModelBased(recipe="classic"))
    assert (classic.epochs, classic.batch_size) == (25, 4)
    assert (classic.learning_rate, classic.momentum) == (0.001, 0.9)
    assert (classic.weight_decay, classic.label_smoothing) == (0, 0)
    assert (classic.optimizer, classic.batch_norm, classic.min_scale) == ("sgd", "learned", 0.08)
    own = settings(ModelBased(recipe="classic", epochs=3, freeze_batch_norm=True))
    assert (own.epochs, own.batch_norm, own.batch_size) == (3, "frozen", 4)
    device = torch.device("cpu")
    network = torch.nn.Flatten()
    chosen, _ = compute.choose_precision(
        settings(ModelBased(recipe="classic")).precision, device, network, BLANK
    )
    assert chosen == "fp32"
    with pytest.raises(InvalidInput, match="fp16 needs a GPU"):
        compute.choose_precision("fp16", device, network, BLANK)


@pytest.mark.parametrize(("ratio", "expected"), [(2.0, "bf16"), (1.1, "fp32")])
def test_a_cpu_with_bf16_uses_it_where_a_probe_finds_it_faster(
    ratio: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"fp32": ratio, "bf16": 1.0}
    monkeypatch.setattr(compute, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(compute, "step_s", lambda precision, *_: times[precision])
    device, network = torch.device("cpu"), torch.nn.Flatten()
    precision = settings(ModelBased()).precision
    assert compute.choose_precision(precision, device, network, BLANK)[0] == expected
    monkeypatch.setattr(compute, "_cpu_has_bf16", lambda: False)
    assert compute.choose_precision(precision, device, network, BLANK)[0] == "fp32"


def test_a_probe_leaves_the_network_as_it_was() -> None:
    class Images(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.norm(images.permute(0, 3, 1, 2).float()).flatten(1)

    network = Images()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert compute.step_s("fp32", torch.device("cpu"), network, BLANK) > 0
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_training_sees_the_very_pixels_that_serving_makes(
    make_folder: MakeFolder,
) -> None:
    loaded = data.load(make_folder(side=300))
    path = loaded.train.locations[0].path
    assert (loaded.train.decode([0])[0] == preprocess.decode(path.read_bytes())).all()


@pytest.mark.usefixtures("small_network")
def test_a_repeated_job_computes_no_features_and_imports_no_torch(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=20)
    cache = str(tmp_path / "features.sqlite")
    fields: dict[str, object] = {"feature_cache": cache}
    first = run(make_spec(folder, **fields), told)
    fields |= exported_of(first, tmp_path / "out")
    spec = make_spec(folder, out_dir=str(tmp_path / "again"), **fields)
    again = made_without_torch(spec, tmp_path, "onnx", "sklearn")
    # It was compared with what PyTorch made, without PyTorch.
    assert again.parity == first.parity and again.parity.max_difference < 1e-3
    assert again.reference_digest == first.reference_digest != ""
    assert again.backbone_difference == first.backbone_difference
    assert first.backbone_difference is not None and first.backbone_difference < 1e-3
    assert again.figures == first.figures
    assert (tmp_path / "again" / HEAD_FILE).read_bytes() == (
        tmp_path / "out" / HEAD_FILE
    ).read_bytes()


@pytest.mark.usefixtures("small_network")
def test_a_damaged_cache_costs_a_word_and_nothing_else(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    cache = tmp_path / "features.sqlite"
    cache.write_bytes(b"\0no database" * 1000)
    method = FeatureBased(l2=0.1)
    spec = make_spec(
        make_folder(),
        backbone="resnet18",
        weights="random",
        method=method,
        feature_cache=str(cache),
    )
    assert run(spec, told).train_count == 12
    notes = [n.text for n in told.of(Note) if isinstance(n, Note)]
    assert sum("was damaged" in text for text in notes) == 1


@pytest.mark.usefixtures("small_network")
def test_the_manifest_says_where_the_time_went(
    make_folder: MakeFolder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that goes on by a second whenever the job tells something.
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    for module in (train, job, stages):
        monkeypatch.setattr(module, "time", clock)

    def tell(_: object) -> None:
        now[0] += 1

    method = FeatureBased(l2=0.1)
    spec = make_spec(make_folder(), backbone="resnet18", weights="random", method=method)
    manifest = train.run(spec, tell)
    assert {"reading", "training", "checking"} <= set(manifest.stages_s)
    assert all(manifest.stages_s[stage] > 0 for stage in ("reading", "training", "checking"))
    assert sum(manifest.stages_s.values()) == manifest.duration_s


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(
    "method",
    [
        FeatureBased(l2=0.1),
        ModelBased(epochs=8, batch_size=4, learning_rate=0.1, precision="fp32"),
    ],
    ids=["feature_based", "model_based"],
)
def test_a_test_part_is_measured_with_what_serves_and_nothing_is_chosen_on_it(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path, method: Method
) -> None:
    folder = make_folder("parts/train", per_class=12).parent
    make_folder("parts/val", per_class=4, seed=1)
    # Half of them under the other's name: a choice by these images would go the wrong way.
    tested = make_folder("parts/test", per_class=4, seed=2)
    for n in range(2):
        (tested / "red" / f"{n}.png").rename(tested / "blue" / f"was-red-{n}.png")
        (tested / "blue" / f"{n}.png").rename(tested / "red" / f"was-blue-{n}.png")
    fields: dict[str, object] = {
        "method": method,
        "backbone": "resnet18",
        "weights": "random",
        "threads": 1,
        "gate": Gate(min_accuracy=0.9),
    }
    manifest = run(make_spec(folder, **fields), told)

    served = exporting.compose(
        (tmp_path / "out" / BACKBONE_FILE).read_bytes(),
        heads.load((tmp_path / "out" / HEAD_FILE).read_bytes()),
        {},
        manifest.decoding,
    )
    session = onnxruntime.InferenceSession(served, providers=["CPUExecutionProvider"])
    found = data.load(folder).test
    (answers,) = session.run(None, {session.get_inputs()[0].name: found.decode()})
    right = answers.argmax(axis=1) == found.targets
    losses = -np.log(answers[np.arange(len(found)), found.targets])
    tested_on, *others = manifest.figures
    assert (tested_on.measured_on, tested_on.count) == ("test", 8)
    assert tested_on.accuracy == pytest.approx(right.mean())
    assert tested_on.loss == pytest.approx(losses.mean(), rel=1e-3)
    assert tested_on.accuracy < 0.9 < others[0].accuracy
    assert others[0].measured_on == "validation"
    # What the headline is of is what the gate goes by.
    assert [check.verdict for check in manifest.gate_checks] == ["failed"]
    (counted,) = told.of(DataFound)
    assert isinstance(counted, DataFound)
    assert [(c.train, c.validation, c.test) for c in counted.classes] == [(12, 4, 4), (12, 4, 4)]

    shutil.rmtree(tested)
    untested = run(make_spec(folder, out_dir=str(tmp_path / "untested"), **fields), Told())
    assert untested.figures == others
    assert untested.temperature == manifest.temperature
    assert (tmp_path / "untested" / HEAD_FILE).read_bytes() == (
        tmp_path / "out" / HEAD_FILE
    ).read_bytes()


@pytest.mark.usefixtures("small_network")
def test_augmented_views_and_a_base_are_learned_from(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    base = make_folder("base", per_class=6)
    own = make_folder("own", per_class=6, classes=("green",), seed=1)
    shutil.copytree(make_folder("more", per_class=4, seed=2) / "red", own / "red")
    spec = make_spec(own, method=FeatureBased(augmented_views=2), base_data=[source_of(base)])
    manifest = run(spec, told)
    assert manifest.classes == ["blue", "green", "red"]
    assert manifest.hyperparameters["augmented_views"] == 2
    assert manifest.headline is not None
    assert manifest.headline.accuracy == 1.0
    page = (Path(spec.out_dir) / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
