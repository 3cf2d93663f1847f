"""int8: static, with scales measured on text (Q/DQ nodes), or dynamic, with scales that are measured per batch.

Only matrix products with a constant weight are quantized, and only their inputs. Attention's own products, the residual
stream and every output stay float32, and so does the vocabulary head: nothing after it would average out its rounding.
Scales are symmetric and per channel for weights, as TensorRT requires.
"""

from collections.abc import Iterable
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
from mlmkit.export.graphs import add_constant, feeds, quiet, reachable, scratch_folder

LARGEST_ACTIVATION = 127
# Seven bits. On x86 without VNNI, ONNX Runtime adds two products of a weight with an activation from 0 to 255 in 16
# bits: 2 * 255 * 64 fits, 2 * 255 * 127 saturates, and scores would depend on the processor (docs/decisions.md).
LARGEST_WEIGHT = 64
# TensorRT accepts no scale of zero, not even for a column of zeros, and computes with scales in float16.
SMALLEST_SCALE = np.finfo(np.float16).smallest_subnormal


def static_int8(model: ir.Model, thresholds: dict[str, float]) -> int:
    """Quantize the inputs of every linear product in place; return the number of products.

    `thresholds` maps the name of an activation to the largest magnitude it keeps; larger values are clipped.
    """
    graph, nodes = model.graph, linear_products(model.graph)
    for node in nodes:
        activation, weight = node.inputs
        assert activation is not None and weight is not None and weight.const_value is not None
        # Query, key and value read the same activation, and each gets its own quantizer: ONNX Runtime fuses a product
        # into one kernel only if nothing else reads its int8 input.
        numbers = np.maximum(np.float32(thresholds[str(activation.name)] / LARGEST_ACTIVATION), SMALLEST_SCALE)
        scale = add_constant(graph, f"{activation.name}_scale", numbers)
        values = _insert(node, "QuantizeLinear", activation, scale, ir.DataType.INT8)
        node.replace_input_with(0, _insert(node, "DequantizeLinear", values, scale, ir.DataType.FLOAT))
        quantized, scales = quantize_weight(weight.const_value.numpy())
        values = add_constant(graph, f"{weight.name}_int8", quantized)
        scale = add_constant(graph, f"{weight.name}_scale", scales)
        node.replace_input_with(1, _insert(node, "DequantizeLinear", values, scale, ir.DataType.FLOAT, axis=1))
    return len(nodes)


def _insert(
    before: ir.Node, operator: str, value: ir.Value, scale: ir.Value, kind: ir.DataType, **attributes: int
) -> ir.Value:
    """The output of a new (de)quantizer with zero point 0."""
    assert before.graph is not None and scale.const_value is not None
    zeros = np.zeros(scale.const_value.shape.numpy(), np.int8)
    zero = add_constant(before.graph, f"{scale.name}_zero", zeros)  # pyright: ignore[reportArgumentType]
    output = ir.val(None, kind, value.shape)
    before.prepend(ir.node(operator, [value, scale, zero], attributes, outputs=[output]))
    return output


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[in, out]` as int8, and its scales `[out]` in float32.

    A column's largest magnitude becomes `LARGEST_WEIGHT`.
    """
    scales = np.maximum(np.abs(weight).max(axis=0) / LARGEST_WEIGHT, SMALLEST_SCALE)
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def linear_products(graph: ir.Graph) -> list[ir.Node]:
    """The products of an activation with a constant matrix, except the last one, which computes the logits."""
    log_softmax = next((node for node in graph if node.op_type == "LogSoftmax"), None)
    producers = [log_softmax.inputs[0]] if log_softmax else graph.outputs  # of a graph that only computes logits
    logits = [producer for value in producers if value is not None and (producer := value.producer()) is not None]
    head = reachable(logits, lambda node: () if node.op_type in ("MatMul", "Gemm") else node.predecessors())
    body = reachable(logits, ir.Node.predecessors)
    return [node for node in body if _is_linear(node) and node not in head]


def _is_linear(node: ir.Node) -> bool:
    if node.op_type != "MatMul":
        return False
    activation, weight = node.inputs
    is_matrix = weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2
    return is_matrix and activation is not None and activation.const_value is None


def activation_thresholds(graph: Path, batches: Iterable[Batch]) -> dict[str, float]:
    """The largest magnitude to keep of each product's inputs and outputs on `batches`, by the value's name.

    The threshold keeps 99.999 % of a value's numbers; ONNX Runtime's calibrator measures it.
    """
    names = [str(value.name) for value in ir.load(graph).graph.inputs]
    with scratch_folder(graph.parent) as folder, quiet():
        calibrator: Any = create_calibrator(
            graph,
            ["MatMul"],
            str(folder / "calibration.onnx"),
            CalibrationMethod.Percentile,
            _has_external_data(graph),
        )
        for batch in batches:  # one call per batch: the calibrator keeps every intermediate value of a call in memory
            calibrator.collect_data(_Reader(feeds(names, batch)))
        ranges = calibrator.compute_data()
    by_name = {name: ranges[name].range_value for name in ranges.keys()}  # noqa: SIM118  (not a mapping)
    return {name: float(max(abs(low.item()), abs(high.item()))) for name, (low, high) in by_name.items()}


class _Reader(CalibrationDataReader):
    """The one batch of a calibration step."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self._batches = iter([inputs])

    def get_next(self) -> dict[str, Any] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._batches, None)


def dynamic_int8(graph: Path) -> ir.Model:
    """The graph with the weights of its linear products in int8, and activations scaled by their range per batch."""
    with scratch_folder(graph.parent) as folder, quiet():
        quantize_dynamic(
            graph,
            folder / "dynamic.onnx",
            ["MatMul"],
            per_channel=True,
            reduce_range=True,  # seven bits, as in `LARGEST_WEIGHT`
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[str(node.name) for node in linear_products(ir.load(graph).graph)],
            use_external_data_format=_has_external_data(graph),
        )
        return ir.external_data.load_to_model(ir.load(folder / "dynamic.onnx"))  # the file is deleted with its folder


def _has_external_data(graph: Path) -> bool:
    return graph.with_name(f"{graph.name}.data").exists()
