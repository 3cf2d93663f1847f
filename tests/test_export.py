"""Artifacts: parity at shapes the export never saw, and files that refuse to lie."""

import json
import shutil

import numpy as np
import pytest
from conftest import KINDS, paragraphs

from mlmkit.artifact import read_manifest
from mlmkit.backends import Batch, load
from mlmkit.errors import CheckError, UserError
from mlmkit.export import export as exporting
from mlmkit.export.parity import TOKENS, parity_batches


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


def test_manifest_says_what_was_proven(artifact):
    manifest = read_manifest(artifact("bert"))
    assert manifest.parity["max_log_prob_difference"] <= manifest.parity["bounds"]["max_log_prob"] == 1e-4
    assert manifest.parity["masked"] > 300
    assert (manifest.architecture, manifest.vocabulary_size, manifest.max_length) == ("bert", 600, 64)
    assert set(manifest.files) == {path.name for path in artifact("bert").iterdir()} - {"mlmkit.json"}


def test_parity_is_proven_on_many_shapes_and_a_budget_of_tokens(artifact):
    tokenizer = load(str(artifact("bert"))).tokenizer
    batches = list(parity_batches(paragraphs() * 30, tokenizer, max_length=64))
    shapes = [batch.input_ids.shape for batch in batches]
    assert {(8, 64), (1, 64), (1, 3)} <= set(shapes)  # full, one row of the model's length, one token
    assert any((batch.attention_mask.sum(axis=1) < batch.input_ids.shape[1]).any() for batch in batches)
    assert TOKENS < sum(int(batch.attention_mask.sum()) for batch in batches) < 1.2 * TOKENS
    assert all(len(batch.positions) for batch in batches)


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


def test_weights_of_another_shape_are_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint("bert"), tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(UserError, match="do not have the shapes"):
        load(str(tmp_path / "copy"))


def test_the_wrong_backend_is_refused(artifact, checkpoint):
    with pytest.raises(UserError, match="name the checkpoint"):
        load(str(artifact("bert")), backend="torch")
    with pytest.raises(UserError, match="export it first"):
        load(str(checkpoint("bert")), backend="onnx")
    with pytest.raises(UserError, match="choose auto"):
        load(str(artifact("bert")), backend="tensorflow")
