"""What TensorRT's ONNX parser would refuse in a graph, by data/tensorrt-operators.tsv."""

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

TABLE = Path(__file__).with_name("data") / "tensorrt-operators.tsv"
OPSETS = range(9, 25)
TYPES: dict[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
LARGEST_K = 3839
# Which input (or, below zero, which output) has the type that the table speaks of, where it is not the first input.
DATA = {"Where": 1, "Constant": -1, "ConstantOfShape": -1}
# Inputs that TensorRT must know from the shapes of the graph's inputs alone, before it runs.
SHAPES = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
CONSTANTS = {"CumSum": (1,), "OneHot": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "TopK": (1,)}


def load_table() -> dict[str, set[str]]:
    """The types of each operator."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")][1:]
    return {name: set(types.split()) for name, types, _ in (line.split("\t") for line in lines)}


def problems(model: onnx.ModelProto) -> list[str]:
    """One line a node that the parser would refuse, with its name and operator."""
    found = [f"domain {opset.domain!r}" for opset in model.opset_import if opset.domain not in ("", "ai.onnx")]
    found += [f"opset {opset.version}" for opset in model.opset_import if opset.version not in OPSETS]
    found += [f"function {function.name}" for function in model.functions]
    table = load_table()
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for graph in subgraphs(inferred):
        types = {item.name: item.data_type for item in inferred.initializer}
        for value in [*inferred.input, *inferred.value_info, *inferred.output, *graph.value_info, *graph.output]:
            types[value.name] = value.type.tensor_type.elem_type
        constants = {item.name: item for item in inferred.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = node.attribute[0].t
        static = settled(inferred)
        for node in graph.node:
            for text in refused(node, table, types, constants, static):
                found.append(f"node {node.name!r} ({node.op_type}): {text}")
    return found


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []:
                yield from subgraphs(inner)


def settled(graph: onnx.GraphProto) -> set[str]:
    """Names whose values follow from constants and shapes."""
    names = {item.name for item in graph.initializer} | {""}
    for node in graph.node:
        if node.op_type in ("Shape", "Size", "Constant") or all(name in names for name in node.input):
            names.update(node.output)
    return names


def refused(
    node: onnx.NodeProto,
    table: dict[str, set[str]],
    types: dict[str, int],
    constants: dict[str, onnx.TensorProto],
    static: set[str],
) -> Iterator[str]:
    if node.op_type not in table:
        yield "not supported"
        return
    place = DATA.get(node.op_type, 0)
    data = [node.output[0] if place < 0 or not node.input else node.input[place]]
    data += [node.output[0]] if node.op_type in ("Cast", "Range", "Where") else []
    for name in data:
        kind = TYPES.get(types.get(name, 0), f"type {types.get(name)} of {name!r}")
        if kind not in table[node.op_type]:
            yield f"{kind} is not among {' '.join(sorted(table[node.op_type]))}"
    for index in SHAPES.get(node.op_type, ()):
        if index < len(node.input) and node.input[index] not in static:
            yield f"input {node.input[index]!r} is a shape that depends on data"
    reduces = (1,) if node.op_type.startswith("Reduce") else ()
    for index in CONSTANTS.get(node.op_type, reduces):
        if index < len(node.input) and node.input[index] and node.input[index] not in constants:
            yield f"input {node.input[index]!r} must be a constant"
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "TopK" and node.input[1] in constants:
        k = int(numpy_helper.to_array(constants[node.input[1]]).item())
        if k > LARGEST_K or not attributes.get("sorted", 1):
            yield f"k = {k} must be below {LARGEST_K + 1}, and sorted"
    if node.op_type == "LayerNormalization" and any(node.output[1:]):
        yield "only its first output is supported"
    if node.op_type == "ScatterND" and attributes.get("reduction", b"none") != b"none":
        yield "no reduction is supported"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2 and node.input[2]:
        zero = constants.get(node.input[2])
        if zero is None or numpy_helper.to_array(zero).any():
            yield "the zero point must be zero"
