"""Real builds with TensorRT for RTX, which need no GPU: eight architectures, four precisions, and failing builds."""

import json
import logging
import shutil
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

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import PROOF
from onnx import TensorProto, helper
from test_export import random_batch

from benchmarks.architectures import SIZES
from benchmarks.plans import random_batches, write_plan_graph
from mlmkit.artifact import GRAPH, PLAN, TensorRT, read_manifest
from mlmkit.backends import Scored
from mlmkit.errors import UserError
from mlmkit.export.export import export
from mlmkit.export.profiles import PORTABLE, PlanOptions, make_profiles

pytest.importorskip(
    "tensorrt_rtx", reason="TensorRT for RTX has wheels for Linux on x86-64 alone", exc_type=ImportError
)

from mlmkit.export.plans import add_plan, rewrite_for_tensorrt
from mlmkit.export.tensorrt import build_plan, count_layers

OPTIONS = PlanOptions(max_batch=8, max_seq=64, max_masked=64)
INTEGERS = {"int32", "int64", "bool"}
TYPES = {
    "fp32": {"fp32", *INTEGERS},
    "fp16": {"fp16", "fp32", *INTEGERS},
    "bf16": {"bf16", "fp32", *INTEGERS},
    "int8": {"int8", "fp16", "fp32", *INTEGERS},
}
# Each takes an export and 3 to 4 processor seconds for the build. An int8 plan computes its attention in fp16, so it
# shows both. Plans of ELECTRA in every precision are in test_architectures.py.
BUILT = [
    *(("bert", precision) for precision in TYPES if precision != "fp16"),
    *((kind, "int8") for kind in ("deberta-v2", "modernbert", "mpnet")),
    *(("eurobert", "fp16"), ("modernbert", "bf16")),
]


def build(graph: Path, folder: Path | None = None, **changes: Any) -> TensorRT:
    """Build a plan of the graph, by default in the graph's folder."""
    values = {"architecture": "bert", "precision": "fp32", "max_length": 64, "options": OPTIONS}
    return build_plan(graph, folder or graph.parent, **{**values, **changes})


@pytest.fixture(scope="module")
def graph(architecture, tmp_path_factory) -> Callable[..., Path]:
    """Makes the graph that a plan of an architecture is built from, in a precision."""

    @cache
    def make(kind: str, precision: str = "fp32") -> Path:
        path = tmp_path_factory.mktemp("plan") / GRAPH
        shutil.copyfile(architecture(kind)[1] / GRAPH, path)
        write_plan_graph(path, precision, random_batches(SIZES["vocab_size"], 4, 32))
        return path

    return make


@pytest.mark.parametrize(("kind", "precision"), BUILT)
def test_plans_compute_in_the_types_of_the_graph_and_fuse_attention(kind, precision, graph, tmp_path, caplog):
    path = graph(kind, precision)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        built = build(path, tmp_path, architecture=kind, precision=precision)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("mlmkit")]  # no warnings
    assert line.startswith("building model.plan with TensorRT for RTX 1.")
    assert line.endswith("for compute capability 8.0, 8.6, 8.9, 12.0+")
    assert (built.flavour, built.targets, built.gpu, built.parity) == ("tensorrt_rtx", PORTABLE, None, None)
    assert built.profiles == make_profiles(OPTIONS, 64)
    names = [profile.name for profile in built.profiles]
    assert list(built.layers) == list(built.scratch_mib) == names
    for name in names:
        assert built.layers[name].keys() <= TYPES[precision]
        assert built.layers[name].get(precision, 0) > 3
        assert built.layers[name].get("fp16", 0) > 3 or precision not in ("fp16", "int8")
        assert built.fused_attention.get(name, 0) == (0 if precision == "fp32" else 2)
        assert built.scratch_mib[name] > 0
    layers = json.loads((tmp_path / "layers.json").read_text())["Layers"]
    products = [layer for layer in layers if layer["LayerType"] == "gemm"]
    assert len(products) > 4 * len(names)
    kinds = {output["Format/Datatype"] for layer in products for output in layer["Outputs"]}
    assert kinds <= {{"fp32": "Float", "bf16": "BFloat16"}.get(precision, "Half"), "Int8"}
    assert (tmp_path / PLAN).stat().st_size > 100_000


@pytest.mark.parametrize("kind", ["fnet", "xmod"])
def test_what_has_standard_operators_is_built(kind, architecture, graph, tmp_path):
    assert (architecture(kind)[0].reason, architecture(kind)[0].rank_agreement) == ("", 1)
    assert build(graph(kind, "fp16"), tmp_path, architecture=kind, precision="fp16").layers


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_the_rewritten_graph_has_the_same_numbers(kind, architecture):
    before, after = (ir.load(architecture(kind)[1] / GRAPH) for _ in range(2))
    for model in (before, after) if kind == "bert" else ():  # logits that are whole numbers, so many tie
        logits: Any = next(node for node in model.graph if node.op_type == "LogSoftmax").inputs[0]
        producer = logits.producer()
        rounding = ir.node("Round", [None])
        logits.replace_all_uses_with(rounding.outputs[0])
        rounding.replace_input_with(0, logits)
        model.graph.insert_after(producer, rounding)
    rewrite_for_tensorrt(after)
    sessions = [
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
        for model in (before, after)
    ]
    for shape in [(1, 1, 1), (17, 13, 300), (3, 31, 1), (1, 60, 5)]:
        batch = random_batch(*shape, vocabulary=200)._asdict()
        expected, actual = (Scored(*map(np.asarray, session.run(None, batch))) for session in sessions)
        np.testing.assert_allclose(actual.log_prob, expected.log_prob, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(actual.rank, expected.rank)
        if kind == "bert" and shape == (17, 13, 300):
            assert (actual.top_log_prob[:, 0] == actual.top_log_prob[:, 1]).any()


def test_weights_beside_the_graph_are_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("mlmkit.export.graphs.EXTERNAL_DATA_BYTES", 0)
    manifest = export(checkpoint("bert"), tmp_path / "artifact", text=PROOF, plans=OPTIONS)
    assert {f"{GRAPH}.data", PLAN, "layers.json"} <= manifest.files.keys()
    assert read_manifest(tmp_path / "artifact") == manifest


def test_no_input_is_a_shape(artifact):
    """The values of a shape input would have to be in host memory, and its profile would list values."""
    model = onnx.load(artifact("bert") / GRAPH)
    values = {value.name: value.type.tensor_type for value in model.graph.input}
    assert {name: kind.elem_type for name, kind in values.items()} == dict.fromkeys(values, TensorProto.INT64)
    assert [len(kind.shape.dim) for kind in values.values()] == [2, 2, 1, 1]
    assert [output.type.tensor_type.elem_type for output in model.graph.output] == [1, 7, 1, 7]


# ------------------------------------------------------------------ targets and sizes


@pytest.mark.parametrize(("target", "capability"), [("sm75", "7.5"), ("sm121", "12.1")])
def test_a_target_that_the_default_does_not_reach(target, capability, lowered, tmp_path):
    options = replace(OPTIONS, target=target)
    built = add_plan(lowered("bert", "fp16"), tmp_path / "out", plans=options).tensorrt
    assert built is not None and built.targets == [capability]
    if target == "sm75":  # the rank's matrix product is float32, which Turing does not have
        message = r"cannot build a plan of model.onnx: .*FP32 GEMM is not supported"
        with pytest.raises(UserError, match=message) as caught:
            build(lowered("bert", "fp16") / GRAPH, tmp_path, precision="fp16", options=options)
        assert "cudaError 35" not in str(caught.value), "every error has one about the missing driver beside it"
        assert "--max-batch" not in str(caught.value), "memory was not the reason"


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
        ({"target": "sm90"}, "unknown target 'sm90': choose sm75, sm121"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        PlanOptions(**options)


# ------------------------------------------------------------------ what goes wrong


def graph_with_dft() -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", 4])
    nodes = [helper.make_node("Abs", ["x"], ["z"]), helper.make_node("DFT", ["z"], ["y"], name="spectrum")]
    graph = helper.make_graph(nodes, "graph", [x], [helper.make_empty_tensor_value_info("y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()


@pytest.mark.parametrize(
    ("values", "damaged", "message"),
    [
        ({"precision": "int8-dynamic"}, False, "TensorRT has no dynamic int8: export with --precision int8"),
        ({"options": replace(OPTIONS, target="sm75")}, False, "sm75 (Turing) computes in float16 only, not in fp32"),
        ({"architecture": "tapas"}, False, "cannot run a tapas model: its pooling over cells needs ScatterElements"),
        ({}, True, "TensorRT for RTX cannot parse it: model deserialize failed"),
        ({}, False, "does not take DFT (node 'spectrum': invalid node): docs/architectures.md lists"),
    ],
)
def test_what_no_plan_can_be_built_of_is_refused_in_one_line(values, damaged, message, tmp_path):
    (tmp_path / GRAPH).write_bytes(b"no graph" if damaged else graph_with_dft())
    with pytest.raises(UserError) as caught:
        build(tmp_path / GRAPH, **values)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [GRAPH]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_the_build(artifact, text_file, tmp_path, number, code):
    """Python would raise it in a callback of TensorRT, whose bindings swallow exceptions. The build needs no torch."""
    program = "import signal, sys; sys.modules.update(torch=None, transformers=None); from mlmkit.cli import main; "
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); main()"  # a shell's background jobs ignore it
    command = [sys.executable, "-c", program, "export", str(artifact("bert")), "--text", str(text_file), "--trt"]
    with subprocess.Popen([*command, "--output", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True) as it:
        assert it.stderr is not None
        lines = [*takewhile(lambda line: not line.startswith("building model.plan"), it.stderr)]
        it.send_signal(number)
        after = it.stderr.read()
    assert it.returncode == code, (lines, after)
    assert "Traceback" not in after and not (tmp_path / "out").exists()


def test_builds_of_two_threads_keep_their_figures(graph, tmp_path):
    kinds = ["bert", "electra"]
    for kind in kinds:
        (tmp_path / kind).mkdir()
    alone = [build(graph(kind), tmp_path / kind) for kind in kinds]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda kind: build(graph(kind), tmp_path / kind), kinds)) == alone


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
