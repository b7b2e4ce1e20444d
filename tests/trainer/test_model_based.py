"""Training a network on, one so small that an epoch takes a moment."""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from service.contract import DomainAdaptation, EpochEnded, ModelBased, Note
from service.engine.head import Head
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from tests.trainer.small_network import parts_of, small_backbone
from trainer import backbones, compute, crops, recipes
from trainer.backbones import Backbone
from trainer.data import Part
from trainer.folding import folded
from trainer.images import AsServed, Images
from trainer.methods import model_based
from trainer.methods.model_based import Objective, Outputs, Result
from trainer.recipes import adaptation_settings, batch_size_for, part_of_rate, rate_for, settings


def head_for(backbone: Backbone, learned: Part) -> Head:
    """Fitted by least squares to the features of the training images."""
    with torch.no_grad():
        features = backbone.eval()(torch.from_numpy(learned.decode())).numpy()
    wanted = np.eye(2)[learned.targets]
    centre, scale = features.mean(axis=0), features.std()
    solution = np.linalg.lstsq((features - centre) / scale, wanted - 0.5, rcond=0.1)[0].T / scale
    weight = (20 * solution).astype(np.float32)
    return Head(weight, (-20 * solution @ centre).astype(np.float32), ("blue", "red"))


class Trained:
    """A job of the small network."""

    def __init__(
        self,
        folder: Path,
        make_spec: MakeSpec,
        method: ModelBased,
        told: Told,
        held_out: int = 2,
        **changes: object,
    ) -> None:
        self.backbone = small_backbone()
        self.spec = make_spec(folder, method=method, **changes)
        self.learned, self.held_out, self.classes = parts_of(folder, held_out)
        self.method, self.told = method, told

    def run(self, deadline: float | None = None) -> Result:
        return model_based.train(
            self.spec,
            self.method,
            self.learned,
            self.held_out,
            self.classes,
            self.backbone,
            lambda: head_for(self.backbone, self.learned),
            deadline,
            self.told.append,
        )

    def accuracy(self, head: Head) -> float:
        """Of what was handed back, on the held-out images."""
        with torch.no_grad():
            features = self.backbone(torch.from_numpy(self.held_out.decode())).numpy()
        right = head.probabilities(features).argmax(axis=1) == self.held_out.targets
        return float(right.mean())

    @property
    def epochs(self) -> list[EpochEnded]:
        return [e for e in self.told.of(EpochEnded) if isinstance(e, EpochEnded)]


def notes(told: Told) -> list[str]:
    return [note.text for note in told.of(Note) if isinstance(note, Note)]


def test_the_held_out_images_are_told_of_and_choose_nothing(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    # Epochs that only do harm: whatever chose by the held-out images would keep the start.
    method = ModelBased(epochs=4, batch_size=4, learning_rate=3.0, precision="fp32")
    folder = make_folder(per_class=8)
    job = Trained(folder, make_spec, method, told)
    before = copy.deepcopy(job.backbone.state_dict())
    head, used, *_ = job.run()
    assert [e.epoch for e in job.epochs] == [1, 2, 3, 4]
    assert job.epochs[-1].validation_accuracy == job.accuracy(head)
    assert (used["epochs"], used["kept_weights"]) == (4, "moving average")
    assert any(not torch.equal(v, before[k]) for k, v in job.backbone.state_dict().items())
    # Without held-out images it is the same version, and nothing is told of them.
    other = Trained(folder, make_spec, method, Told())
    other.held_out = other.held_out.take(np.empty(0, np.int64))
    same, *_ = other.run()
    np.testing.assert_array_equal(same.matrix, head.matrix)
    assert {(e.validation_loss, e.validation_accuracy) for e in other.epochs} == {(None, None)}


def test_training_begins_with_the_fitted_head_at_its_own_temperature(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    method = ModelBased(epochs=1, batch_size=4, learning_rate=1e-12, precision="fp32")
    job = Trained(make_folder(per_class=8), make_spec, method, told)
    fitted = head_for(job.backbone, job.learned)
    tempered = Head(2 * fitted.matrix, 2 * fitted.bias, fitted.classes, temperature=2.0)
    head, *_ = model_based.train(
        job.spec, method, job.learned, job.held_out, job.classes, job.backbone,
        lambda: tempered, None, told.append,
    )  # fmt: skip
    np.testing.assert_allclose(head.matrix, fitted.matrix, rtol=1e-3)
    assert (head.temperature, head.classes) == (1.0, ("blue", "red"))


@pytest.mark.parametrize("recipe", ["classic", "auto"])
def test_training_from_random_weights_learns_batch_norm_and_begins_with_no_fitted_head(
    recipe: str, make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    method = ModelBased(recipe=recipe, epochs=6, batch_size=4, learning_rate=0.05)  # type: ignore[arg-type]
    job = Trained(make_folder(per_class=8), make_spec, method, told, weights="random")
    norm = job.backbone.stages["stem"][0].get_submodule("1")
    before = norm.running_mean.clone()
    head, used, _, precision = model_based.train(
        job.spec, method, job.learned, job.held_out, job.classes, job.backbone,
        pytest.fail, None, told.append,
    )  # fmt: skip
    assert not torch.equal(norm.running_mean, before)
    # What is handed back is what was measured last.
    assert job.epochs[-1].validation_accuracy == job.accuracy(head)
    if recipe == "classic":
        assert (used["kept_weights"], precision) == ("last step", "fp32")


@pytest.mark.parametrize(
    ("images", "device", "expected"),
    [
        (2, "cpu", 16),
        (999, "cpu", 16),
        (1_000, "cpu", 32),
        (10_000, "cpu", 64),
        (100_000, "cpu", 64),
        (999, "cuda", 16),
        (100_000, "cuda", 128),
        (1_000_000, "cuda", 256),
    ],
)
def test_the_batch_size_follows_from_the_images_and_the_learning_rate_from_it(
    images: int, device: str, expected: int
) -> None:
    size = batch_size_for(images, device)
    assert size == expected
    assert rate_for(settings(ModelBased()), size) == pytest.approx(0.001 * (size / 16) ** 0.5)


def exhausted(largest: int) -> Callable[..., torch.Tensor]:
    """The loss, where there is no memory for more than `largest` images."""
    real = Objective.forward

    def forward(self: Objective, source: Outputs, *given: object) -> torch.Tensor:
        if len(source.logits) > largest:
            # Torch's own error on a CPU, of which no machine has so much.
            torch.empty(2**60, dtype=torch.uint8)
        return real(self, source, *given)  # type: ignore[arg-type]

    return forward


def test_batches_are_halved_until_memory_is_enough_and_that_is_said(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objective, "forward", exhausted(3))
    job = Trained(make_folder(per_class=10), make_spec, ModelBased(epochs=2), told)
    _, used, *_ = job.run()
    assert (used["batch_size"], used["epochs"]) == (2, 2)
    assert used["learning_rate"] == pytest.approx(0.001 * (2 / 16) ** 0.5)
    said = [text for text in notes(told) if "memory is exhausted" in text]
    assert [int(text.split("have ")[1].split()[0]) for text in said] == [8, 4, 2]


@pytest.mark.parametrize(
    ("largest", "asked"), [(3, 8), (0, None)], ids=["the request's size", "the least size"]
)
def test_batches_that_may_not_be_smaller_end_the_job(
    largest: int,
    asked: int | None,
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Objective, "forward", exhausted(largest))
    method = ModelBased(epochs=2, batch_size=asked)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        Trained(make_folder(per_class=10), make_spec, method, told).run()


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [("classic", ""), ("auto", "random"), ("auto", "")],
    ids=["classic", "random", "pretrained"],
)
def test_the_first_epoch_ends_with_the_time(
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
    job = Trained(make_folder(per_class=16), make_spec, method, told, weights=weights)
    _, used, *_ = job.run(time.monotonic() - 1)
    assert len(steps) == 1
    # An average that is for a good part the start is not handed back.
    assert (used["epochs"], used["kept_weights"]) == (1, "last step")


def test_epochs_are_planned_before_the_first_and_that_is_said(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 steps an epoch, a third of a step to measure, and room for three epochs: hours do not
    # matter.
    monkeypatch.setattr(compute, "step_s", lambda *_: 10_000.0)
    method = ModelBased(epochs=50, batch_size=4, precision="fp32")
    job = Trained(make_folder(per_class=8), make_spec, method, told)
    _, used, *_ = job.run(time.monotonic() + 105_000)
    assert (used["epochs"], used["epochs_planned"]) == (3, 50)
    said = next(i for i, record in enumerate(told) if "room for 3, 50 are" in str(record))
    first = next(i for i, record in enumerate(told) if isinstance(record, EpochEnded))
    assert said < first


def test_an_objective_sees_as_many_images_of_the_other_domain_and_its_weights_are_trained(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Adapting(Objective):
        def __init__(self) -> None:
            super().__init__(0.1)
            self.own = nn.Linear(16, 1)
            self.sizes: list[tuple[int, int]] = []

        def forward(
            self, source: Outputs, targets: torch.Tensor, other: Outputs | None, done: float
        ) -> torch.Tensor:
            assert other is not None
            self.sizes.append((len(source.logits), len(other.features)))
            known = super().forward(source, targets, None, done)
            return known + self.own(other.features).square().mean()

    asked = []

    def step_s(*given: object) -> float:
        asked.append(len(given[-1]))  # type: ignore[arg-type]
        return 0.01

    monkeypatch.setattr(compute, "step_s", step_s)
    objective, backbone = Adapting(), small_backbone()
    before = objective.own.weight.detach().clone()
    learned, held_out, classes = parts_of(make_folder(per_class=6), 1)
    other, *_ = parts_of(make_folder("other", per_class=2))
    drawn = crops.Views()
    inputs, others = Images(learned, drawn, 0, 2), Images(other, drawn, 1, 2)
    work = model_based.Work(
        spec=make_spec(Path()),
        recipe=settings(ModelBased(epochs=1, batch_size=4, precision="fp32")),
        classes=classes,
        backbone=backbone,
        body=backbone,
        inputs=inputs,
        targets=learned.targets,
        judged=AsServed(held_out, 2),
        judged_targets=held_out.targets,
        linear_probe=lambda: head_for(backbone, learned),
        objective=objective,
        others=others,
        key="",
    )
    model_based.run(work, time.monotonic() + 3600, told.append)
    inputs.close()
    others.close()
    assert objective.sizes == [(4, 4), (4, 4), (2, 4)]
    assert not torch.equal(objective.own.weight, before)
    assert asked == [8]


def test_early_stages_move_least_and_only_weights_are_penalised() -> None:
    backbone, classifier, own = small_backbone(), nn.Linear(16, 2), nn.Linear(16, 1)
    recipe = settings(ModelBased())
    recipes.freeze(backbone, recipe)
    factor, decay = {}, {}
    for group in recipes.optimizer(backbone, classifier, own, recipe).param_groups:
        for parameter in group["params"]:
            factor[parameter], decay[parameter] = group["factor"], group["weight_decay"]
    stem, top = backbone.stages["stem"][0], backbone.stages["top"][0]
    assert factor[stem.get_submodule("0").weight] == pytest.approx(0.03)
    assert factor[top.get_submodule("0").weight] == pytest.approx(0.3)
    assert factor[classifier.weight] == 1
    assert factor[own.weight] > 1
    # Scale and shift of a BatchNorm are trained, its statistics are not.
    assert (decay[top.get_submodule("0").weight], decay[top.get_submodule("1").bias]) == (0.02, 0)
    moving = [p for m in (backbone, classifier, own) for p in m.parameters()]
    assert set(factor) == set(moving)
    # The yardstick trains all alike, by plain SGD.
    classic = recipes.optimizer(
        backbone, classifier, own, settings(ModelBased(recipe="classic", momentum=0.5))
    )
    assert isinstance(classic, torch.optim.SGD)
    assert {group["factor"] for group in classic.param_groups[:-2]} == {1.0}
    assert {group["momentum"] for group in classic.param_groups} == {0.5}


def test_the_last_stages_move_alike_where_maps_are_kept() -> None:
    backbone, classifier = small_backbone(), nn.Linear(16, 2)
    recipe = settings(ModelBased(), kept_from="top")
    recipes.freeze(backbone, recipe)
    groups = recipes.optimizer(backbone, classifier, Objective(0.1), recipe).param_groups
    assert {group["factor"] for group in groups} == {0.3, 1.0}
    stem = set(backbone.stages["stem"][0].parameters())
    assert stem.isdisjoint(p for group in groups for p in group["params"])


def test_the_schedule_warms_up_and_goes_down_to_nothing() -> None:
    recipe = settings(ModelBased())
    parts = [part_of_rate(recipe, done, 10) for done in (0, 0.5, 1, 5.5, 10)]
    assert parts == pytest.approx([0.1, 0.55, 1, 0.5, 0])
    classic = settings(ModelBased(recipe="classic"))
    assert [part_of_rate(classic, e, 25) for e in (0, 6.9, 7, 14)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )
    assert rate_for(settings(ModelBased(learning_rate=0.5)), 64) == 0.5


@pytest.mark.parametrize(
    ("asked", "kept_from", "expected"),
    [
        (ModelBased(), "top", ("adamw", 12, "top", True, "scaled", True)),
        (ModelBased(), "", ("adamw", 10, "", False, "scaled", True)),
        (ModelBased(train_from_stage="top", epochs=3, freeze_batch_norm=True), "top",
         ("adamw", 3, "top", True, "frozen", True)),
        (ModelBased(recipe="classic"), "", ("sgd", 25, "", False, "learned", False)),
        (ModelBased(recipe="classic", freeze_batch_norm=True, train_from_stage="top"), "",
         ("sgd", 25, "top", False, "frozen", False)),
    ],
)  # fmt: skip
def test_what_a_request_says_goes_before_the_recipe(
    asked: ModelBased, kept_from: str, expected: tuple[object, ...]
) -> None:
    recipe = settings(asked, kept_from=kept_from)
    found = (
        recipe.optimizer, recipe.epochs, recipe.train_from_stage, recipe.keeps_maps,
        recipe.batch_norm, recipe.start_from_linear_probe,
    )  # fmt: skip
    assert found == expected


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "scale and shift trained"])
def test_a_folded_network_gives_the_same_features_and_the_same_gradients(
    is_frozen: bool,
) -> None:
    plain = small_backbone()
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
            norm.eval().requires_grad_(not is_frozen)
    fast = folded(plain)
    assert fast is not None
    x = torch.randint(0, 255, (2, 224, 224, 3), dtype=torch.uint8)
    features = plain(x)
    (features**2).sum().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    for norm in norms:
        # It is not asked any more.
        norm.register_forward_pre_hook(lambda *_: pytest.fail("it was asked"))
    found = fast(x)
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)
    (found**2).sum().backward()
    for p, gradient in zip(plain.parameters(), expected, strict=True):
        if gradient is None:
            assert is_frozen
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3)


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
    (tmp_path / "file").write_text("no folder")
    kept = str(tmp_path / "file" / "kept")
    folder = make_folder(per_class=4)
    _, used, *_ = Trained(folder, make_spec, method, told, checkpoint_dir=kept).run()
    assert used["epochs"] == 1
    assert any("no checkpoint could be written" in text for text in notes(told))


def test_adaptation_trains_all_layers_as_it_was_measured() -> None:
    recipe = adaptation_settings(DomainAdaptation(technique="cdan"), is_pretrained=True)
    assert (recipe.optimizer, recipe.batch_norm, recipe.train_from_stage) == ("sgd", "frozen", "")
    assert recipe.epochs < settings(ModelBased()).epochs
    own = DomainAdaptation(epochs=3, batch_size=5, learning_rate=0.1)
    found = adaptation_settings(own, is_pretrained=True)
    assert (found.epochs, found.batch_size, found.learning_rate) == (3, 5, 0.1)
    scratch = settings(ModelBased(), is_pretrained=False)
    assert (scratch.batch_norm, scratch.start_from_linear_probe) == ("learned", False)
