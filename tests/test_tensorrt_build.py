"""TensorRT for RTX builds real plans here, without a GPU: six architectures in four precisions, and what goes wrong."""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers as T
from conftest import PROOF
from onnx import TensorProto, helper
from rich.progress import Progress
from tensorrt_fixtures import random_batch

from mlmkit.artifact import GRAPH, PLAN, Manifest, read_manifest
from mlmkit.errors import UserError
from mlmkit.export.export import export
from mlmkit.export.graph_files import save_graph
from mlmkit.export.onnx import write_onnx
from mlmkit.export.precision import convert
from mlmkit.export.profiles import PORTABLE, PlanOptions, make_profiles
from mlmkit.model import MaskedLM

pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 alone", exc_type=ImportError
)

from mlmkit.export.plans import add_plans, plan_model
from mlmkit.export.tensorrt import build_plan, count_layers

OPTIONS = PlanOptions(max_batch=8, max_seq=64, max_masked=64)
SIZES: dict[str, Any] = {"vocab_size": 600, "max_position_embeddings": 66}
# Heads of 64, the size that TensorRT for RTX fuses attention at.
HIDDEN: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 192,
}
SPECIALS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: T.BertConfig(**SIZES, **HIDDEN),
    "distilbert": lambda: T.DistilBertConfig(**SIZES, dim=128, n_layers=2, n_heads=2, hidden_dim=192),
    "electra": lambda: T.ElectraConfig(**SIZES, **HIDDEN, embedding_size=64),
    "modernbert": lambda: T.ModernBertConfig(**SIZES, **HIDDEN, **SPECIALS, local_attention=8),
    "mpnet": lambda: T.MPNetConfig(**SIZES, **HIDDEN),
    "roberta": lambda: T.RobertaConfig(**SIZES, **HIDDEN),
}
INTEGERS = {"int32", "int64", "bool"}
TYPES = {
    "fp32": {"fp32", *INTEGERS},
    "fp16": {"fp16", "fp32", *INTEGERS},
    "bf16": {"bf16", "fp32", *INTEGERS},
    "int8": {"int8", "fp16", "fp32", *INTEGERS},
}


@pytest.fixture(scope="module")
def manifest(artifact) -> Manifest:
    return read_manifest(artifact("bert"))


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Callable[[str], Path]:
    """The float32 scoring graph of an architecture."""

    @cache
    def make(kind: str) -> Path:
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(kind) / GRAPH
        write_onnx(MaskedLM(T.AutoModelForMaskedLM.from_config(CONFIGS[kind]()).eval()), path)
        return path

    return make


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_plans_compute_in_the_types_of_the_graph(kind, precision, graph, manifest, tmp_path):
    path, batches = tmp_path / GRAPH, [random_batch(4, 16, 8)]
    path.write_bytes(graph(kind).read_bytes())
    facts = convert(path, precision, batches) or {}
    save_graph(plan_model(path, precision, facts.get("overflowing", ())), path)
    built = build_plan(tmp_path, replace(manifest, architecture=kind, precision=precision), OPTIONS, path)
    assert (built.flavour, built.targets, built.gpu, built.parity) == ("tensorrt_rtx", PORTABLE, None, None)
    assert built.profiles == make_profiles(OPTIONS, manifest.max_length)
    names = [profile.name for profile in built.profiles]
    assert list(built.layers) == list(built.scratch_mib) == names
    for name in names:
        assert built.layers[name].keys() <= TYPES[precision]
        assert built.layers[name].get(precision, 0) > 3
        assert built.fused_attention.get(name, 0) == (0 if precision == "fp32" else 2)
        assert built.scratch_mib[name] > 0
    layers = json.loads((tmp_path / "layers.json").read_text())["Layers"]
    products = [layer for layer in layers if layer["LayerType"] == "gemm"]
    assert len(products) > 4 * len(names)
    kinds = {output["Format/Datatype"] for layer in products for output in layer["Outputs"]}
    assert kinds <= {{"fp32": "Float", "bf16": "BFloat16"}.get(precision, "Half"), "Int8"}
    assert (tmp_path / PLAN).stat().st_size > 100_000


def test_weights_beside_the_graph_are_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("mlmkit.export.graph_files.EXTERNAL_DATA_BYTES", 0)
    manifest = export(checkpoint("bert"), tmp_path / "artifact", text=PROOF, plans=OPTIONS)
    assert {f"{GRAPH}.data", PLAN, "layers.json"} <= manifest.files.keys()
    assert read_manifest(tmp_path / "artifact") == manifest


def test_no_input_is_a_shape(artifact):
    """Else its values would have to lie in host memory, and its profile be one of values."""
    model = onnx.load(artifact("bert") / GRAPH)
    values = {value.name: value.type.tensor_type for value in model.graph.input}
    assert {name: kind.elem_type for name, kind in values.items()} == dict.fromkeys(values, TensorProto.INT64)
    assert [len(kind.shape.dim) for kind in values.values()] == [2, 2, 1, 1]
    assert [output.type.tensor_type.elem_type for output in model.graph.output] == [1, 7, 1, 7]


# ------------------------------------------------------------------ targets and sizes


@pytest.mark.parametrize(("target", "capability"), [("sm75", "7.5"), ("sm121", "12.1")])
def test_a_target_that_the_default_does_not_reach(target, capability, lowered, tmp_path):
    built = add_plans(lowered("bert", "fp16"), tmp_path / "out", plans=replace(OPTIONS, target=target)).tensorrt
    assert built is not None and built.targets == [capability]


def test_profiles_hold_any_sizes():
    for sizes in [(1, 1, 1), (1, 512, 1), (64, 512, 4096), (3, 7, 2), (1000, 8192, 10)]:
        for profile in make_profiles(PlanOptions(*sizes), max_length=512):
            for axis in (profile.batch, profile.seq, profile.masked):
                assert 1 <= axis[0] <= axis[1] <= axis[2]
            assert profile.seq[2] == (512 if profile.name == "long" else min(sizes[1], 512))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "--max-batch must be between 1 and 2147483647"),
        ({"max_masked": 1 << 31}, "--max-masked must be"),
        ({"target": "sm90"}, "no target 'sm90': choose sm75, sm121"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        PlanOptions(**options)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"precision": "int8-dynamic"}, OPTIONS, "TensorRT has no dynamic int8: export with --precision int8"),
        ({}, replace(OPTIONS, target="sm75"), r"sm75 \(Turing\) computes in float16 only, not in fp32"),
        ({"architecture": "tapas"}, OPTIONS, "cannot run a tapas model: its pooling over cells needs ScatterElements"),
    ],
)
def test_what_no_plan_can_be_built_of_is_refused_before_the_build(values, options, message, manifest, tmp_path):
    with pytest.raises(UserError, match=message):
        build_plan(tmp_path, replace(manifest, **values), options)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ what goes wrong


def write_graph(path: Path, *nodes: onnx.NodeProto) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", 4])
    y = helper.make_empty_tensor_value_info("y")
    model = helper.make_model(helper.make_graph(nodes, "graph", [x], [y]), opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(model.SerializeToString())


def refusal(folder: Path, manifest: Manifest) -> str:
    with pytest.raises(UserError) as caught:
        build_plan(folder, manifest, OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (folder / PLAN).exists()
    return str(caught.value)


def test_a_node_that_the_parser_does_not_take_is_named(manifest, tmp_path):
    nodes = helper.make_node("Abs", ["x"], ["z"]), helper.make_node("DFT", ["z"], ["y"], name="spectrum")
    write_graph(tmp_path / GRAPH, *nodes)
    message = refusal(tmp_path, manifest)
    assert "model.onnx: TensorRT for RTX does not take DFT (node 'spectrum': invalid node)" in message
    assert message.endswith("docs/architectures.md lists the architectures that build")


def test_a_file_that_is_no_graph(manifest, tmp_path):
    (tmp_path / GRAPH).write_bytes(b"no graph")
    assert "TensorRT for RTX cannot parse it: model deserialize failed" in refusal(tmp_path, manifest)


def test_a_build_that_fails_says_why(manifest, tmp_path, graph):
    """Without a driver every error is accompanied by one about that, which is not the reason."""
    from mlmkit.export.tensorrt import _build, _Monitor

    with pytest.raises(UserError, match=r"cannot build a plan of model.onnx: .*FP32 GEMM is not supported") as caught:
        _build(graph("bert"), make_profiles(OPTIONS, 64), "sm75", _Monitor(Progress()))
    assert "cudaError 35" not in str(caught.value)
    assert "--max-batch" not in str(caught.value), "memory was not the reason"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_the_build(artifact, text_file, tmp_path, number, code):
    """Python would raise it inside a call of TensorRT's, whose bindings swallow exceptions."""
    command = [sys.executable, "-m", "mlmkit", "export", str(artifact("bert")), "--text", str(text_file)]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path / "out"), "--trt"], stderr=subprocess.PIPE, text=True
    ) as it:
        assert it.stderr is not None
        lines = [*takewhile(lambda line: not line.startswith("building model.plan"), it.stderr)]
        it.send_signal(number)
        after = it.stderr.read()
    assert it.returncode == code, (lines, after)
    assert "Traceback" not in after and not (tmp_path / "out").exists()


def test_builds_of_two_threads_keep_their_figures(manifest, graph, tmp_path):
    def build(kind: str) -> Any:
        (tmp_path / kind).mkdir(exist_ok=True)
        return build_plan(tmp_path / kind, manifest, OPTIONS, graph(kind))

    kinds = ["bert", "modernbert"]
    alone = [build(kind) for kind in kinds]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(build, kinds)) == alone


def test_what_is_logged_tells_a_user_something(manifest, graph, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        build_plan(tmp_path, manifest, OPTIONS, graph("bert"))
    (line,) = caplog.messages
    assert line.startswith("building model.plan with TensorRT for RTX 1.")
    assert line.endswith("for compute capability 8.0, 8.6, 8.9, 12.0+")


# ------------------------------------------------------------------ layers, as either flavour describes them


def test_layers_are_counted_by_profile():
    layers: list[Any] = [
        "names alone",
        {"Name": "a_myl0_1", "Outputs": [{"Format/Datatype": "Half"}, {"Format/Datatype": "Half"}]},
        {
            "Name": "b [profile 1]",
            "Outputs": [{"Format/Datatype": "Row major linear FP32"}, {"Format/Datatype": "Int64"}],
        },
        {"Name": "c_myl3_7", "Outputs": [{"Format/Datatype": "BFloat16"}], "TacticName": "_gemm_mha_v2_0x1"},
        {"Name": "c2 [profile 1]+c3_myl3_9", "Outputs": []},
        {"Name": "d", "Outputs": [{}]},
    ]
    counts, fused = count_layers({"Layers": layers}, ["latency", "throughput"])
    assert counts == {"latency": {"fp16": 1, "unknown": 1}, "throughput": {"bf16": 1, "fp32": 1, "int64": 1}}
    assert fused == {"throughput": 1}
    assert count_layers({}, ["latency"]) == ({"latency": {}}, {})
