"""Artifacts: parity at shapes the export never saw, and files that refuse to lie."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import KINDS, paragraphs

from mlmkit.artifact import read_manifest
from mlmkit.backends import Batch, load
from mlmkit.backends.graph import drop_outputs
from mlmkit.errors import CheckError, UserError
from mlmkit.export import export as exporting


def random_batch(batch: int, seq: int, masked: int, vocabulary: int = 600) -> Batch:
    """Ragged rows of ordinary ids."""
    generator = np.random.default_rng(batch * 1000 + seq)
    input_ids = generator.integers(5, vocabulary, (batch, seq))
    attention_mask = np.ones_like(input_ids)
    for row in range(1, batch):
        attention_mask[row, generator.integers(1, seq + 1) :] = 0
    real = np.flatnonzero(attention_mask)
    positions = np.sort(generator.choice(real, masked, replace=masked > len(real)))
    return Batch(input_ids, attention_mask, positions, generator.integers(5, vocabulary, masked))


@pytest.mark.parametrize("kind", KINDS)
def test_engine_equals_checkpoint_at_unseen_shapes(kind, checkpoint, artifact):
    torch_backend, onnx_backend = load(str(checkpoint(kind))), load(str(artifact(kind)))
    assert (torch_backend.name, onnx_backend.name) == ("torch", "onnx")
    assert onnx_backend.info.fingerprint == torch_backend.info.fingerprint
    assert onnx_backend.info.max_length == torch_backend.info.max_length == 64
    for shape in [(1, 1, 1), (1, 64, 5), (17, 13, 300), (3, 31, 1), (5, 7, 0)]:
        batch = random_batch(*shape)
        expected, found = torch_backend.predict(batch), onnx_backend.predict(batch)
        np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-4, rtol=0)
        np.testing.assert_allclose(found.top_log_prob, expected.top_log_prob, atol=1e-4, rtol=0)
        assert found.top_id.shape == (shape[2], 100)
        assert (found.top_id[:, 0] == expected.top_id[:, 0]).all()
        scored = onnx_backend.score(batch)
        np.testing.assert_allclose(scored.log_prob, expected.log_prob, atol=1e-4, rtol=0)
        assert (scored.rank == found.rank).all()


def test_scoring_graph_has_lost_the_top_k(artifact):
    import onnx

    path = artifact("bert") / "model.onnx"
    whole = onnx.load(path)
    pruned = onnx.load_from_string(drop_outputs(path.read_bytes(), {"top_log_prob", "top_id"}))
    onnx.checker.check_model(pruned)
    assert [output.name for output in pruned.graph.output] == ["log_prob", "rank"]
    operators = {node.op_type for node in pruned.graph.node}
    assert "TopK" not in operators
    assert "TopK" in {node.op_type for node in whole.graph.node}
    kept = {node.name for node in pruned.graph.node}
    assert [node for node in whole.graph.node if node.name in kept] == list(pruned.graph.node)
    assert [i.name for i in pruned.graph.input] == ["input_ids", "attention_mask", "positions", "targets"]
    assert drop_outputs(path.read_bytes(), set()) == path.read_bytes()


def test_pruning_keeps_what_a_subgraph_reads():
    from onnx import TensorProto, helper

    def value(name, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, [1])

    branch = helper.make_graph([helper.make_node("Neg", ["inner"], ["y"])], "branch", [], [value("y")])
    nodes = [
        helper.make_node("Abs", ["x"], ["inner"]),
        helper.make_node("Exp", ["x"], ["unused"]),
        helper.make_node("If", ["condition"], ["kept"], then_branch=branch, else_branch=branch),
        helper.make_node("Sqrt", ["unused"], ["dropped"]),
    ]
    inputs = [value("x"), value("condition", TensorProto.BOOL)]
    graph = helper.make_graph(nodes, "graph", inputs, [value("kept"), value("dropped")])
    import onnx

    pruned = onnx.load_from_string(drop_outputs(helper.make_model(graph).SerializeToString(), {"dropped"}))
    assert [node.op_type for node in pruned.graph.node] == ["Abs", "If"]


@pytest.mark.parametrize("junk", [b"\x07", b"\x3a\xff", b"\xff" * 12])
def test_what_is_no_protobuf_is_refused(junk):
    with pytest.raises(ValueError, match="not a protobuf"):
        drop_outputs(junk, set())


def test_manifest_says_what_was_proven(artifact):
    manifest = read_manifest(artifact("bert"))
    assert manifest.parity["max_log_prob_difference"] <= manifest.parity["bounds"]["max_log_prob"] == 1e-4
    assert manifest.parity["masked"] > 300
    assert (manifest.architecture, manifest.vocabulary_size, manifest.max_length) == ("bert", 600, 64)
    assert set(manifest.files) == {path.name for path in artifact("bert").iterdir()} - {"mlmkit.json"}


def test_weights_beside_the_graph(checkpoint, artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("mlmkit.export.onnx.EXTERNAL_DATA_BYTES", 1000)
    exporting.export(str(checkpoint("bert")), tmp_path / "external", texts=paragraphs())
    assert (tmp_path / "external" / "model.onnx.data").exists()
    moved = tmp_path / "elsewhere"
    (tmp_path / "external").rename(moved)
    batch = random_batch(3, 9, 5)
    found, expected = load(str(moved)).score(batch), load(str(artifact("bert"))).score(batch)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-5, rtol=0)


def test_nothing_is_exported_when_parity_does_not_hold(checkpoint, tmp_path, monkeypatch):
    real = exporting.write_onnx

    def write_another_model(model, path):
        import torch

        with torch.no_grad():
            bias = model.network.get_output_embeddings().bias
            bias[7] += 0.01
            real(model, path)
            bias[7] -= 0.01

    monkeypatch.setattr(exporting, "write_onnx", write_another_model)
    with pytest.raises(CheckError, match="parity does not hold"):
        exporting.export(str(checkpoint("bert")), tmp_path / "artifact", texts=paragraphs())
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_told(checkpoint, tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        exporting.export(str(checkpoint("bert")), tmp_path / "artifact")
    assert [path.name for path in (tmp_path / "artifact").iterdir()] == ["thesis.tex"]


# ------------------------------------------------------------------ refusing


@pytest.fixture
def copy(artifact, tmp_path) -> Path:
    return Path(shutil.copytree(artifact("bert"), tmp_path / "copy"))


def change(folder: Path, **values: object) -> None:
    manifest = json.loads((folder / "mlmkit.json").read_text())
    (folder / "mlmkit.json").write_text(json.dumps(manifest | values))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_changed_or_missing_file_is_refused(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{name} is not the file that was exported.*mlmkit export"):
        load(str(copy))
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load(str(copy))


@pytest.mark.parametrize(
    "values",
    [
        {"format": 1},
        {"format": None},
        {"top_k": "100"},
        {"max_length": -1},
        {"vocabulary_size": True},
        {"files": {}},
        {"files": []},
        {"files": {"model.onnx": 3}},
        {"parity": None},
    ],
)
def test_a_wrong_manifest_is_refused(copy, values):
    change(copy, **values)
    with pytest.raises(UserError, match="mlmkit export"):
        load(str(copy))


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "[" * 100_000, '{"format": 1}'])
def test_a_broken_manifest_is_refused(copy, content):
    (copy / "mlmkit.json").write_text(content)
    with pytest.raises(UserError, match="mlmkit export"):
        load(str(copy))


def test_a_name_that_leads_out_of_the_folder_is_refused(copy):
    files = json.loads((copy / "mlmkit.json").read_text())["files"]
    change(copy, files={**files, "../copy/config.json": files["config.json"]})
    with pytest.raises(UserError, match="not a plain file"):
        load(str(copy))


def test_a_tokenizer_larger_than_the_model_is_refused(copy):
    change(copy, vocabulary_size=599)
    with pytest.raises(UserError, match="ids up to 599"):
        load(str(copy))


def test_a_manifest_that_promises_too_much_is_refused(copy):
    change(copy, top_k=200)
    with pytest.raises(UserError, match="gives 100 candidates"):
        load(str(copy)).predict(random_batch(1, 5, 1))
    change(copy, top_k=100, max_length=128)
    with pytest.raises(CheckError, match=r"ONNX Runtime failed on a batch of shape \(1, 100\)"):
        load(str(copy)).score(random_batch(1, 100, 1))


def test_weights_of_another_shape_are_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint("bert"), tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(UserError, match="do not have the shapes"):
        load(str(tmp_path / "copy"))


def test_the_wrong_backend_is_refused(copy, checkpoint):
    with pytest.raises(UserError, match="name the checkpoint"):
        load(str(copy), backend="torch")
    with pytest.raises(UserError, match="export it first"):
        load(str(checkpoint("bert")), backend="onnx")
    with pytest.raises(UserError, match="choose auto"):
        load(str(copy), backend="tensorflow")
