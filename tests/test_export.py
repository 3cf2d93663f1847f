"""Export: parity at shapes that the export did not check, and everything that must stop an export."""

import json
import re
import shutil
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import KINDS, PROOF, paragraphs

from mlmkit.artifact import read_manifest
from mlmkit.backends import Backend, Batch, Scored, load
from mlmkit.corpus import tokenize
from mlmkit.errors import CheckError, UserError
from mlmkit.export import export as exporting
from mlmkit.export.parity import BOUNDS, Parity, check_parity, parity_batches, parity_line, proof_text, require_parity
from mlmkit.files import write_record
from mlmkit.locations import Source


def random_batch(batch: int, seq: int, masked: int, vocabulary: int = 600) -> Batch:
    """Rows of different lengths, the first one full, with ordinary ids; unordered positions, repeated if need be."""
    generator = np.random.default_rng(batch * 1000 + seq)
    input_ids = generator.integers(5, vocabulary, (batch, seq))
    lengths = np.r_[seq, generator.integers(1, seq + 1, batch - 1)]
    attention_mask = (np.arange(seq) < lengths[:, None]).astype(np.int64)
    real = np.flatnonzero(attention_mask)
    positions = generator.choice(real, masked, replace=masked > len(real))
    return Batch(input_ids, attention_mask, positions, generator.integers(5, vocabulary, masked))


@pytest.mark.parametrize("kind", KINDS)
def test_engine_equals_checkpoint_at_unseen_shapes(kind, checkpoint, artifact):
    torch_backend, onnx_backend = load(str(checkpoint(kind))), load(str(artifact(kind)))
    assert (torch_backend.name, onnx_backend.name) == ("torch", "onnx")
    assert onnx_backend.info.fingerprint == torch_backend.info.fingerprint
    assert onnx_backend.info.max_length == torch_backend.info.max_length == 64
    for shape in [(1, 1, 1), (1, 64, 5), (17, 13, 300), (3, 31, 1), (5, 7, 0)]:
        batch = random_batch(*shape)
        expected, actual = torch_backend.score(batch), onnx_backend.score(batch)
        np.testing.assert_allclose(actual.log_prob, expected.log_prob, atol=1e-4, rtol=0)
        np.testing.assert_allclose(actual.top_log_prob, expected.top_log_prob, atol=1e-4, rtol=0)
        assert actual.top_id.shape == (shape[2], 100)
        assert (actual.top_id[:, 0] == expected.top_id[:, 0]).all()


def test_manifest_says_what_was_proven(artifact):
    manifest = read_manifest(artifact("bert"))
    assert manifest.parity["max_log_prob_difference"] <= manifest.parity["bounds"]["max_log_prob"] == 1e-4
    assert manifest.parity["masked"] > 300
    assert (manifest.architecture, manifest.vocabulary_size, manifest.max_length) == ("bert", 600, 64)
    assert set(manifest.files) == {path.name for path in artifact("bert").iterdir()} - {"mlmkit.json"}


@pytest.mark.parametrize(("weight_bytes", "tokens"), [(1, 1 << 14), (1 << 29, 1 << 12)])
def test_parity_is_proven_on_many_shapes_and_a_budget_of_work(artifact, weight_bytes, tokens):
    tokenizer = load(str(artifact("bert"))).tokenizer
    batches = parity_batches(tokenize(paragraphs() * 30, tokenizer), tokenizer, 64, weight_bytes)
    shapes = [batch.input_ids.shape for batch in batches]
    assert {(8, 64), (1, 64), (1, 3)} <= set(shapes)  # full, one row of the model's length, one token
    assert any((batch.attention_mask.sum(axis=1) < batch.input_ids.shape[1]).any() for batch in batches)
    read = np.cumsum([batch.input_ids.size for batch in batches[:-3]])
    assert read[-2] < 1.1 * tokens and read[-1] > tokens
    assert all(len(batch.positions) for batch in batches)


def test_weights_beside_the_graph(checkpoint, artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("mlmkit.export.graphs.EXTERNAL_DATA_BYTES", 1000)
    exporting.export(str(checkpoint("bert")), tmp_path / "external", text=PROOF)
    assert (tmp_path / "external" / "model.onnx.data").exists()
    moved = tmp_path / "elsewhere"
    (tmp_path / "external").rename(moved)
    actual, expected = (load(str(folder)).score(random_batch(3, 9, 5)) for folder in (moved, artifact("bert")))
    np.testing.assert_allclose(actual.log_prob, expected.log_prob, atol=1e-5, rtol=0)


def test_nothing_is_exported_when_parity_does_not_hold(checkpoint, tmp_path, monkeypatch):
    real = exporting.write_onnx

    def write_another_model(model, path):
        real(model, path)
        graph = ir.load(path)
        bias: Any = graph.graph.initializers["network.cls.predictions.decoder.bias"]
        numbers = bias.const_value.numpy() + np.float32(0.01) * (np.arange(600) == 7)
        bias.const_value = ir.tensor(numbers.astype(np.float32), name=bias.name)
        ir.save(graph, path)

    monkeypatch.setattr(exporting, "write_onnx", write_another_model)
    with pytest.raises(CheckError, match="parity does not hold"):
        exporting.export(str(checkpoint("bert")), tmp_path / "artifact", text=PROOF)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_told(checkpoint, tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        exporting.export(str(checkpoint("bert")), tmp_path / "artifact")
    assert [path.name for path in (tmp_path / "artifact").iterdir()] == ["thesis.tex"]


def test_weights_of_another_shape_are_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("bert"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(UserError, match="do not have the shapes"):
        load(str(folder))


def test_the_wrong_backend_is_refused(artifact, checkpoint):
    with pytest.raises(UserError, match="name the checkpoint"):
        load(str(artifact("bert")), backend="torch")
    with pytest.raises(UserError, match="export it first"):
        load(str(checkpoint("bert")), backend="onnx")
    with pytest.raises(UserError, match="choose auto"):
        load(str(artifact("bert")), backend="tensorflow")


# ------------------------------------------------------------------ the proof itself


def with_scores(backend: Backend, skew: Callable[[Scored], Scored]) -> Backend:
    """The engine, with scores that are changed by `skew`."""
    changed: Any = copy(backend)
    changed.score = lambda batch: skew(backend.score(batch))
    return changed


def skewed(amount: float, relative: float = 0.0, field: str = "log_prob") -> Callable[[Scored], Scored]:
    def skew(scored: Scored) -> Scored:
        values = getattr(scored, field).astype(np.float64)
        return scored._replace(**{field: (values + amount + relative * np.abs(values)).astype(np.float32)})

    return skew


@pytest.mark.parametrize(
    ("skew", "beyond"),
    [
        (skewed(0.9e-4), []),
        (skewed(0.8e-4, 1e-5), ["mean |Δ log P|", "|Δ cross-entropy|"]),
        (skewed(1e-5, 1e-3), ["mean |Δ log P|", "largest", "|Δ cross-entropy|"]),
        (skewed(0.9e-4, 4.5e-5, "top_log_prob"), []),
        (skewed(1.1e-4, 5.5e-5, "top_log_prob"), ["largest of a candidate"]),
    ],
)
def test_a_proof_shows_each_figure_beside_its_bound(artifact, skew, beyond):
    model = load(str(artifact("bert")))
    parity = check_parity(model, with_scores(model, skew), PROOF, BOUNDS["fp32"], 1)
    assert parity.passed == (not beyond)
    line = parity_line(parity.as_dict())
    assert re.findall(r"[,:] ([^,:]*?) [\d.e-]+ \(BEYOND", line) == beyond
    assert line.count("bound") == 4
    assert "masked tokens of paragraphs" in line
    if beyond:
        with pytest.raises(CheckError, match="BEYOND its bound of"):
            require_parity(model, with_scores(model, skew), PROOF, "fp32", 1, allow_drift=False)


@pytest.mark.parametrize("field", [field.name for field in fields(Parity) if field.type is float])
def test_what_is_not_a_number_never_passes(artifact, field):
    parity = Parity(**{**read_manifest(artifact("bert")).parity, "bounds": BOUNDS["fp32"]})
    assert parity.passed
    assert not replace(parity, **{field: float("nan")}).passed


def test_one_score_that_is_not_a_number_fails_the_proof(artifact):
    model = load(str(artifact("bert")))

    def spoil(scored: Scored) -> Scored:
        return scored._replace(log_prob=np.where(np.arange(len(scored.log_prob)) == 3, np.nan, scored.log_prob))

    assert not check_parity(model, with_scores(model, spoil), PROOF, BOUNDS["int8"], 1).passed


def test_the_proof_of_a_runs_model_is_made_on_its_held_out_text(tmp_path, text_file, caplog):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    for step, location in ((1, "elsewhere.txt"), (2, str(text_file))):
        folder = run / "checkpoints" / f"step-{step:08d}" / "held-out"
        folder.mkdir(parents=True)
        source = {"set": None, **asdict(Source(location))}
        write_record(folder / "result.json", {"corpus": {"source": source}})
    for checkpoint in (run / "model", run / "checkpoints" / "step-00000001"):
        actual = proof_text(str(checkpoint))
        assert actual.name == f"the run's held-out text ({text_file})"
        assert list(actual.texts) == paragraphs()[:1024]
    assert proof_text(str(run / "model"), str(text_file)).name == str(text_file)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    with caplog.at_level("INFO"):
        assert proof_text(str(run / "model")).name == "Python's documentation"
    assert "elsewhere.txt no longer exists" in caplog.text
    assert "for a text like yours, use --text" in caplog.text
