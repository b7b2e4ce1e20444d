"""Random views of images, as seen by whatever learns from them; without torch.

Drawn from a generator of their own: torchvision's draw from the one that threads share.
"""

from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from service.contract import Augmentation
from service.domain import ImageDecoding
from service.engine.preprocess import Pixels

CLASSIC_SCALE = 0.08
"""Least part of an image's area that a crop has: of ImageNet's recipes, with their many epochs."""
GENTLE_SCALE = 0.4
"""The same for few epochs, of which each is to see what the image is of."""
_RATIO, _TRIES = (3 / 4, 4 / 3), 10
_MOST_SHEAR, _MOST_SHIFT, _MOST_TURN = 0.99, 32 / 224, 135.0


@dataclass(frozen=True, kw_only=True)
class Views:
    """Says what random views are drawn from; see the proto's Augmentation."""

    mirror: bool = True
    min_scale: float = CLASSIC_SCALE
    rotation_degrees: float = 0.0
    colour: float = 0.0
    trivial_augment: bool = False

    @property
    def key(self) -> str:
        """Names them, shortly."""
        return "/".join(f"{value:g}" for value in astuple(self))


def views(asked: Augmentation | None, min_scale: float) -> Views:
    """Returns what a request asks for, and what it leaves to the recipe, as `Views` has it."""
    wanted = {
        name: value
        for name in Views.__dataclass_fields__
        if (value := getattr(asked, name, None)) is not None
    }
    return Views(**{"min_scale": min_scale, **wanted})


def describe() -> dict[str, float | int | str]:
    """Says what `random_view` does beside what `Views` says, as `preprocess.describe`."""
    return {"ratio": f"{_RATIO[0]:g} to {_RATIO[1]:g}", "tries": _TRIES, "version": 2}


def random_view(
    image: Image.Image, decoding: ImageDecoding, drawn: Views, rng: np.random.Generator
) -> Pixels:
    """Draws a crop and what else `drawn` asks for; uint8 [size, size, 3].

    Where images are squeezed into a square when served, so are the crops.
    """
    (left, top, width, height), is_mirrored = cropped_and_mirrored(
        image.width, image.height, decoding, drawn, rng
    )
    box = (left, top, left + width, top + height)
    view = image.resize((decoding.size, decoding.size), Image.Resampling.BILINEAR, box=box)
    if is_mirrored:
        view = ImageOps.mirror(view)
    if drawn.rotation_degrees:
        view = _turned(view, rng.uniform(-drawn.rotation_degrees, drawn.rotation_degrees))
    if drawn.colour:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            view = enhance(view).enhance(1 + rng.uniform(-drawn.colour, drawn.colour))
    if drawn.trivial_augment:
        view = trivially_augmented(view, rng)
    return np.asarray(view, dtype=np.uint8)


def cropped_and_mirrored(
    width: int, height: int, decoding: ImageDecoding, drawn: Views, rng: np.random.Generator
) -> tuple[tuple[int, int, int, int], bool]:
    """Draws the crop of a view, as `random_crop`, and whether it is mirrored."""
    is_squeezed = decoding.framing == "whole"
    box = random_crop(width, height, rng, drawn.min_scale, is_squeezed=is_squeezed)
    return box, bool(drawn.mirror and rng.random() < 0.5)


def random_crop(
    width: int,
    height: int,
    rng: np.random.Generator,
    min_scale: float = CLASSIC_SCALE,
    *,
    is_squeezed: bool = False,
) -> tuple[int, int, int, int]:
    """Draws left, top, width and height of a crop, pixels.

    From `min_scale` of the area to all of it, sides 3:4 to 4:3 (Szegedy et al. 2015), of an image
    that is squeezed times those of the image.
    """
    aspect = width / height if is_squeezed else 1.0
    for _ in range(_TRIES):
        cut = width * height * rng.uniform(min_scale, 1.0)
        ratio = np.exp(rng.uniform(*np.log(_RATIO))) * aspect
        w, h = round(np.sqrt(cut * ratio)), round(np.sqrt(cut / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    if is_squeezed:
        return 0, 0, width, height
    # A very long image: the middle, as near to the ratios as it allows.
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def trivially_augmented(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Does one of 14 operations in a random strength (Müller and Hutter 2021, TrivialAugment).

    The wide space. What comes in from outside the image is grey.
    """
    name = _OPERATIONS[rng.integers(len(_OPERATIONS))]
    return operated(view, name, float(rng.uniform(0, 1)), float(rng.choice((-1, 1))))


_ENHANCED = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
_OPERATIONS = (
    *_ENHANCED, "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
    "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_GREY = (128, 128, 128)


def operated(view: Image.Image, name: str, strength: float, sign: float) -> Image.Image:  # noqa: PLR0911
    """Does an operation, in a strength from 0 to 1 of the widest, one way or the other (1, -1)."""
    by = strength * sign
    match name:
        case "identity":
            return view
        case "rotate":
            return _turned(view, _MOST_TURN * by)
        case "shear_x":
            return _mapped(view, (1, _MOST_SHEAR * by, 0, 0, 1, 0))
        case "shear_y":
            return _mapped(view, (1, 0, 0, _MOST_SHEAR * by, 1, 0))
        case "translate_x":
            return _mapped(view, (1, 0, _MOST_SHIFT * by * view.width, 0, 1, 0))
        case "translate_y":
            return _mapped(view, (1, 0, 0, 0, 1, _MOST_SHIFT * by * view.height))
        case "posterize":
            return ImageOps.posterize(view, round(8 - 6 * strength))
        case "solarize":
            return ImageOps.solarize(view, round(255 * (1 - strength)))
        case "autocontrast":
            return ImageOps.autocontrast(view)
        case "equalize":
            return ImageOps.equalize(view)
        case _:
            return _ENHANCED[name](view).enhance(1 + 0.99 * by)


def _turned(view: Image.Image, degrees: float) -> Image.Image:
    return view.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=_GREY)


def _mapped(view: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    bilinear = Image.Resampling.BILINEAR
    return view.transform(view.size, Image.Transform.AFFINE, matrix, bilinear, fillcolor=_GREY)
