"""int8: static, with scales measured on text (Q/DQ nodes), or dynamic, with scales that ONNX Runtime finds as it runs.

Only products with a constant weight are quantized, and only what they read: attention's products, the residual stream
and every output stay float32, and so does the vocabulary head, behind whose rounding nothing would even it out. Scales
are symmetric, and weights have one a channel, as TensorRT requires.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    create_calibrator,
    quantize_dynamic,
)

from mlmkit.backends import Batch
from mlmkit.export.onnx import quiet

LARGEST_ACTIVATION = 127
# Seven bits. On x86 without VNNI, ONNX Runtime adds two products of a weight with an activation from 0 to 255 in 16
# bits: 2 * 255 * 64 fits there, 2 * 255 * 127 saturates, and scores would depend on the processor (docs/decisions.md).
LARGEST_WEIGHT = 64
# TensorRT takes no scale of zero, not for a column of zeros either, and computes with scales in float16.
SMALLEST_SCALE = np.finfo(np.float16).smallest_subnormal


def static_int8(model: ir.Model, thresholds: dict[str, float]) -> int:
    """Let every linear product read int8, in place; return how many there are.

    `thresholds` has the largest magnitude that an activation keeps, by its name; beyond it, it is cut.
    """
    graph, nodes = model.graph, linear_products(model.graph)
    for node in nodes:
        activation, weight = node.inputs
        assert activation is not None and weight is not None
        numbers, scales = quantize_weight(_numbers(weight))
        step = np.maximum(np.float32(thresholds[str(activation.name)] / LARGEST_ACTIVATION), SMALLEST_SCALE)
        scale = add_constant(graph, f"{activation.name}_scale", step)
        # Query, key and value read the same activation, and each quantizes it: ONNX Runtime fuses a product into one
        # kernel only if no other reads its int8 input.
        values = _insert(node, "QuantizeLinear", activation, scale, ir.DataType.INT8)
        node.replace_input_with(0, _insert(node, "DequantizeLinear", values, scale, ir.DataType.FLOAT))
        values = add_constant(graph, f"{weight.name}_int8", numbers)
        scale = add_constant(graph, f"{weight.name}_scale", scales)
        node.replace_input_with(1, _insert(node, "DequantizeLinear", values, scale, ir.DataType.FLOAT, axis=1))
    return len(nodes)


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[in, out]` in int8 and its scales `[out]` float32: a column's largest becomes `LARGEST_WEIGHT`."""
    scales = np.maximum(np.abs(weight).max(axis=0) / LARGEST_WEIGHT, SMALLEST_SCALE)
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def linear_products(graph: ir.Graph) -> list[ir.Node]:
    """Products of an activation with a constant matrix on the way to the logits, but for the last, which makes them."""
    scoring = next(node for node in graph if node.op_type == "LogSoftmax")
    head = _before(scoring, stop=_is_product)
    return [node for node in _before(scoring) if _is_linear(node) and node not in head]


def _before(node: ir.Node, stop: Callable[[ir.Node], bool] = lambda _: False) -> list[ir.Node]:
    """The nodes that a node depends on; of those that `stop` names, not what they depend on in turn."""
    found, waiting = dict[ir.Node, None](), list(node.predecessors())
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            if not stop(node):
                waiting.extend(node.predecessors())
    return list(found)


def _is_product(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm")


def _is_linear(node: ir.Node) -> bool:
    if node.op_type != "MatMul":
        return False
    activation, weight = node.inputs
    is_matrix = weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
    return is_matrix and activation is not None and activation.const_value is None


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def add_constant(graph: ir.Graph, name: str, numbers: Any) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.asarray(numbers), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(
    before: ir.Node, operator: str, value: ir.Value, scale: ir.Value, kind: ir.DataType, **attributes: int
) -> ir.Value:
    """The output of a new node with a zero point of zero."""
    assert before.graph is not None
    zero = add_constant(before.graph, f"{scale.name}_zero", np.zeros_like(_numbers(scale), np.int8))  # pyright: ignore[reportArgumentType]
    node = ir.node(operator, [value, scale, zero], attributes)
    (output,) = node.outputs
    output.dtype, output.shape = kind, value.shape
    before.prepend(node)
    return output


def activation_thresholds(graph: Path, batches: Iterable[Batch]) -> dict[str, float]:
    """The largest magnitude worth keeping of each product's inputs and outputs on `batches`, by the value's name.

    It keeps 99.999 % of a value's numbers, as ONNX Runtime finds them.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        measured = str(Path(folder) / "measured.onnx")
        calibrator: Any = create_calibrator(
            graph, ["MatMul"], measured, CalibrationMethod.Percentile, _has_external_data(graph)
        )
        for batch in batches:  # one at a time: the calibrator keeps every intermediate of what it is given at once
            calibrator.collect_data(_Reader([batch]))
        ranges = calibrator.compute_data()
    found = {name: ranges[name].range_value for name in ranges.keys()}  # noqa: SIM118  (not a mapping)
    return {name: float(max(abs(low.item()), abs(high.item()))) for name, (low, high) in found.items()}


def dynamic_int8(graph: Path) -> ir.Model:
    """A graph with its linear products' weights in int8, whose activations are scaled by what a batch holds."""
    products = [str(node.name) for node in linear_products(ir.load(graph).graph)]
    with tempfile.TemporaryDirectory() as folder, quiet():
        target = Path(folder) / "dynamic.onnx"
        quantize_dynamic(
            graph,
            target,
            ["MatMul"],
            per_channel=True,
            reduce_range=True,  # see `LARGEST_WEIGHT`
            weight_type=QuantType.QInt8,
            nodes_to_quantize=products,
            use_external_data_format=_has_external_data(graph),
        )
        model = ir.load(target)
        return ir.external_data.load_to_model(model)  # the file goes with its folder


def _has_external_data(graph: Path) -> bool:
    return graph.with_name(f"{graph.name}.data").exists()


class _Reader(CalibrationDataReader):
    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches: Iterator[Batch] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch = next(self._batches, None)
        return None if batch is None else batch._asdict()
