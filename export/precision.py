"""Choosing what a graph computes in: fp32, fp16, bf16, int8, int8-dynamic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mlmkit.artifact import DYNAMIC_INT8
from mlmkit.backends import Batch
from mlmkit.export.graph_files import replace_graph
from mlmkit.export.lowering import LARGEST_FLOAT16, lower
from mlmkit.export.quantize import activation_thresholds, dynamic_int8, static_int8
from mlmkit.export.ranges import value_ranges


def convert(graph: Path, precision: str, batches: Sequence[Batch]) -> dict[str, Any] | None:
    """Change a float32 graph file to `precision`; return what the manifest says of how.

    `batches` of real text are what ranges and scales are measured on.
    """
    if precision == "fp32":
        return None
    if precision == DYNAMIC_INT8:
        replace_graph(dynamic_int8(graph), graph)
        return None
    measured = {"batches": len(batches), "tokens": sum(int(batch.attention_mask.sum()) for batch in batches)}
    model, facts, overflowing = ir.load(graph), dict[str, Any](), list[str]()
    if precision == "int8":
        products = static_int8(model, activation_thresholds(graph, batches))
        facts = {"method": "percentile", **measured, "int8_products": products}
        replace_graph(model, graph)
    if precision != "bf16":  # what is not int8, TensorRT computes in float16
        overflowing = [name for name, largest in value_ranges(graph, batches).items() if largest > LARGEST_FLOAT16]
        facts = {"method": "range", **measured, **facts, "overflowing": overflowing}
    if precision != "int8":
        facts["float32_nodes"] = lower(model, precision, overflowing)
        replace_graph(model, graph)
    return facts
