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
    model = ir.load(graph)
    if precision == "int8":
        products = static_int8(model, activation_thresholds(graph, batches))
        facts = {"method": "percentile", **measured, "int8_products": products}
    elif precision == "fp16":
        ranges = value_ranges(graph, batches)
        overflowing = [name for name, largest in ranges.items() if largest > LARGEST_FLOAT16]
        kept = lower(model, precision, overflowing)
        facts = {"method": "range", **measured, "float32_nodes": kept, "overflowing": overflowing}
    else:
        facts = {"float32_nodes": lower(model, precision)}
    replace_graph(model, graph)
    return facts
