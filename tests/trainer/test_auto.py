"""Whether the network is trained on, and what serves then; on a network of few weights."""

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch

from service.contract import Auto, EpochEnded, Note, Progressed
from service.engine.head import Head
from service.engine.preprocess import Pixels
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.errors import InvalidInput, Reason
from service.ingest.packs import Location
from tests.fake_runtime import FakeSession
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from tests.trainer.small_network import parts_of, small_backbone
from trainer import compute, export, maps
from trainer.backbone_file import BLOCKS, BackboneFile
from trainer.backbones import Backbone
from trainer.data import Part
from trainer.methods import auto, model_based
from trainer.methods.auto import Average, Given
from trainer.recipes import Settings
from trainer.tails import Split

CLASSES = ("blue", "red")


def answers_of(targets: np.ndarray, p: float) -> np.ndarray:
    """Gives the true one of two classes a probability."""
    return np.where(np.eye(2)[targets] == 1, p, 1 - p)


def given_of(learned: Part, make_spec: MakeSpec, **changes: object) -> Given:
    """Frozen features that tell nothing, so that answers are at 0.5, and no brakes' reason."""
    n = len(learned)
    rng = np.random.default_rng(0)
    fields: dict[str, object] = {
        "spec": make_spec(Path(), method=Auto()),
        "classes": CLASSES,
        "learned": learned,
        "groups": np.arange(n),
        "features": rng.normal(size=(n, 16)).astype(np.float32),
        "head": Head(np.zeros((2, 16), np.float32), np.zeros(2, np.float32), CLASSES),
        "answers": answers_of(learned.targets, 0.4),
        "order": rng.random(n),
        "budget_s": None,
        "session": pytest.fail,
        "pretrained": small_backbone,
    }
    return Given(**{**fields, **changes})  # type: ignore[arg-type]


def unread(n: int) -> Part:
    """Images that nothing here opens."""
    return Part(tuple(Location(Path(str(i))) for i in range(n)), ("0" * 64,) * n, np.arange(n) % 2)


@pytest.fixture
def trial(
    make_folder: MakeFolder, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Given:
    """What a moment's training is enough for: colours that the frozen head does not tell."""
    learned, _, _ = parts_of(make_folder(per_class=20))
    real = maps.parted

    def quick(*given: object) -> tuple[Settings, Split | None]:
        recipe, split = real(*given)  # type: ignore[arg-type]
        changes = {"epochs": 4, "learning_rate": 0.1, "body_lr_factor": 1.0, "precision": "fp32"}
        return dataclasses.replace(recipe, **changes), split  # type: ignore[arg-type]

    monkeypatch.setattr(maps, "parted", quick)
    monkeypatch.setattr(auto, "hopeless", lambda _: "")
    spec = make_spec(Path(), method=Auto(), checkpoint_dir=str(tmp_path / "kept"))
    return given_of(learned, make_spec, spec=spec, budget_s=1e6)


@pytest.mark.parametrize(
    ("count", "changes", "said"),
    [
        (99, {}, "99 images of 2 classes are too few"),
        (400, {"groups": np.arange(400) // 8}, "400 images in 50 groups of 2 classes are too few"),
        (110, {"classes": tuple("abcdef")}, "110 images of 6 classes are too few"),
        (200, {"answers": answers_of(np.arange(200) % 2, 0.6)}, "wrong on 0 of 200 images"),
        (200, {"answers": np.full((200, 2), np.nan)}, "no image can be held out"),
    ],
    ids=["few images", "few groups", "few a class", "all are right", "nothing was answered"],
)
def test_what_cannot_be_shown_to_win_is_hopeless(
    count: int, changes: dict[str, object], said: str, make_spec: MakeSpec
) -> None:
    assert said in auto.hopeless(given_of(unread(count), make_spec, **changes))


def test_wrong_images_of_one_group_are_one(make_spec: MakeSpec) -> None:
    n = 200
    answers = answers_of(np.arange(n) % 2, 0.6)
    answers[:20] = 1 - answers[:20]
    answers[-1] = np.nan
    lone = given_of(unread(n), make_spec, answers=answers, session=FakeSession, budget_s=np.inf)
    assert auto.hopeless(lone) == ""
    burst = np.where(np.arange(n) < 20, 0, np.arange(n))
    said = auto.hopeless(dataclasses.replace(lone, groups=burst))
    assert "wrong on 20 of 199 images" in said


@pytest.mark.parametrize(
    ("budget_s", "said"),
    [
        (None, ["about 10 min", "90 s", "budget of 13 min or more"]),
        (749.0, ["about 10 min", "the time budget leaves 749 s", "budget of 13 min or more"]),
        (751.0, []),
    ],
)
def test_time_that_training_has_not_is_said_with_what_to_ask_for(
    budget_s: float | None,
    said: list[str],
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]

    class Slow(FakeSession):
        def run(self, images: Pixels, cores: int = 0) -> np.ndarray:
            clock[0] += 0.1 * len(images)
            return super().run(images, cores)

    monkeypatch.setattr(auto.time, "monotonic", lambda: clock[0])
    # 200 images, 0.1 s forward, on 2 cores: 6 views, and 3 times 12 epochs of 1.5 passes.
    spec = make_spec(Path(), method=Auto(), threads=2)
    given = given_of(unread(200), make_spec, spec=spec, session=Slow, budget_s=budget_s)
    found = auto.hopeless(given)
    assert bool(found) == bool(said)
    assert all(text in found for text in said)


def test_a_network_that_wins_serves_averaged_with_the_frozen_head(
    trial: Given, told: Told, tmp_path: Path
) -> None:
    found = auto.improve(trial, told.append)
    assert isinstance(found, Average), found
    # One file of both tails on one trunk; the frozen one is as it was.
    file = tmp_path / "both.onnx"
    export.to_onnx(found.backbone, file)
    pixels = trial.learned.decode()
    served = OnnxRuntime(Provider("cpu", ""), 1).load(file.read_bytes).run(pixels)
    wanted = export.torch_features(found.backbone, pixels)
    np.testing.assert_allclose(served, wanted, rtol=1e-3, atol=1e-4)
    frozen = export.torch_features(small_backbone(), pixels)
    np.testing.assert_allclose(wanted[:, :16], frozen, rtol=1e-5, atol=1e-6)
    assert found.head.weight.shape == (2, 32)
    model = onnx.load(file)
    assert {e.key: e.value for e in model.metadata_props}[BLOCKS] == "[16, 16]"
    assert [node.op_type for node in model.graph.node].count("Conv") == 3
    # The frozen head is worth nothing here, and so is its half.
    assert not found.head.weight[:, :16].any()
    right = found.head.probabilities(served).argmax(axis=1) == trial.learned.targets
    assert right.mean() > 0.9
    # What is reported is of images that were held out.
    assert (found.answers.argmax(axis=1) == trial.learned.targets).mean() > 0.9
    np.testing.assert_allclose(found.answers.sum(axis=1), 1)
    assert found.hyperparameters["loss_difference_upper"] < 0
    # The job's epochs are those of the version, and it comes to its end once.
    assert [e.epoch for e in told.of(EpochEnded) if isinstance(e, EpochEnded)] == [1, 2, 3, 4]
    done = [p.fraction for p in told.of(Progressed) if isinstance(p, Progressed)]
    assert done == sorted(done)
    assert (done[-1], done.count(1.0)) == (1.0, 1)


@pytest.mark.parametrize("width", [24, 20], ids=["all features", "some of them"])
def test_a_frozen_head_of_middle_layers_is_averaged_with_the_network_too(
    width: int, trial: Given, told: Told, tmp_path: Path
) -> None:
    # 16 features of the last layer, 8 of the first.
    pretrained = small_backbone(taps=("0",))
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, width)), rng.normal(size=2)
    head = Head(weight, bias.astype(np.float32), CLASSES, temperature=2.0)
    found = auto.improve(
        dataclasses.replace(trial, head=head, pretrained=lambda: pretrained), told.append
    )
    assert isinstance(found, Average), found
    file = tmp_path / "both.onnx"
    export.to_onnx(found.backbone, file)
    pixels = trial.learned.decode()
    runtime = OnnxRuntime(Provider("cpu", ""), 1)
    served = runtime.load(file.read_bytes).run(pixels)
    assert BackboneFile(file, runtime).blocks == (16, 8, 16)
    frozen = export.torch_features(small_backbone(taps=("0",)), pixels)
    np.testing.assert_allclose(served[:, :24], frozen, rtol=1e-4, atol=1e-5)
    # What the frozen head does not take has no weight.
    assert not found.head.matrix[:, width:24].any()
    wanted = head.logits(frozen) / head.temperature / 2
    ours = found.head.logits(served) - served[:, 24:] @ found.head.matrix[:, 24:].T
    differences = (ours - wanted) - (ours - wanted)[:1]
    np.testing.assert_allclose(differences, 0, atol=1e-2)


def test_a_network_that_does_not_look_better_is_given_up_after_its_first_fold(
    trial: Given, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = counted(monkeypatch)
    sure = dataclasses.replace(trial, answers=answers_of(trial.learned.targets, 0.999))
    found = auto.improve(sure, told.append)
    assert isinstance(found, str)
    assert "the network does not win" in found
    assert len(trained) == 1
    assert not told.of(EpochEnded)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[model_based.Work]:
    """Collects what is trained."""
    trained: list[model_based.Work] = []
    real = model_based.run

    def run(work: model_based.Work, *given: object) -> model_based.Result:
        trained.append(work)
        return real(work, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(model_based, "run", run)
    return trained


def test_a_fold_is_learned_from_by_neither_the_network_nor_its_first_head(
    trial: Given, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, asked = counted(monkeypatch), []
    real = auto._Trial._train

    def train(self: auto._Trial, places: np.ndarray, part: int) -> object:
        asked.append(places)
        return real(self, places, part)

    monkeypatch.setattr(auto._Trial, "_train", train)
    never = trial.answers.copy()
    never[0] = np.nan
    found = auto.improve(dataclasses.replace(trial, answers=never), told.append)
    assert isinstance(found, Average), found
    *parts, last = [{trial.learned.locations[place] for place in places} for places in asked]
    every = set(trial.learned.locations)
    held = [every - part for part in parts]
    assert last == every
    assert sum(map(len, held)) == len(set.union(*held)) == len(every) - 1
    # What was never answered for is always learned from, and stays without an answer.
    assert trial.learned.locations[0] not in set.union(*held)
    assert np.isnan(found.answers[0]).all()
    assert not np.isnan(found.answers[1:]).any()
    heads = [work.linear_probe() for work in trained]
    assert len({head.matrix.tobytes() for head in heads}) == 4
    for work, places in zip(trained, asked, strict=True):
        assert (work.targets == trial.learned.targets[places]).all()


def test_no_fold_is_reported_by_what_it_chose_itself(trial: Given, told: Told) -> None:
    targets = trial.learned.targets
    undecided = dataclasses.replace(trial, answers=answers_of(targets, 0.5))
    found = auto._Trial(undecided, told.append)
    fold = found.fold
    # The average is right on two folds, and badly wrong on the third.
    good = np.log(answers_of(targets, 0.95))
    found.mixed = np.where((fold == 2)[:, None], -4 * good, good)
    answers = found._answers()
    right = answers.argmax(axis=1) == targets
    # The first two say that it wins; each of them with the third, that it does not.
    assert not right[fold == 2].any()
    assert answers[fold == 2].max() > 0.9
    np.testing.assert_array_equal(answers[fold != 2], undecided.answers[fold != 2])


def test_the_difference_is_paired_and_goes_by_groups() -> None:
    rng = np.random.default_rng(0)
    n = 300
    targets = rng.integers(0, 3, n)
    frozen = np.log(rng.dirichlet(np.ones(3), n))
    better = frozen + 0.2 * np.eye(3)[targets] + rng.normal(0, 0.3, (n, 3))
    found = auto.compare(better, frozen, targets, np.arange(n))
    assert found.difference < found.upper < 0
    assert found.wins
    # Four copies of each image tell no more than one.
    four = [np.repeat(rows, 4, axis=0) for rows in (better, frozen, targets, np.arange(n))]
    again = auto.compare(*four)
    assert (again.difference, again.upper) == pytest.approx((found.difference, found.upper))
    same = auto.compare(frozen, frozen, targets, np.arange(n))
    assert same.difference == pytest.approx(0)
    assert not same.wins


def test_training_that_would_take_longer_than_it_may_ends_before_its_first_epoch(
    trial: Given, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fold has 4 epochs of 2 steps, 2 hours, which are two ninths of all.
    monkeypatch.setattr(compute, "step_s", lambda *_: 900.0)
    slow = dataclasses.replace(trial, budget_s=8 * 3600.0)
    found = auto.improve(slow, told.append)
    assert isinstance(found, str)
    assert "and the time budget leaves 28800 s: ask for it with" in found
    # What was spent until then is on top.
    assert "about 54" in found
    assert not any(isinstance(note, Note) and note.level == "warning" for note in told)


def test_a_job_that_was_cut_off_trains_no_fold_again(
    trial: Given, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = msgspec.structs.replace(trial.spec, checkpoint_dir="")
    whole = dataclasses.replace(trial, spec=spec)
    expected = auto.improve(whole, told.append)
    assert isinstance(expected, Average)
    trained = counted(monkeypatch)

    class Cut(BaseException):
        pass

    def cut(record: object) -> None:
        if len(trained) == 2 and isinstance(record, Progressed) and "epoch 3" in record.detail:
            raise Cut

    with pytest.raises(Cut):
        auto.improve(trial, cut)
    # A machine that is busy by now does not make hopeless what was begun.
    monkeypatch.setattr(auto, "hopeless", pytest.fail)
    found = auto.improve(trial, told.append)
    assert isinstance(found, Average)
    assert len(trained) == 5
    np.testing.assert_array_equal(found.head.matrix, expected.head.matrix)
    np.testing.assert_array_equal(found.answers, expected.answers)
    assert not any(isinstance(note, Note) and note.level == "warning" for note in told)


@pytest.mark.parametrize("error", [MemoryError("no memory"), None], ids=["memory", "no number"])
def test_a_network_that_cannot_be_trained_leaves_the_frozen_head(
    error: Exception | None, trial: Given, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: model_based.Objective, source: model_based.Outputs, *_: object) -> torch.Tensor:
        if error is not None:
            raise error
        return source.logits.sum() * float("nan")

    monkeypatch.setattr(model_based.Objective, "forward", fail)
    found = auto.improve(trial, told.append)
    assert isinstance(found, str)
    assert "the network could not be trained" in found


def test_an_image_that_was_changed_meanwhile_ends_the_job(trial: Given, told: Told) -> None:
    def change() -> Backbone:
        trial.learned.locations[3].path.write_bytes(b"another")
        return small_backbone()

    with pytest.raises(InvalidInput) as caught:
        auto.improve(dataclasses.replace(trial, pretrained=change), told.append)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
