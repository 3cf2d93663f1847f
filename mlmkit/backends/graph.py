"""What an ONNX graph declares, read without the onnx package, which the base install does not have.

It has to be known before ONNX Runtime sees the graph: which files it would open for the weights. So this walks the
protobuf wire format for the few fields it needs. Field numbers: onnx.proto,
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. Every function raises `ValueError` for bytes that are no ONNX
model.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mlmkit.artifact import Manifest

MODEL_GRAPH, MODEL_OPSET = 7, 8
GRAPH_NODE, GRAPH_INPUT, GRAPH_OUTPUT = 1, 11, 12
NODE_OPERATOR, NODE_ATTRIBUTE = 4, 5
ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS = 6, 11
TENSOR_EXTERNAL = 13
VALUE_NAME, VALUE_TYPE = 1, 2
# Every message that may hold a tensor, by the field that holds it: a test compares the table with onnx.proto.
NESTED = {
    "ModelProto": {MODEL_GRAPH: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {GRAPH_NODE: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {NODE_ATTRIBUTE: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        ATTRIBUTE_GRAPH: "GraphProto",
        10: "TensorProto",
        ATTRIBUTE_GRAPHS: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
DEEPEST = 100  # as protobuf itself has it
TYPES = {1: "float32", 7: "int64", 10: "float16", 16: "bfloat16"}
# The contract (docs/architecture.md): type and number of axes.
INPUTS = {"input_ids": ("int64", 2), "attention_mask": ("int64", 2), "positions": ("int64", 1), "targets": ("int64", 1)}
OUTPUTS = {"log_prob": ("float32", 1), "rank": ("int64", 1), "top_log_prob": ("float32", 2), "top_id": ("int64", 2)}

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Value:
    """An input or output of a graph: `type` as numpy names it, `shape` with None for a dynamic axis."""

    type: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Graph:
    """What a model declares. `operators` counts the nodes by type; `external` names the files of its weights."""

    opset: int
    inputs: dict[str, Value]
    outputs: dict[str, Value]
    operators: dict[str, int]
    external: frozenset[str]


def read_graph(model: bytes) -> Graph:
    """What the serialized ModelProto declares, nodes and tensors inside subgraphs and functions included."""
    whole = memoryview(model)
    graphs = _contents(whole, MODEL_GRAPH)
    if len(graphs) != 1:
        raise ValueError(f"not an ONNX model: it has {len(graphs)} graphs")
    operators, external = Counter[str](), set[str]()
    for kind, message in _messages(whole):
        if kind == "NodeProto":
            operators[_string(message, NODE_OPERATOR)] += 1
        elif kind == "TensorProto":
            entries = _contents(message, TENSOR_EXTERNAL)
            external.update(_string(entry, 2) for entry in entries if _string(entry, 1) == "location")
    inputs, outputs = _values(graphs[0], GRAPH_INPUT), _values(graphs[0], GRAPH_OUTPUT)
    return Graph(_opset(whole), inputs, outputs, dict(operators), frozenset(external))


def graph_problems(graph: Graph, manifest: Manifest) -> list[str]:
    """What the graph has that the manifest or the contract does not, in words; empty if it is sound.

    ONNX Runtime opens the files that a graph names, so they must be files that the manifest lists, and so hashed ones.
    """
    problems = [
        f"takes its weights from {name!r}, which is no file of the manifest"
        for name in sorted(graph.external - manifest.files.keys())
    ]
    for word, found, wanted in (("input", graph.inputs, INPUTS), ("output", graph.outputs, OUTPUTS)):
        kinds = {name: (value.type, len(value.shape)) for name, value in found.items()}
        if kinds != wanted:
            problems.append(f"does not have the {word}s {', '.join(wanted)} with their types")
    k = graph.outputs["top_id"].shape[-1] if not problems else manifest.top_k
    if k != manifest.top_k:
        problems.append(f"gives {k} candidates, its manifest says {manifest.top_k}")
    if graph.opset != manifest.opset:
        problems.append(f"is of opset {graph.opset}, its manifest says {manifest.opset}")
    return problems


def _messages(model: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Every message that `NESTED` reaches, with its kind."""
    waiting = [("ModelProto", model, 0)]
    while waiting:
        kind, message, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError("not an ONNX model: nested too deeply")
        yield kind, message
        if inner := NESTED[kind]:
            waiting += [
                (inner[number], content, depth + 1) for number, _, content in _fields(message) if number in inner
            ]


def _opset(model: memoryview) -> int:
    """The version of the operator set without a domain, ONNX's own; 0 if the model names none."""
    imported = _contents(model, MODEL_OPSET)
    return next((_number(content, 2) for content in imported if _string(content, 1) in ("", "ai.onnx")), 0)


def _values(graph: memoryview, wanted: int) -> dict[str, Value]:
    """The graph's inputs or outputs: ValueInfoProto → TypeProto → Tensor → TensorShapeProto → Dimension."""
    values = {}
    for value in _contents(graph, wanted):
        tensors = [tensor for kind in _contents(value, VALUE_TYPE) for tensor in _contents(kind, 1)]
        code = _number(tensors[-1], 1) if tensors else 0
        axes = [axis for tensor in tensors for shape in _contents(tensor, 2) for axis in _contents(shape, 1)]
        shape = tuple(_number(axis, 1) or None for axis in axes)
        values[_string(value, VALUE_NAME)] = Value(TYPES.get(code, f"type {code}"), shape)
    return values


def _contents(message: memoryview, wanted: int) -> list[memoryview]:
    return [content for number, _, content in _fields(message) if number == wanted]


def _strings(message: memoryview, wanted: int) -> list[str]:
    return [str(content, "utf-8") for content in _contents(message, wanted)]


def _string(message: memoryview, wanted: int) -> str:
    """A field that is there once; as in protobuf the last counts, and none is empty."""
    return next(reversed(_strings(message, wanted)), "")


def _number(message: memoryview, wanted: int) -> int:
    """The same for a number, which is 0 if there is none."""
    numbers = [_varint(whole, _varint(whole, 0)[1])[0] for number, whole, _ in _fields(message) if number == wanted]
    return next(reversed(numbers), 0)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """(field number, the field with its tag, its content) of each field; the content of a number is empty."""
    position = 0
    while position < len(message):
        begin = position
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        content = message[:0]
        if wire == VARINT:
            _, position = _varint(message, position)
        elif wire == LENGTH_DELIMITED:
            length, position = _varint(message, position)
            content, position = message[position : position + length], position + length
        elif wire in (FIXED64, FIXED32):
            position += 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"not a protobuf message: wire type {wire}")
        if position > len(message):
            raise ValueError("not a protobuf message: a field goes beyond its end")
        yield number, message[begin:position], content


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position == len(data):
            raise ValueError("not a protobuf message: it ends inside a number")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
    raise ValueError("not a protobuf message: a number of more than 64 bits")
