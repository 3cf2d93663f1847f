# ruff: noqa: F401, F811 (fixtures are imported)
"""Triton's model repository: its graph against the artifact's own backend, its configuration with protobuf."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import KINDS, PROOF, run
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_fixtures import folder, machine, plan

from mlmkit.artifact import hash_files, parse_manifest, read_manifest, write_manifest
from mlmkit.backends import Backend, Batch, load
from mlmkit.errors import UserError
from mlmkit.export.export import export
from mlmkit.export.triton import CONFIG, write_repository

DESCRIPTOR = Path(__file__).parent / "data" / "triton-model-config.json"


@pytest.fixture(scope="module")
def repository(lowered, tmp_path_factory) -> Callable[..., Path]:
    """Makes the folder of an artifact's graph in a repository."""

    @cache
    def make(kind: str, precision: str = "fp32") -> Path:
        folder = tmp_path_factory.mktemp("triton") / "repository"
        (name,) = write_repository(lowered(kind, precision), folder)
        return folder / name

    return make


@cache
def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path))


@cache
def backend(path: Path) -> Backend:
    return load(str(path), "onnx", "cpu")


def random_inputs(batch: int, seq: int, masked: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different lengths, and unordered positions within each row."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, seq + 1, (batch, 1))
    return {
        "input_ids": generator.integers(5, 600, (batch, seq)),
        "attention_mask": (np.arange(seq) < lengths).astype(np.int64),
        "positions": generator.integers(0, np.broadcast_to(lengths, (batch, masked))),
        "targets": generator.integers(5, 600, (batch, masked)),
    }


def run_graph(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    names = [output.name for output in session(path).get_outputs()]
    return dict(zip(names, session(path).run(names, inputs), strict=True))


def flattened(inputs: dict[str, np.ndarray]) -> Batch:
    """The same request for the artifact's own graph, whose positions are flat."""
    begins = np.arange(len(inputs["positions"]))[:, None] * inputs["input_ids"].shape[1]
    flat = {"positions": (inputs["positions"] + begins).reshape(-1), "targets": inputs["targets"].reshape(-1)}
    return Batch(**{**inputs, **flat})


def assert_equals_backend(graph: Path, artifact: Path, inputs: dict[str, np.ndarray]) -> None:
    actual = run_graph(graph, inputs)
    for name, values in backend(artifact).score(flattened(inputs))._asdict().items():
        assert actual[name].dtype == values.dtype
        assert actual[name].shape == (*inputs["positions"].shape, *values.shape[1:])
        expected = values.reshape(actual[name].shape)
        np.testing.assert_allclose(actual[name], expected, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_the_artifact(kind, artifact, repository):
    graph = repository(kind) / "1" / "model.onnx"
    onnx.checker.check_model(str(graph), full_check=True)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 6), st.integers(1, 64), st.integers(0, 5), st.integers(0, 1 << 32))
    def check(batch: int, seq: int, masked: int, seed: int) -> None:
        assert_equals_backend(graph, artifact(kind), random_inputs(batch, seq, masked, seed))

    check()


def test_requests_that_are_joined_get_what_each_gets_alone(repository):
    graph = repository("bert") / "1" / "model.onnx"
    requests = [random_inputs(rows, 12, 2, seed=rows) for rows in (1, 3, 2)]
    joined = run_graph(graph, {name: np.concatenate([one[name] for one in requests]) for name in requests[0]})
    alone = [run_graph(graph, request) for request in requests]
    for name, values in joined.items():
        np.testing.assert_allclose(values, np.concatenate([one[name] for one in alone]), atol=1e-6, rtol=0)


def test_a_position_outside_its_row_reads_no_other_row(repository):
    graph = repository("bert") / "1" / "model.onnx"
    inputs = random_inputs(3, 9, 4)
    whole = run_graph(graph, inputs)
    inputs["positions"][1] = -1, 9, 1 << 40, -(1 << 62)
    actual = run_graph(graph, inputs)
    assert all(np.isnan(actual[name][1]).all() for name in ("log_prob", "top_log_prob"))
    assert all((actual[name][1] == -1).all() for name in ("rank", "top_id"))
    for name, values in actual.items():
        np.testing.assert_allclose(values[[0, 2]], whole[name][[0, 2]], atol=1e-6, rtol=0)


def test_large_weights_stay_in_a_file_beside_the_graph(checkpoint, artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("mlmkit.export.graphs.EXTERNAL_DATA_BYTES", 1000)
    export(str(checkpoint("bert")), tmp_path / "external", text=PROOF)
    write_repository(tmp_path / "external", tmp_path / "repository")
    shutil.move(tmp_path / "external", tmp_path / "elsewhere")  # what is written stands alone
    graph = tmp_path / "repository/external/1/model.onnx/model.onnx"
    assert sorted(path.name for path in graph.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert graph.stat().st_size < (tmp_path / "elsewhere" / "model.onnx").stat().st_size + 10_000
    weights = (graph.parent / "model.onnx.data").read_bytes()
    assert weights == (tmp_path / "elsewhere" / "model.onnx.data").read_bytes()
    onnx.checker.check_model(str(graph), full_check=True)
    assert_equals_backend(graph, tmp_path / "elsewhere", random_inputs(4, 11, 3))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_are_batched_alike(precision, lowered, repository):
    inputs = random_inputs(2, 9, 2)
    actual = run_graph(repository("bert", precision) / "1" / "model.onnx", inputs)
    wanted = backend(lowered("bert", precision)).score(flattened(inputs))
    # ONNX Runtime fuses quantizers here that mlmkit keeps apart, and float16 rounds where it fuses.
    np.testing.assert_allclose(actual["log_prob"].reshape(-1), wanted.log_prob, atol=2e-2, rtol=0)


@cache
def model_config() -> Any:
    """Triton's ModelConfig message, from the descriptor in Triton's Python client."""
    file = json_format.ParseDict(json.loads(DESCRIPTOR.read_text())["descriptor"], descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def read_config(path: Path) -> dict[str, Any]:
    """Read with protobuf's parser, which refuses unknown fields, wrong types and repeated singular fields."""
    return json_format.MessageToDict(
        text_format.Parse(path.read_text(encoding="utf-8"), model_config()()),
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


def shapes(entries: list[dict[str, Any]]) -> dict[str, tuple[str, list[int]]]:
    return {entry["name"]: (entry["data_type"], [int(size) for size in entry["dims"]]) for entry in entries}


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_describes_the_graph(kind, repository):
    config = read_config(repository(kind) / CONFIG)
    types = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)"}
    engine = session(repository(kind) / "1" / "model.onnx")
    for entries, declared in ((config["input"], engine.get_inputs()), (config["output"], engine.get_outputs())):
        actual = {name: (types[kind], [-1, *dims]) for name, (kind, dims) in shapes(entries).items()}
        sizes = {each.name: [size if isinstance(size, int) else -1 for size in each.shape] for each in declared}
        assert actual == {each.name: (each.type, sizes[each.name]) for each in declared}
    assert (config["name"], config["backend"], config["max_batch_size"]) == (kind, "onnxruntime", 64)
    assert "dynamic_batching" in config
    assert [(group["count"], group["kind"]) for group in config["instance_group"]] == [(1, "KIND_AUTO")]
    accelerators = config["optimization"]["execution_accelerators"]["gpu_execution_accelerator"]
    assert accelerators == [{"name": "cuda", "parameters": {"use_tf32": "0"}}]


def test_the_parser_of_these_tests_is_strict(repository):
    text = (repository("bert") / CONFIG).read_text()
    for wrong in ("max_batch: 3", 'max_batch_size: "4"', 'name: "again"', "instance_group [ { kind: KIND_TPU } ]"):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(f"{text}\n{wrong}", model_config()())


def test_the_descriptor_is_that_of_tritons_client():
    client = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient wants an older protobuf")
    file = descriptor_pb2.FileDescriptorProto()
    client.DESCRIPTOR.CopyToProto(file)
    assert json.loads(DESCRIPTOR.read_text())["descriptor"] == json_format.MessageToDict(file)


def test_dynamic_int8_is_served_row_by_row_and_bf16_on_gpus_alone(repository):
    """A scale of dynamic int8 spans the batch, so a request's scores would depend on the other requests."""
    config = read_config(repository("bert", "int8-dynamic") / CONFIG)
    assert config["max_batch_size"] == 1
    assert "dynamic_batching" not in config
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    assert read_config(repository("bert", "bf16") / CONFIG)["instance_group"][0]["kind"] == "KIND_GPU"


def test_a_plan_is_a_model_of_its_own(plan, tmp_path):
    source = plan()
    assert write_repository(source, tmp_path / "repository") == ["artifact", "artifact-plan"]
    model = tmp_path / "repository" / "artifact-plan"
    assert (model / "1" / "model.plan").read_bytes() == (source / "model.plan").read_bytes()
    config = read_config(model / CONFIG)
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config
    wanted = {"input_ids": [-1, -1], "attention_mask": [-1, -1], "positions": [-1], "targets": [-1]}
    assert shapes(config["input"]) == {name: ("TYPE_INT64", dims) for name, dims in wanted.items()}
    assert shapes(config["output"])["top_id"] == ("TYPE_INT64", [-1, read_manifest(source).top_k])
    built = read_manifest(source).tensorrt
    assert built is not None
    group = config["instance_group"][0]
    assert (group["kind"], group["profile"]) == ("KIND_GPU", [str(number) for number in range(len(built.profiles))])


def test_the_command_writes_it_for_an_artifact(artifact, tmp_path, capsys):
    code, out, err = run(capsys, "export", artifact("bert"), "--triton", tmp_path / "repository", "--json")
    assert code == 0, err
    assert json.loads(out)["triton_models"] == ["bert"]
    assert (tmp_path / "repository" / "bert" / CONFIG).is_file()
    again = ["export", artifact("bert"), "--triton", tmp_path / "repository"]
    assert run(capsys, *again)[0] == 2
    code, out, _ = run(capsys, *again, "--overwrite")
    assert code == 0
    assert "with bert" in out


def test_the_command_writes_it_with_an_export(checkpoint, text_file, tmp_path, capsys):
    command = ["export", checkpoint("bert"), "--output", tmp_path / "mine", "--text", text_file]
    code, _, err = run(capsys, *command, "--triton", tmp_path / "repository")
    assert code == 0, err
    assert read_config(tmp_path / "repository" / "mine" / CONFIG)["name"] == "mine"
    inputs = random_inputs(2, 7, 1)
    assert_equals_backend(tmp_path / "repository" / "mine" / "1" / "model.onnx", tmp_path / "mine", inputs)


def test_mistakes_are_one_line_and_write_nothing(artifact, checkpoint, tmp_path, capsys):
    broken = Path(shutil.copytree(artifact("bert"), tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"another")
    spaced = Path(shutil.copytree(artifact("bert"), tmp_path / "my model"))
    precious, shared, new = (tmp_path / name for name in ("precious", "shared", "new"))
    precious.mkdir()
    (precious / "thesis.tex").write_text("precious")
    write_repository(artifact("bert"), shared)
    (shared / "resnet").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for message, arguments in {
        "with --triton, or name the checkpoint": [artifact("bert"), "--overwrite"],
        "omit --output": [artifact("bert"), "--triton", new, "--output", tmp_path / "other"],
        "needs a checkpoint, not an artifact": [artifact("bert"), "--triton", new, "--precision", "fp16"],
        "--output ARTIFACT": [checkpoint("bert"), "--triton", new],
        "SHA-256 differs": [broken, "--triton", new],
        "cannot be part of a URL": [spaced, "--triton", new],
        "--overwrite": [artifact("bert"), "--triton", precious],
        "leaves it alone": [artifact("bert"), "--triton", precious, "--overwrite"],
        "also holds resnet": [artifact("bert"), "--triton", shared, "--overwrite"],
        "choose another folder": [checkpoint("bert"), "--output", tmp_path / "out", "--triton", precious],
    }.items():
        code, out, err = run(capsys, "export", *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err and "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_a_graph_that_is_no_scoring_graph_is_refused(artifact, tmp_path):
    source = Path(shutil.copytree(artifact("bert"), tmp_path / "artifact"))
    model = onnx.load(source / "model.onnx")
    model.graph.output[1].name = "place"
    for node in model.graph.node:
        node.output[:] = ["place" if name == "rank" else name for name in node.output]
    onnx.save(model, source / "model.onnx")
    write_manifest(source, replace(parse_manifest(source), files=hash_files(source)))
    with pytest.raises(UserError, match="does not have the outputs"):
        write_repository(source, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
