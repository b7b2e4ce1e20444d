"""What is refused of a brought file before it is run, each with what to do about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.errors import InvalidInput, Reason
from service.ingest import backbone_graph
from service.ingest.backbone_process import Asked
from tests.extractors import MEAN, SIZE, STD, convolution, extractor, pooling, weights, write

ASKED = Asked(size=SIZE, mean=MEAN, std=STD)


def read(tmp_path: Path, model: onnx.ModelProto, **changes: Any) -> onnx.ModelProto:
    asked = Asked(**{"size": SIZE, "mean": MEAN, "std": STD, **changes})
    return backbone_graph.read(write(tmp_path / "given.onnx", model), asked)


def refusal(tmp_path: Path, model: onnx.ModelProto, **changes: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, model, **changes)
    assert caught.value.reason is Reason.BACKBONE_UNUSABLE
    return caught.value.message.removeprefix("the file cannot serve as a backbone: ")


def after(*nodes: onnx.NodeProto, **options: Any) -> onnx.ModelProto:
    """The usual network with more nodes behind it, the last of which gives `last`."""
    return extractor([*convolution(), *pooling(), *nodes], outputs=["last"], **options)


def test_what_a_usual_export_brings_is_taken(tmp_path: Path) -> None:
    model = read(tmp_path, extractor())
    assert [value.name for value in model.graph.output] == ["embedding"]
    sizes = [
        axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim
    ]
    assert sizes == ["n", 3, SIZE, SIZE]
    assert [entry.version for entry in model.opset_import] == [17]


@pytest.mark.parametrize(
    "shape",
    [(1, 3, SIZE, SIZE), (7, 3, SIZE, SIZE), (None, 3, None, None), ("b", "c", "h", "w"), None],
    ids=str,
)
def test_a_fixed_batch_and_open_axes_are_taken(tmp_path: Path, shape: Any) -> None:
    model = read(tmp_path, extractor(inputs={"x": shape}, nodes=[*convolution("x"), *pooling()]))
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


def test_what_does_not_lead_to_the_output_is_neither_kept_nor_looked_at(tmp_path: Path) -> None:
    head = numpy_helper.from_array(np.zeros((12, 1000), np.float32), "head")
    nodes = [
        *convolution(),
        *pooling(),
        helper.make_node("MatMul", ["embedding", "head"], ["logits"]),
        helper.make_node("FusedMatMul", ["text", "head"], ["words"], domain="com.microsoft"),
    ]
    given = extractor(
        nodes,
        outputs=["logits", "words"],
        inputs={"pixel_values": (1, 3, SIZE, SIZE), "text": (1, 12)},
        initializers=[weights(), head],
        opsets={"": 17, "com.microsoft": 1},
    )
    model = read(tmp_path, given, output="embedding")
    assert [tensor.name for tensor in model.graph.initializer] == ["kernels"]
    assert [node.op_type for node in model.graph.node] == [
        "Conv", "Relu", "GlobalAveragePool", "Flatten",
    ]  # fmt: skip
    assert [value.name for value in model.graph.input] == ["pixel_values"]


def test_weights_that_old_exporters_list_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    inputs = {"pixel_values": (1, 3, SIZE, SIZE), "kernels": (12, 3, 8, 8)}
    assert len(read(tmp_path, extractor(inputs=inputs)).graph.input) == 1


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04 a checkpoint", b"\x08\x08", b"version https://git-lfs", b"\xff" * 99]
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "given.onnx").write_bytes(data)
    with pytest.raises(InvalidInput, match=r"it is not an ONNX model.*torch\.onnx\.export"):
        backbone_graph.read(tmp_path / "given.onnx", ASKED)


@pytest.mark.parametrize("opset", [8, 10, 24, 28])
def test_operators_of_another_age_are_refused(tmp_path: Path, opset: int) -> None:
    said = refusal(tmp_path, extractor(opsets={"": opset}))
    assert said.startswith(f"it is of opset {opset}, and 11 to 23 are taken: export it with")


def test_a_model_without_standard_operators_is_refused(tmp_path: Path) -> None:
    assert "it is of opset none" in refusal(tmp_path, extractor(opsets={"ai.onnx.ml": 3}))


def test_operators_of_one_runtime_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("FusedGemm", ["embedding"], ["last"], domain="com.microsoft")
    said = refusal(tmp_path, after(node, opsets={"": 17, "com.microsoft": 1}))
    assert said.startswith("it uses the operator 'FusedGemm' of 'com.microsoft': only those of the")


def test_functions_are_refused(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function(
        "mine", "Pool", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets
    )
    node = helper.make_node("Pool", ["embedding"], ["last"], domain="mine")
    said = refusal(tmp_path, after(node, functions=[function], opsets={"": 17, "mine": 1}))
    assert "'Pool' is a function of its own: inline those" in said


def branch(name: str) -> onnx.GraphProto:
    made = helper.make_node("Identity", ["embedding"], [name])
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph([made], name, [], [output])


def test_graphs_within_the_graph_are_refused(tmp_path: Path) -> None:
    condition = numpy_helper.from_array(np.array(True), "condition")
    node = helper.make_node(
        "If", ["condition"], ["last"], then_branch=branch("a"), else_branch=branch("b")
    )
    said = refusal(tmp_path, after(node, initializers=[weights(), condition]))
    assert said.startswith("'If' holds a graph within the graph: branches and loops are not taken")


def test_chance_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("RandomNormalLike", ["embedding"], ["last"])
    assert "'RandomNormalLike' draws random numbers" in refusal(tmp_path, after(node))


def test_a_quantised_file_is_refused(tmp_path: Path) -> None:
    scale = numpy_helper.from_array(np.float32(1), "scale")
    nodes = [
        helper.make_node("QuantizeLinear", ["embedding", "scale"], ["bytes"]),
        helper.make_node("DequantizeLinear", ["bytes", "scale"], ["last"]),
    ]
    said = refusal(tmp_path, after(*nodes, initializers=[weights(), scale]))
    assert "it is quantised (" in said and "register it in float" in said


def outside(tensor: TensorProto) -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def test_weights_in_other_files_are_refused(tmp_path: Path) -> None:
    said = refusal(tmp_path, extractor(initializers=[outside(weights())]))
    assert said.startswith("the weights 'kernels' lie in a file beside it: save it as one file")
    node = helper.make_node("Constant", [], ["kernels"], value=outside(weights()))
    nodes = [node, *convolution(), *pooling()]
    assert "lie in a file beside it" in refusal(tmp_path, extractor(nodes, initializers=[]))


def test_sparse_weights_are_refused(tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "kernels")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    sparse = helper.make_sparse_tensor(values, indices, [12, 3, 8, 8])
    model = extractor(initializers=[])
    model.graph.sparse_initializer.append(sparse)
    assert "'kernels' are sparse weights" in refusal(tmp_path, model)


def test_too_many_operators_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_graph, "MOST_NODES", 3)
    assert refusal(tmp_path, extractor()).startswith("it has 4 operators or weights, and 3 are")


def test_one_of_several_outputs_has_to_be_named(tmp_path: Path) -> None:
    given = extractor(outputs=["embedding", "map"])
    assert refusal(tmp_path, given) == (
        "it has 2 outputs ('embedding', 'map'): say which one the features are (output)"
    )
    assert read(tmp_path, given, output="map").graph.output[0].name == "map"
    said = refusal(tmp_path, given, output="logits")
    assert said.startswith("it computes no value 'logits': its outputs are 'embedding', 'map';")


@pytest.mark.parametrize("name", ["pixel_values", "kernels"])
def test_what_nothing_computes_is_no_output(tmp_path: Path, name: str) -> None:
    assert f"it computes no value '{name}'" in refusal(tmp_path, extractor(), output=name)


def test_a_second_input_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["embedding", "text"], ["last"])
    inputs = {"pixel_values": (1, 3, SIZE, SIZE), "text": (1, 12)}
    said = refusal(tmp_path, after(node, inputs=inputs))
    assert "'last' is computed from 2 inputs ('pixel_values', 'text')" in said


def test_an_output_that_needs_no_images_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["kernels"], ["last"])
    assert "is computed from 0 inputs (none)" in refusal(tmp_path, after(node))


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_an_input_that_is_no_float32_is_refused(tmp_path: Path, kind: int) -> None:
    assert "its input 'pixel_values' is not float32" in refusal(tmp_path, extractor(kind=kind))


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((1, 3, 64, 64), "[1, 3, 64, 64]"),
        ((None, SIZE, SIZE, 3), "[?, 48, 48, 3]"),
        ((1, 1, SIZE, SIZE), "[1, 1, 48, 48]"),
        (("n", 3, SIZE), "[?, 3, 48]"),
    ],
)
def test_another_shape_than_was_described_is_refused(tmp_path: Path, shape: Any, told: str) -> None:
    said = refusal(tmp_path, extractor(inputs={"pixel_values": shape}))
    assert said.startswith(
        f"its input 'pixel_values' is {told}, and [?, 3, 48, 48] is what the size 48 and the "
        "layout NCHW say: "
    )


def break_type(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def break_order(model: onnx.ModelProto) -> None:
    model.graph.node.reverse()


def break_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("no_such", 1))


@pytest.mark.parametrize("damage", [break_type, break_order, break_attribute])
def test_what_the_standard_does_not_allow_is_refused(
    tmp_path: Path, damage: Callable[[onnx.ModelProto], None]
) -> None:
    model = extractor()
    damage(model)
    assert refusal(tmp_path, model).startswith("onnx finds a fault in it (")


def test_a_name_that_is_made_to_mislead_stays_one_short_line(tmp_path: Path) -> None:
    node = helper.make_node("x\n" * 5000, ["embedding"], ["last"], domain="evil\u202e")
    said = refusal(tmp_path, after(node, opsets={"": 17, "evil\u202e": 1}))
    assert said.isprintable() and len(said) < 600


def test_the_same_graph_in_other_words_gives_the_same_file(tmp_path: Path) -> None:
    made = []
    for images, maker in (("x", "somebody"), ("location", "another")):
        model = extractor([*convolution(images), *pooling()], inputs={images: (1, 3, SIZE, SIZE)})
        model.producer_name = model.graph.node[0].doc_string = maker
        helper.set_model_props(model, {"secret": maker})
        found = read(tmp_path, model)
        backbone_graph.into_our_form(found, ASKED, 12, is_map=False)
        onnx.checker.check_model(found, full_check=True)
        made.append(found.SerializeToString(deterministic=True))
    assert made[0] == made[1]
    # The runtime refuses a file that holds this word, by which it knows files that name others.
    assert b"location" not in made[0] and b"another" not in made[0]
