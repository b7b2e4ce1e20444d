"""Draws images that int8 is calibrated on: of many spectra, colours, contrasts, textures and edges.

Nobody's photographs: a frozen backbone is quantised once for all tenants, so the ranges may depend
on none of them. Noise of a power-law spectrum and occluding shapes of power-law sizes ("dead
leaves") have the statistics of natural images that networks learn from (Lee, Mumford and Huang
2001, "Occlusion Models for Natural Images"; Baradad et al. 2021, "Learning to See by Looking at
Noise").
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from service.engine.preprocess import Pixels
from trainer.arrays import Doubles

COUNT = 64
_SEED = 20
_LEAVES = (60, 600)
"""Fewest and most shapes of an image that they cover."""
_STROKES = (1, 12)
"""And of one that is a drawing on plain ground."""
_TEXTURES = 4
"""None, noise, a grating, grain."""


def images(size: int, count: int = COUNT, seed: int = _SEED) -> Pixels:
    """Draws images uint8 [count, size, size, 3]; the same for the same arguments."""
    made = np.empty((count, size, size, 3), np.uint8)
    for place in range(count):
        rng = np.random.default_rng([seed, place])
        made[place] = _finished(_KINDS[place % len(_KINDS)](size, rng), rng)
    return made


def _noise(size: int, rng: np.random.Generator) -> Doubles:
    """Draws noise [size, size, 3], correlated between the colours, mean 0, deviation 1."""
    grey = rng.uniform(0, 1)
    layers = [_spectrum(size, rng) for _ in range(4)]
    mixed = np.stack([grey * layers[0] + (1 - grey) * own for own in layers[1:]], axis=2)
    scaled: Doubles = mixed / max(float(mixed.std()), 1e-9)
    return scaled


def _spectrum(size: int, rng: np.random.Generator) -> Doubles:
    # The amplitude falls with the frequency f as f**-slope: about 1 in photographs.
    slope = rng.uniform(0.3, 2.2)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(rng.standard_normal((size, size)))
    made = np.fft.irfft2(white * frequency**-slope, (size, size))
    scaled: Doubles = made / max(float(made.std()), 1e-9)
    return scaled


def _leaves(size: int, rng: np.random.Generator) -> Doubles:
    """Draws shapes of plain and of textured colour that cover each other."""
    return _drawn(size, rng, int(np.exp(rng.uniform(*np.log(_LEAVES)))))


def _strokes(size: int, rng: np.random.Generator) -> Doubles:
    """Draws few shapes and lines on plain ground."""
    return _drawn(size, rng, int(rng.integers(*_STROKES)), is_drawing=True)


_KINDS: tuple[Callable[[int, np.random.Generator], Doubles], ...] = (
    _noise, _leaves, _leaves, _strokes,
)  # fmt: skip


def _drawn(size: int, rng: np.random.Generator, count: int, is_drawing: bool = False) -> Doubles:
    colours = Image.new("RGB", (size, size), _colour(rng))
    textures = Image.new("L", (size, size), 0)
    on_colours, on_textures = ImageDraw.Draw(colours), ImageDraw.Draw(textures)
    for _ in range(count):
        # Sizes of density r**-3, from a fiftieth of the image to its half.
        radius = size * 0.02 / np.sqrt(rng.uniform(0.0016, 1))
        if is_drawing:
            radius = size * rng.uniform(0.05, 0.4)
        middle = rng.uniform(0, size, 2)
        corners = middle + radius * _outline(rng)
        points = [(float(x), float(y)) for x, y in corners]
        texture, colour = int(rng.integers(_TEXTURES)), _colour(rng)
        if rng.random() < (0.6 if is_drawing else 0.15):
            width = int(rng.integers(1, 3 + size // 16))
            on_colours.line(points, fill=colour, width=width)
            on_textures.line(points, fill=texture, width=width)
        else:
            on_colours.polygon(points, fill=colour)
            on_textures.polygon(points, fill=texture)
    found = np.asarray(colours, np.float64) / 127.5 - 1
    if is_drawing:
        return found
    which = np.asarray(textures)[..., None]
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(0.05, 1.5)
    grating = np.sin(pitch * (x * np.cos(angle) + y * np.sin(angle)))[..., None]
    strength = rng.uniform(0, 0.6)
    grain = rng.standard_normal(which.shape)
    for number, pattern in enumerate((_noise(size, rng), grating, grain), start=1):
        found = found + strength * (which == number) * pattern
    return found


def _outline(rng: np.random.Generator) -> Doubles:
    """Draws corners [n, 2] around 0, about 1 away: of a polygon, or so many that it is a disc."""
    corners = int(rng.choice([3, 4, 5, 24]))
    turn = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else None
    if turn is None:
        turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    around = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return around * rng.uniform(0.3, 1, 2)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    grey, own = rng.uniform(0, 255), rng.uniform(0, 255, 3)
    share = rng.uniform(0, 1)
    red, green, blue = (int(share * grey + (1 - share) * each) for each in own)
    return red, green, blue


def _finished(drawn: Doubles, rng: np.random.Generator) -> Pixels:
    """Gives an image its brightness, contrast, noise; some lose their colours."""
    if rng.random() < 0.15:
        drawn = np.repeat(drawn.mean(axis=2, keepdims=True), 3, axis=2)
    contrast = np.exp(rng.uniform(np.log(20), np.log(120)))
    pixels = rng.uniform(40, 215) + contrast * drawn
    pixels += rng.uniform(0, 8) * rng.standard_normal(pixels.shape)
    finished: Pixels = pixels.clip(0, 255).astype(np.uint8)
    return finished
