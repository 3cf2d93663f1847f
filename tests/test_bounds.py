"""Untrusted files: what a model folder may ask for, and what of it reaches a library or a terminal."""

import json
import os
import shutil
import sys
import zipfile
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_record, process, refusal, run
from interruptions import start_rank
from safetensors.torch import load_file
from test_artifact import refused, rehash

from mlmkit.backends import load
from mlmkit.bounds import read_config
from mlmkit.console import printable
from mlmkit.demo import show_fill
from mlmkit.errors import UserError
from mlmkit.eval.set_files import set_rows

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ADDED = {"special": False, "normalized": True, "single_word": False, "lstrip": False, "rstrip": False}
CLS = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.fixture
def copies(checkpoint, artifact, tmp_path) -> dict[str, Path]:
    """Copies of a checkpoint and its artifact, to damage."""
    made = {"checkpoint": checkpoint("bert"), "artifact": artifact("bert")}
    return {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in made.items()}


def change(folder: Path, file: str, **values: object) -> None:
    """Change values in a JSON file of the folder, and the hash in an artifact's manifest."""
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    if (folder / "mlmkit.json").exists():
        rehash(folder)


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


EVIL = """
from pathlib import Path
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
Path({canary!r}).touch()
class Config(BertConfig): model_type = "evil"
class Model(BertForMaskedLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""
AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForMaskedLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


@pytest.fixture
def canary(copies, tmp_path) -> Path:
    """A file that the code in the checkpoint's folder would make."""
    folder = copies["checkpoint"]
    (folder / "evil.py").write_text(EVIL.format(canary=str(tmp_path / "canary")))
    change(folder, "config.json", auto_map=AUTO_MAP)
    change(folder, "tokenizer_config.json", auto_map=AUTO_MAP)
    return tmp_path / "canary"


def answer(answers: Path) -> None:
    """Let the process read this file from its standard input."""
    os.dup2(os.open(answers, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


def test_a_folders_code_is_not_run_where_its_classes_are_known(copies, canary, tmp_path):
    answers, log = tmp_path / "answers", tmp_path / "log"
    answers.write_text("y\n" * 9)
    process = start_rank(log, ["score", str(copies["checkpoint"])], before=partial(answer, answers))
    process.join(120)
    printed, said = (log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    assert process.exitcode is not None
    assert not canary.exists()
    assert "[y/N]" not in printed + said


def test_no_answer_in_a_text_runs_a_folders_code(capsys, monkeypatch, copies, canary, text_file, tmp_path):
    """In a process of its own, whose standard input the command reads, and in this one."""
    folder, home = copies["checkpoint"], tmp_path / "home"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(home / "modules"))
    change(folder, "config.json", model_type="evil")
    change(folder, "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    config = tmp_path / "train.toml"
    config.write_text(f'[data]\ntrain = "{text_file}"\n')
    train = ["train", config, "--output", tmp_path / "run", "--set"]
    for command in (
        ["score", folder],
        ["fill", folder, "a [MASK]"],
        ["eval", folder, "--set", text_file],
        ["export", folder, "--output", tmp_path / "exported"],
        [*train, f"model.init_from={folder}"],
        [*train, f"tokenizer.path={folder}"],
    ):
        if command[0] == "score":
            ended = process(*command, input="1\ny\n" * 9, env=os.environ | {"HF_HOME": str(home)})
            code, out, err = ended.returncode, ended.stdout, ended.stderr
        else:
            monkeypatch.setattr("sys.stdin", StringIO("1\ny\n" * 9))
            code, out, err = run(capsys, *command)
        assert (code, out, "[y/N]" in err, "which mlmkit does not run" in err) == (2, "", False, True), command
    assert not canary.exists()
    assert not home.exists()


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ("config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ("config.json", {"configuration_files": ["config.4.0.json"]}, "configuration_files"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files"),
    ],
)
def test_what_would_read_other_files_or_run_other_code_is_refused(copies, file, values, message):
    change(copies["checkpoint"], file, **values)
    assert f"has {message}, which mlmkit does not accept" in refused(copies["checkpoint"])


def test_an_adapter_is_refused(copies):
    (copies["checkpoint"] / "adapter_config.json").write_text("{}")
    assert "merge it into the model" in refused(copies["checkpoint"])


@pytest.mark.parametrize("name", ["w.bin", "../out.safetensors", "{folder}/w.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("by", ["index", "config"])
def test_weights_are_safetensors_files_of_the_folder(copies, name, by):
    folder = copies["checkpoint"]
    name = name.format(folder=folder)
    weights = load_file(folder / "model.safetensors")
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    if by == "index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        change(folder, "config.json", transformers_weights=name)
    assert "which is not a safetensors file in the folder" in refused(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_snapshot_of_links_is_loaded_and_checked(copies, tmp_path, sharded, monkeypatch):
    from huggingface_hub import constants
    from transformers import AutoModelForMaskedLM

    folder = copies["checkpoint"]
    if sharded:
        network = AutoModelForMaskedLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        network.save_pretrained(folder, max_shard_size="50KB")
    home = tmp_path / "hub" / "models--someone--model"
    snapshot = home / "snapshots" / ("a" * 40)
    for made in (snapshot, home / "refs"):
        made.mkdir(parents=True)
    (home / "refs" / "main").write_text(snapshot.name)
    shutil.copytree(folder, home / "blobs")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home.parent))
    assert load("someone/model").info.fingerprint == load(folder).info.fingerprint
    change(home / "blobs", "config.json", vocab_size=10**9)
    with pytest.raises(UserError, match="someone/model: its configuration asks for 1,000,000,000 weights"):
        load("someone/model")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("config.json", 17 << 20),
        ("tokenizer_config.json", 17 << 20),
        ("tokenizer.json", 129 << 20),
        ("special_tokens_map.json", 129 << 20),
        ("model.safetensors.index.json", 129 << 20),
        ("model.onnx", (2 << 30) + 1),
    ],
)
def test_a_file_too_large_to_be_what_it_is_called_is_not_read(capsys, copies, name, size):
    for folder in copies.values():
        if folder.name == "checkpoint" or (folder / name).exists():
            with (folder / name).open("wb") as file:
                file.truncate(size)  # sparse: it uses no disk space
    if name != "model.onnx":
        assert f"{name} must be a file of at most" in refused(copies["checkpoint"])
    if (copies["artifact"] / name).exists():
        code, out, err = run(capsys, "inspect", copies["artifact"])
        assert (code, len(err.splitlines())) == (1, 1)
        assert f"{name} is larger than any such file" in out


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_pipe_or_a_device_is_not_waited_for(copies, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (copies["checkpoint"] / name).unlink()
        make(copies["checkpoint"] / name)
        assert f"{name} must be a file of at most" in refused(copies["checkpoint"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 10**9}, "asks for 1,000,000,000 weights, and its files hold 38,104"),
        ({"vocab_size": 10**30}, "asks for 1,000,000,000"),
        ({"intermediate_size": 10**8}, "asks for 13,000,"),
        ({"type_vocab_size": 10**8}, "asks for 3,200,"),
        ({"max_position_embeddings": 10**8}, "asks for 1,600,000,000 weights"),
        ({"model_type": "distilbert", "sinusoidal_pos_embds": True, "max_position_embeddings": 10**8}, "asks for"),
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 num_hidden_layers"),
        ({"num_labels": 10**9}, "asks for 1000000000 num_labels"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "asks for 1000000000 num_hidden_layers"),
    ],
)
def test_a_configuration_asks_for_no_more_than_the_weights_hold(copies, values, message):
    change(copies["checkpoint"], "config.json", **values)
    assert message in refused(copies["checkpoint"])


def test_sizes_and_names_of_labels_are_no_counts(tmp_path):
    values = {"expert_intermediate_size": 4096, "hidden_layer_size": 4096, "label2id": {"group theory": 5012}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path / "config.json") == values


# Each lengthens a text more than 256 times, but not so much that a failing test runs out of memory.
GROWING: dict[str, dict[str, Any]] = {
    "replace": {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 20)] * 2}},
    "no type": {"normalizer": {"normalizers": [replace({"String": "a"}, "a" * 20)] * 2}},
    "nested": {
        "normalizer": {"type": "Sequence", "normalizers": [{"normalizers": [replace({"String": "a"}, "a" * 300)]}]}
    },
    "empty match": {"normalizer": replace({"Regex": ""}, "a" * 300)},
    "empty text": {"normalizer": replace({"String": ""}, "a" * 300)},
    "prepend": {"normalizer": {"type": "Prepend", "prepend": "a" * 300}},
    "both": {
        "normalizer": replace({"String": "a"}, "a" * 200),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 2},
    },
    "decoder": {"decoder": {"type": "Sequence", "decoders": [{"type": "BPEDecoder", "suffix": ""}] * 9}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*[CLS] * 20, TEXT],
            "pair": [TEXT, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2] * 20, "tokens": ["[CLS]"] * 20}},
        }
    },
    "added": {"normalizer": replace({"String": "b"}, "b" * 250), "added_tokens": "c" * 300_000},
}


@pytest.mark.parametrize("name", GROWING)
def test_a_tokenizer_that_multiplies_a_text_is_refused(capsys, copies, name):
    values = dict(GROWING[name])
    for folder in copies.values():
        if name == "added":
            tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
            values["added_tokens"] = [*tokens, {"id": 600, "content": "c" * 300_000, **ADDED}]
        change(folder, "tokenizer.json", **values)
    assert "turns one character into up to" in refused(copies["checkpoint"])
    code, out, err = run(capsys, "inspect", copies["artifact"])
    assert (code, len(err.splitlines()), "turns one character into up to" in out) == (1, 1, True)


def test_a_pattern_that_gives_up_is_one_line(capsys, copies, tmp_path):
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "text.txt").write_text("a" * 40 + "!\n")
    for folder in copies.values():
        change(folder, "tokenizer.json", pre_tokenizer=pattern)
        assert "a text: the tokenizer cannot process it" in refusal(capsys, "score", folder, tmp_path / "text.txt")


def test_ids_far_beyond_any_vocabulary_are_refused(copies):
    vocabulary = json.loads((copies["checkpoint"] / "tokenizer.json").read_text())["model"]
    vocabulary["vocab"]["zz"] = 30_000_000
    change(copies["checkpoint"], "tokenizer.json", model=vocabulary)
    assert "ids up to 30000000, above the limit of 16777216" in refused(copies["checkpoint"])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_manifest_that_promises_longer_rows_is_refused(capsys, artifact, tmp_path, kind):
    folder = Path(shutil.copytree(artifact(kind), tmp_path / kind))
    code, *_ = run(capsys, "inspect", folder)
    assert code == 0
    edit_record(folder / "mlmkit.json", max_length=65)
    assert "allows rows of 65 tokens, but the model takes 64" in refused(folder)
    code, out, _ = run(capsys, "inspect", folder)
    assert (code, "rows of 65 tokens" in out) == (1, True)


STEERING = "\x1b]0;x\x07\x9b2J\u202egnp\u2066\u2028\r"
REAL = "می‌خواهم क्‍ष e\u0301 co\u00adop 1\u00a0000 \u200fא"


def test_real_text_is_shown_as_it_is():
    assert printable(REAL) == REAL
    assert printable(STEERING).isprintable()


def test_no_text_or_name_steers_the_terminal(capsys, artifact, tmp_path):
    folder, text = artifact("bert"), tmp_path / "text.txt"
    text.write_text(f"The text {STEERING} of {REAL}\n")
    pair = {"sentence_good": "The text.", "sentence_bad": "Text the.", "phenomenon": STEERING + REAL}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    declared = 'name = "mine"\ntask = "pairs"\nlocal = "pairs.jsonl"\n[pairs]\nphenomenon = "phenomenon"\n'
    (tmp_path / "mine.toml").write_text(declared)
    evaluation = ["eval", folder, "--set", tmp_path / "mine.toml", "--output"]
    for command, shown in (
        (["score", folder, text], True),
        (["fill", folder, f"The [MASK] {STEERING}{REAL}", "--targets", f"the{STEERING}"], False),
        ([*evaluation, tmp_path / "a"], True),
        (["compare", tmp_path / "a", tmp_path / "a"], False),
    ):
        for as_json in ([], ["--json"]):
            code, out, err = run(capsys, *command, *as_json, *(["--overwrite"] if "eval" in command else []))
            assert code == 0, err
            assert not set(STEERING) - set("gnpx]0;2J") & {*out, *err} - {"\n"}
            assert REAL in out or not shown
            assert not as_json or json.loads(out)
    show_fill(load(folder), f"The [MASK] {STEERING}{REAL}")
    out = capsys.readouterr().out
    assert REAL in out
    assert not set(STEERING) - set("gnpx]0;2J") & {*out}
    ended = process("fill", folder, "The [MASK]", "--targets", f"the{STEERING}")
    assert (ended.returncode, "is scored instead" in ended.stderr) == (0, True)
    assert all(map(str.isprintable, ended.stderr.splitlines()))


def test_a_small_zip_that_unpacks_to_much_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.jsonl", "w") as member:
        for _ in range(257):
            member.write(b" " * (1 << 20))
    with pytest.raises(UserError, match="more than 256 MiB when unpacked"):
        list(set_rows(str(path)))
