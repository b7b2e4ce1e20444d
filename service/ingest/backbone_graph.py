"""What an ONNX file must be to serve as a backbone, and the form of our own that it is given.

Parsers and checkers of foreign graphs work here, so it is for a process with limits
(`backbone_check`). Only what leads from the images to the chosen value is looked at and kept:
one graph of standard operators, without subgraphs, functions, randomness or files beside it.
Every refusal is InvalidInput (BACKBONE_UNUSABLE) and says what to do.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, helper, numpy_helper

from service.domain import BLOCKS
from service.ingest.backbone_process import Asked, unusable
from service.ingest.names import shown

OPSETS = range(11, 24)
"""Versions of the standard operators that every ONNX Runtime which Graft may be installed with
runs."""
MOST_NODES = 20_000
"""The largest networks have some thousand."""
_STANDARD = ("", "ai.onnx")
_RANDOM = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
}  # fmt: skip
_QUANTISED = {
    "ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv",
    "QLinearMatMul", "QuantizeLinear",
}  # fmt: skip
_MOST_SHOWN = 5
_MOST_WORDS = 300
_OF_RUNTIME = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")


def words_of(error: BaseException) -> str:
    """Returns what a library says was wrong, on one line, cut off where it is long."""
    text = _OF_RUNTIME.sub("", " ".join(str(error).split()))
    return text if len(text) <= _MOST_WORDS else text[: _MOST_WORDS - 3] + "..."


def read(path: Path, asked: Asked) -> onnx.ModelProto:
    """Reads a file and checks what of it is needed, without running it.

    The model that is returned holds nothing else. It has one input, float32 in the asked
    layout with a batch of any size, and the chosen value as its output, of unknown shape.
    """
    model = _parsed(path)
    opset = _opset(model)
    graph = model.graph
    if (count := max(len(graph.node), len(graph.initializer))) > MOST_NODES:
        raise unusable(
            f"it has {count} operators or weights, and {MOST_NODES} are the most: choose a smaller "
            "network, or simplify the graph"
        )
    chosen = _chosen(graph, asked)
    _keep_what_leads_to(chosen, graph)
    for node in graph.node:
        _check_node(node, {function.name for function in model.functions})
    for tensor in graph.initializer:
        _check_tensor(tensor)
    given = _input(graph, chosen, asked)
    for field in graph.DESCRIPTOR.fields:
        if field.name not in ("node", "initializer"):
            graph.ClearField(field.name)
    for field in model.DESCRIPTOR.fields:
        if field.name != "graph":
            model.ClearField(field.name)
    graph.name = "backbone"
    graph.input.append(helper.make_tensor_value_info(given, TensorProto.FLOAT, ["n", *asked.axes]))
    # The checker wants a type and a shape; those that it has show when it is run.
    graph.output.append(helper.make_tensor_value_info(chosen, TensorProto.FLOAT, []))
    model.opset_import.append(helper.make_opsetid("", opset))
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the native half raises more kinds than are documented
        raise unusable(
            f"onnx finds a fault in it ({words_of(error)}): export it again, and look that "
            "onnx.checker.check_model takes it"
        ) from error
    graph.output[0].ClearField("type")
    return model


def into_our_form(model: onnx.ModelProto, asked: Asked, width: int, *, is_map: bool) -> None:
    """Rewrites a model that `read` returned, in place, as the backbone file that serves.

    `images` uint8 [n, size, size, 3] in, `features` float32 [n, width] out: the normalisation
    is within, and of a map the mean over its positions is taken. All names are ours, so that
    none meets one that is added later, and the file tells nothing of where it was made.
    """
    graph = model.graph
    names: dict[str, str] = {"": ""}

    def ours(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}")

    given, chosen = ours(graph.input[0].name), ours(graph.output[0].name)
    for tensor in graph.initializer:
        tensor.name = ours(tensor.name)
        tensor.ClearField("doc_string")
    for number, node in enumerate(graph.node):
        values = [ours(name) for name in node.input], [ours(name) for name in node.output]
        node.input[:], node.output[:] = values
        node.name, node.domain = f"n{number}", ""
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for number, node in enumerate(_normalising(asked, given)):
        graph.node.insert(number, node)
    graph.node.extend(_pooling(asked, chosen, is_map=is_map))
    std = np.array(asked.std)
    graph.initializer.extend(
        [
            numpy_helper.from_array((1 / (255 * std)).astype(np.float32), "scale"),
            numpy_helper.from_array((-np.array(asked.mean) / std).astype(np.float32), "shift"),
        ]
    )
    shape: list[str | int | None] = ["n", asked.size, asked.size, 3]
    del graph.input[:], graph.output[:]
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, shape))
    graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", width]))
    helper.set_model_props(model, {BLOCKS: f"[{width}]"})


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(path.read_bytes())
    except DecodeError:
        model = onnx.ModelProto()
    if not model.graph.node:
        raise unusable(
            "it is not an ONNX model, or one without operators: export one, of PyTorch with "
            "torch.onnx.export"
        )
    model.DiscardUnknownFields()
    return model


def _opset(model: onnx.ModelProto) -> int:
    versions = {entry.version for entry in model.opset_import if entry.domain in _STANDARD}
    if len(versions) != 1 or (version := int(*versions)) not in OPSETS:
        told = ", ".join(map(str, sorted(versions))) or "none"
        raise unusable(
            f"it is of opset {told}, and {OPSETS[0]} to {OPSETS[-1]} are taken: export it with "
            "another one (opset_version), or convert it with onnx.version_converter"
        )
    return version


def _chosen(graph: onnx.GraphProto, asked: Asked) -> str:
    outputs = [value.name for value in graph.output]
    if not asked.output:
        if len(outputs) == 1:
            return str(outputs[0])
        raise unusable(
            f"it has {len(outputs)} outputs ({_listed(outputs)}): say which one the features are "
            "(output)"
        )
    if not any(asked.output in node.output for node in graph.node):
        raise unusable(
            f"it computes no value {shown(asked.output)}: its outputs are {_listed(outputs)}; "
            "name one of them, or another value of the graph"
        )
    return asked.output


def _keep_what_leads_to(chosen: str, graph: onnx.GraphProto) -> None:
    """Deletes the nodes and weights that the chosen value does not need."""
    made_by = {name: number for number, node in enumerate(graph.node) for name in node.output}
    needed, used, waiting = set[int](), {chosen}, [chosen]
    while waiting:
        number = made_by.get(waiting.pop())
        if number is None or number in needed:
            continue
        needed.add(number)
        waiting += graph.node[number].input
        used.update(graph.node[number].input)
    # In place: a rebuilt list would hold all weights twice.
    for number in reversed(range(len(graph.node))):
        if number not in needed:
            del graph.node[number]
    for number in reversed(range(len(graph.initializer))):
        if graph.initializer[number].name not in used:
            del graph.initializer[number]
    if sparse := {tensor.values.name for tensor in graph.sparse_initializer} & used:
        raise unusable(f"{_listed(sparse)} are sparse weights: export it with dense ones")


def _check_node(node: NodeProto, functions: set[str]) -> None:
    operator = shown(node.op_type)
    if node.op_type in functions and node.domain not in _STANDARD:
        raise unusable(
            f"{operator} is a function of its own: inline those with "
            "onnx.inliner.inline_local_functions"
        )
    if node.domain not in _STANDARD:
        raise unusable(
            f"it uses the operator {operator} of {shown(node.domain)}: only those of the ONNX "
            "standard are taken; export it without that runtime's own optimisations"
        )
    if node.op_type in _RANDOM:
        raise unusable(
            f"{operator} draws random numbers, and features must not: export it for inference"
        )
    if node.op_type in _QUANTISED:
        raise unusable(
            f"it is quantised ({operator}): register it in float; a server that serves in int8 "
            "quantises it by itself"
        )
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs:
            raise unusable(
                f"{operator} holds a graph within the graph: branches and loops are not taken; "
                "export it for inference, with the size of its images fixed"
            )
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise unusable("it holds sparse weights: export it with dense ones")
        for tensor in (attribute.t, *attribute.tensors):
            _check_tensor(tensor)
        attribute.ClearField("doc_string")


def _check_tensor(tensor: TensorProto) -> None:
    if tensor.external_data or tensor.data_location != TensorProto.DEFAULT:
        raise unusable(
            f"the weights {shown(tensor.name)} lie in a file beside it: save it as one file "
            "(onnx.save with save_as_external_data=False; of PyTorch external_data=False)"
        )


def _input(graph: onnx.GraphProto, chosen: str, asked: Asked) -> str:
    """Returns the name of the one input, which takes images of the asked size and layout."""
    weights = {tensor.name for tensor in graph.initializer}
    used = {name for node in graph.node for name in node.input} - weights
    given = [value for value in graph.input if value.name in used]
    if len(given) != 1:
        found = _listed(value.name for value in given) if given else "none"
        raise unusable(
            f"the value {shown(chosen)} is computed from {len(given)} inputs ({found}), and a "
            "backbone has the images alone: choose another output, or export another part"
        )
    (value,) = given
    kind = value.type.tensor_type
    if kind.elem_type != TensorProto.FLOAT:
        raise unusable(
            f"its input {shown(value.name)} is not float32: export it with one; the normalisation "
            "of bytes is added here"
        )
    if kind.HasField("shape"):
        _check_shape(shown(value.name), [_size(axis) for axis in kind.shape.dim], asked)
    return str(value.name)


def _check_shape(name: str, sizes: list[int | None], asked: Asked) -> None:
    wanted = asked.axes
    is_right = len(sizes) == 4 and all(
        size in (None, want) for size, want in zip(sizes[1:], wanted, strict=True)
    )
    if is_right:
        return
    told = "[" + ", ".join("?" if size is None else str(size) for size in sizes) + "]"
    told_wanted = "[?, " + ", ".join(map(str, wanted)) + "]"
    raise unusable(
        f"its input {name} is {told}, and {told_wanted} is what the size {asked.size} and the "
        f"layout {asked.layout.upper()} say: say the size and the layout that it has, or export "
        "it for square images in colour"
    )


def _size(axis: Any) -> int | None:
    # Some exporters write 0 or -1 for one that is open.
    return int(axis.dim_value) if axis.dim_value > 0 else None


def _normalising(asked: Asked, to: str) -> list[NodeProto]:
    normal = to if asked.layout == "nhwc" else "normal"
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], "to_float", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"], "scaling"),
        helper.make_node("Add", ["scaled", "shift"], [normal], "shifting"),
    ]
    if normal != to:
        nodes.append(helper.make_node("Transpose", [normal], [to], "to_nchw", perm=[0, 3, 1, 2]))
    return nodes


def _pooling(asked: Asked, chosen: str, *, is_map: bool) -> list[NodeProto]:
    if not is_map:
        return [helper.make_node("Identity", [chosen], ["features"], "naming")]
    nodes = []
    if asked.layout == "nhwc":
        nodes.append(
            helper.make_node("Transpose", [chosen], ["map"], "map_to_nchw", perm=[0, 3, 1, 2])
        )
        chosen = "map"
    return [
        *nodes,
        helper.make_node("GlobalAveragePool", [chosen], ["pooled"], "pooling"),
        helper.make_node("Flatten", ["pooled"], ["features"], "flattening", axis=1),
    ]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(shown(name) for name in names[:_MOST_SHOWN]) + more
