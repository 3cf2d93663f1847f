"""Every node of the exported graphs is one that TensorRT's ONNX parser takes, by its published table."""

from typing import Any

import numpy as np
import onnx
import pytest
from conftest import KINDS
from onnx import TensorProto, helper, numpy_helper
from tensorrt_graph import LARGEST_K, load_table, problems

OTHERS = ("deberta-v2", "mpnet")


@pytest.mark.parametrize("kind", [*KINDS, "convbert"])
def test_graphs_of_artifacts(kind, artifact):
    assert problems(onnx.load(artifact(kind) / "model.onnx")) == []


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_graphs_of_lower_precisions(kind, precision, lowered):
    assert problems(onnx.load(lowered(kind, precision) / "model.onnx")) == []


@pytest.mark.parametrize("name", OTHERS)
def test_graphs_of_other_architectures(name, tmp_path):
    from test_model import CONFIGS
    from transformers import AutoModelForMaskedLM

    from mlmkit.export.onnx import write_onnx
    from mlmkit.model import MaskedLM

    write_onnx(MaskedLM(AutoModelForMaskedLM.from_config(CONFIGS[name]()).eval()), tmp_path / "model.onnx")
    assert problems(onnx.load(tmp_path / "model.onnx")) == []


def test_no_input_is_a_shape(artifact):
    """Else its values would have to lie in host memory, and its profile be one of values."""
    model = onnx.load(artifact("bert") / "model.onnx")
    values = {value.name: value.type.tensor_type for value in model.graph.input}
    assert {name: kind.elem_type for name, kind in values.items()} == dict.fromkeys(values, TensorProto.INT64)
    assert [len(kind.shape.dim) for kind in values.values()] == [2, 2, 1, 1]
    assert [output.type.tensor_type.elem_type for output in model.graph.output] == [1, 7, 1, 7]


def test_the_table_is_whole():
    table = load_table()
    assert len(table) > 130
    assert table["NonZero"] == {"FP32", "FP16"} and "BOOL" in table["Where"] and "Unique" not in table


# ------------------------------------------------------------------ what must be found


def graph(
    *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, constants: dict[str, Any] | None = None
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    x = helper.make_tensor_value_info("x", kind, ["a", 4])
    n = helper.make_tensor_value_info("n", TensorProto.INT64, [1])
    y = helper.make_empty_tensor_value_info("y")
    return helper.make_model(
        helper.make_graph(list(nodes), "graph", [x, n], [y], tensors), opset_imports=[helper.make_opsetid("", 20)]
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (graph(helper.make_node("Abs", ["x"], ["y"], name="fine")), None),
        (graph(helper.make_node("Unique", ["x"], ["y"], name="odd")), "node 'odd' (Unique): not supported"),
        (
            graph(helper.make_node("Exp", ["x"], ["y"], name="wide"), kind=TensorProto.DOUBLE),
            "node 'wide' (Exp): type 11",
        ),
        (graph(helper.make_node("And", ["x", "x"], ["y"], name="bits")), "node 'bits' (And): FP32 is not among BOOL"),
        (graph(helper.make_node("NonZero", ["x"], ["y"]), kind=TensorProto.BOOL), "BOOL is not among FP16 FP32"),
        (graph(helper.make_node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE)), "(Cast): type 11"),
        (
            graph(helper.make_node("Reshape", ["x", "n"], ["y"], name="r")),
            "node 'r' (Reshape): input 'n' is a shape that",
        ),
        (
            graph(helper.make_node("Squeeze", ["x", "n"], ["y"], name="s")),
            "node 's' (Squeeze): input 'n' must be a const",
        ),
        (graph(helper.make_node("ReduceSum", ["x", "n"], ["y"])), "(ReduceSum): input 'n' must be a constant"),
        (
            graph(helper.make_node("TopK", ["x", "k"], ["y", ""]), constants={"k": np.array([LARGEST_K + 1])}),
            "(TopK): k = 3840 must be below 3840",
        ),
        (graph(helper.make_node("TopK", ["x", "k"], ["y", ""]), constants={"k": np.array([LARGEST_K])}), None),
        (
            graph(
                helper.make_node("LayerNormalization", ["x", "s"], ["y", "m"]), constants={"s": np.ones(4, np.float32)}
            ),
            "only its first output",
        ),
        (
            graph(
                helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]),
                constants={"s": np.float32(1), "z": np.uint8(128)},
            ),
            "the zero point must be zero",
        ),
        (
            graph(
                helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "", ""], name="dynamic"),
            ),
            "node 'dynamic' (DynamicQuantizeLinear): not supported",
        ),
    ],
)
def test_what_the_parser_refuses_is_named(model, expected):
    found = problems(model)
    assert found == [] if expected is None else any(expected in text for text in found), found


def test_a_node_inside_a_branch_is_found():
    inner = helper.make_graph(
        [helper.make_node("Unique", ["x"], ["out"], name="deep")],
        "branch",
        [],
        [helper.make_empty_tensor_value_info("out")],
    )
    condition = {"c": np.array(True)}
    model = graph(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner), constants=condition)
    assert any("node 'deep' (Unique)" in text for text in problems(model))


def test_foreign_operators_are_found():
    model = graph(helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert any("com.microsoft" in text for text in problems(model))
