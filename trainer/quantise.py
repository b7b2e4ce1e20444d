"""From a backbone's ONNX file to one that computes in int8 (static quantisation).

Weights are rounded per channel, activations by the ranges that they take on
calibration images (Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference"). Whether the result is
good enough is measured afterwards, never assumed.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

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
from service.quantisation import QuantisationCost
from trainer import calibration_images, quantisation_cost
from trainer.arrays import Ints
from trainer.backbone_file import BackboneFile, name_blocks
from trainer.data import Part
from trainer.features import Features
from trainer.methods import feature_based
from trainer.methods.feature_based import FittedHead
from trainer.quantisation_cost import Answers
from trainer.records import Send

if TYPE_CHECKING:
    import onnx

_WIDE = 4
"""A layer that reads maps of more than a fourth of the images' side is computed in float."""
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that hold a layer's weights."""


def to_int8(backbone: Path, out: Path) -> bool:
    """Writes `out`, the same function as `backbone` in int8; False where no layer may be in it.

    Weights are rounded per channel, activations by the least and the largest value that they take
    on `calibration_images`, which are nobody's: what is made for one tenant serves them all. The
    first and the last layers stay in float, see `in_float`.
    """
    # Imported late: they bring onnx with them, which few jobs need.
    import onnx
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file = BackboneFile(backbone, OnnxRuntime(Provider("cpu", "")))
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Its warnings are about operators that stay in float, as they should.
        logger = logging.getLogger()
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            quant_pre_process(str(backbone), str(prepared), skip_symbolic_shape=True)
            model = onnx.load_from_string(prepared.read_bytes())
            for place, node in enumerate(model.graph.node):
                node.name = node.name or f"node {place}"  # by which it is left out
            excluded = in_float(model, file.size)
            weighted = {node.name for node in model.graph.node if node.op_type in _WEIGHTED}
            if weighted <= set(excluded):
                return False
            onnx.save(model, str(prepared))
            quantize_static(
                str(prepared),
                str(out),
                _Images(calibration_images.images(file.size)),
                quant_format=QuantFormat.QDQ,  # the form that all providers understand
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=excluded,
                # The maps of one image in memory; of all, they would be gigabytes.
                extra_options={"CalibStridedMinMax": 1},
            )
        finally:
            logger.setLevel(level)
    name_blocks(out, file.blocks)
    return True


def in_float(model: "onnx.ModelProto", size: int) -> list[str]:
    """Lists the nodes that int8 leaves in float, by name.

    Those before the first layers with weights and after the last ones, these included, so that
    neither pixels nor features are rounded; and those that read maps of more than a fourth of
    `size`, the images' side, in pixels. These early layers see faint contrasts in large ranges:
    of efficientnet_lite0 they made more than half of the error of its features.
    """
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    sides = {
        value.name: value.type.tensor_type.shape.dim[2].dim_value
        for value in (*graph.input, *graph.value_info)
        if len(value.type.tensor_type.shape.dim) == 4  # [n, channels, height, width]
    }
    makers = {output: node for node in graph.node for output in node.output}
    is_late = dict[str, bool]()
    """Whether a layer with weights lies before the node."""
    for node in graph.node:  # in the order of computing
        before = [makers[name] for name in node.input if name in makers]
        is_late[node.name] = any(n.op_type in _WEIGHTED or is_late[n.name] for n in before)
    needed = set[str]()
    """Tensors that a layer with weights needs."""
    is_early = dict[str, bool]()
    for node in reversed(graph.node):
        is_early[node.name] = any(output in needed for output in node.output)
        if is_early[node.name] or node.op_type in _WEIGHTED:
            needed.update(node.input)
    return [
        node.name
        for node in graph.node
        if not (is_late[node.name] and is_early[node.name])
        or any(sides.get(name, 0) * _WIDE > size for name in node.input)
    ]


@dataclass(frozen=True, eq=False)
class Served:
    """A backbone's file with its head, as it is to serve."""

    file: Path
    features: Features
    """What the file makes of images."""
    head: Head
    fitted: FittedHead | None = None
    """Of a frozen backbone: what the head was fitted to."""
    cost: QuantisationCost | None = None
    """What int8 costs, where it was tried and there were images to tell."""
    note: str = ""
    """The same for people, or why it is not quantised, though that was asked for."""


def quantised(
    spec: JobSpec,
    floating: Served,
    known: ExportedBackbone | None,
    learned: Part,
    folds: Ints,
    answers: Callable[[Served], Answers],
    runtime: OnnxRuntime,
    cache: FeatureCache | None,
    send: Send,
) -> Served:
    """The same version in int8; as it was where int8 is shown to lose and nobody named it.

    A frozen backbone is quantised once, by its first job, and shared by all later
    ones (`known`), so that their images run together; the head is then fitted to
    the features that it will get. A trained backbone is its version's own. `answers`
    gives what a form answers to images that neither form learned from.
    """
    out = Path(spec.out_dir)
    file, digest = out / "int8.onnx", ""
    if floating.fitted is not None and known is not None and known.digest in spec.files:
        file, digest = Path(spec.files[known.digest]), known.digest
    else:
        send(Progressed("exporting", 0.5, "quantising to int8"))
        if not to_int8(floating.file, file):
            note = "no layer lies between the backbone's first and last ones, which int8 leaves"
            note = f"{note}: the version is served in {floating.features.precision}"
            send(Note("warning", note))
            return replace(floating, note=note)
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
    # Loaded under this name, before it gets another.
    times = quantisation_cost.timed(floating.features.session, features.session)
    cost = quantisation_cost.measured(answers(floating), answers(found), times)
    note = quantisation_cost.words(cost)
    if not (spec.is_precision_asked or quantisation_cost.is_bearable(cost)):
        if file.parent == out:
            file.unlink()
        note = f"{note}: the version is served in {floating.features.precision}"
        send(Note("warning", note))
        return replace(floating, cost=cost, note=note)
    send(Note("info", note))
    # The float file, if this job made it, is nobody's any more.
    (out / BACKBONE_FILE).unlink(missing_ok=True)
    if file.parent == out:
        file = file.rename(out / BACKBONE_FILE)
    return replace(found, file=file, cost=cost, note=note)


def _progress(record: Record, send: Send) -> None:
    # The epoch was sent already, and the training is over.
    if isinstance(record, Progressed) and record.stage == "training":
        share = 0.6 + 0.3 * record.fraction
        send(Progressed("exporting", share, "fitting the head to what int8 gives"))
    elif isinstance(record, Progressed):
        send(record)


class _Images:
    """A `CalibrationDataReader` of one image at a time, whose maps are then dropped."""

    def __init__(self, images: Pixels) -> None:
        self._images = images
        self.set_range(0, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Begins anew, with the images from `start_index` to before `end_index`."""
        self._places = iter(range(start_index, end_index))

    def get_next(self) -> dict[str, Pixels] | None:
        """Returns the next image as a batch of one, by the graph's input."""
        place = next(self._places, None)
        return None if place is None else {"images": self._images[place : place + 1]}
