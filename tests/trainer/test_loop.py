"""The training loop, on a network so small that an epoch takes a moment."""

import copy
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from service.inference.head import Head
from service.jobs.contract import (
    NETWORK_TECHNIQUES,
    DomainAdaptation,
    EpochEnded,
    ModelBased,
    Note,
)
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from tests.trainer.small_network import small_backbone
from trainer import backbones, compute, data, recipes
from trainer.backbones import Backbone
from trainer.data import Data, Files
from trainer.folding import folded
from trainer.methods import model_based, network_adaptation, tuning
from trainer.methods.loop import Result
from trainer.methods.objective import Objective
from trainer.recipes import adaptation_settings, rate_for, settings

CPU = torch.device("cpu")


def head_for(backbone: Backbone, found: Data) -> Head:
    """Fitted by least squares to the features of the training images."""
    with torch.no_grad():
        features = backbone.eval()(torch.from_numpy(found.train.decode())).numpy()
    wanted = np.eye(len(found.classes))[found.train.targets]
    centre, scale = features.mean(axis=0), features.std()
    solution = np.linalg.lstsq((features - centre) / scale, wanted - 0.5, rcond=0.1)[0].T / scale
    return Head(
        (20 * solution).astype(np.float32),
        (-20 * solution @ centre).astype(np.float32),
        found.classes,
    )


class Trained:
    """A job of the small network."""

    def __init__(self, folder: Path, make_spec: MakeSpec, method: ModelBased, told: Told) -> None:
        self.backbone = small_backbone()
        self.spec = make_spec(folder, method=method)
        self.found = data.load(folder, 0.25, 0)
        self.method, self.told = method, told

    def run(self, deadline: float | None = None) -> Result:
        return model_based.train(
            self.spec,
            self.method,
            self.found,
            self.backbone,
            lambda: head_for(self.backbone, self.found),
            deadline,
            self.told.append,
        )


def notes(told: Told) -> list[str]:
    return [note.text for note in told.of(Note) if isinstance(note, Note)]


def test_the_modern_recipe_is_never_worse_than_the_head_alone(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    # Epochs that only do harm, early stopping after two of them.
    method = ModelBased(
        epochs=9, batch_size=4, learning_rate=3.0, precision="fp32", early_stopping_patience=2
    )
    job = Trained(make_folder(per_class=8), make_spec, method, told)
    before = copy.deepcopy(job.backbone.state_dict())
    head, used, *_ = job.run()
    assert (used["best_epoch"], used["best_weights"]) == (0, "fitted head")
    assert used["head_only_accuracy"] == 1.0
    assert all(torch.equal(v, before[k]) for k, v in job.backbone.state_dict().items())
    np.testing.assert_array_equal(head.weight, head_for(job.backbone, job.found).weight)
    epochs = [e for e in told.of(EpochEnded) if isinstance(e, EpochEnded)]
    assert 3 <= len(epochs) < 9
    assert epochs[-1].epochs == used["epochs"] == len(epochs)
    assert any("the head alone reaches 1.0000" in text for text in notes(told))


def test_training_from_random_weights_learns_batch_norm_and_begins_with_no_fitted_head(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    method = ModelBased(epochs=6, batch_size=4, learning_rate=0.05, precision="fp32")
    job = Trained(make_folder(per_class=8), make_spec, method, told)
    job.spec = make_spec(Path(job.spec.data_dir), method=method, weights="random")
    norm = job.backbone.stages["stem"][0].get_submodule("1")
    before = norm.running_mean.clone()
    head, used, *_ = model_based.train(
        job.spec, method, job.found, job.backbone, pytest.fail, None, told.append
    )
    assert used["head_only_accuracy"] is None
    assert used["best_weights"] in ("trained", "averaged")
    assert not torch.equal(norm.running_mean, before)
    epochs = [e for e in told.of(EpochEnded) if isinstance(e, EpochEnded)]
    best = max(epochs, key=lambda e: (e.validation_accuracy, -e.validation_loss))
    assert used["best_epoch"] == best.epoch
    # What is handed back is what was judged.
    with torch.no_grad():
        features = job.backbone(torch.from_numpy(job.found.validation.decode())).numpy()
    right = head.probabilities(features).argmax(axis=1) == job.found.validation.targets
    assert right.mean() == pytest.approx(best.validation_accuracy)


def test_the_batch_size_is_found_told_and_written_down(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "choose_batch_size", lambda *_: (3, "it is the fastest"))
    job = Trained(make_folder(per_class=4), make_spec, ModelBased(epochs=1), told)
    _, used, *_ = job.run()
    assert (used["batch_size"], used["batch_size_chosen_by"]) == (3, "probe")
    assert used["learning_rate"] == pytest.approx(0.003 * (3 / 16) ** 0.5)
    assert "batch size 3: it is the fastest" in notes(told)


@pytest.mark.parametrize(
    ("images", "seconds", "expected"),
    [
        (10_000, {8: 8.0, 16: 8.0, 32: 8.0, 64: 8.0}, 64),
        (10_000, {8: 8.0, 16: 10.0, 32: 19.8}, 16),
        (10_000, {8: 8.0, 16: 15.9}, 8),
        (130, {8: 8.0, 16: 8.0}, 16),
        (3, {8: 8.0}, 8),
        (10_000, {8: 8.0, 16: 8.0, 32: None}, 16),
    ],
    ids=["it pays", "it ends to pay", "hardly faster", "few images", "fewer", "out of memory"],
)
def test_batches_grow_as_long_as_that_pays(
    images: int,
    seconds: dict[int, float | None],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step_s(precision: str, device: torch.device, network: nn.Module, size: int) -> float:
        if (found := seconds[size]) is None:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(compute, "step_s", step_s)
    monkeypatch.setattr(compute, "_PROBE_S", math.inf)
    size, why = compute.choose_batch_size("fp32", CPU, nn.Flatten(), images)
    assert size == expected
    assert "images a second" in why


def test_the_probe_runs_the_images_of_both_domains_and_ends_where_a_cpu_has_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def step_s(precision: str, device: torch.device, network: nn.Module, size: int) -> float:
        asked.append(size)
        # Torch's own error on a CPU, of which no machine has so much.
        return 8.0 if size < 64 else float(torch.empty(2**60, dtype=torch.uint8)[0])

    monkeypatch.setattr(compute, "step_s", step_s)
    monkeypatch.setattr(compute, "_PROBE_S", math.inf)
    size, _ = compute.choose_batch_size("fp32", CPU, nn.Flatten(), 10_000, 2)
    assert (size, asked) == (16, [16, 32, 64])

    def fail(*_: object) -> float:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(compute, "step_s", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        compute.choose_batch_size("fp32", CPU, nn.Flatten(), 10_000)


def test_an_adaptations_batch_size_is_probed_with_both_domains(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def step_s(precision: str, device: torch.device, network: nn.Module, size: int) -> float:
        asked.append(size)
        return 0.01

    monkeypatch.setattr(compute, "step_s", step_s)
    monkeypatch.setattr(compute, "_cpu_has_bf16", lambda: True)
    folder = make_folder(per_class=6)
    found, backbone = data.load(folder, 0.25, 0), small_backbone()
    method = DomainAdaptation(technique="deep_coral", epochs=1)
    network_adaptation.train(
        make_spec(folder, method=method),
        method,
        found,
        found.validation,
        backbone,
        lambda: head_for(backbone, found),
        time.monotonic() + 3600,
        told.append,
    )
    # The batch size of 8, and the plan of the epochs.
    assert asked[-2:] == [16, 16]


@pytest.mark.parametrize(
    ("recipe", "weights"), [("classic", ""), ("modern", "random")], ids=["classic", "random"]
)
def test_the_first_epoch_ends_with_the_time_where_there_is_no_fitted_head_to_keep(
    recipe: str,
    weights: str,
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = []
    real = Objective.forward

    def counted(self: Objective, *given: object) -> torch.Tensor:
        steps.append(given)
        return real(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "forward", counted)
    monkeypatch.setattr(compute, "step_s", lambda *_: 0.01)
    method = ModelBased(recipe=recipe, epochs=3, batch_size=2, precision="fp32")  # type: ignore[arg-type]
    job = Trained(make_folder(per_class=16), make_spec, method, told)
    job.spec = make_spec(Path(job.spec.data_dir), method=method, weights=weights)
    _, used, *_ = job.run(time.monotonic() - 1)
    assert len(steps) == 1
    assert (used["epochs"], used["best_epoch"], used["best_weights"]) == (1, 1, "trained")


def test_epochs_are_planned_before_the_first_and_that_is_said(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 steps an epoch and room for three epochs and a half: hours do not matter.
    monkeypatch.setattr(compute, "step_s", lambda *_: 10_000.0)
    method = ModelBased(epochs=50, batch_size=4, precision="fp32", early_stopping_patience=0)
    job = Trained(make_folder(per_class=8), make_spec, method, told)
    _, used, *_ = job.run(time.monotonic() + 105_000)
    assert (used["epochs"], used["epochs_planned"]) == (3, 50)
    said = next(i for i, record in enumerate(told) if "room for 3 epochs of the 50" in str(record))
    first = next(i for i, record in enumerate(told) if isinstance(record, EpochEnded))
    assert said < first


def test_early_stages_move_least_and_only_weights_are_penalised() -> None:
    backbone, classifier, own = small_backbone(), nn.Linear(16, 2), nn.Linear(16, 1)
    recipe = settings(ModelBased())
    tuning.freeze(backbone, recipe)
    factor, decay = {}, {}
    for group in tuning.groups(backbone, classifier, own, recipe):
        for parameter in group["params"]:
            factor[parameter], decay[parameter] = group["factor"], group["weight_decay"]
    stem, top = backbone.stages["stem"][0][0], backbone.stages["top"][0][0]
    assert factor[stem.weight] == pytest.approx(0.1)
    assert factor[top.weight] == pytest.approx(0.1**0.5)
    assert factor[classifier.weight] == 1
    assert factor[own.weight] > 1
    assert (decay[top.weight], decay[top.bias]) == (1e-4, 0)
    moving = [p for m in (backbone, classifier, own) for p in m.parameters() if p.requires_grad]
    assert set(factor) == set(moving)
    # The yardstick trains all alike.
    classic = tuning.groups(backbone, classifier, own, settings(ModelBased(recipe="classic")))
    assert {group["factor"] for group in classic[:-2]} == {1.0}


def test_the_schedule_warms_up_and_goes_down_to_nothing() -> None:
    recipe = settings(ModelBased())
    parts = [tuning.part_of_rate(recipe, done, 10) for done in (0, 0.5, 1, 5.5, 10)]
    assert parts == pytest.approx([0.1, 0.55, 1, 0.5, 0])
    classic = settings(ModelBased(recipe="classic"))
    assert [tuning.part_of_rate(classic, e, 25) for e in (0, 6.9, 7, 14)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )
    assert rate_for(settings(ModelBased(learning_rate=0.5)), 64) == 0.5


def test_a_folded_trunk_gives_the_same_features_and_the_same_gradients() -> None:
    plain = small_backbone()
    norm = plain.stages["stem"][0].get_submodule("1")
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    for module in (norm,):
        module.eval().requires_grad_(False)
    fast = folded(plain.trunk)
    assert fast is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules() if m is not norm)
    x = torch.randn(2, 3, 224, 224)
    (plain.trunk(x) ** 2).sum().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    torch.testing.assert_close(fast(x), plain.trunk(x), rtol=1e-4, atol=1e-5)
    (fast(x) ** 2).sum().backward()
    for p, gradient in zip(plain.parameters(), expected, strict=True):
        if gradient is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-4)


def test_the_default_backbone_is_folded_where_its_batch_norms_are_frozen(tmp_path: Path) -> None:
    trunk = backbones.load("efficientnet_lite0", "", 0, tmp_path).trunk.eval().requires_grad_(False)
    fast = folded(trunk)
    assert fast is not None
    # All convolutions but those that pad by themselves, which are another class.
    plain = sum(type(module) is nn.Conv2d for module in trunk.modules())
    assert sum(name.startswith("folded") for name, _ in fast.named_children()) == plain > 40
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(x), trunk(x), rtol=1e-3, atol=1e-4)


def test_a_trunk_without_batch_norm_or_with_code_that_cannot_be_read_is_not_folded() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    assert folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())) is None
    assert folded(Branching()) is None


def test_training_ends_well_where_no_checkpoint_can_be_written(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    method = ModelBased(epochs=1, batch_size=4, precision="fp32")
    job = Trained(make_folder(per_class=4), make_spec, method, told)
    (tmp_path / "file").write_text("no folder")
    job.spec = make_spec(
        Path(job.spec.data_dir), method=method, checkpoint_dir=str(tmp_path / "file" / "kept")
    )
    _, used, *_ = job.run()
    assert used["epochs"] == 1
    assert any("no checkpoint could be written" in text for text in notes(told))


@pytest.mark.parametrize("technique", NETWORK_TECHNIQUES)
def test_each_technique_trains_the_network_on_without_a_class_of_the_target(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, technique: str
) -> None:
    folder = make_folder(per_class=8)
    method = DomainAdaptation(
        technique=technique,  # type: ignore[arg-type]
        epochs=2,
        batch_size=4,
        always_adapt=True,
    )
    found = data.load(folder, 0.25, 0)
    other = data.load(make_folder("other", per_class=5, seed=9), 0.2, 0).train
    target = Files(other.paths, other.digests)
    backbone = small_backbone()
    before = copy.deepcopy(backbone.state_dict())
    head, used, device, precision = network_adaptation.train(
        make_spec(folder, method=method),
        method,
        found,
        target,
        backbone,
        lambda: head_for(backbone, found),
        None,
        told.append,
    )
    assert (used["technique"], used["epochs"], device) == (technique, 2, "cpu")
    assert used["best_epoch"] in (1, 2)
    assert head.weight.shape == (2, 16)
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert not any("1." in name.removeprefix("trunk.0.") and "trunk.0" in name for name in changed)
    assert len(told.of(EpochEnded)) == 2
    assert precision in ("fp32", "bf16")


def test_what_adapts_must_look_better_than_the_head_alone_unless_it_is_asked_for(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    folder = make_folder(per_class=8)
    found, backbone = data.load(folder, 0.25, 0), small_backbone()
    before = copy.deepcopy(backbone.state_dict())
    method = DomainAdaptation(technique="deep_coral", epochs=1, batch_size=4, learning_rate=1e-9)
    _, used, *_ = network_adaptation.train(
        make_spec(folder, method=method),
        method,
        found,
        found.validation,
        backbone,
        lambda: head_for(backbone, found),
        None,
        told.append,
    )
    assert (used["best_epoch"], used["best_weights"]) == (0, "fitted head")
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_adaptation_has_the_modern_recipe_without_early_stopping() -> None:
    recipe = adaptation_settings(DomainAdaptation(technique="dann"), is_pretrained=True)
    assert recipe.early_stopping_patience == 0
    assert recipe.freeze_batch_norm
    assert recipe.epochs < settings(ModelBased()).epochs
    own = adaptation_settings(DomainAdaptation(epochs=3, batch_size=5, learning_rate=0.1), True)
    assert (own.epochs, own.batch_size, own.learning_rate) == (3, 5, 0.1)
    scratch = recipes.settings(ModelBased(), is_pretrained=False)
    assert (scratch.freeze_batch_norm, scratch.fitted_head) == (False, False)
