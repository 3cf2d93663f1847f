"""The precision of a graph: fp32, fp16, bf16, int8 or int8-dynamic.

`convert` changes a graph file. For int8 it calls `mlmkit.export.int8`; for fp16 and bf16 it calls `lower`, which writes
the precision of every node into the graph, with casts between them, so that the engine has nothing to choose. A node
computes in the lower type unless

- its operator does not support that type (by its ONNX schema), or it contains a subgraph,
- it computes log-probabilities: the log-softmax and everything after it,
- it computes an angle or an index, where rounding would give another position: everything that leads to Sin, Cos or a
  cast to integers (rotary embeddings, buckets of relative distance),
- it is part of a normalisation that consists of single operators (RMSNorm): the squares, their mean, and what the mean
  scales. Squares overflow float16 from 256 on, and bfloat16 would scale a whole row by a mean of eight bits,
- one of its constants would become infinite or all zero, or
- it reads or writes a value that exceeded float16's range on real text (`value_ranges`). LayerNormalization and Softmax
  stay float32 only where they overflow.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mlmkit.artifact import DYNAMIC_INT8
from mlmkit.backends import Batch
from mlmkit.export.graphs import feeds, reachable, replace_graph, scratch_folder
from mlmkit.export.int8 import activation_thresholds, dynamic_int8, static_int8

FLOAT = ir.DataType.FLOAT
TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# A quarter of float16's largest number: calibration text cannot show every extreme, so leave room for four times more.
LARGEST_FLOAT16 = 65504 / 4
# Attention masks hold float32's most negative number, or minus infinity. The lowered value still gives a probability of
# zero, and a row that is masked completely stays finite: -65504 plus a score would overflow.
SENTINEL = 1e30
LOWERED_SENTINEL = 32768.0
SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def convert(graph: Path, precision: str, batches: Sequence[Batch]) -> dict[str, Any] | None:
    """Change a float32 graph file to `precision`; return what the manifest says about the calibration.

    fp16 and int8 measure ranges and scales on `batches` of real text.
    """
    if precision == "fp32":
        return None
    if precision == DYNAMIC_INT8:
        replace_graph(dynamic_int8(graph), graph)
        return None
    model = ir.load(graph)
    if precision == "bf16":
        float32_nodes = lower(model, precision)
        replace_graph(model, graph)
        return {"float32_nodes": float32_nodes}
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    calibration: dict[str, Any] = {"method": "range", "batches": len(batches), "tokens": tokens}
    if precision == "int8":
        calibration |= {
            "method": "percentile",
            "int8_products": static_int8(model, activation_thresholds(graph, batches)),
        }
        replace_graph(model, graph)
    # Also for int8: TensorRT computes the rest of its graph in float16.
    overflowing = [name for name, largest in value_ranges(graph, batches).items() if largest > LARGEST_FLOAT16]
    calibration["overflowing"] = overflowing
    if precision == "fp16":
        calibration["float32_nodes"] = lower(model, precision, overflowing)
        replace_graph(model, graph)
    return calibration


def value_ranges(graph: Path, batches: Iterable[Batch]) -> dict[str, float]:
    """The largest magnitude that each float32 value of the graph reaches on `batches`, by the value's name.

    Ignores infinities and the numbers of attention masks.
    """
    model = ir.load(graph)
    measured = [value for node in model.graph for value in node.outputs if value.dtype == FLOAT]
    tape = ir.tape.Tape(model.graph)
    ceiling, zero = (tape.initializer(ir.tensor(number, FLOAT, name=f"range_{number}")) for number in (SENTINEL, 0.0))
    model.graph.outputs.clear()
    for value in measured:
        magnitude = tape.op("Abs", [value])
        finite = tape.op("Where", [tape.op("Less", [magnitude, ceiling]), magnitude, zero])
        largest = tape.op("ReduceMax", [finite], {"keepdims": 0})
        largest.dtype = FLOAT
        model.graph.outputs.append(largest)
    with scratch_folder(graph.parent) as folder:
        ir.save(model, folder / "ranges.onnx", external_data="ranges.onnx.data")
        session = ort.InferenceSession(folder / "ranges.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    ranges = np.zeros(len(measured))
    for batch in batches:
        ranges = np.maximum(ranges, np.asarray(session.run(None, feeds(names, batch))))
    return {str(value.name): float(largest) for value, largest in zip(measured, ranges, strict=True)}


def lower(model: ir.Model, precision: str, overflowing: Collection[str] = ()) -> int:
    """Change a float32 model to `fp16` or `bf16` in place; return how many of its float32 nodes stay float32.

    Its inputs and outputs stay float32. `overflowing` names the values that must stay float32.
    """
    graph, kind = model.graph, TYPES[precision]
    exact = _exact_nodes(graph)
    nodes = [node for node in graph if any(map(_is_float, (*node.inputs, *node.outputs)))]
    is_float = {value for node in nodes for value in (*node.inputs, *node.outputs) if _is_float(value)}
    converted = dict[tuple[ir.Value, ir.DataType], ir.Value]()
    kept = 0
    for node in nodes:
        stays = (
            node in exact
            or any(value is not None and value.name in overflowing for value in (*node.inputs, *node.outputs))
            or not _supports(node, model.opset_imports[node.domain], kind)
            or not all(_survives(value, kind) for value in node.inputs if value in is_float)
            or any(attribute.type in SUBGRAPHS for attribute in node.attributes.values())
        )
        kept += stays
        wanted = FLOAT if stays else kind
        for index, value in enumerate(node.inputs):
            if value in is_float and value.dtype != wanted:
                if (value, wanted) not in converted:
                    converted[value, wanted] = _convert_value(graph, value, wanted)
                node.replace_input_with(index, converted[value, wanted])
        if not stays:
            _retype(node, FLOAT, kind)
    for index, value in enumerate(graph.outputs):
        if value in is_float and value.dtype == kind:
            graph.outputs[index] = _convert_value(graph, value, FLOAT)
            value.name, graph.outputs[index].name = f"{value.name}_{precision}", value.name
    return kept


def emulate(model: ir.Model, precision: str) -> None:
    """Change a lowered model in place: it computes in float32 and rounds every value that has the lower type.

    Hardware that accumulates in float32 computes the same, so this stands in for the model where an engine lacks the
    type.
    """
    graph, kind = model.graph, TYPES[precision]
    for value in graph.initializers.values():
        if value.dtype == kind and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = FLOAT
    for node in [*graph]:
        outputs = [(value, [*value.uses()]) for value in node.outputs if value.dtype == kind]
        if node.op_type != "Cast":  # a cast already rounds
            _retype(node, kind, FLOAT)
        for value, uses in outputs:
            rounded = value if value.dtype == kind else _convert_value(graph, value, kind)
            widened = _convert_value(graph, rounded, FLOAT)
            for user, index in uses:
                user.replace_input_with(index, widened)


def _convert_value(graph: ir.Graph, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """The value in another type: a constant that is rounded once, else a cast right behind the value's producer."""
    name = f"{value.name}_{kind.name.lower()}"
    if value.const_value is not None:
        constant = ir.val(name, const_value=ir.tensor(lowered_numbers(value.const_value.numpy(), kind), name=name))
        graph.register_initializer(constant)
        return constant
    cast = ir.node("Cast", [value], {"to": int(kind)}, outputs=[ir.val(name, kind, value.shape)])
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)
    return cast.outputs[0]


def _retype(node: ir.Node, before: ir.DataType, after: ir.DataType) -> None:
    """Let a node write `after` where it writes `before`."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == before:
            numbers = lowered_numbers(attribute.value.numpy(), after)
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, ir.tensor(numbers))
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(after))
    for value in node.outputs:
        if value.dtype == before:
            value.dtype = after


def lowered_numbers(numbers: np.ndarray, kind: ir.DataType) -> np.ndarray:
    """Numbers rounded to another type; the infinities and sentinels of attention masks become finite."""
    finite = np.where(np.abs(numbers) >= SENTINEL, np.sign(numbers) * LOWERED_SENTINEL, numbers)
    with np.errstate(over="ignore"):
        return finite.astype(kind.numpy())


def _survives(value: ir.Value | None, kind: ir.DataType) -> bool:
    """Whether a constant keeps its meaning in the lower type: no number becomes infinite, and not all become zero."""
    if value is None or value.const_value is None:
        return True
    numbers = value.const_value.numpy()
    lowered = lowered_numbers(numbers, kind).astype(np.float32)
    return bool(np.isfinite(lowered).all()) and bool(lowered.any()) == bool(numbers.any())


def _exact_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that compute log-probabilities, normalisations, angles and indices."""
    means = [node for node in graph if node.op_type == "ReduceMean"]
    squares = [node for mean in means for node in mean.predecessors() if node.op_type in ("Pow", "Mul")]
    log_softmax = [node for node in graph if node.op_type == "LogSoftmax"]
    positions = [node for node in graph if node.op_type in ("Sin", "Cos") or _floats_to_integers(node)]
    return {
        *squares,
        # What follows a mean for as long as it is one number per row, and what that number scales.
        *reachable(means, lambda node: node.successors() if list(node.outputs[0].shape or ())[-1:] == [1] else ()),
        *reachable(log_softmax, ir.Node.successors),
        *reachable(positions, _float_sources),
    }


def _float_sources(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        producer = value.producer() if value is not None and _is_float(value) else None
        if producer is not None:
            yield producer


def _floats_to_integers(node: ir.Node) -> bool:
    output = node.outputs[0].dtype
    is_integer = output is not None and not output.is_floating_point()
    return node.op_type == "Cast" and _is_float(node.inputs[0]) and is_integer


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == FLOAT


def _supports(node: ir.Node, opset: int, kind: ir.DataType) -> bool:
    """Whether the operator's ONNX schema allows the type wherever this node has a float32."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            parameter = formal[min(index, len(formal) - 1)].type_str  # the last parameter may be variadic
            if _is_float(value) and f"tensor({kind.name.lower()})" not in allowed.get(parameter, ()):
                return False
    return True
