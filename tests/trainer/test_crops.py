"""Random views: what they are drawn from, and what they never do."""

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from service.contract import Augmentation
from service.domain import ImageDecoding
from trainer import crops
from trainer.crops import GENTLE_SCALE, Views, operated, random_crop, random_view, views

CROPPED = ImageDecoding(size=32)


def arrow() -> Image.Image:
    """Dark at its left end, bright at its right one."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    return Image.fromarray(np.repeat(np.tile(ramp, (64, 1))[:, :, None], 3, axis=2))


def drawn(view: Views, count: int = 60, decoding: ImageDecoding = CROPPED) -> list[np.ndarray]:
    return [
        random_view(arrow(), decoding, view, np.random.default_rng(seed)) for seed in range(count)
    ]


def is_mirrored(pixels: np.ndarray) -> bool:
    grey = pixels.mean(axis=(0, 2))
    return bool(grey[0] > grey[-1])


def test_every_second_view_is_mirrored_unless_mirrors_are_off() -> None:
    mirrored = sum(map(is_mirrored, drawn(Views())))
    assert 15 < mirrored < 45
    everything = Views(mirror=False, colour=0.5, rotation_degrees=20, min_scale=0.5)
    for view in (Views(mirror=False), everything):
        assert not any(map(is_mirrored, drawn(view)))


def test_what_a_request_leaves_out_is_the_recipes() -> None:
    assert views(None, 0.3) == Views(min_scale=0.3)
    asked = Augmentation(mirror=False, colour=0.0, trivial_augment=True)
    assert views(asked, GENTLE_SCALE) == Views(
        mirror=False, min_scale=GENTLE_SCALE, colour=0.0, trivial_augment=True
    )
    assert views(Augmentation(min_scale=1.0), 0.3).min_scale == 1.0


@pytest.mark.parametrize("least", [0.08, 0.5, 1.0])
def test_a_crop_has_no_less_of_the_area_than_asked_for(least: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, width, height = random_crop(100, 80, rng, least)
        assert 0 <= left <= 100 - width
        assert 0 <= top <= 80 - height
        assert width * height > 0.98 * least * 8000


def test_crops_of_images_that_are_served_squeezed_are_squeezed_alike() -> None:
    rng = np.random.default_rng(0)
    found = [random_crop(1000, 100, rng, 0.5, is_squeezed=True) for _ in range(50)]
    ratios = [width / height for *_, width, height in found]
    assert all(10 * 3 / 4 - 0.5 <= ratio <= 10 * 4 / 3 + 0.5 for ratio in ratios)
    # A crop of a very long image that is not squeezed is its middle.
    assert random_crop(1000, 100, rng, 0.5)[2:] == (133, 100)
    squeezed = drawn(Views(mirror=False, min_scale=0.9), 5, ImageDecoding(size=32, framing="whole"))
    assert all(pixels.shape == (32, 32, 3) for pixels in squeezed)


def test_rotation_and_colour_change_no_more_than_asked_for() -> None:
    plain = Views(mirror=False, min_scale=1.0)
    same = drawn(plain, 1)[0].astype(float)
    for view in drawn(Views(mirror=False, min_scale=1.0, colour=0.2), 20):
        assert np.abs(view - same).max() <= 0.2 * 255 * 3
        assert np.abs(view - same).max() > 0
    level = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    for seed in range(20):
        turned = random_view(
            level, CROPPED, Views(rotation_degrees=10), np.random.default_rng(seed)
        )
        # What comes in at the corners is little, and grey.
        assert ((turned >= 128) & (turned <= 200)).all()
        assert (turned == 200).mean() > 0.8


NAMES = {
    "identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
    "translate_y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness",
    "colour": "Color", "contrast": "Contrast", "sharpness": "Sharpness", "posterize": "Posterize",
    "solarize": "Solarize", "autocontrast": "AutoContrast", "equalize": "Equalize",
}  # fmt: skip


def test_all_operations_are_those_of_the_paper() -> None:
    assert set(crops._OPERATIONS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_operation_gives_what_torchvision_gives(name: str, sign: float) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((224, 224), Image.Resampling.BILINEAR)
    strength = 0.5
    widest: dict[str, float] = {
        "rotate": 135.0, "translate_x": -32.0, "translate_y": -32.0, "identity": 0,
        "autocontrast": 0, "equalize": 0, "posterize": 0, "solarize": 0,
    }  # fmt: skip
    magnitude = sign * strength * widest.get(name, 0.99)
    if name == "posterize":
        magnitude = 8 - round(6 * strength)
    elif name == "solarize":
        magnitude = round(255 * (1 - strength))
    fill: Sequence[float] = (128, 128, 128)
    wanted = np.asarray(
        _apply_op(image, NAMES[name], magnitude, InterpolationMode.BILINEAR, list(fill)), int
    )
    found = np.asarray(operated(image, name, strength, sign), int)
    # The edges of what was moved may be rounded otherwise.
    assert (np.abs(found - wanted) <= 2).mean() > 0.98


def test_trivial_augment_does_one_operation_which_the_generator_tells() -> None:
    with_it = Views(mirror=False, min_scale=1.0, trivial_augment=True)
    first, again = drawn(with_it, 40), drawn(with_it, 40)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    plain = drawn(Views(mirror=False, min_scale=1.0), 1)[0]
    assert 0 < sum((view == plain).all() for view in first) < 15
