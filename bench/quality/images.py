"""The images that quality is measured on: folders of photographs, scikit-learn's digits, bursts.

Their features, in each framing, and difference hashes are computed once, by the service's own
decoder and runtime, and kept in a folder from run to run.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from service import backbones as registry
from service.domain import Framing, ImageDecoding
from service.engine import preprocess
from service.engine.preprocess import ImageFacts
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime, Session
from service.ops.cpus import available_cores
from trainer import backbones, export, framing, groups, quantise
from trainer.arrays import Floats, Ints, Looks
from trainer.backbone_file import BackboneFile

BACKBONE = "efficientnet_lite0"
WANTED = (
    "hymenoptera_data", "pacs-small/photo", "pacs-small/cartoon", "satellite-small", "tiles-small",
)  # fmt: skip
"""Sets that are looked for by default; those that are absent are named in the document."""
DIGITS = "digits"
FRAMES = 6
"""Frames of a scene."""
_FILMED = 400
"""Images of a set that are filmed, about; spread over its classes."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_PARTS = {"train", "val", "test"}
_BATCH = 8
_ROW = registry.BACKBONES[BACKBONE]
_MADE_AS = f"frames 1, {_ROW.size}, {_ROW.mean}, {_ROW.std}, {_ROW.taps}".encode()
"""Changes when frames or features are made in another way, so that older ones go unused."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Features of a set's images, in the order of their files."""

    name: str
    features: Floats
    """float32 [n, d], the last layer's of the crop."""
    targets: Ints
    """[n], places in `classes`."""
    classes: tuple[str, ...]
    looks: Looks
    """Difference hashes [n], as the service's reader makes them."""
    scenes: Ints
    """[n], equal for images that belong together, as far as the trainer sees in the whole set, and
    for frames of one image."""

    views: Mapping[Framing, Floats] = field(default_factory=dict)
    """All features float32 [n, sum of `blocks`] in each framing that a job may compare; {} where
    there are no others than `features`."""
    blocks: tuple[int, ...] = ()
    """How many features each block has, the last layer's first."""
    aspects: Floats = field(default_factory=lambda: np.empty(0))
    """[n], the longer side over the shorter, or []."""

    def __len__(self) -> int:
        return len(self.targets)

    def seen(self, framing: Framing) -> Floats:
        """Returns all features float32 [n, d] in a framing."""
        return self.views[framing] if self.views else self.features

    def at(self, places: Ints) -> "ImageSet":
        """Returns the images at `places`, in that order."""
        return replace(
            self,
            features=self.features[places],
            targets=self.targets[places],
            looks=self.looks[places],
            scenes=self.scenes[places],
            views={framing: rows[places] for framing, rows in self.views.items()},
            aspects=self.aspects[places] if len(self.aspects) else self.aspects,
        )

    def of_classes(self, kept: Sequence[int]) -> "ImageSet":
        """Returns the images of the classes `kept`, which are numbered anew."""
        numbers = np.full(len(self.classes), -1, np.int64)
        numbers[list(kept)] = np.arange(len(kept))
        chosen = self.at(np.flatnonzero(np.isin(self.targets, kept)))
        return replace(
            chosen,
            targets=numbers[chosen.targets],
            classes=tuple(self.classes[k] for k in kept),
        )


@dataclass(frozen=True)
class LabelledFile:
    """An encoded image, read when it is needed, and its class."""

    read: Callable[[], bytes]
    label: str


def data_root() -> Path:
    """Returns the folder of data sets that tests use: GRAFT_TEST_DATA, else beside the checkout."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    return Path(os.environ.get("GRAFT_TEST_DATA", beside)).resolve()


def find(root: Path) -> dict[str, list[LabelledFile]]:
    """Finds the data sets below `root`, by their paths: each a folder with a folder per class.

    Parts (`train`, `val`, `test`) of a set are taken together. scikit-learn's digits come last.
    """
    found = {
        str(folder.relative_to(root)): [
            LabelledFile(path.read_bytes, path.parent.name) for path in paths
        ]
        for folder, paths in _sets(root)
    }
    return found | {DIGITS: _digits()}


def _sets(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    below = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    parts = [path for path in below if path.name in _PARTS]
    classes = [child for part in parts for child in sorted(part.iterdir())] if parts else below
    images = [
        path
        for each in classes
        if each.is_dir()
        for path in sorted(each.iterdir())
        if path.suffix.lower() in _SUFFIXES
    ]
    if images:
        yield folder, images
    elif not parts:
        for child in below:
            yield from _sets(child)


def _digits() -> list[LabelledFile]:
    digits = load_digits()
    return [
        LabelledFile(lambda scan=scan: _png(scan), str(digit))  # type: ignore[misc]
        for scan, digit in zip(digits.images, digits.target, strict=True)
    ]


def _png(scan: Floats) -> bytes:
    image = Image.fromarray((255 - scan * (255 / 16)).astype("uint8"))
    data = io.BytesIO()
    image.resize((96, 96), Image.Resampling.BICUBIC).save(data, "PNG")
    return data.getvalue()


def _filmed(targets: Ints) -> Ints:
    """Returns the places of the first images of each class, those that are filmed."""
    classes = int(targets.max()) + 1
    per_class = max(40, _FILMED // classes)
    return np.concatenate([np.flatnonzero(targets == k)[:per_class] for k in range(classes)])


def _frame(data: bytes, number: int) -> bytes:
    """Returns frame `number` of a scene, a JPEG; the same bytes every time.

    A camera that is held by hand: the window drifts and turns a little from frame to frame, the
    light changes, the sensor adds noise, and each frame is compressed on its own.
    """
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8])
    rng = np.random.default_rng(seed)
    image = preprocess.open_image(data).convert("RGB")
    image.thumbnail((384, 384))
    side = rng.uniform(0.78, 0.86)
    path = rng.uniform(-1, 1, (1, 5)) * (1, 1, 3, 0.12, 0.05)
    steps = rng.normal(0, 1, (FRAMES, 5)) * (0.35, 0.35, 1.2, 0.05, 0.02)
    x, y, angle, gain, tint = (path + steps.cumsum(axis=0))[number]
    turned = image.rotate(float(np.clip(angle, -6, 6)), Image.Resampling.BICUBIC)
    width, height = (round(side * length) for length in turned.size)
    left = round((turned.width - width) * (0.5 + 0.4 * float(np.tanh(x))))
    top = round((turned.height - height) * (0.5 + 0.4 * float(np.tanh(y))))
    pixels = np.asarray(turned.crop((left, top, left + width, top + height)), np.float32)
    pixels = pixels * (1 + gain) * (1 + tint, 1, 1 - tint)
    noise = np.random.default_rng([seed, number])
    pixels = pixels + noise.normal(0, noise.uniform(1, 6), pixels.shape)
    saved = io.BytesIO()
    frame = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    frame.save(saved, "JPEG", quality=int(noise.integers(60, 93)))
    return saved.getvalue()


class Kept:
    """Sets with features and difference hashes, computed where `folder` does not hold them yet."""

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], None] = lambda _: None,
        precision: Literal["fp32", "int8"] = "fp32",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._say = say
        # On one provider, so that the figures do not depend on the machine.
        runtime = OnnxRuntime(Provider("cpu", "the same everywhere"), 1)
        self._file = BackboneFile(
            folder / f"{BACKBONE}-{hashlib.sha256(_MADE_AS).hexdigest()[:16]}.onnx",
            runtime,
            make=lambda path: export.to_onnx(backbones.load(BACKBONE, "", 0, folder), path),
        )
        self._form = ""
        if precision == "int8":
            self._file.load()
            quantised = folder / f"{BACKBONE}.int8.onnx"
            quantise.to_int8(self._file.path, quantised)
            digest = hashlib.sha256(quantised.read_bytes()).hexdigest()
            self._file = BackboneFile(quantised, runtime, digest)
            self._form = f"-int8-{digest[:16]}"
        self._loaded: Session | None = None

    def of(self, name: str, files: Sequence[LabelledFile]) -> ImageSet:
        """Returns the set of these images; those that the trainer groups are one scene."""
        views, looks, aspects = self._views(name, files, 1)
        features = self._last_layer(views)
        classes = tuple(sorted({file.label for file in files}))
        targets = np.array([classes.index(file.label) for file in files], np.int64)
        scenes = groups.find(features, looks, targets, [""] * len(files)).of
        blocks = self._file.blocks
        return ImageSet(name, features, targets, classes, looks, scenes, views, blocks, aspects)

    def views(self, name: str, files: Sequence[LabelledFile]) -> dict[Framing, Floats]:
        """Returns all features float32 [n, d] of these images, in each framing of a job."""
        return self._views(name, files, 1)[0]

    def filmed(self, whole: ImageSet, files: Sequence[LabelledFile]) -> ImageSet:
        """Returns `FRAMES` frames, side by side, of each of some images of the set `whole`.

        Frames of images that are one scene are of one scene, too.
        """
        places = _filmed(whole.targets)
        views, looks, aspects = self._views(whole.name, [files[p] for p in places], FRAMES)
        places = places.repeat(FRAMES)
        return ImageSet(
            whole.name,
            self._last_layer(views),
            whole.targets[places],
            whole.classes,
            looks,
            whole.scenes[places],
            views,
            self._file.blocks,
            aspects,
        )

    def _last_layer(self, views: Mapping[Framing, Floats]) -> Floats:
        return views["crop"][:, : self._file.blocks[0]]

    def _views(
        self, name: str, files: Sequence[LabelledFile], frames: int
    ) -> tuple[dict[Framing, Floats], Looks, Floats]:
        """Returns features by framing, difference hashes, and aspects of images."""
        encoded = [file.read() for file in files]
        content = hashlib.sha256(_MADE_AS)
        for data in encoded:
            content.update(hashlib.sha256(data).digest())
        views: dict[Framing, Floats] = {}

        def see(framing: Framing) -> tuple[Looks, Floats]:
            digest = content.hexdigest()[:16]
            kept = (
                self._folder
                / f"{name.replace('/', '-')}{self._form}-{frames}-{framing}-{digest}.npz"
            )
            if not kept.exists():
                self._say(
                    f"computing features of {len(files) * frames} images of {name}, {framing}"
                )
                features, looks, aspects = self._compute(encoded, frames, framing)
                partial = kept.with_suffix(".partial.npz")
                np.savez(partial, features=features, looks=looks, aspects=aspects)
                partial.replace(kept)
            with np.load(kept) as stored:
                views[framing] = stored["features"]
                return stored["looks"], stored["aspects"]

        looks, aspects = see("crop")
        # Whatever is drawn of square images, no job looks at all of them.
        if aspects.max() > framing.LONG:
            see("whole")
        return views, looks, aspects

    def _compute(
        self, encoded: Sequence[bytes], frames: int, framing: Framing
    ) -> tuple[Floats, Looks, Floats]:
        if self._loaded is None:
            self._loaded = self._file.load()
        session = self._loaded
        decoding = ImageDecoding(size=self._file.size, framing=framing)
        places = [(image, frame) for image in range(len(encoded)) for frame in range(frames)]

        def run(start: int) -> tuple[Floats, list[ImageFacts]]:
            some = [
                encoded[image] if frames == 1 else _frame(encoded[image], frame)
                for image, frame in places[start : start + _BATCH]
            ]
            pixels = np.stack([preprocess.decode(data, decoding) for data in some])
            return session.run(pixels, cores=1), [preprocess.inspect(data) for data in some]

        with ThreadPoolExecutor(available_cores()) as pool:
            runs = list(pool.map(run, range(0, len(places), _BATCH)))
        facts = [one for _, some in runs for one in some]
        looks = np.array([int(one.look, 16) for one in facts], np.uint64)
        aspects = np.array([one.aspect for one in facts])
        return np.concatenate([rows for rows, _ in runs]), looks, aspects
