"""How large the values inside a graph become on real text."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from mlmkit.backends import Batch
from mlmkit.export.lowering import SENTINEL
from mlmkit.export.quantize import add_constant


def value_ranges(graph: Path, batches: Iterable[Batch]) -> dict[str, float]:
    """The largest magnitude of each float32 value that a node of the graph writes, by its name.

    Infinities and a mask's sentinels, which are no measurements, are left out.
    """
    model = ir.load(graph)
    measured = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    model.graph.outputs.clear()
    constants = {
        name: add_constant(model.graph, name, np.float32(number))
        for name, number in (("ceiling", SENTINEL), ("zero", 0.0))
    }
    for value in measured:
        magnitude = _append(model.graph, "Abs", value)
        is_measurement = _append(model.graph, "Less", magnitude, constants["ceiling"], kind=ir.DataType.BOOL)
        kept = _append(model.graph, "Where", is_measurement, magnitude, constants["zero"])
        model.graph.outputs.append(_append(model.graph, "ReduceMax", kept, keepdims=0))
    with tempfile.TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "measured.onnx", external_data="measured.onnx.data")
        session = ort.InferenceSession(Path(folder) / "measured.onnx", providers=["CPUExecutionProvider"])
    largest = np.zeros(len(measured))
    for batch in batches:
        largest = np.maximum(largest, [float(found) for found in session.run(None, batch._asdict())])  # pyright: ignore[reportArgumentType]
    return {str(value.name): float(found) for value, found in zip(measured, largest, strict=True)}


def _append(
    graph: ir.Graph, operator: str, *inputs: ir.Value, kind: ir.DataType = ir.DataType.FLOAT, **attributes: int
) -> ir.Value:
    node = ir.node(operator, inputs, attributes)
    (output,) = node.outputs
    output.dtype = kind
    graph.append(node)  # which names the output
    return output
