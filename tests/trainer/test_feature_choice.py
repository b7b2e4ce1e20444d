"""What a head sees of images is chosen by cross-validated loss: layers, scale and framing."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from service.contract import BACKBONE_FILE, HEAD_FILE, FeatureBased, JobSpec
from service.domain import Framing
from service.engine import head as heads
from service.engine import preprocess
from service.engine.head import Floats
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.ingest.packs import Location
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from trainer import framing
from trainer.data import Files, Part
from trainer.folds import deal
from trainer.methods import feature_based
from trainer.methods.feature_based import Choice, FittedHead
from trainer.train import run

CLASSES = ("a", "b", "c")
BLOCKS = (6, 8)
"""Of the last layer, and of a middle one."""


class Known:
    """Features of numbered images that are known, by framing."""

    blocks = BLOCKS
    images_per_second = 0.0

    def __init__(self, rows: dict[Framing, Floats]) -> None:
        self.rows = rows
        self.asked: list[Framing] = []

    def all_of(self, files: Files, detail: str = "") -> Floats:
        self.asked.append(files.decoding.framing)
        return self.rows[files.decoding.framing][[int(digest) for digest in files.digests]]


def rows_of(targets: np.ndarray, told_by: str, seed: int = 0) -> Floats:
    """Noise, in which the classes are told by the first features of one layer."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(len(targets), sum(BLOCKS))).astype(np.float32)
    if told_by:
        start = 0 if told_by == "last" else BLOCKS[0]
        rows[np.arange(len(targets)), start + targets] += 3
    return rows


def fitted(
    rows: dict[Framing, Floats], targets: np.ndarray, choice: Choice, l2: float | None = None
) -> tuple[FittedHead, Known]:
    names = tuple(str(n) for n in range(len(targets)))
    part = Part(tuple(Location(Path(name)) for name in names), names, targets)
    known = Known(rows)
    method = FeatureBased(l2=l2)
    found = feature_based.fit_head(
        method, part, deal(targets), CLASSES, known, 0, lambda _: None, 1, choice  # type: ignore[arg-type]
    )  # fmt: skip
    return found, known


def balanced(per_class: int) -> np.ndarray:
    return np.arange(per_class * len(CLASSES)) % len(CLASSES)


def test_middle_layers_are_taken_where_they_tell_the_classes() -> None:
    targets = balanced(20)
    rows = {"crop": rows_of(targets, "middle")}
    found, _ = fitted(rows, targets, Choice())
    assert found.head.feature_dim == sum(BLOCKS)
    assert found.hyperparameters["features"] == "last and middle layers"
    # New images, by the one head on raw features that it was folded into.
    fresh = rows_of(targets, "middle", seed=1)
    assert (found.head.probabilities(fresh).argmax(axis=1) == targets).mean() > 0.8
    # Images are still compared, and outliers found, by the last layer.
    np.testing.assert_array_equal(found.train, rows["crop"][:, : BLOCKS[0]])


@pytest.mark.parametrize("choice", [Choice(), feature_based.LAST_LAYER])
def test_the_last_layer_alone_serves_where_it_tells_as_much(choice: Choice) -> None:
    targets = balanced(20)
    found, _ = fitted({"crop": rows_of(targets, "last")}, targets, choice)
    assert found.head.feature_dim == BLOCKS[0]
    assert found.hyperparameters["features"] == "last layer"


@pytest.mark.parametrize(("sureness", "width"), [(0.2, 14), (0.9, 6), (None, 6)])
def test_of_few_images_middle_layers_serve_only_what_is_strange_to_the_backbone(
    sureness: float | None, width: int
) -> None:
    targets = balanced(8)
    choice = Choice(sureness=lambda _: sureness)
    found, _ = fitted({"crop": rows_of(targets, "middle")}, targets, choice)
    assert found.head.feature_dim == width


def test_a_penalty_that_is_named_is_for_the_last_layer_as_it_is() -> None:
    targets = balanced(20)
    rows = {"crop": rows_of(targets, "middle"), "whole": rows_of(targets, "middle")}
    found, known = fitted(rows, targets, Choice(framings=("whole",)), l2=0.1)
    assert found.hyperparameters["l2"] == pytest.approx(0.1)
    assert (found.head.feature_dim, found.framing, set(known.asked)) == (6, "crop", {"crop"})


@pytest.mark.parametrize("better", ["crop", "whole"])
def test_the_framing_that_tells_more_is_taken(better: Framing) -> None:
    targets = balanced(20)
    rows: dict[Framing, Floats] = {
        framing: rows_of(targets, "last" if framing == better else "", seed)
        for seed, framing in enumerate(("crop", "whole"))
    }  # type: ignore[misc]
    found, known = fitted(rows, targets, Choice(framings=("whole",)))
    assert (found.framing, known.asked) == (better, ["crop", "whole"])


def test_what_is_told_of_an_image_was_not_chosen_by_it() -> None:
    # Nothing tells the classes: a choice that had seen an image would look better than chance.
    targets = np.random.default_rng(3).integers(0, 3, 90)
    losses = []
    for seed in range(5):
        found, _ = fitted({"crop": rows_of(targets, "", seed)}, targets, Choice())
        assert found.out_of_fold is not None
        losses.append(-np.log(found.out_of_fold[np.arange(90), targets]).mean())
    assert np.mean(losses) > np.log(3) - 0.02


def stripe(label: str, n: int, length: int = 96) -> Image.Image:
    """A long image whose class is told by its ends alone."""
    rng = np.random.default_rng([n, label == "left"])
    pixels = rng.normal(120, 20, (32, length, 3))
    pixels[:, slice(0, 20) if label == "left" else slice(-20, None)] += 90
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(
    ("asked", "least"), [("auto", 8), ("auto", 96), ("crop", 96), ("whole", 96), ("compare", 96)]
)  # the images of a sample: 8 of 24, or all
def test_long_images_are_seen_whole_where_that_tells_more(
    asked: str,
    least: int,
    make_spec: MakeSpec,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(framing, "_LEAST", least)
    for label in ("left", "right"):
        (tmp_path / "long" / label).mkdir(parents=True)
        for n in range(12):
            stripe(label, n).save(tmp_path / "long" / label / f"{n}.png")
    spec: JobSpec = make_spec(tmp_path / "long", framing=asked)
    manifest = run(spec, told.append)
    whole = asked != "crop"
    assert manifest.decoding.framing == ("whole" if whole else "crop")
    assert manifest.headline is not None
    assert (manifest.headline.accuracy > 0.9) == whole
    # What was measured is what serves: the files answer the same with the version's pixels.
    session = OnnxRuntime(Provider("cpu", ""), 1).load(
        (tmp_path / "out" / BACKBONE_FILE).read_bytes
    )
    head = heads.load((tmp_path / "out" / HEAD_FILE).read_bytes())
    data = [(tmp_path / "long" / label / "0.png").read_bytes() for label in ("left", "right")]
    pixels = np.stack([preprocess.decode(each, manifest.decoding) for each in data])
    answers = head.probabilities(session.run(pixels)).argmax(axis=1).tolist()
    assert answers == [0, 1] or not whole


@pytest.mark.usefixtures("small_network")
def test_square_images_are_read_once(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    manifest = run(make_spec(make_folder(per_class=8)), told.append)
    assert manifest.decoding.framing == "crop"


def test_a_backbone_of_another_size_is_served_at_its_own(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=8)
    spec = make_spec(folder, backbone="timm/test_resnet", weights="random")
    manifest = run(spec, told.append)
    assert manifest.decoding.size == 160
    served = onnxruntime.InferenceSession(str(tmp_path / "out" / BACKBONE_FILE))
    assert served.get_inputs()[0].shape[1:] == [160, 160, 3]
