"""The model card: the Hub can read it, its examples run, and it says what was trained, proven and measured."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import ARCHITECTURES, edit_record, refusal, run
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

import mlmkit
from mlmkit.artifact import read_manifest, write_manifest
from mlmkit.backends import load
from mlmkit.card import find_example
from mlmkit.eval.api import evaluate
from mlmkit.fill import fill
from mlmkit.locations import Source
from mlmkit.train.config_file import load_config
from mlmkit.train.loop import train

ROOT = Path(__file__).parent.parent
CONFIG = """
[data]
train = "{folder}/treino.txt"
held_out = "{folder}/teste.txt"
[tokenizer]
vocab_size = 500
[model]
architecture = "{folder}/architecture.json"
max_length = 64
[optim]
schedule = "constant"
[train]
steps = 4
global_batch_tokens = 256
micro_batch_tokens = 256
save_every = 2
"""


def unpadded(text: str) -> str:
    """The card with one space where the cells of its tables are padded."""
    return re.sub(" +", " ", text)


def front_matter(folder: Path) -> dict[str, Any]:
    """The front matter as huggingface_hub reads it."""
    metadata = metadata_load(folder / "README.md")
    assert metadata == ModelCard.load(folder / "README.md").data.to_dict()
    return metadata or {}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def portuguese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on the Portuguese text of the quickstart: `treino.txt`, `teste.txt`, `run`."""
    folder = tmp_path_factory.mktemp("portuguese")
    page = (ROOT / "docs" / "pt" / "quickstart.md").read_text(encoding="utf-8")
    for name in ("treino.txt", "teste.txt"):
        text = re.search(rf"cat > {name} <<'TEXTO'\n(.*?)TEXTO", page, re.DOTALL)
        assert text
        (folder / name).write_text(text[1], encoding="utf-8")
    (folder / "architecture.json").write_text(ARCHITECTURES["bert"])
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    train(load_config(folder / "config.toml"), folder / "run")
    return folder


@pytest.fixture(scope="module")
def result(artifact, text_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("result") / "result"
    evaluate(artifact("bert"), text_file, output=folder)
    return folder


def test_the_card_of_a_portuguese_run(portuguese, capsys, caplog, tmp_path):
    model = portuguese / "run" / "model"
    given = ("--license", "apache-2.0", "--language", "pt", "--dataset", "user/machado", "--dataset", "oscar")
    code, out, err = run(capsys, "card", portuguese / "run", *given)
    assert code == 0 and "the card lacks fields" not in caplog.text and "no example" not in caplog.text, err
    assert out.splitlines()[-1] == shlex.join(["hf", "upload", "USER/NAME", str(model)])
    front = front_matter(model)
    entries = front.pop("model-index")[0]["results"]
    [widget] = front.pop("widget")
    assert front == {
        "language": ["pt"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "mask_token": "[MASK]",
        "datasets": ["user/machado", "oscar"],
        "tags": ["mlmkit", "masked-lm", "bert"],
    }
    # A held-out sentence with one whole word masked, so the widget is in the model's language.
    before, after = widget["text"].split("[MASK]")
    pattern = re.compile(re.escape(before) + r"\w+" + re.escape(after))
    assert pattern.search((portuguese / "teste.txt").read_text(encoding="utf-8"))
    text = (model / "README.md").read_text(encoding="utf-8")
    assert text.count(widget["text"]) == 3  # the widget and both examples with a mask
    # What training measured at the last checkpoint, which holds the same weights.
    measured = json.loads((portuguese / "run/checkpoints/step-00000004/held-out/result.json").read_text())
    metric = measured["metrics"]["masked_cross_entropy"]
    [entry] = [each for each in entries[0]["metrics"] if each["type"] == "masked_cross_entropy"]
    assert entry["value"] == metric["value"] and entry["args"] == {"low": metric["low"], "high": metric["high"]}
    assert f"(95 % interval {metric['low']:.4f} to {metric['high']:.4f})" in entry["name"]
    assert {each.dataset_type for each in model_index_to_eval_results([{"name": "x", "results": entries}])[1]} == {
        "teste-txt"
    }
    # The training.
    last = [json.loads(line) for line in (portuguese / "run/log.jsonl").read_text().splitlines() if "loss" in line][-1]
    counts = f"{last['tokens_seen']:,} tokens (special tokens included) and {round(last['words_seen']):,} words"
    assert f"\n4 steps: {counts}, counting repeated passes.\n" in text
    assert re.search(r"\| treino\.txt \| 12 \| \d+ \| \d+ \| [0-9a-f]{32} \|", unpadded(text))
    [toml] = blocks(text, "toml")
    assert 'model.architecture = "architecture.json"\n' in toml and "# masking.mask_prob = 0.15\n" in toml
    (tmp_path / "config.toml").write_text(toml)
    was, read = load_config(portuguese / "config.toml"), load_config(tmp_path / "config.toml")
    assert read.data.train == ("treino.txt",) and read.data.held_out == "teste.txt"
    assert (read.tokenizer, read.masking, read.optim) == (was.tokenizer, was.masking, was.optim)
    assert (read.train.steps, read.train.global_batch_tokens) == (4, 256)
    assert str(portuguese) not in text
    assert "\n# run: a bert masked language model\n" in text
    assert f"| weights | {measured['model']['fingerprint']} |" in unpadded(text)
    run(capsys, "card", portuguese / "run", *given)
    assert (model / "README.md").read_text(encoding="utf-8") == text


def examples(portuguese: Path, capsys: pytest.CaptureFixture[str], language: str) -> list[str]:
    """The blocks of the run's card, with the model's folder in place of its name on the Hub."""
    run(capsys, "card", portuguese / "run")
    model = portuguese / "run" / "model"
    return blocks((model / "README.md").read_text(encoding="utf-8").replace("USER/NAME", str(model)), language)


def test_the_commands_of_a_checkpoint_run(portuguese, capsys, tmp_path, monkeypatch):
    [commands] = examples(portuguese, capsys, "bash")
    monkeypatch.chdir(tmp_path)
    for name in ("sentences.txt", "corpus.txt"):
        Path(name).write_text((portuguese / "teste.txt").read_text(encoding="utf-8"), encoding="utf-8")
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        assert program == "mlmkit"
        if arguments[0] != "export":  # ten seconds; the quickstart runs it
            code, _, err = run(capsys, *arguments)
            assert code == 0, err


def test_the_pipeline_of_a_checkpoint_runs(portuguese, capsys):
    code, known = examples(portuguese, capsys, "python")[0], dict[str, Any]()
    exec(code.replace("\nfill_mask(", "\nfilled = fill_mask("), known)
    assert len(known["filled"]) == 5


def test_the_embeddings_of_a_checkpoint_run(portuguese, capsys):
    pytest.importorskip("sentence_transformers")
    code, known = examples(portuguese, capsys, "python")[1], dict[str, Any]()
    exec(code.replace("\nencoder.encode(", "\nvectors = encoder.encode("), known)
    assert known["vectors"].shape == (1, 32)


def test_a_checkpoint_of_a_run_is_published_without_its_optimiser(portuguese, capsys):
    folder = portuguese / "run" / "checkpoints" / "step-00000002"
    _, out, _ = run(capsys, "card", folder)
    excluded = ["--exclude=optimizer*", "--exclude=trainer.json", "--exclude=held-out*"]
    assert shlex.split(out.splitlines()[-1]) == ["hf", "upload", "USER/NAME", str(folder), *excluded]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "\n2 steps: " in text and "\n### teste.txt\n\n| metric " in text
    assert "trainer.json" not in text
    (folder / "README.md").unlink()


def test_a_checkpoint_with_a_graph_of_the_hubs_layout(portuguese, artifact, capsys, tmp_path):
    """tests/test_layout.py runs transformers.js on it."""
    folder = Path(shutil.copytree(portuguese / "run" / "model", tmp_path / "model"))
    (folder / "onnx").mkdir()
    shutil.copy(artifact("bert") / "model.onnx", folder / "onnx")
    run(capsys, "card", folder, "--text", portuguese / "teste.txt")
    front, text = front_matter(folder), (folder / "README.md").read_text(encoding="utf-8")
    assert {"onnx", "transformers.js"} < set(front["tags"])
    [code] = blocks(text, "js")
    assert f"await fillMask({json.dumps(front['widget'][0]['text'], ensure_ascii=False)});" in code
    assert "## Training" not in text  # outside its run


def test_the_card_of_an_artifact(copy, result, text_file, capsys, caplog):
    given = ("--text", text_file, "--result", result, "--base-model", "google-bert/bert-base-uncased")
    code, out, _ = run(capsys, "card", copy, *given)
    assert (
        code == 0 and "the card lacks fields that the Hub shows: give --license, --language, --dataset" in caplog.text
    )
    assert "no example" not in caplog.text
    assert out.splitlines()[-1] == f"hf upload USER/NAME {copy}"
    front = front_matter(copy)
    assert front["library_name"] == "mlmkit" and front["base_model"] == "google-bert/bert-base-uncased"
    assert front["tags"] == ["mlmkit", "masked-lm", "onnx", "fp32", "bert"]
    assert "license" not in front and "base_model_relation" not in front
    manifest, measured = read_manifest(copy), json.loads((result / "result.json").read_text())
    text = (copy / "README.md").read_text()
    assert f", largest {manifest.parity['max_log_prob_difference']:.1e} (bound " in text
    assert "--allow-drift" not in text
    metric = measured["metrics"]["masked_cross_entropy"]
    assert (
        f"| masked cross entropy | {metric['value']:.4f} | {metric['low']:.4f} to {metric['high']:.4f} |"
        in unpadded(text)
    )
    assert (
        f"| unigram entropy, to beat | {measured['unigram_entropy']:.4f} |" in unpadded(text)
        and "top-5 accuracy" in text
    )
    assert (
        f"fingerprint `{measured['corpus']['fingerprint']}`\n- masked tokens: {measured['scored']['masked']:,}; "
        in text
    )
    assert "; mask-v1, 0.15 selected: 0.8 masked, 0.1 random; mask seed 0, epoch 0\n" in text
    assert f"\n- mask digest: `{measured['mask_digest']}`\n- run by: onnx on cpu, fp32\n" in text
    assert "\n### text.txt\n" in text
    assert str(text_file.parent) not in text
    assert f"| weights | {manifest.fingerprint} |" in unpadded(text)
    parity = {**manifest.parity, "text": f"the run's held-out text ({text_file})"}
    write_manifest(copy, replace(manifest, precision="int8", drift_allowed=True, parity=parity))
    run(capsys, "card", copy, "--base-model", "google-bert/bert-base-uncased")
    assert front_matter(copy)["base_model_relation"] == "quantized"
    text = (copy / "README.md").read_text()
    assert "--allow-drift" in text and "## Metrics" not in text
    assert "masked tokens of the run's held-out text (text.txt), in nats: " in text
    assert str(text_file.parent) not in text


def test_a_result_replaces_what_training_measured_of_the_same(portuguese, capsys, tmp_path):
    """The same text and masks are shown once. A sample is called one, with its variant and how many were scored."""
    model, source = portuguese / "run" / "model", portuguese / "teste.txt"
    for name, metrics in (("same", ["masked"]), ("both", ["masked", "pseudo"])):
        options = {"metrics": metrics, "pseudo_sample": 0.5} if "pseudo" in metrics else {}
        evaluate(model, source, output=tmp_path / name, **options)
        assert run(capsys, "card", model, "--result", tmp_path / name)[0] == 0
        text = (model / "README.md").read_text(encoding="utf-8")
        assert text.count("| masked cross entropy ") == text.count("### teste.txt") == 1
        assert len(front_matter(model)["model-index"][0]["results"]) == 1
    result = json.loads((tmp_path / "both" / "result.json").read_text())
    count = f"{result['scored']['pseudo']} of {result['corpus']['tokens']} tokens"
    assert f"- pseudo-likelihood: {count}; original, each masked alone; a sample of 0.5, mask seed 0\n" in text
    assert "| pseudo perplexity, of a sample " in text and "name: pseudo perplexity, of a sample (95 %" in text
    evaluate(model, source, output=tmp_path / "pseudo", metrics=["pseudo"])
    run(capsys, "card", model, "--result", tmp_path / "pseudo")
    assert (model / "README.md").read_text(encoding="utf-8").count("\n### teste.txt\n") == 2


def test_without_a_text_the_examples_are_in_no_language(copy, capsys, caplog):
    run(capsys, "card", copy)
    assert "no example and no widget: pass --text FILE" in caplog.text
    assert "widget" not in front_matter(copy)
    text = (copy / "README.md").read_text()
    assert "mlmkit fill artifact '... [MASK] ...'" in text and 'score("...")' in text


def without_mlmkit(code: str, folder: Path) -> Any:
    """What the code prints as JSON in a process that cannot import mlmkit, torch or transformers."""
    block = "import sys; sys.modules.update(dict.fromkeys(['mlmkit', 'torch', 'transformers'])); import json\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", block + code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("source", ["card", "page"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_graph_runs_without_mlmkit(artifact, kind, source, tmp_path, capsys, text_file):
    """The code of the card and of docs/graph.md, with scores and candidates that equal those of mlmkit."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    for file in artifact(kind).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    run(capsys, "card", folder, "--text", text_file)
    card = (folder / "README.md").read_text(encoding="utf-8")
    [code] = blocks(card, "python")
    if source == "page":
        own = "[MASK]" if kind == "bert" else "<mask>"
        [page] = blocks((ROOT / "docs" / "graph.md").read_text(encoding="utf-8"), "python")
        assert page.partition("\nprint(")[0] == code.partition("\nprint(")[0].replace(own, "[MASK]")
        code = page.replace("[MASK]", own)
    sentence, masked = (json.loads(text) for text in re.findall(r'^print\(\w+\((".*")\)\)', code, re.MULTILINE))
    functions = code.partition("\nprint(")[0]
    total, candidates = without_mlmkit(
        f"{functions}\nprint(json.dumps([score({sentence!r}), fill({masked!r})]))", tmp_path
    )
    backend = load(str(folder))
    assert total == pytest.approx(mlmkit.pseudo_log_likelihood(backend, [sentence])[0].pseudo_log_likelihood, abs=1e-6)
    expected = fill(backend, masked)
    assert [[token for token, _ in row] for row in candidates] == [
        [backend.tokenizer.token(each["token"]) for each in row] for row in expected
    ]
    for row, wanted in zip(candidates, expected, strict=True):
        assert [value for _, value in row] == pytest.approx([each["score"] for each in wanted], abs=1e-6)


def test_values_out_of_range_are_treated_as_the_page_says(artifact):
    """docs/graph.md has the table; on a CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(artifact("bert") / "model.onnx"), options)
    size, ids = read_manifest(artifact("bert")).vocabulary_size, np.array([[2, 10, 11, 3], [2, 12, 13, 3]])

    def log_prob(position: int, target: int, input_ids: Any = ids) -> float:
        each = {"input_ids": input_ids, "attention_mask": np.ones_like(ids)}
        each |= {"positions": np.array([position]), "targets": np.array([target])}
        [scores] = session.run(["log_prob"], each)
        return float(np.asarray(scores)[0])

    assert log_prob(-1, 5) == log_prob(7, 5) and log_prob(-8, 5) == log_prob(0, 5)
    assert log_prob(1, -1) == log_prob(1, size - 1) and log_prob(1, -size) == log_prob(1, 0)
    assert log_prob(1, 5, np.where(ids == 10, -1, ids)) == log_prob(1, 5, np.where(ids == 10, size - 1, ids))
    for position, target in ((8, 5), (-9, 5), (1, size), (1, -size - 1)):
        with pytest.raises(Exception, match=r"out of data bounds|GatherElements"):
            log_prob(position, target)
    with pytest.raises(Exception, match="out of data bounds"):
        log_prob(1, 5, np.where(ids == 10, size, ids))


def test_an_example_is_a_whole_word_of_one_token(artifact, tmp_path):
    backend = load(str(artifact("roberta")))
    (tmp_path / "text.txt").write_text(
        "Too short.\nA statement with <mask> in it is not used at all.\n"
        "First this statement, which is much too long for an example because it goes on and on and on and on and on "
        "and on and on and on and on.  The statement is an expression of the\u00a0module? Never this one.\n"
    )
    text = Source(str(tmp_path / "text.txt"))
    masked, sentence = find_example(text, backend.tokenizer, backend.info)
    assert sentence == "The statement is an expression of the module?"
    original = backend.tokenizer.encode_control(sentence).ids
    ids = backend.tokenizer.encode_control(masked).ids
    [index] = [index for index, id in enumerate(ids) if id == backend.tokenizer.mask_id]
    assert ids[:index] + original[index : index + 1] + ids[index + 1 :] == original
    assert backend.tokenizer.token(original[index]).removeprefix("Ġ") in ("statement", "expression")
    short = replace(backend.info, max_length=5)
    assert find_example(text, backend.tokenizer, short) == ("", "")


def test_a_name_cannot_break_out_of_its_place(copy, result, tmp_path, capsys):
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for file in result.iterdir():
        (hostile / file.name).write_bytes(file.read_bytes())
    measured = json.loads((hostile / "result.json").read_text())
    source = {**measured["corpus"]["source"], "set": 'a|b\n---\n# title<script>: "x'}
    edit_record(hostile / "result.json", corpus={**measured["corpus"], "source": source})
    assert run(capsys, "card", copy, "--result", hostile)[0] == 0
    assert '\n### a\\|b---# title&lt;script>: "x\n' in (copy / "README.md").read_text()
    assert front_matter(copy)["model-index"][0]["results"][0]["dataset"]["name"] == source["set"]


def test_what_cannot_be_published_is_refused(copy, result, portuguese, capsys):
    assert "was not measured on the weights" in refusal(capsys, "card", portuguese / "run", "--result", result)
    assert "--license 'MIT': give an identifier of the Hub" in refusal(capsys, "card", copy, "--license", "MIT")
    assert "--language 'pt-BR'" in refusal(capsys, "card", copy, "--language", "pt-BR")
    assert "--dataset './text'" in refusal(capsys, "card", copy, "--dataset", "./text")
    assert "is not a folder: download" in refusal(capsys, "card", "user/name")
    (copy / "config.json").write_text("{}")
    assert "config.json is not the file that was exported" in refusal(capsys, "card", copy)
    assert not (copy / "README.md").exists()


def test_an_edited_card_stays(copy, capsys):
    run(capsys, "card", copy)
    assert run(capsys, "card", copy, "--license", "mit")[0] == 0  # as it was not edited
    card = copy / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    assert "replace it with --overwrite" in refusal(capsys, "card", copy)
    assert load(str(copy)).info.architecture == "bert"
    assert run(capsys, "card", copy, "--overwrite")[0] == 0
    assert "Mine." not in card.read_text()
    card.write_text("mine")
    assert "is not as mlmkit wrote it" in refusal(capsys, "card", copy)


def test_training_keeps_what_was_added_to_the_same_weights(portuguese, caplog, tmp_path):
    """Another held-out text leaves a card and graphs; more steps remove them, with a warning."""
    config, folder = portuguese / "config.toml", shutil.copytree(portuguese / "run", tmp_path / "run")
    model = folder / "model"
    (model / "README.md").write_text("mine")
    (model / "onnx").mkdir()
    train(load_config(config, [f"data.held_out={portuguese / 'treino.txt'}"]), folder)
    assert (model / "README.md").read_text() == "mine" and (model / "onnx").is_dir()
    assert "removed" not in caplog.text
    train(load_config(config, ["train.steps=5"]), folder)
    assert f"mlmkit removed README.md, onnx: mlmkit card {model} writes" in caplog.text
    assert not (model / "README.md").exists() and not (model / "onnx").exists()
