"""Checkpoints, and training that is broken off and goes on."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from service.contract import (
    Augmentation,
    EpochEnded,
    ImageSource,
    JobSpec,
    ModelBased,
    Note,
)
from service.engine.head import Head
from service.ingest.packs import Location
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from tests.trainer.small_network import parts_of, small_backbone
from trainer import checkpoint, compute, crops
from trainer.backbones import Backbone
from trainer.checkpoint import Checkpoints
from trainer.data import Part
from trainer.images import AsServed, Images
from trainer.methods import feature_based, model_based
from trainer.methods.model_based import Objective, Outputs
from trainer.recipes import settings

EPOCHS = 8


class Adapting(Objective):
    """Has weights of its own, and reads a second domain."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.own = nn.Linear(16, 1)

    def forward(
        self, source: Outputs, targets: torch.Tensor, other: Outputs | None, done: float
    ) -> torch.Tensor:
        assert other is not None
        added = functional.softplus(self.own(other.features)).mean()
        return super().forward(source, targets, None, done) + done * added


def trained(spec: JobSpec, send: Callable[..., None]) -> tuple[object, ...]:
    """The head, all that was said of it, and the backbone, as bytes and numbers."""
    torch.set_num_threads(1)
    # A probe's outcome may differ from run to run.
    compute._cpu_has_bf16 = lambda: False
    learned, held_out, classes = parts_of(Path(spec.data.folder), 2)
    backbone = small_backbone()
    assert isinstance(spec.method, ModelBased)
    if spec.labels == {"objective": "adapting"}:
        result = adapted(spec, learned, held_out, classes, backbone, send)
    else:

        def linear_probe() -> Head:
            with torch.no_grad():
                features = backbone.eval()(torch.from_numpy(learned.decode())).numpy()
            dealt = np.arange(len(learned)) % 3
            return feature_based.linear_probe(features, learned.targets, dealt, classes, 0, 1)

        result = model_based.train(
            spec, spec.method, learned, held_out, classes, backbone, linear_probe, None, send
        )
    weights = [value.numpy().tobytes() for value in backbone.state_dict().values()]
    head = result.head
    return head.weight.tobytes(), head.bias.tobytes(), result.hyperparameters, weights


def adapted(
    spec: JobSpec,
    learned: Part,
    held_out: Part,
    classes: tuple[str, ...],
    backbone: Backbone,
    send: Callable[..., None],
) -> model_based.Result:
    """Trains with a second domain, and with an objective that has weights."""
    torch.manual_seed(0)
    recipe = settings(spec.method, is_pretrained=False)  # type: ignore[arg-type]
    inputs = Images(learned, crops.Views(), spec.seed, 1)
    others = Images(held_out, crops.Views(), spec.seed, 1)
    work = model_based.Work(
        spec=spec,
        recipe=recipe,
        classes=classes,
        backbone=backbone,
        body=backbone,
        inputs=inputs,
        targets=learned.targets,
        judged=AsServed(held_out, 1),
        judged_targets=held_out.targets,
        linear_probe=pytest.fail,
        objective=Adapting(),
        others=others,
        key=checkpoint.key(spec, spec.method, recipe, learned),
    )
    try:
        return model_based.run(work, None, send)
    finally:
        inputs.close()
        others.close()


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `trained` sets for its whole process is put back."""
    monkeypatch.setattr(compute, "_cpu_has_bf16", compute._cpu_has_bf16)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def figures(records: list[object]) -> list[tuple[float, ...]]:
    """What must be the same in every run: all but times."""
    return [
        (e.epoch, e.train_loss, e.train_accuracy, e.validation_loss, e.validation_accuracy)
        for e in records
        if isinstance(e, EpochEnded)
    ]


class Cut(BaseException):
    """Ends training where it stands, as nothing in it expects."""


def cut(spec: JobSpec, after: int) -> list[object]:
    """Trains until it has told of epoch `after`, and no further."""
    told: list[object] = []

    def tell(record: object) -> None:
        told.append(record)
        if isinstance(record, EpochEnded) and record.epoch == after:
            raise Cut

    with pytest.raises(Cut):
        trained(spec, tell)
    return told


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    ("objective", "weights", "recipe"),
    [
        ("", "", "auto"),
        ("", "random", "auto"),
        ("", "", "classic"),
        ("adapting", "random", "auto"),
    ],
    ids=["on kept maps", "on images", "by SGD", "adapting"],
)
def test_training_that_is_broken_off_goes_on_to_the_very_same_model(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    tmp_path: Path,
    objective: str,
    weights: str,
    recipe: str,
) -> None:
    method = ModelBased(recipe=recipe, epochs=EPOCHS, batch_size=4, learning_rate=0.01)  # type: ignore[arg-type]
    labels = {"objective": objective}
    folder = make_folder(per_class=6)
    spec = make_spec(folder, method=method, weights=weights, threads=1, labels=labels)
    whole = Told()
    expected = trained(spec, whole.append)

    spec = msgspec.structs.replace(spec, checkpoint_dir=str(tmp_path / "kept"))
    at = random.SystemRandom().randrange(1, EPOCHS - 1)
    broken = cut(spec, at)
    resumed = Told()
    assert trained(spec, resumed.append) == expected
    assert figures(resumed) == figures(whole)
    assert figures(broken) == figures(whole)[:at]
    again = [n.text for n in resumed.of(Note) if isinstance(n, Note) and "goes on" in n.text]
    assert len(again) == 1
    assert f"after epoch {at}," in again[0]


def test_a_checkpoint_of_other_settings_or_data_is_refused_with_a_note(
    make_spec: MakeSpec, tmp_path: Path, told: Told
) -> None:
    spec = make_spec(tmp_path, method=ModelBased(epochs=3))
    here, there = (tuple(Location(Path(name)) for name in pair) for pair in ("ab", "cd"))
    learned = Part(here, ("1" * 64, "2" * 64), np.array([0, 1]))
    relabelled = Part(learned.locations, learned.digests, np.array([1, 0]))
    recipe = settings(ModelBased(epochs=3))
    own = checkpoint.key(spec, spec.method, recipe, learned)
    replaced = msgspec.structs.replace
    others = [
        checkpoint.key(spec, ModelBased(epochs=4), recipe, learned),
        # A recipe of another release, for the same request.
        checkpoint.key(spec, spec.method, dataclasses.replace(recipe, momentum=0.8), learned),
        checkpoint.key(spec, spec.method, recipe, relabelled),
        checkpoint.key(spec, spec.method, recipe, learned, "fold 1"),
        checkpoint.key(replaced(spec, seed=1), spec.method, recipe, learned),
        checkpoint.key(replaced(spec, backbone="resnet18"), spec.method, recipe, learned),
        checkpoint.key(
            replaced(spec, augmentation=Augmentation(mirror=False)), spec.method, recipe, learned
        ),
    ]
    assert len({own, *others}) == 8
    # Another attempt has other folders and less time, and is the same work.
    attempt = replaced(
        spec,
        out_dir="elsewhere",
        data=ImageSource(folder="moved"),
        job_id="job-2",
        exported=[],
        time_budget_s=9.0,
    )
    moved = Part(there, learned.digests, learned.targets)
    assert checkpoint.key(attempt, attempt.method, recipe, moved) == own

    Checkpoints(str(tmp_path), own).save({"epoch": 2, "weights": torch.arange(3.0)}, told.append)
    for other in others:
        assert Checkpoints(str(tmp_path), other).load(told.append) is None
    assert [n.level for n in told.of(Note) if isinstance(n, Note)] == ["warning"] * 7
    state = Checkpoints(str(tmp_path), own).load(told.append)
    assert state is not None
    assert (state["epoch"], state["weights"].tolist()) == (2, [0, 1, 2])
    assert len(told) == 7
    assert Checkpoints("", own).load(told.append) is None


@pytest.mark.parametrize("length", [0, 10, 500])
def test_a_damaged_checkpoint_is_refused_with_a_note(
    tmp_path: Path, told: Told, length: int
) -> None:
    kept = Checkpoints(str(tmp_path), "key")
    kept.save({"weights": torch.arange(300.0)}, told.append)
    path = tmp_path / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:length])
    assert kept.load(told.append) is None
    assert "training starts anew" in json.dumps(msgspec.to_builtins(told))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, told: Told) -> None:
    torch.save({"key": "key", "state": {"path": tmp_path}}, tmp_path / checkpoint.FILE)
    assert Checkpoints(str(tmp_path), "key").load(told.append) is None
    assert len(told.of(Note)) == 1


def test_a_write_that_breaks_off_leaves_the_checkpoint_before(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(str(tmp_path), "key")
    kept.save({"epoch": 1}, told.append)

    def broken(state: object, file: object) -> None:
        file.write(b"half a check")  # type: ignore[attr-defined]
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken)
        kept.save({"epoch": 2}, told.append)
    assert "no checkpoint could be written (no space left)" in json.dumps(msgspec.to_builtins(told))
    assert kept.load(told.append) == {"epoch": 1}
    kept.save({"epoch": 3}, told.append)
    assert kept.load(told.append) == {"epoch": 3}
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.FILE]
