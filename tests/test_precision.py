"""Lower precisions: which node computes in which type, how far scores move, and what overflows."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import PROOF, paragraphs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file
from test_export import random_batch

from benchmarks.architectures import EXTRAS, SIZES, build
from mlmkit.artifact import PRECISIONS, read_manifest
from mlmkit.backends import Batch, load
from mlmkit.corpus import tokenize
from mlmkit.errors import CheckError, UserError
from mlmkit.export.export import export
from mlmkit.export.int8 import quantize_weight
from mlmkit.export.onnx import write_onnx
from mlmkit.export.parity import BOUNDS, parity_batches
from mlmkit.export.precision import LARGEST_FLOAT16, TYPES, emulate, lower, lowered_numbers, value_ranges
from mlmkit.model import MaskedLM

LOWER = [name for name in PRECISIONS if name != "fp32"]


def graph_of(folder: Path) -> ir.Graph:
    return ir.load(folder / "model.onnx").graph


def run(model: ir.Model, names: list[str] | None, batch: Batch) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(names, batch._asdict())]


def types_of(graph: ir.Graph, operator: str) -> set[str]:
    return {value.dtype.name for node in graph if node.op_type == operator for value in node.outputs[:1] if value.dtype}


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_the_manifest_says_what_a_precision_costs(kind, precision, lowered):
    manifest = read_manifest(lowered(kind, precision))
    assert (manifest.precision, manifest.drift_allowed) == (precision, False)
    parity = manifest.parity
    assert parity["bounds"] == BOUNDS[precision]._asdict()
    assert 0 < parity["mean_log_prob_difference"] <= parity["max_log_prob_difference"] <= BOUNDS[precision].max_log_prob
    assert abs(parity["cross_entropy_difference"]) <= BOUNDS[precision].cross_entropy
    assert 0.9 < parity["top_1_agreement"] <= 1 and parity["top_5_agreement"] > 0.9


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-dynamic"])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_engine_is_near_the_checkpoint_at_unseen_shapes(kind, precision, checkpoint, lowered):
    reference, engine = load(str(checkpoint(kind))), load(str(lowered(kind, precision)))
    assert engine.info.precision == precision
    for shape in [(1, 1, 1), (1, 64, 5), (17, 13, 300), (5, 7, 0)]:
        batch = random_batch(*shape)
        expected, actual = reference.score(batch), engine.score(batch)
        np.testing.assert_allclose(actual.log_prob, expected.log_prob, atol=BOUNDS[precision].max_log_prob, rtol=0)
        assert actual.log_prob.dtype == actual.top_log_prob.dtype == np.float32


@pytest.mark.parametrize(("precision", "name"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16")])
def test_types_stand_in_the_graph(precision, name, lowered):
    graph = graph_of(lowered("modernbert", precision))
    for operator in ("LayerNormalization", "Softmax", "Gelu"):
        assert types_of(graph, operator) == {name}
    (counts,) = [node for node in graph if node.op_type == "MatMul" and node.outputs[0].dtype == ir.DataType.FLOAT]
    assert [node.op_type for node in counts.predecessors()] == ["Cast"]  # it counts the better ids: the rank
    # what would be another position, or a rounded log-probability
    for operator in ("Cos", "Sin", "LogSoftmax"):
        assert types_of(graph, operator) == {"FLOAT"}
    assert [output.dtype for output in graph.outputs] == [ir.DataType.FLOAT, ir.DataType.INT64] * 2
    stored = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    matrices = [tensor for tensor in stored if len(tensor.shape) == 2 and min(tensor.shape.numpy()) > 1]
    assert {matrix.dtype.name for matrix in matrices} == {name}


def test_bfloat16_needs_a_gpu(lowered):
    with pytest.raises(UserError, match="no bf16 on the CPU"):
        load(str(lowered("bert", "bf16")), device="cpu")


def test_the_stand_in_for_bfloat16_rounds_every_value(lowered):
    """On a CPU, bf16 is proven with a float32 graph that holds a bfloat16 number wherever the bf16 graph does."""
    model = ir.load(lowered("bert", "bf16") / "model.onnx")
    bfloat16 = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.BFLOAT16]
    emulate(model, "bf16")
    for node in model.graph:
        for value in node.outputs:
            if node.op_type == "Cast" and value.dtype == ir.DataType.FLOAT and value not in model.graph.outputs:
                model.graph.outputs.append(value)
    outputs = run(model, None, random_batch(3, 9, 5))[4:]
    assert len(outputs) >= len(bfloat16)
    for numbers in outputs:
        assert not (np.asarray(numbers, np.float32).view(np.uint32) & 0xFFFF).any()


def test_what_overflows_float16_stays_float32(checkpoint, tmp_path):
    """Feed-forward outputs exceed 65504; the layer normalisation after them scales them down."""
    file = shutil.copytree(checkpoint("bert"), tmp_path / "checkpoint") / "model.safetensors"
    weights = load_file(file)
    for layer in (0, 1):
        weights[f"bert.encoder.layer.{layer}.output.dense.weight"] *= 6e4
    save_file(weights, file, metadata={"format": "pt"})
    export(str(tmp_path / "checkpoint"), tmp_path / "exact", text=PROOF)
    exact = load(str(tmp_path / "exact"))
    batches = parity_batches(tokenize(paragraphs(), exact.tokenizer), exact.tokenizer, exact.info.max_length, 1)
    ranges = value_ranges(tmp_path / "exact" / "model.onnx", batches)
    assert max(ranges.values()) > 65504

    naive = ir.load(tmp_path / "exact" / "model.onnx")
    lower(naive, "fp16")
    emulate(naive, "fp16")  # every value rounded, as ONNX Runtime's CPU kernels may not do inside
    assert not all(np.isfinite(run(naive, ["log_prob"], batch)[0]).all() for batch in batches)

    manifest = export(str(tmp_path / "checkpoint"), tmp_path / "fp16", precision="fp16", text=PROOF)
    assert manifest.parity["max_log_prob_difference"] <= BOUNDS["fp16"].max_log_prob
    assert manifest.calibration is not None
    large = {name for name, largest in ranges.items() if largest > LARGEST_FLOAT16 / 2}
    assert set(manifest.calibration["overflowing"]) <= large
    graph = graph_of(tmp_path / "fp16")
    assert types_of(graph, "LayerNormalization") == {"FLOAT", "FLOAT16"}  # only where it overflows
    assert types_of(graph, "Softmax") == {"FLOAT16"}


@pytest.mark.parametrize("name", ["eurobert", "deberta"])
def test_a_written_out_normalisation_stays_float32(name, tmp_path, monkeypatch):
    """Squares overflow float16 from 256 on, and bfloat16's eight bits are too few for a number that scales a row."""
    monkeypatch.setitem(SIZES, "num_hidden_layers", 1)  # exporting takes seconds for each layer,
    monkeypatch.setitem(EXTRAS, name, {})  # and more for DeBERTa's relative attention
    network = build(name)
    with torch.no_grad():
        network.get_input_embeddings().weight.mul_(3000)
    write_onnx(MaskedLM(network), tmp_path / "model.onnx")
    batch = random_batch(3, 9, 5, vocabulary=200)
    (expected,) = run(ir.load(tmp_path / "model.onnx"), ["log_prob"], batch)
    for precision in ("fp16", "bf16"):
        lower(model := ir.load(tmp_path / "model.onnx"), precision)
        assert [types_of(model.graph, operator) for operator in ("Pow", "ReduceMean", "Sqrt")] == [{"FLOAT"}] * 3
        assert types_of(model.graph, "Gelu" if name == "deberta" else "Sigmoid") == {TYPES[precision].name}
        emulate(model, precision)
        (actual,) = run(model, ["log_prob"], batch)
        np.testing.assert_allclose(actual, expected, atol=BOUNDS[precision].max_log_prob, rtol=0.02)  # logits of 1,000s


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_what_int8_leaves_can_be_float16(kind, checkpoint, lowered):
    """As TensorRT computes it: a scale has the type of the values it scales, and scores stay within int8's bounds."""
    model = ir.load(lowered(kind, "int8") / "model.onnx")
    lower(model, "fp16", (read_manifest(lowered(kind, "int8")).calibration or {})["overflowing"])
    assert types_of(model.graph, "QuantizeLinear") == {"INT8"}
    assert types_of(model.graph, "DequantizeLinear") == types_of(model.graph, "Softmax") == {"FLOAT16"}
    reference = load(str(checkpoint(kind)))
    for shape in [(1, 64, 5), (17, 13, 300)]:
        expected = reference.score(batch := random_batch(*shape)).log_prob
        (actual,) = run(model, ["log_prob"], batch)
        np.testing.assert_allclose(actual, expected, atol=BOUNDS["int8"].max_log_prob, rtol=0)


def test_a_column_of_zeros_has_a_scale():
    """TensorRT refuses a scale of zero, also one that is zero only in float16."""
    numbers, scales = quantize_weight(np.zeros((4, 3), np.float32))
    assert not numbers.any()
    assert (scales.astype(np.float16) > 0).all()


def test_only_dynamic_int8_is_coupled_by_its_batch(lowered):
    assert load(str(lowered("bert", "int8-dynamic"))).info.couples_batch
    engine = load(str(lowered("bert", "int8")))
    assert not engine.info.couples_batch
    assert (read_manifest(lowered("bert", "int8")).calibration or {})["method"] == "percentile"
    batch = random_batch(4, 9, 12)
    together = engine.score(batch).log_prob
    for row in range(4):
        mine, real = batch.positions // 9 == row, batch.attention_mask[row] == 1
        input_ids, mask = (values[row, real][None] for values in (batch.input_ids, batch.attention_mask))
        alone = engine.score(Batch(input_ids, mask, batch.positions[mine] - row * 9, batch.targets[mine])).log_prob
        np.testing.assert_allclose(alone, together[mine], atol=1e-5, rtol=0)


def test_int8_reads_int8_and_keeps_the_head(lowered):
    graph = graph_of(lowered("bert", "int8"))
    products = [node for node in graph if node.op_type == "MatMul"]
    is_int8 = [all(node.op_type == "DequantizeLinear" for node in product.predecessors()) for product in products]
    assert sum(is_int8) == (read_manifest(lowered("bert", "int8")).calibration or {})["int8_products"] == 2 * 6 + 1
    assert not is_int8[-1]  # the head, which makes the logits
    zeros: list[Any] = [value.const_value for name, value in graph.initializers.items() if name.endswith("_zero")]
    assert zeros and not any(zero.numpy().any() for zero in zeros)  # TensorRT takes no other zero point


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.6), ("bf16", 0.6), ("int8", 0.75), ("int8-dynamic", 0.75)])
def test_old_weights_do_not_stay(precision, share, artifact, lowered):
    """The share is high because a tiny model is mostly its embedding, which int8 does not change."""
    size = sum(path.stat().st_size for path in artifact("bert").glob("model.onnx*"))
    stored = graph_of(lowered("bert", precision)).initializers.values()
    assert all(value.uses() for value in stored)
    weights = sum(value.const_value.nbytes for value in stored if value.const_value is not None)
    assert weights < share * size


def test_int8_asks_for_text(checkpoint, tmp_path):
    with pytest.raises(UserError, match="--text"):
        export(str(checkpoint("bert")), tmp_path / "a", precision="int8")
    with pytest.raises(UserError, match="unknown precision 'fp8': choose fp32, fp16"):
        export(str(checkpoint("bert")), tmp_path / "a", precision="fp8")
    assert not list(tmp_path.iterdir())


def test_drift_is_refused_unless_allowed(checkpoint, tmp_path, monkeypatch):
    tight = BOUNDS["fp16"]._replace(mean_log_prob=1e-9)
    monkeypatch.setitem(BOUNDS, "fp16", tight)
    with pytest.raises(CheckError, match=r"mean .* \(BEYOND its bound of 1\.0e-09\).*--allow-drift"):
        export(str(checkpoint("bert")), tmp_path / "a", precision="fp16", text=PROOF)
    assert not list(tmp_path.iterdir())
    export(str(checkpoint("bert")), tmp_path / "a", precision="fp16", text=PROOF, allow_drift=True)
    manifest = json.loads((tmp_path / "a" / "mlmkit.json").read_text())
    assert manifest["drift_allowed"] is True
    assert manifest["parity"]["bounds"]["mean_log_prob"] == 1e-9


@given(arrays.arrays(np.float32, (4, 3), elements=st.floats(-1e4, 1e4, width=32)))
def test_quantized_weights_are_within_half_a_step(weight):
    numbers, scales = quantize_weight(weight)
    assert numbers.dtype == np.int8
    assert scales.shape == (3,)
    assert (np.abs(numbers * scales.astype(np.float64) - weight) <= scales * 0.5001).all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.sampled_from(["FLOAT16", "BFLOAT16"]))
def test_masks_become_finite(numbers, name):
    given_numbers = np.array(numbers, np.float32)
    lowered = lowered_numbers(given_numbers, ir.DataType[name]).astype(np.float32)
    is_mask = np.abs(given_numbers) >= 1e30
    assert (np.abs(lowered[is_mask]) == 32768).all()
    assert (np.sign(lowered[is_mask]) == np.sign(given_numbers[is_mask])).all()
