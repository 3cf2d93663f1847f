"""What TensorRT for RTX builds of a graph: real builds of tiny models, which need no GPU."""

import re
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers as T
from test_export import random_batch

from benchmarks.architectures import build, check
from mlmkit.artifact import read_manifest
from mlmkit.backends import Scored
from mlmkit.export.graph_files import save_graph
from mlmkit.export.lowering import lower
from mlmkit.export.onnx import write_onnx
from mlmkit.export.plan_graph import plan_graph
from mlmkit.export.standard_forms import FORMS
from mlmkit.model import MaskedLM

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 alone")

# Heads of 64.
SIZES: dict[str, Any] = {"vocab_size": 200, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 256, "max_position_embeddings": 64}
SPECIALS: dict[str, Any] = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
MODERN: dict[str, Any] = SPECIALS | {"local_attention": 16, "global_attn_every_n_layers": 2}
CONFIGS = {
    "bert": lambda: T.BertConfig(**SIZES),
    "modernbert": lambda: T.ModernBertConfig(**SIZES, **MODERN),
    "eurobert": lambda: T.EuroBertConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=4),
    "deberta-v2": lambda: T.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
}


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.warnings: list[str] = []
        self.layers: list[str] = []

    def log(self, severity, message: str) -> None:
        if message.startswith("Layers:"):
            self.layers = [line for line in message.splitlines() if line.startswith("Name:")]
        elif severity in (trt.ILogger.WARNING, trt.ILogger.ERROR) and "Int64 binding" not in message:
            self.warnings.append(message)

    def fused(self) -> int:
        return sum("TacticName: _gemm_mha" in layer for layer in self.layers)

    def products(self) -> set[tuple[str, str]]:
        """What the products with weights read and write."""
        sides = [layer.split(", Outputs: ") for layer in self.layers if "LayerType: gemm" in layer]
        return {tuple(re.findall(r"Datatype: (\w+)", side)[0] for side in pair) for pair in sides}  # pyright: ignore[reportReturnType]


def built(path, target=None) -> Log | None:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path)), log.warnings
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target:
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
    profile = builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        shapes = ((1, 1), (4, 32), (8, 64)) if len(tensor.shape) == 2 else ((1,), (8,), (64,))
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    return None if builder.build_serialized_network(network, config) is None else log


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A graph in a precision, with heads of 64 numbers, which TensorRT fuses; written as plans are built from it."""

    @cache
    def exact(kind):
        path = tmp_path_factory.mktemp(kind) / "model.onnx"
        torch.manual_seed(0)
        network = T.AutoModelForMaskedLM.from_config(CONFIGS[kind]()).eval()
        with torch.no_grad():  # every logit is that of five ids
            weight = network.get_output_embeddings().weight
            weight.copy_(weight[::5].repeat_interleave(5, dim=0))
        write_onnx(MaskedLM(network, top_k=10), path)
        return path

    def make(kind, precision, rewrite=plan_graph):
        model = ir.load(exact(kind))
        if precision != "fp32":
            lower(model, precision)
        rewrite(model)
        save_graph(model, path := exact(kind).with_name(f"{precision}.onnx"))
        return path

    return make


def test_turing_takes_float16_without_the_product_of_the_rank(graph):
    turing = trt.ComputeCapability.SM75
    assert built(graph("bert", "fp16", rewrite=lambda model: None), turing) is None
    assert built(graph("bert", "fp16"), turing)


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "fp16") for kind in CONFIGS), ("deberta-v2", "bf16")])
def test_attention_is_fused_and_nothing_is_warned_of(kind, precision, graph):
    log = built(graph(kind, precision))
    assert log
    assert log.fused() == 2
    assert log.warnings == []
    assert log.products() == {("Half", "Half") if precision == "fp16" else ("BFloat16", "BFloat16")}


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_the_rewritten_graph_has_the_same_numbers(kind, graph):
    before, after = (
        onnxruntime.InferenceSession(graph(kind, "fp32", rewrite), providers=["CPUExecutionProvider"])
        for rewrite in (lambda model: None, plan_graph)
    )
    for shape in [(1, 1, 1), (17, 13, 300), (3, 31, 1), (1, 64, 5)]:
        batch = random_batch(*shape, vocabulary=200)._asdict()
        expected, found = (Scored(*map(np.asarray, session.run(None, batch))) for session in (before, after))
        np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(found.rank, expected.rank)
        assert (found.rank % 5 == 4).all()  # four ids tie with each


def test_int8_with_float16_around_it(lowered, tmp_path):
    folder = lowered("bert", "int8")
    model = ir.load(folder / "model.onnx")
    lower(model, "fp16", (read_manifest(folder).calibration or {})["overflowing"])
    plan_graph(model)
    save_graph(model, tmp_path / "model.onnx")
    log = built(tmp_path / "model.onnx")
    assert log
    assert ("Int8", "Half") in log.products()
    assert not any("Float" in types for types in log.products())


@pytest.mark.parametrize("name", ["fnet", "xmod"])
def test_what_has_a_standard_form_is_built(name, tmp_path):
    row = check(name, tmp_path)
    assert (row.reason, row.rank_agreement) == ("", 1)
    model = ir.load(tmp_path / "model.onnx")
    lower(model, "fp16")
    plan_graph(model)
    save_graph(model, tmp_path / "fp16.onnx")
    assert built(tmp_path / "fp16.onnx")


def test_a_form_that_gives_other_logits_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setitem(FORMS, "FNetBasicFourierTransform", ("forward", lambda module, config, states: (states,)))
    write_onnx(model := MaskedLM(build("fnet")), tmp_path / "model.onnx")
    assert "DFT" in {node.op_type for node in ir.load(tmp_path / "model.onnx").graph}
    assert not [module for module in model.network.modules() if "forward" in vars(module)]
