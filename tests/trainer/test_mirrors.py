"""Where mirrors are switched off nothing that is learned from is mirrored, by any method."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.contract import (
    Augmentation,
    Auto,
    DomainAdaptation,
    FeatureBased,
    Method,
    ModelBased,
)
from tests.trainer.conftest import MakeSpec, Told, source_of
from trainer import crops, features, images, maps, train
from trainer.methods import auto
from trainer.records import Send


@pytest.fixture
def arrows(tmp_path: Path) -> Path:
    """Images that grow brighter to one side: the side is the class."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 230, 64)
    for label, row in (("left", ramp[::-1]), ("right", ramp)):
        folder = tmp_path / "arrows" / label
        folder.mkdir(parents=True)
        for n in range(10):
            pixels = row[None, :, None] + rng.normal(0, 8, (64, 64, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.png")
    return tmp_path / "arrows"


def side(pixels: np.ndarray) -> bool:
    """Whether it grows brighter to the right."""
    columns = np.asarray(pixels, float).mean(axis=(0, 2))
    return bool(columns[-10:].mean() > columns[:10].mean())


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes of every view that is learned from whether its side is another than its image's."""
    noted: list[bool] = []
    real_view, real_maps = crops.random_view, maps.Frozen.maps

    def random_view(image: Image.Image, *given: object) -> np.ndarray:
        view = real_view(image, *given)  # type: ignore[arg-type]
        noted.append(side(np.asarray(image)) != side(view))
        return view

    def of_views(self: maps.Frozen, views: np.ndarray) -> np.ndarray:
        noted.extend(side(views[0]) != side(view) for view in views)
        return real_maps(self, views)

    for module in (features, images, maps):
        monkeypatch.setattr(module, "random_view", random_view)
    monkeypatch.setattr(maps.Frozen, "maps", of_views)
    # A network is trained, however little it wins, and in a moment.
    monkeypatch.setattr(auto, "hopeless", lambda _: "")
    won = auto.Comparison(difference=-1.0, upper=-0.5, images=20)
    monkeypatch.setattr(auto, "compare", lambda *_: won)
    real_improve = auto.improve

    def improve(given: auto.Given, send: Send) -> auto.Average | str:
        # So alike that they would be one group a class.
        n = len(given.learned)
        alone = {"groups": np.arange(n), "order": np.arange(n) / n, "answers": np.full((n, 2), 0.5)}
        return real_improve(dataclasses.replace(given, **alone), send)

    monkeypatch.setattr(auto, "improve", improve)
    return noted


METHODS: dict[str, Method] = {
    "augmented views": FeatureBased(augmented_views=4),
    "the last stages": ModelBased(epochs=1, precision="fp32"),
    "all layers": ModelBased(epochs=1, train_from_stage="stem", precision="fp32"),
    "classic": ModelBased(recipe="classic", epochs=1),
    "auto": Auto(),
    "adaptation": DomainAdaptation(technique="cdan", epochs=1),
}


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mirror", [False, None], ids=["off", "the recipe's"])
def test_no_view_is_mirrored_where_mirrors_are_off(
    name: str,
    mirror: bool | None,
    arrows: Path,
    make_spec: MakeSpec,
    turned: list[bool],
    told: Told,
) -> None:
    spec = make_spec(
        arrows,
        method=METHODS[name],
        augmentation=Augmentation(mirror=mirror, min_scale=0.6, colour=0.1),
        target=source_of(arrows) if name == "adaptation" else None,
        asked_budget_s=3600.0,
    )
    manifest = train.run(spec, told.append)
    assert len(turned) >= 16
    if mirror is False:
        assert not any(turned)
        assert manifest.hyperparameters["mirror"] is False
    else:
        assert 0.2 < np.mean(turned) < 0.8
        assert manifest.hyperparameters["mirror"] is True
