"""What TensorRT builds better when it is written otherwise, while ONNX Runtime keeps the graph as it is."""

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from mlmkit.export.quantize import add_constant


def plan_graph(model: ir.Model) -> None:
    """Rewrite a graph of any precision in place for TensorRT. Its numbers stay the same but for rounding.

    - The rank is counted by a sum, which becomes part of the log-softmax's kernel. The product that ONNX Runtime wants
      (`MaskedLM.forward`) takes 450 to 830 MB at base sizes, and Turing has none in float32.
    - DeBERTa-v2's query meets scaled keys, and positions. Its key is left unscaled, and the query scaled: in float16
      TensorRT joins products that read the same query, and then does not recognise attention.
    """
    graph = model.graph
    for product in [node for node in graph if node.op_type == "MatMul"]:
        left, right = product.inputs
        assert left is not None and right is not None
        scaling = right.producer()
        if _is_column_of_ones(right):
            total = ir.node("ReduceSum", [left, add_constant(graph, "last_axis", [-1])], {"keepdims": 1})
            replace_nodes_and_values(graph, product, [product], [total], product.outputs, total.outputs)
        elif scaling is not None and _scales(scaling) and len(left.uses()) > 1:
            scaled = ir.node(scaling.op_type, [left, scaling.inputs[1]])
            graph.insert_before(product, scaled)
            product.replace_input_with(0, scaled.outputs[0])
            product.replace_input_with(1, scaling.inputs[0])


def _is_column_of_ones(value: ir.Value) -> bool:
    constant = value.const_value
    return constant is not None and constant.shape[1:] == (1,) and bool((constant.numpy() == 1).all())


def _scales(node: ir.Node) -> bool:
    if node.op_type not in ("Mul", "Div"):
        return False
    factor = node.inputs[1]
    return factor is not None and getattr(factor.const_value, "size", 0) == 1
