"""Lower precision, typed in the graph itself: which nodes compute in float16 or bfloat16, and the casts between.

Strongly typed engines do what the graph says, so the graph has to say it. A node computes in the lower type unless

- the operator does not have it (by its ONNX schema), or the node holds a subgraph,
- it makes a log-probability: log-softmax and what follows it, to the graph's outputs,
- it makes an angle or an index, where a rounded position is another position: whatever leads to Sin, Cos or a cast to
  integers (rotary embeddings, buckets of relative distance),
- it is part of a normalisation that is written out (RMSNorm): its mean, its squares, and what they normalise. Squares
  overflow float16 from 256 on, and in bfloat16 a whole row would be scaled by a mean of eight bits,
- a constant of it would become zero or infinite, or
- a value that it reads or writes left float16's range on real text (`mlmkit.export.ranges`): LayerNormalization and
  Softmax among them where they overflow.
"""

from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import onnx
import onnx_ir as ir

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
# Calibration text cannot show every extreme: a quarter of float16's largest number leaves room for four times as much.
LARGEST_FLOAT16 = 65504 / 4
# Attention masks hold the most negative float32, or infinity. The probability behind this one is zero all the same, and
# a row that is masked as a whole stays finite: -65504 plus a score would not.
SENTINEL = 1e30
LOWERED_SENTINEL = 32768.0
ANGLES = {"Sin", "Cos"}
SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def lower(model: ir.Model, precision: str, overflowing: Collection[str] = (), *, emulate: bool = False) -> int:
    """Change a float32 model to `fp16` or `bf16` in place; return how many of its float32 nodes stay so.

    `overflowing` names the values that must stay float32. With `emulate` the model keeps computing in float32 and
    rounds every value that would have the lower type, which is what hardware with float32 accumulation computes: for
    machines that lack the type.
    """
    graph, kind = model.graph, TYPES[precision]
    exact = _exact_nodes(graph) | {node for node in graph for value in node.outputs if value.name in overflowing}
    nodes = [node for node in graph if any(_is_float(value) for value in (*node.inputs, *node.outputs))]
    is_float = {value for node in nodes for value in (*node.inputs, *node.outputs) if _is_float(value)}
    types = _Types(graph, kind, emulate)
    kept = 0
    for node in nodes:
        stays = (
            node in exact
            or any(value is not None and value.name in overflowing for value in node.inputs)
            or not _has_type(node, model.opset_imports[node.domain], kind)
            or not all(_survives(value, kind) for value in node.inputs if value in is_float)
            or any(attribute.type in SUBGRAPHS for attribute in node.attributes.values())
        )
        kept += stays
        for index, value in enumerate(node.inputs):
            if value in is_float:
                node.replace_input_with(index, types.of(value, exact=stays))
        if not stays:
            types.write(node)
    return kept


class _Types:
    """Each float32 value of the graph in both types, the missing one made when it is first asked for."""

    def __init__(self, graph: ir.Graph, kind: ir.DataType, emulate: bool) -> None:
        self._graph, self._kind, self._emulate = graph, kind, emulate
        self._made: dict[tuple[ir.Value, bool], ir.Value] = {}

    def of(self, value: ir.Value, *, exact: bool) -> ir.Value:
        """The value in float32, or in the lower type."""
        if (value, exact) not in self._made:
            self._made[value, exact] = self._make(value, exact)
        return self._made[value, exact]

    def _make(self, value: ir.Value, exact: bool) -> ir.Value:
        if value.const_value is not None:
            return value if exact else self._constant(value)
        if value.dtype == ir.DataType.FLOAT:
            return value if exact else self._lowered(value)
        return self._cast(value, ir.DataType.FLOAT)

    def _constant(self, value: ir.Value) -> ir.Value:
        numbers = lowered_numbers(value.const_value.numpy(), self._kind)
        if self._emulate:
            numbers = numbers.astype(np.float32)
        name = f"{value.name}_{self._kind.name.lower()}"
        made = ir.Value(name=name, shape=value.shape, const_value=ir.tensor(numbers, name=name))
        made.dtype = ir.DataType.FLOAT if self._emulate else self._kind
        self._graph.register_initializer(made)
        return made

    def _lowered(self, value: ir.Value) -> ir.Value:
        rounded = self._cast(value, self._kind)
        return self._cast(rounded, ir.DataType.FLOAT) if self._emulate else rounded

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(kind)})
        node.outputs[0].name, node.outputs[0].shape = f"{value.name}_{kind.name.lower()}", value.shape
        node.outputs[0].dtype = kind
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return node.outputs[0]

    def write(self, node: ir.Node) -> None:
        """Let a node's float outputs have the lower type."""
        if self._emulate:
            for value in node.outputs:
                if _is_float(value):
                    self._made[value, True] = self._made[value, False] = self._lowered(value)
            return
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrTensor(
                    name, ir.tensor(lowered_numbers(attribute.value.numpy(), self._kind))
                )
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", int(self._kind))
        for value in node.outputs:
            if _is_float(value):
                value.dtype = self._kind
                self._made[value, False] = value


def lowered_numbers(numbers: np.ndarray, kind: ir.DataType) -> np.ndarray:
    """Rounded to the lower type; a mask's sentinels become finite."""
    finite = np.where(np.abs(numbers) >= SENTINEL, np.sign(numbers) * LOWERED_SENTINEL, numbers)
    with np.errstate(over="ignore"):
        return finite.astype(kind.numpy())


def _survives(value: ir.Value, kind: ir.DataType) -> bool:
    """Whether a constant is still about what it was: no number of it becomes infinite or, all of them, zero."""
    if value.const_value is None:
        return True
    numbers = value.const_value.numpy()
    lowered = lowered_numbers(numbers, kind).astype(np.float32)
    return bool(np.isfinite(lowered).all()) and bool(lowered.any()) == bool(numbers.any())


def _exact_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that make log-probabilities, normalisations, angles and indices."""
    means = [node for node in graph if node.op_type == "ReduceMean"]
    squares = [node for mean in means for node in mean.predecessors() if node.op_type in ("Pow", "Mul")]
    scores = [node for node in graph if node.op_type == "LogSoftmax"]
    ends = [node for node in graph if node.op_type in ANGLES or (node.op_type == "Cast" and _floats_to_integers(node))]
    return {
        *squares,
        # What follows a mean, as long as it is one number a row, and what that number is applied to.
        *_reached(means, lambda node: node.successors() if list(node.outputs[0].shape or ())[-1:] == [1] else ()),
        *_reached(scores, ir.Node.successors),
        *_reached(ends, _float_sources),
    }


def _reached(starts: Iterable[ir.Node], step: Callable[[ir.Node], Iterable[ir.Node]]) -> set[ir.Node]:
    """The nodes that `step` leads to from `starts`, with these."""
    found = set(starts)
    waiting = list(found)
    while waiting:
        fresh = set(step(waiting.pop())) - found
        found |= fresh
        waiting.extend(fresh)
    return found


def _float_sources(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        producer = value.producer() if value is not None and _is_float(value) else None
        if producer is not None:
            yield producer


def _floats_to_integers(node: ir.Node) -> bool:
    output = node.outputs[0].dtype
    return _is_float(node.inputs[0]) and output is not None and not output.is_floating_point()


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _has_type(node: ir.Node, opset: int, kind: ir.DataType) -> bool:
    """Whether the operator takes the type wherever this node has a float32, by its schema."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            parameter = formal[min(index, len(formal) - 1)].type_str  # the last may be variadic
            if _is_float(value) and f"tensor({kind.name.lower()})" not in allowed.get(parameter, ()):
                return False
    return True
