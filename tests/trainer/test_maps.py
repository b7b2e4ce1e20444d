"""Maps of views: the same wherever they are kept, each epoch another one of an image."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from service.contract import ModelBased
from service.errors import InvalidInput, Reason
from tests.trainer.conftest import MakeFolder, MakeSpec
from tests.trainer.small_network import parts_of, small_backbone
from trainer import kept, maps, tails
from trainer.crops import Views
from trainer.data import Part
from trainer.maps import Frozen, Maps
from trainer.recipes import VIEWS

MakeMaps = Callable[..., tuple[Maps, Part]]


@pytest.fixture
def make_maps(make_folder: MakeFolder, make_spec: MakeSpec, tmp_path: Path) -> MakeMaps:
    learned, _, _ = parts_of(make_folder(per_class=4))

    def make(drawn: Views | None = Views(), seed: int = 0) -> tuple[Maps, Part]:  # noqa: B008
        split = tails.split(small_backbone().eval(), "top")
        assert split is not None
        return Maps(learned, Frozen(split, make_spec(Path())), drawn, seed, 2, tmp_path), learned

    return make


def epoch_of(made: Maps, epoch: int) -> dict[int, bytes]:
    """The maps of an epoch by the places of their images."""
    return {
        place: batch[i].numpy().tobytes()
        for batch, places in made.batches(epoch, 3)
        for i, place in enumerate(places.tolist())
    }


@pytest.mark.parametrize("memory_bytes", [0, 100_000, 2**30], ids=["disk", "both", "memory"])
def test_maps_are_the_same_wherever_they_are_kept(
    make_maps: MakeMaps, memory_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted, _ = make_maps()
    wanted.prepare()
    expected = [epoch_of(wanted, epoch) for epoch in (1, 2, 3)]
    wanted.close()
    monkeypatch.setattr(kept, "MEMORY_BYTES", memory_bytes)
    made, _ = make_maps()
    made.prepare()
    # Images are not needed any more.
    monkeypatch.setattr(maps, "open_again", pytest.fail)
    assert [epoch_of(made, epoch) for epoch in (1, 2, 3)] == expected
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []
    made.close()


def test_a_disk_that_is_full_costs_time_alone(
    make_maps: MakeMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = make_maps()
    wanted.prepare()
    expected = epoch_of(wanted, 1)
    wanted.close()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "MEMORY_BYTES", 0)
    monkeypatch.setattr("trainer.kept.os.pwrite", full)
    made, _ = make_maps()
    made.prepare()
    assert epoch_of(made, 1) == expected
    made.close()


def test_each_epoch_takes_one_of_the_views_of_each_image(make_maps: MakeMaps) -> None:
    made, learned = make_maps()
    made.prepare()
    epochs = [epoch_of(made, epoch) for epoch in range(60)]
    assert all(set(epoch) == set(range(len(learned))) - lone(epoch, learned) for epoch in epochs)
    for place in range(len(learned)):
        assert len({epoch[place] for epoch in epochs if place in epoch}) == VIEWS
    assert made.steps(3) == 3
    assert epoch_of(made, 7) == epochs[7]
    made.close()
    other, _ = make_maps(seed=1)
    other.prepare()
    assert epoch_of(other, 7) != epochs[7]
    other.close()


def lone(epoch: dict[int, bytes], learned: Part) -> set[int]:
    """No batch is of one image; eight in threes leave none."""
    return set(range(len(learned))) - set(epoch) if len(learned) % 3 == 1 else set()


def test_the_first_views_are_the_served_one_and_its_mirror_unless_mirrors_are_off(
    make_maps: MakeMaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[np.ndarray] = []
    real = Frozen.maps

    def watched(self: Frozen, views: np.ndarray) -> np.ndarray:
        shown.append(views)
        return real(self, views)

    monkeypatch.setattr(Frozen, "maps", watched)
    for mirror in (True, False):
        shown.clear()
        made, learned = make_maps(Views(mirror=mirror, min_scale=1.0))
        made.prepare()
        made.close()
        assert len(shown) == len(learned)
        served = {pixels.tobytes() for pixels in learned.decode()}
        assert {views[0].tobytes() for views in shown} == served
        for views in shown:
            is_mirrored = [(view == views[0][:, ::-1]).all() for view in views]
            assert is_mirrored[1] == mirror
            assert len(views) == VIEWS
            # Of the whole square image nothing but a mirror can make another view.
            if not mirror:
                turned = np.abs(views[1:].astype(int) - views[:1, :, ::-1]).mean()
                straight = np.abs(views[1:].astype(int) - views[:1]).mean()
                assert straight < turned


def test_some_images_share_what_all_have(make_maps: MakeMaps) -> None:
    made, learned = make_maps()
    made.prepare()
    places = np.array([6, 1, 3])
    some = made.at(places)
    some.prepare(lambda _: pytest.fail("they are there"))
    network = torch.nn.Flatten()
    every = made.outputs(network, torch.device("cpu"))
    assert torch.equal(some.outputs(network, torch.device("cpu")), every[places])
    assert {place for batch, own in some.batches(1, 2) for place in own.tolist()} <= {0, 1, 2}
    # What is judged by is what serves, in half precision.
    alone, _ = make_maps(None)
    alone.prepare()
    assert torch.equal(alone.outputs(network, torch.device("cpu")), every)
    assert len(every) == len(learned)
    made.close()
    alone.close()


def test_an_image_that_was_changed_meanwhile_is_named(make_maps: MakeMaps) -> None:
    made, learned = make_maps()
    learned.locations[3].path.write_bytes(b"another")
    with pytest.raises(InvalidInput) as caught:
        made.prepare()
    assert caught.value.reason is Reason.DATASET_UNUSABLE


@pytest.mark.parametrize(
    ("method", "weights", "images", "is_kept"),
    [
        (ModelBased(), "", 100, True),
        (ModelBased(train_from_stage="top"), "", 100, True),
        (ModelBased(train_from_stage="stem"), "", 100, False),
        (ModelBased(recipe="classic"), "", 100, False),
        (ModelBased(), "random", 100, False),
        (ModelBased(), "", 10_000_000, False),
    ],
    ids=["auto", "a stage", "the first stage", "classic", "random weights", "too many images"],
)
def test_maps_are_kept_where_the_last_stages_alone_are_trained(
    method: ModelBased, weights: str, images: int, is_kept: bool, make_spec: MakeSpec
) -> None:
    spec = make_spec(Path(), weights=weights)
    recipe, split = maps.parted(method, small_backbone(), spec, images)
    assert (recipe.keeps_maps, split is not None) == (is_kept, is_kept)
    assert (recipe.train_from_stage == "top") == is_kept


def test_a_network_without_a_stage_to_tune_from_learns_from_images(make_spec: MakeSpec) -> None:
    backbone = small_backbone(tuned_from="")
    recipe, split = maps.parted(ModelBased(), backbone, make_spec(Path()), 100)
    assert (recipe.keeps_maps, recipe.train_from_stage, split) == (False, "", None)
    recipe, split = maps.parted(ModelBased(train_from_stage="top"), backbone, make_spec(Path()), 9)
    assert (recipe.keeps_maps, split is not None) == (True, True)
