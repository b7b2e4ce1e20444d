"""From a backbone's ONNX file to one that computes in int8 (static quantisation).

Weights are rounded per channel, activations by the ranges that they take on
calibration images (Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference"). Whether the result is
good enough is measured afterwards, never assumed.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from service.contract import (
    BACKBONE_FILE,
    ExportedBackbone,
    JobSpec,
    Note,
    Progressed,
    Record,
)
from service.engine.feature_cache import FeatureCache
from service.engine.head import Head
from service.engine.preprocess import Pixels
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from trainer.arrays import Ints
from trainer.backbone_file import BackboneFile, name_blocks
from trainer.data import Part
from trainer.features import Features
from trainer.methods import feature_based
from trainer.methods.feature_based import FittedHead
from trainer.records import Send

MAX_CHANGED = 0.03
"""Answers that int8 may change, as a part of all, or one where that is more: half of those
that change are right before and half after, or neither."""
CALIBRATION_IMAGES = 64
_BATCH = 8


def to_int8(backbone: Path, images: Pixels, out: Path) -> None:
    """Writes `out`, the same function as `backbone` in int8.

    `images` uint8 [n, 224, 224, 3] are what it is to be exact on. Minimum and
    maximum give the ranges: percentiles and entropy took five times as long and
    were no better on the backbones that we ship.
    """
    # Imported late: they bring onnx with them, which few jobs need.
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Its warnings are about operators that stay in float, as they should.
        logger = logging.getLogger()
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            quant_pre_process(str(backbone), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(out),
                _Images(images),
                quant_format=QuantFormat.QDQ,  # the form that all providers understand
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                calibrate_method=CalibrationMethod.MinMax,
            )
        finally:
            logger.setLevel(level)
    blocks = BackboneFile(backbone, OnnxRuntime(Provider("cpu", ""))).blocks
    name_blocks(out, blocks)


def calibration_images(part: Part, threads: int = 0) -> Pixels:
    """At most 64 images, in turn from each class."""
    return part.decode(part.spread(CALIBRATION_IMAGES), threads)


def is_good_enough(changed: int, images: int) -> bool:
    """Whether int8 may be published that changes so many answers; no class is looked at."""
    return changed <= max(1, MAX_CHANGED * images)


@dataclass(frozen=True, eq=False)
class Served:
    """A backbone's file with its head, as it is to serve."""

    file: Path
    features: Features
    """What the file makes of images."""
    head: Head
    fitted: FittedHead | None = None
    """Of a frozen backbone: what the head was fitted to."""
    changed: float | None = None
    """Answers that quantisation changes, as a part of all, where that was tried."""
    note: str = ""
    """Why it is not quantised, though that was asked for."""


def quantised(
    spec: JobSpec,
    floating: Served,
    known: ExportedBackbone | None,
    learned: Part,
    folds: Ints,
    answers: Callable[[Served], Ints],
    runtime: OnnxRuntime,
    cache: FeatureCache | None,
    send: Send,
) -> Served:
    """The same version in int8, or as it was where int8 changes too many answers.

    A frozen backbone is quantised once, by its first job, and shared by all later
    ones (`known`), so that their images run together; the head is then fitted to
    the features that it will get. A trained backbone is its version's own. `answers`
    gives what a form answers to the images that were learned from, int64 [n]; nothing
    that is reported is chosen by.
    """
    out = Path(spec.out_dir)
    file, digest = out / "int8.onnx", ""
    if floating.fitted is not None and known is not None and known.digest in spec.files:
        file, digest = Path(spec.files[known.digest]), known.digest
    else:
        send(Progressed("exporting", 0.5, "quantising to int8"))
        to_int8(floating.file, calibration_images(learned, spec.threads), file)
    features = Features(BackboneFile(file, runtime, digest), cache, spec.threads, send)
    fitted, head = None, floating.head
    if floating.fitted is not None:
        fitted = feature_based.fit_head(
            floating.fitted.method, learned, folds, head.classes, features, spec.seed,
            lambda record: _progress(record, send), spec.threads,
            # The images are framed as the float head chose.
            replace(floating.fitted.choice, framings=()), spec.augmentation,
        )  # fmt: skip
        before = floating.head
        head = replace(fitted.head, prior=before.prior, decision=before.decision)
    found = Served(file, features, head, fitted)
    differs = answers(floating) != answers(found)
    changed = float(differs.mean())
    if not is_good_enough(int(differs.sum()), len(differs)):
        if file.parent == out:
            file.unlink()
        note = (
            f"int8 would change {changed:.1%} of the answers, and {MAX_CHANGED:.0%} is the most: "
            f"the version is served in {floating.features.precision}"
        )
        send(Note("warning", note))
        return replace(floating, changed=changed, note=note)
    # Loaded under this name, before it gets another.
    _ = features.session
    # The float file, if this job made it, is nobody's any more.
    (out / BACKBONE_FILE).unlink(missing_ok=True)
    if file.parent == out:
        file = file.rename(out / BACKBONE_FILE)
    return replace(found, file=file, changed=changed)


def _progress(record: Record, send: Send) -> None:
    # The epoch was sent already, and the training is over.
    if isinstance(record, Progressed) and record.stage == "training":
        share = 0.6 + 0.3 * record.fraction
        send(Progressed("exporting", share, "fitting the head to what int8 gives"))
    elif isinstance(record, Progressed):
        send(record)


class _Images:
    def __init__(self, images: Pixels) -> None:
        self._batches: Iterator[Pixels] = (
            images[start : start + _BATCH] for start in range(0, len(images), _BATCH)
        )

    def get_next(self) -> dict[str, Pixels] | None:
        """The next batch, by the graph's input."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}
