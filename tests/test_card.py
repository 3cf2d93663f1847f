"""The model card: the hub can read it, and it states parity and metrics."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mlmkit.artifact import read_manifest
from mlmkit.backends import load
from mlmkit.errors import UserError
from mlmkit.eval.api import evaluate
from mlmkit.export.card import write_card


@pytest.fixture(scope="module")
def result(artifact, text_file, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("result") / "result"
    evaluate(artifact("bert"), text_file, output=folder)
    return json.loads((folder / "result.json").read_text())


def front_matter(folder: Path) -> dict:
    """The front matter as huggingface_hub reads it."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_front_matter_is_what_the_hub_reads(copy):
    write_card(copy, read_manifest(copy), checkpoint="google-bert/bert-base-uncased")
    assert front_matter(copy) == {
        "library_name": "mlmkit",
        "pipeline_tag": "fill-mask",
        "base_model": "google-bert/bert-base-uncased",
        "tags": ["mlmkit", "masked-lm", "onnx", "bert", "fp32"],
    }
    write_card(copy, replace(read_manifest(copy), precision="int8"), checkpoint="google-bert/bert-base-uncased")
    assert front_matter(copy)["base_model_relation"] == "quantized"


@pytest.mark.parametrize("name", ["/home/someone/run/model", "./model", "a/b/c", "a b", "existing/folder"])
def test_a_local_checkpoint_is_no_base_model_and_its_path_stays_private(copy, name, tmp_path, monkeypatch):
    (tmp_path / "existing/folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_card(copy, read_manifest(copy), checkpoint=name)
    assert "base_model" not in front_matter(copy)
    assert name not in (copy / "README.md").read_text()


def test_the_body_says_what_was_proven_and_measured(copy, result, text_file):
    manifest = read_manifest(copy)
    write_card(copy, manifest, checkpoint="x/y", results=[result])
    text = (copy / "README.md").read_text()
    assert f"| {manifest.parity['max_log_prob_difference']:.1e} |" in text
    assert "Within the bounds" in text
    metric = result["metrics"]["masked_cross_entropy"]
    assert f"| {metric['value']:.4f} | {metric['low']:.4f} to {metric['high']:.4f} | onnx on cpu, fp32 |" in text
    assert f"| {result['mask_digest']} |" in text
    assert "| text.txt | masked cross entropy |" in text
    assert str(text_file.parent) not in text
    assert all(f"| `{name}` | `{digest}` |" in text for name, digest in manifest.files.items())
    assert 'mlmkit fill ARTIFACT "To be or not to [MASK]."' in text
    write_card(copy, replace(manifest, drift_allowed=True), checkpoint="x/y")
    text = (copy / "README.md").read_text()
    assert "Beyond the bounds" in text
    assert "## Metrics" not in text


def test_a_name_cannot_break_out_of_its_cell(copy, result):
    source = {**result["corpus"]["source"], "set": "a|b\n# title<script>"}
    hostile = {**result, "corpus": {**result["corpus"], "source": source}}
    write_card(copy, read_manifest(copy), checkpoint="x/y", results=[hostile])
    assert "| a\\|b# title&lt;script> | masked cross entropy |" in (copy / "README.md").read_text()


def test_a_result_of_other_weights_is_refused(copy, result):
    other = {**result, "model": {**result["model"], "fingerprint": "0" * 64}}
    with pytest.raises(UserError, match="was not measured on the weights"):
        write_card(copy, read_manifest(copy), checkpoint="x/y", results=[other])
    assert not (copy / "README.md").exists()


def test_the_card_may_be_edited(copy):
    write_card(copy, read_manifest(copy), checkpoint="x/y")
    (copy / "README.md").write_text("mine")
    assert load(str(copy)).info.architecture == "bert"
