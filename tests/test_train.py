"""Training: the loop, its start, its texts."""

import json
import os
import re
import shutil
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run as command_line
from interruptions import names
from training import log_lines, same_weights, small_architecture, weights, write_config
from transformers import pipeline

import mlmkit
from mlmkit import evaluate, files
from mlmkit.backends import load as load_backend
from mlmkit.distributed import Ranks
from mlmkit.errors import CheckError, UserError
from mlmkit.export.export import export
from mlmkit.export.parity import ProofText
from mlmkit.files import file_sha256
from mlmkit.masking import MaskRecipe
from mlmkit.pretrained import load_pretrained, load_tokenizer
from mlmkit.token_cache import cache_folder
from mlmkit.train import loop
from mlmkit.train.checkpoints import saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.cost import dry_run
from mlmkit.train.log import draw_loss
from mlmkit.train.rows import RowBuilder
from mlmkit.train.start import begin_or_check, corpora_of

SETTINGS = ("train.steps=60", "train.save_every=20")
TABLE = r"table of 64 positions: model\.max_length \(65\) must not"


@pytest.fixture(scope="module")
def config(tmp_path_factory, text_file) -> Config:
    return write_config(tmp_path_factory.mktemp("config"), text_file, "bert-tiny", *SETTINGS)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    """The finished run of `config`, with its curve. A test that changes it takes a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_loss", draw_loss)
        return loop.train(config, tmp_path_factory.mktemp("finished") / "run").parent


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_training_learns_and_leaves_a_hugging_face_folder(finished):
    entries = log_lines(finished)
    assert [entry["step"] for entry in entries] == list(range(2, 61, 2))
    losses = [entry["loss"] for entry in entries]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1, losses
    assert all(entry["tokens_per_second"] > 0 for entry in entries)
    assert sum(entry["masked"] for entry in entries) / sum(entry["tokens"] for entry in entries) < 0.15
    assert len(pipeline("fill-mask", model=str(finished / "model"))("The [MASK] statement")) == 5
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names(finished / "model")
    assert not find_spec("matplotlib") or (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_of_a_run_stands_for_its_model(run, checkpoint, tmp_path, text_file, caplog, capsys):
    """The model is replaced by one whose graph other tests share, as exporting a graph takes ten seconds."""
    caplog.set_level("INFO", "mlmkit")
    model, taken = run / "model", f"{run} is a training run: using its model, {run}/model"
    shutil.rmtree(model)
    shutil.copytree(checkpoint("bert"), model)
    assert mlmkit.load(str(run)).info.path == str(model)
    assert load_tokenizer(str(run)).fingerprint == load_tokenizer(str(model)).fingerprint
    export(str(run), tmp_path / "artifact", text=ProofText("a text", ["The statement of the text."] * 3))
    short = tmp_path / "short.txt"
    short.write_text("".join(text_file.read_text().splitlines(keepends=True)[:2]))
    for command in (["fill", run, "The [MASK]"], ["score", run, short], ["eval", run, "--set", short]):
        code, _, said = command_line(capsys, *command)
        assert code == 0, said
    further = write_config(tmp_path, text_file, "bert-tiny", f"model.init_from={run}", "train.steps=2")
    loop.train(further, tmp_path / "further")
    assert caplog.messages.count(taken) == 1
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"unfinished training run: finish it, or name a folder in .*run/checkpoints"):
        mlmkit.load(str(run))


def test_a_finished_run_is_not_trained_again(config, finished, monkeypatch):
    monkeypatch.setattr(loop, "backward", lambda *_, **__: pytest.fail("trained again"))
    assert loop.train(config, finished) == finished / "model"


def test_another_configuration_or_text_is_refused_and_the_same_text_elsewhere_is_not(finished, tmp_path, text_file):
    """Another number of steps is named rather than the warm-up that follows from it."""
    for setting, difference in (
        ("optim.lr=0.1", r"optim\.lr \(0.002, now 0.1\)"),
        ("train.steps=400", r"length \(60 steps, 1 of warm-up, now 400 steps, 1 of warm-up; only a constant"),
    ):
        with pytest.raises(UserError, match=rf"another {difference}"):
            loop.train(write_config(tmp_path, text_file, "bert-tiny", *SETTINGS, setting), finished)
    other, moved = tmp_path / "other.txt", tmp_path / "moved.jsonl"
    other.write_text("another text\n" * 20)
    with pytest.raises(UserError, match=r"begun with another text in data\.train: choose another --output"):
        loop.train(write_config(tmp_path, other, "bert-tiny", *SETTINGS), finished)
    moved.write_text("".join(json.dumps({"body": line}) + "\n" for line in text_file.read_text().splitlines()))
    config = write_config(tmp_path, moved, "bert-tiny", *SETTINGS, "data.text_field=body")
    assert loop.train(config, finished) == finished / "model"


def test_a_folder_with_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="something other than a training run"):
        loop.train(config, tmp_path / "mine")
    assert names(tmp_path / "mine") == {"thesis.tex"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.train=none.txt"], "no such file"),
        *([] if torch.cuda.is_available() else [(["train.device=cuda"], "no CUDA device")]),
        (["model.max_length=2", "train.micro_batch_tokens=256"], "no room beside 2 special tokens"),
        (["tokenizer.vocab_size=20"], "the text's characters alone take"),
        (["model.architecture=none"], "neither a preset"),
        (["model.init_from=none/of/these"], "no such folder"),
        (["tokenizer.path=./none"], "no such folder"),
        (["model.init_from=BERT", "model.max_length=65"], TABLE),
        (["model.init_from=ROBERTA", "model.max_length=65"], TABLE),
    ],
)
def test_nothing_is_written_when_training_cannot_start(tmp_path, text_file, checkpoint, settings, message):
    for kind in ("roberta", "bert"):
        settings = [setting.replace(kind.upper(), str(checkpoint(kind))) for setting in settings]
    with pytest.raises(UserError, match=message):
        loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".run*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "gpt2"}', "for which transformers has no masked LM"),
        ('{"model_type": "bert", "is_decoder": true}', "causal"),
        ('{"model_type": "bert", "hidden_size": "32"}', "cannot be loaded"),
        ('{"model_type": "nothing"}', "no model_type 'nothing'"),
        ("{}", "no model_type None"),
        (
            '{"model_type": "bert", "hidden_size": 163840, "intermediate_size": 655360, "num_attention_heads": 16}',
            r"takes 62,\d{3}\.\d GB of memory for 3,89\d(,\d{3}){3} parameters; \d+\.\d GB are free",
        ),
        ('{"model_type": "bert", "num_hidden_layers": 1000000000}', "architecture.json: .* asks for 1000000000 num_hi"),
        ("[]", "not a JSON object"),
        ("{", "not a Hugging Face config.json"),
    ],
)
def test_an_unusable_architecture_is_named(tmp_path, text_file, content, message):
    (tmp_path / "architecture.json").write_text(content)
    config = write_config(tmp_path, text_file, str(tmp_path / "architecture.json"))
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_half_written_checkpoint_is_not_taken(config, finished, run):
    shutil.rmtree(run / "model")
    newest = saved_checkpoints(run)[-1]
    newest.rename(newest.with_name(".step-00000060.half"))
    assert same_weights(loop.train(config, run), finished / "model")


def test_a_loss_that_is_not_finite_stops_with_the_step_named(tmp_path, text_file):
    config = write_config(tmp_path, text_file, "bert-tiny", "optim.lr=1e11", "optim.warmup_steps=1")
    with pytest.raises(CheckError, match=r"step \d+: loss .* learning rate .*text\.txt:\d+, .* and \d+ more\)"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize(("architecture", "message"), [("mpnet", "cannot be packed"), ("modernbert", "")])
def test_other_architectures_train(tmp_path, text_file, caplog, architecture, message):
    path = small_architecture(tmp_path, model_type=architecture)
    config = write_config(tmp_path, text_file, path, "tokenizer.kind=bpe", "train.steps=4")
    with caplog.at_level("INFO", logger="mlmkit"):
        model = loop.train(config, tmp_path / "run")
    assert ("cannot be packed" in caplog.text) == bool(message)
    load_pretrained(str(model))


def test_training_goes_on_from_a_checkpoint(tmp_path, text_file, checkpoint):
    settings = ("train.steps=4", f"model.init_from={checkpoint('bert')}", "optim.lr=1e-9")
    model = loop.train(write_config(tmp_path, text_file, "unused", *settings), tmp_path / "run")
    before, after = weights(checkpoint("bert")), weights(model)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_positions_that_are_computed_are_extended(tmp_path, text_file, checkpoint):
    """The checkpoint holds rows of 64 tokens."""
    settings = ("train.steps=4", f"model.init_from={checkpoint('modernbert')}", "model.max_length=96")
    config = write_config(tmp_path, text_file, "", *settings)
    saved = load_backend(str(loop.train(config, tmp_path / "run")), "torch", "cpu")
    assert (saved.info.max_length, saved.tokenizer.limit) == (96, 96)
    tokenizer, texts = begin_or_check(config, tmp_path / "run", Ranks())
    rows = RowBuilder(config, corpora_of(config, texts), tokenizer, packed=True)
    assert rows.windows[0].locate(np.arange(len(rows.windows[0])))["length"].max() in range(80, 95)


def test_a_given_tokenizer_takes_the_length_of_the_model(tmp_path, text_file, tokenizer_folder):
    """The tokenizer was made for 64 tokens."""
    settings = (f"tokenizer.path={tokenizer_folder('wordpiece')}", "model.max_length=96", "train.steps=2")
    loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings), tmp_path / "run")
    assert load_tokenizer(str(tmp_path / "run" / "model")).limit == 96


def test_out_of_memory_says_what_can_still_be_done(config, run, tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loop, "backward", fails)
    with pytest.raises(UserError, match=r"micro_batch_tokens = 256: lower train\.micro_batch_tokens"):
        loop.train(config, tmp_path / "new")
    shutil.rmtree(run / "model")
    shutil.rmtree(newest := saved_checkpoints(run)[-1])
    with pytest.raises(UserError, match=rf"keeps its batches: .* model\.init_from = {newest.parent}/step-00000040"):
        loop.train(config, run)


# ------------------------------------------------------------------ the texts


@pytest.mark.parametrize(("foreign", "said"), [(0, ""), (1, "INFO"), (90, "WARNING"), (4000, "refused")])
def test_text_that_the_tokenizer_does_not_know_is_reported(tmp_path, text_file, checkpoint, caplog, foreign, said):
    lines = text_file.read_text(encoding="utf-8").splitlines()[:100]
    text = tmp_path / "mixed.txt"
    text.write_text("".join(f"{line}\n" for line in [*lines, *["ภาษาไทย ไม่มีช่องว่าง"] * foreign]), encoding="utf-8")
    config = write_config(tmp_path, text, "", f"model.init_from={checkpoint('bert')}", f"data.held_out={text_file}")
    caplog.set_level("INFO", logger="mlmkit")
    if said == "refused":
        as_held_out = replace(config.data, train=(str(text_file),), held_out=str(text))
        for data in (config.data, as_held_out):
            with pytest.raises(UserError, match=r"mixed\.txt: .*; [5-9]\d\.\d+% of the char.* \"bpe\" has no unknown"):
                dry_run(replace(config, data=data))
        return
    dry_run(config)
    records = [record for record in caplog.records if "are unknown" in record.message]
    assert [record.levelname for record in records] == [said or "INFO", "INFO"]
    shares = [re.search(r"; (\S+)% of the characters \((\S+)% of the tokens\)", each.message) for each in records]
    (characters, tokens), nothing = (tuple(map(float, each.groups())) for each in shares if each)
    assert (tokens > 0, characters > 1, nothing) == (bool(said), said == "WARNING", (0.0, 0.0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "água".encode("latin-1"), "a.txt: line 1, byte 1 is not UTF-8"),
        ("a.jsonl", b'{"body": "some text"}', "a.jsonl: line 1 has no field 'text'"),
        ("a.txt", b"if\n", r"the masks select no token of the held-out text .*a\.txt"),
        ("a.txt", b"\n", "a.txt: no documents in it"),
        ("a.txt", "語      語      語\n".encode() * 20, r"a\.txt: all tokens are special ones"),  # most are spaces
    ],
)
def test_held_out_text_is_checked_before_the_first_step(tmp_path, text_file, checkpoint, name, content, message):
    (tmp_path / name).write_bytes(content)
    settings = (f"data.held_out={tmp_path / name}", f"model.init_from={checkpoint('bert')}")
    config = write_config(tmp_path, text_file, "", *settings)
    for start in (dry_run, lambda config: loop.train(config, tmp_path / "run")):
        with pytest.raises(UserError, match=message):
            start(config)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_target_ends_without_a_model(tmp_path, text_file):
    settings = ("masking.mask_prob=0.001", "train.global_batch_tokens=48", "train.micro_batch_tokens=48")
    with pytest.raises(CheckError, match=r"no step of .*run had a token to predict"):
        loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings, "train.steps=2"), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_a_step_without_a_target_has_no_loss(tmp_path, text_file, caplog):
    """On average a step has 0.2 targets."""
    settings = ("masking.mask_prob=0.002", "train.global_batch_tokens=96", "train.micro_batch_tokens=48")
    caplog.set_level("WARNING", logger="mlmkit")
    loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings, "train.steps=20"), tmp_path / "run")
    entries = log_lines(tmp_path / "run")
    assert {bool(entry["masked"]) for entry in entries} == {True, False}
    assert all(("loss" in entry) == bool(entry["masked"]) and entry.get("loss", 9) > 1 for entry in entries)
    empty = [re.fullmatch(r"step \d+: ([12]) of the last 2 steps had nothing to predict", m) for m in caplog.messages]
    assert 20 > sum(int(found[1]) for found in empty if found) > 8


@pytest.mark.parametrize(("kind", "effect"), [("wordpiece", "has no effect"), ("bpe", "hides long stretches")])
def test_whole_word_masking_of_text_without_spaces_is_warned_of(tmp_path, caplog, kind, effect):
    lines = ("天地玄黄宇宙洪荒", "日月盈昃辰宿列张", "寒来暑往秋收冬藏", "闰余成岁律吕调阳")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{''.join(each)}\n" for each in permutations(lines)), encoding="utf-8")
    settings = (f"tokenizer.kind={kind}", "tokenizer.vocab_size=300", "masking.whole_word=true", "train.steps=2")
    config = write_config(tmp_path, text, "bert-tiny", *settings)
    model = loop.train(config, tmp_path / "run")
    dry_run(config)
    evaluate(model, text, recipe=MaskRecipe(whole_word=True))
    said = [message for message in caplog.messages if "whole-word masking " + effect in message]
    assert len(said) == len([message for message in caplog.messages if "whole-word" in message]) == 3


def test_held_out_text_may_be_a_dataset(tmp_path, text_file):
    """Here a local folder that `datasets` reads."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.txt").write_text("".join(text_file.read_text().splitlines(keepends=True)[::30]))
    settings = ("train.steps=2", f"data.held_out=hub:{folder}")
    loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "held_out.json").read_text())["held-out"]["masked_cross_entropy"]["value"] > 0


def test_a_text_is_hashed_once(config, tmp_path, monkeypatch):
    [source], hashed = config.data.sources, []
    monkeypatch.setenv("MLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "file_sha256", lambda path: hashed.append(str(path)) or file_sha256(path))
    old = time.time_ns() - 10**10  # a younger file may change unseen
    text = Path(shutil.copy(source.location, tmp_path / "text.txt"))
    os.utime(text, ns=(old, old))
    config = replace(config, data=replace(config.data, train=(str(text),)))
    for times in (1, 0):
        hashed.clear()
        tokenizer, texts = begin_or_check(config, tmp_path / "run", Ranks())
        [found] = texts.values()
        assert hashed.count(str(text)) == times
        assert found.folder == cache_folder(config.data.sources[0], tokenizer, words=False)
