"""Random views of images that lie on a GPU: cropped, scaled and mirrored there.

The cores, which the service shares, then decode each image once and are done with it, and
nothing but places and boxes goes to the GPU from the second epoch on. Scaled as Pillow does, to
a level or two of 255 (bilinear, with a support that grows as the image shrinks), but for the
outermost pixels, for which Pillow looks beyond the crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from service.engine.preprocess import Pixels
from trainer import compute
from trainer.crops import Views

_MEMORY_PART = 0.25
"""Of the memory that a GPU has free before anything is trained; the rest is for that."""


@dataclass(frozen=True)
class Asked:
    """One view of an image."""

    place: int
    pixels: Pixels | None
    """The image uint8 [height, width, 3]; None where it lies on the device."""
    box: tuple[int, int, int, int]
    """Left, top, width and height of the crop, pixels."""
    is_mirrored: bool


class DeviceViews:
    """Keeps images on a device, up to `memory_bytes`, and makes square views of side `size`.

    For one thread, but for `has` and `shape`.
    """

    def __init__(self, device: torch.device, size: int, memory_bytes: int) -> None:
        self._device, self._size, self._free = device, size, memory_bytes
        self._held: dict[int, Tensor] = {}

    def has(self, place: int) -> bool:
        """Tells whether the image of a place is kept; it stays then."""
        return place in self._held

    def shape(self, place: int) -> tuple[int, int]:
        """Returns height and width of an image that is kept."""
        height, width, _ = self._held[place].shape
        return height, width

    def views(self, asked: Sequence[Asked]) -> Tensor:
        """Makes views uint8 [n, size, size, 3], on the device."""
        side = self._size
        made = torch.empty(len(asked), 3, side, side, device=self._device)
        for row, one in zip(made, asked, strict=True):
            left, top, width, height = one.box
            crop = self._image(one)[top : top + height, left : left + width]
            row.copy_(_scaled(crop, side))
        mirrored = torch.tensor([one.is_mirrored for one in asked])
        mirrored = mirrored.to(self._device, non_blocking=True)[:, None, None, None]
        made = torch.where(mirrored, made.flip(3), made)
        return made.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _image(self, asked: Asked) -> Tensor:
        if (held := self._held.get(asked.place)) is not None:
            return held
        assert asked.pixels is not None, "what is kept stays"
        image = torch.tensor(asked.pixels).to(self._device, non_blocking=True)
        if image.nbytes <= self._free:
            self._free -= image.nbytes
            self._held[asked.place] = image
        return image


def make(device: str, drawn: Views, size: int) -> DeviceViews | None:
    """Returns what makes views on the GPU; None where the CPU trains, or views are not made so.

    Colours, rotations and TrivialAugment are Pillow's.
    """
    if drawn.rotation_degrees or drawn.colour or drawn.trivial_augment:
        return None
    chosen = compute.choose_device(device)
    if chosen.type == "cpu":
        return None
    free_bytes, _ = torch.cuda.mem_get_info(chosen)
    return DeviceViews(chosen, size, int(free_bytes * _MEMORY_PART))


def _scaled(crop: Tensor, side: int) -> Tensor:
    """Scales uint8 [height, width, 3] to float32 [3, side, side], 0 to 255."""
    return functional.interpolate(
        crop.permute(2, 0, 1)[None].float(), (side, side), mode="bilinear", antialias=True
    )[0]
