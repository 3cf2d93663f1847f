"""The configuration of a training: its checks, its defaults, the presets."""

import re
import tomllib
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
from conftest import run
from training import write_config
from transformers import AutoModelForMaskedLM

from mlmkit.errors import UserError
from mlmkit.locations import Source
from mlmkit.model import MaskedLM
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config, DataConfig
from mlmkit.train.config_file import load_config
from mlmkit.train.presets import PRESETS, build_config


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
        ("data.weights=[1.0, 2.0]", "data.weights has 2 numbers for 1 texts"),
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
        ("tokenizer.add=words.txt", "tokenizer.add has no effect, as there is no model.init_from"),
        ("model.new_head=true", "model.new_head has no effect, as there is no model.init_from"),
        ("model.init_from=x tokenizer.path=y tokenizer.kind=bpe", "tokenizer.kind has no effect, as tokenizer.path"),
        ("model.init_from=x tokenizer.path=y tokenizer.add=z model.rope_theta=1e4", ""),
        ("model.init_from=x tokenizer.vocab_size=900 tokenizer.kind=bpe tokenizer.lowercase=true", ""),
        ("tokenizer.path=y tokenizer.vocab_size=16000", "tokenizer.vocab_size has no effect, as tokenizer.path"),
        ("optim.decay_share=0.2", "optim.decay_share has no effect, as optim.schedule"),
        ("data.text_field=text", "data.text_field has no effect, as text files"),
        ("data.train=a.jsonl data.blank_line=true", "data.blank_line has no effect"),
        ("data.weights=[2.0]", "data.weights has no effect"),
        ("data.train=['a','b'] data.weights=[0.5,0.5]", "data.weights has no effect"),
        ("train.steps=1 masking.final_mask_prob=0.3", "masking.final_mask_prob has no effect"),
        ("train.steps=12 optim.warmup_steps=12", r"warmup_steps \(12\) must end before train.steps \(12\)"),
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
    assert load_config(tmp_path / "config.toml").warmup(steps) == warmup


def test_the_template_has_every_setting_with_its_default(tmp_path, capsys):
    code, template, _ = run(capsys, "train", "--print-config")
    (tmp_path / "config.toml").write_text(template, encoding="utf-8")
    defaults = Config(data=DataConfig(train=("corpus.txt",)))
    assert (code, load_config(tmp_path / "config.toml")) == (0, defaults)
    everything = tomllib.loads(re.sub(r"^# (?=[\w.]+ = |\[)", "", template, flags=re.MULTILINE))
    known = asdict(defaults)
    assert everything.keys() == known.keys()
    for table in known.keys() - {"held_out", "phase"}:  # the names in them are free
        assert everything[table].keys() == known[table].keys()
        for key, default in known[table].items():
            if default is not None and key != "train":
                assert everything[table][key] == (list(default) if isinstance(default, tuple) else default), key


def test_the_template_takes_no_other_option(capsys):
    for words in (("config.toml",), ("--set", "optim.lr=5"), ("--output", "run"), ("--json",)):
        code, _, err = run(capsys, "train", "--print-config", *words)
        assert (code, "--print-config prints the defaults" in err) == (2, True), words


def test_the_help_names_the_presets_and_the_template(capsys):
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0 and "mlmkit train --print-config" in out
    assert set(PRESETS) <= set(re.findall(r"[\w-]+", out))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data.held_out=a.txt held_out.b=b.txt", r"data.held_out and \[held_out\] exclude each other"),
        ("held_out.A=a.txt", r"held_out\.A: name it with lower-case letters"),
        ("held_out.a/b=a.txt", r"held_out\.a/b: name it with lower-case letters"),
        ("held_out.deadbeef=a.txt", r"held_out\.deadbeef: name it .* not with eight hexadecimal digits"),
        ("held_out.a=3", r"held_out\.a must be text"),
    ],
)
def test_names_of_held_out_texts_are_safe_for_folders(tmp_path, text_file, settings, message):
    with pytest.raises(UserError, match=message):
        write_config(tmp_path, text_file, "bert-tiny", *settings.split())


def test_held_out_texts_keep_their_order(tmp_path, text_file):
    one = write_config(tmp_path, text_file, "bert-tiny", "data.held_out=a.txt")
    several = write_config(tmp_path, text_file, "bert-tiny", "held_out.web=w.jsonl", "held_out.a=a.txt", "held_out.b=")
    assert one.held_out_sources == {"held-out": Source("a.txt")}
    assert list(several.held_out_sources.items()) == [("web", Source("w.jsonl")), ("a", Source("a.txt"))]


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
    tokenizer = Tokenizer.from_folder(tokenizer_folder("bpe" if name == "roberta-base" else "wordpiece"))
    with torch.device("meta"):
        model = MaskedLM(AutoModelForMaskedLM.from_config(build_config(name, tokenizer, 48)))
    assert model.max_length() == 48
    assert model.network.config.vocab_size == tokenizer.vocabulary_size
    assert model.network.config.pad_token_id == tokenizer.pad_id
