"""Training: configuration, the loop, resuming."""

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import pytest
import torch
from training import log_lines, weights, write_config

import mlmkit
from mlmkit import corpus, evaluate
from mlmkit.backends import load as load_backend
from mlmkit.cli import main
from mlmkit.distributed import Ranks
from mlmkit.errors import CheckError, UserError
from mlmkit.export.export import export
from mlmkit.export.parity import ProofText
from mlmkit.files import file_sha256
from mlmkit.masking import MaskRecipe
from mlmkit.model import MaskedLM
from mlmkit.pretrained import load_pretrained, load_tokenizer
from mlmkit.train import loop
from mlmkit.train.checkpoints import saved_checkpoints
from mlmkit.train.config import Config, DataConfig, load_config
from mlmkit.train.cost import dry_run
from mlmkit.train.presets import PRESETS, build_config
from mlmkit.train.start import begin_or_check


@pytest.fixture
def config(tmp_path, text_file) -> Config:
    return write_config(tmp_path, text_file, "bert-tiny")


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown setting optim.lrr: did you mean optim.lr"),
        ("optimizer.lr=1", "unknown setting optimizer: did you mean optim"),
        ("optim.lr=fast", "optim.lr must be a number"),
        ("train.steps=1.5", "train.steps must be a whole number"),
        ("train.steps=true", "train.steps must be a whole number"),
        ("train.steps=0", "train.steps must be positive and finite, not 0"),
        ("data.workers=257", "data.workers must be between 0 and 256"),
        ("data.weights=[0.0]", "data.weights must be positive"),
        ("masking.final_mask_prob=0.0", "masking.final_mask_prob must be at least 0.001"),
        ("optim.decay_share=0", "optim.decay_share must be above 0"),
        ("optim.name=lion", "optim.name must be one of adamw, muon"),
        ("data=3", "table.key=value"),
        ("masking.mask_prob=1.5", "masking.mask_prob must be at least 0.001 and below 1, not 1.5"),
        ("masking.random_prob=0.9", "replace_prob"),
        ("masking.mask_prob=nan", "mask_prob must be a number"),
        ("masking.mask_prob=1e-300", "masking.mask_prob must be at least 0.001 and below 1, not 1e-300"),
        ("masking.mask_prob=1", "masking.mask_prob must be at least 0.001 and below 1, not 1.0"),
        ("train.micro_batch_tokens=8", "must hold one row"),
        ("train.global_batch_tokens=300", "multiple of"),
        ("tokenizer.kind=words", "tokenizer.kind must be one of wordpiece, bpe"),
        ("lr=1", "table.key=value"),
        ("data.train=", "data.train is missing"),
        ("model=3", "table.key=value"),
        ("optim.lr=inf", "optim.lr must be positive and finite"),
        ("optim.eps=0", "optim.eps must be positive"),
        ("optim.beta2=1.0", "optim.beta2 must be"),
        ("optim.beta1=nan", "optim.beta1 must be"),
        ("optim.weight_decay=-0.1", "optim.weight_decay must be"),
        ("optim.warmup_steps=-1", "optim.warmup_steps must be"),
        ("train.seed=-1", "train.seed must be"),
        ("train.device=tpu", "train.device must be one of auto, cpu, cuda"),
        ("tokenizer.vocab_size=99999999999", r"tokenizer.vocab_size must be between 1 and 2\*\*24, not 99999999999"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text_file, override, message):
    with pytest.raises(UserError, match=message):
        write_config(tmp_path, text_file, "bert-tiny", override)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("model.init_from=x model.architecture=bert-small", "model.architecture has no effect, as model.init_from"),
        ("model.init_from=x tokenizer.lowercase=false", "tokenizer.lowercase has no effect, as model.init_from"),
        ("model.init_from=x tokenizer.path=y", "tokenizer.path has no effect, as model.init_from"),
        ("tokenizer.path=y tokenizer.vocab_size=16000", "tokenizer.vocab_size has no effect, as tokenizer.path"),
        ("optim.decay_share=0.2", "optim.decay_share has no effect, as optim.schedule"),
        ("data.text_field=text", "data.text_field has no effect, as text files"),
        ("data.train=a.jsonl data.blank_line=true", "data.blank_line has no effect"),
        ("data.weights=[2.0]", "data.weights has no effect"),
        ("data.train=['a','b'] data.weights=[0.5,0.5]", "data.weights has no effect"),
        ("train.steps=1 masking.final_mask_prob=0.3", "masking.final_mask_prob has no effect"),
        ("train.steps=12 optim.warmup_steps=12", r"warmup_steps \(12\) must be below train.steps \(12\)"),
        ("model.init_from=x model.architecture=", ""),
        ("optim.decay_share=0.2 optim.schedule=wsd", ""),
        ("data.held_out=a.parquet data.text_field=text", ""),
        ("data.train=a.jsonl data.blank_line=false", ""),
        ("data.train=['a.txt','b.jsonl'] data.blank_line=true data.text_field=text data.weights=[1,1]", ""),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path, settings, message):
    (tmp_path / "config.toml").write_text('[data]\ntrain = "text.txt"\n')
    with pytest.raises(UserError, match=message) if message else nullcontext():
        load_config(tmp_path / "config.toml", settings.split())


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (4, 0), (100, 10), (101, 100), (5000, 100)])
def test_a_short_run_warms_up_for_a_tenth_of_it(tmp_path, steps, warmup):
    (tmp_path / "config.toml").write_text(f'[data]\ntrain = "text.txt"\n[train]\nsteps = {steps}\n')
    assert load_config(tmp_path / "config.toml").optim.warmup_steps == warmup


def test_the_documented_configuration_is_that_of_the_defaults(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    (tmp_path / "config.toml").write_text(page.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
    assert load_config(tmp_path / "config.toml") == Config(data=DataConfig(train=("corpus.txt",)))


def test_overrides_take_values_of_their_type(tmp_path, text_file):
    config = write_config(tmp_path, text_file, "bert-tiny", "optim.lr=1", "data.train=some file.txt", "train.steps=7")
    assert (config.optim.lr, config.data.train, config.train.steps) == (1.0, ("some file.txt",), 7)


@pytest.mark.parametrize(("content", "message"), [("[data\n", "not valid TOML"), (None, "cannot be read")])
def test_a_file_that_is_not_toml_is_named(tmp_path, content, message):
    if content:
        (tmp_path / "a.toml").write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "a.toml")


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"bert-large", "modernbert-large"}))
def test_presets_take_the_length_asked_for(name, tokenizer_folder):
    from transformers import AutoModelForMaskedLM

    from mlmkit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tokenizer_folder("bpe" if name == "roberta-base" else "wordpiece"))
    with torch.device("meta"):
        model = MaskedLM(AutoModelForMaskedLM.from_config(build_config(name, tokenizer, 48)))
    assert model.max_length() == 48
    assert model.network.config.vocab_size == tokenizer.vocabulary_size
    assert model.network.config.pad_token_id == tokenizer.pad_id


# ------------------------------------------------------------------ the loop


def test_training_learns_and_leaves_a_hugging_face_folder(config, tmp_path):
    from transformers import pipeline

    config = replace(config, train=replace(config.train, steps=60, save_every=60))
    model = loop.train(config, tmp_path / "run")
    entries = log_lines(tmp_path / "run")
    assert [entry["step"] for entry in entries] == list(range(2, 61, 2))
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.5
    assert all(entry["tokens_per_second"] > 0 for entry in entries)
    assert sum(entry["masked"] for entry in entries) / sum(entry["tokens"] for entry in entries) < 0.15
    filled = pipeline("fill-mask", model=str(model))("The [MASK] statement")
    assert len(filled) == 5
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in model.iterdir()}
    assert not find_spec("matplotlib") or (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_of_a_run_stands_for_its_model(config, tmp_path, text_file, caplog, capsys):
    caplog.set_level("INFO", "mlmkit")
    run, taken = tmp_path / "run", f"{tmp_path}/run is a training run: using its model, {tmp_path}/run/model"
    model = loop.train(config, run)
    assert mlmkit.load(str(run)).info.path == str(model)
    assert load_tokenizer(str(run)).fingerprint == load_tokenizer(str(model)).fingerprint
    export(str(run), tmp_path / "artifact", text=ProofText("a text", ["The statement of the text."] * 3))
    short = tmp_path / "short.txt"
    short.write_text("".join(text_file.read_text().splitlines(keepends=True)[:2]))
    for command in (["fill", run, "The [MASK]"], ["score", run, short], ["eval", run, "--set", short]):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in command])
        assert not stop.value.code, capsys.readouterr().err
    further = write_config(tmp_path, text_file, "bert-tiny", f"model.init_from={run}", "train.steps=2")
    loop.train(further, tmp_path / "further")
    assert caplog.messages.count(taken) == 1
    (run / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"unfinished training run: finish it, or name a folder in .*run/checkpoints"):
        mlmkit.load(str(run))


def test_a_finished_run_is_not_trained_again(config, tmp_path, monkeypatch):
    first = loop.train(config, tmp_path / "run")
    monkeypatch.setattr(loop, "backward", lambda *_, **__: pytest.fail("trained again"))
    assert loop.train(config, tmp_path / "run") == first


def test_another_configuration_or_text_is_refused_and_the_same_text_elsewhere_is_not(config, tmp_path, text_file):
    """Another number of steps is named rather than the warm-up that follows from it."""
    model = loop.train(config, tmp_path / "run")
    for setting, difference in (
        ("optim.lr=0.1", r"config\.optim\.lr \(0.002, now 0.1\)"),
        ("train.steps=400", r"config\.train\.steps \(12, now 400\)"),
    ):
        with pytest.raises(UserError, match=rf"another {difference}"):
            loop.train(write_config(tmp_path, text_file, "bert-tiny", setting), tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 20)
    with pytest.raises(UserError, match=r"begun with another text in data\.train: choose another --output"):
        loop.train(write_config(tmp_path, other, "bert-tiny"), tmp_path / "run")
    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(json.dumps({"body": line}) + "\n" for line in text_file.read_text().splitlines()))
    assert loop.train(write_config(tmp_path, moved, "bert-tiny", "data.text_field=body"), tmp_path / "run") == model


def test_a_folder_with_something_else_is_left_alone(config, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        loop.train(config, folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


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
        (["model.init_from=BERT", "model.max_length=65"], r"table of 64 positions: model\.max_length \(65\) must not"),
        (
            ["model.init_from=ROBERTA", "model.max_length=65"],
            r"table of 64 positions: model\.max_length \(65\) must not",
        ),
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
        (
            '{"model_type": "bert", "num_hidden_layers": 1000000000}',
            r"architecture.json: .* asks for 1000000000 num_hi",
        ),
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


def test_a_half_written_checkpoint_is_not_taken(config, tmp_path):
    straight = weights(loop.train(config, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "model")
    newest = saved_checkpoints(tmp_path / "run")[-1]
    newest.rename(newest.with_name(".step-00000012.half"))
    resumed = weights(loop.train(config, tmp_path / "run"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_loss_that_is_not_finite_stops_with_the_step_named(tmp_path, text_file):
    config = write_config(tmp_path, text_file, "bert-tiny", "optim.lr=1e11", "optim.warmup_steps=1")
    with pytest.raises(
        CheckError,
        match=r"step \d+: loss .* learning rate .*text\.txt:\d+, .* and \d+ more\)",
    ):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize(("architecture", "message"), [("mpnet", "cannot be packed"), ("modernbert", "")])
def test_other_architectures_train(tmp_path, text_file, caplog, architecture, message):
    path = tmp_path / "architecture.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    path.write_text(json.dumps({"model_type": architecture, **sizes}))
    config = write_config(tmp_path, text_file, str(path), "tokenizer.kind=bpe", "train.steps=4")
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
    _, [corpus] = begin_or_check(config, tmp_path / "run", Ranks())
    assert corpus.folder and (corpus.folder / "windows-94").exists()


def test_a_given_tokenizer_takes_the_length_of_the_model(tmp_path, text_file, tokenizer_folder):
    """The tokenizer was made for 64 tokens."""
    settings = (f"tokenizer.path={tokenizer_folder('wordpiece')}", "model.max_length=96", "train.steps=2")
    loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings), tmp_path / "run")
    assert load_tokenizer(str(tmp_path / "run" / "model")).limit == 96


def test_out_of_memory_says_what_can_still_be_done(config, tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", fails)
        with pytest.raises(UserError, match=r"micro_batch_tokens = 256: lower train\.micro_batch_tokens"):
            loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "run")
    (tmp_path / "run" / "model").rename(tmp_path / "model")
    shutil.rmtree(newest := saved_checkpoints(tmp_path / "run")[-1])
    monkeypatch.setattr(loop, "backward", fails)
    with pytest.raises(UserError, match=rf"keeps its batches: .* model\.init_from = {newest.parent}/step-00000008"):
        loop.train(config, tmp_path / "run")


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
            with pytest.raises(UserError, match=r"mixed\.txt: [5-9]\d\.\d+% of the char.* \"bpe\" has no unknown"):
                dry_run(replace(config, data=data))
        return
    dry_run(config)
    records = [record for record in caplog.records if "are unknown" in record.message]
    assert [record.levelname for record in records] == ([said] if said else [])
    for record in records:
        shares = re.search(r": (\S+)% of the characters \((\S+)% of the tokens\) are unknown", record.message)
        assert shares and float(shares[2]) > 0 and (float(shares[1]) > 1) == (said == "WARNING")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "água".encode("latin-1"), "a.txt: line 1, byte 1 is not UTF-8"),
        ("a.jsonl", b'{"body": "some text"}', "a.jsonl: line 1 has no field 'text'"),
        ("a.txt", b"if\n", r"data\.held_out: the masks select no token of .*a\.txt"),
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
    text, names = (
        tmp_path / "text.txt",
        ("天地玄黄宇宙洪荒", "日月盈昃辰宿列张", "寒来暑往秋收冬藏", "闰余成岁律吕调阳"),
    )
    text.write_text("".join(f"{''.join(each)}\n" for each in permutations(names)), encoding="utf-8")
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
    assert json.loads((tmp_path / "run" / "held_out.json").read_text())["masked_cross_entropy"]["value"] > 0


def test_each_start_hashes_a_text_once(config, tmp_path, monkeypatch):
    [source], hashed = config.data.sources, []
    monkeypatch.setenv("MLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "file_sha256", lambda path: hashed.append(str(path)) or file_sha256(path))
    for times in (2, 1):  # before and after it is tokenised; once it is
        hashed.clear()
        tokenizer, [found] = begin_or_check(config, tmp_path / "run", Ranks())
        assert hashed.count(source.location) == times
        assert found.folder == corpus.cache_folder(source, tokenizer)
