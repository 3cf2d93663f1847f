"""The configuration of a training: its checks, its defaults, the presets."""

import json
import re
import tomllib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import run
from training import write_config
from transformers import AutoModelForMaskedLM

from mlmkit.cli.completion import setting_keys
from mlmkit.errors import UserError
from mlmkit.locations import Source
from mlmkit.model import MaskedLM
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.config import Config, DataConfig, as_tables, from_tables, to_toml
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
        ("data.temperature=0.5", "data.temperature has no effect, as there is one text"),
        ("tokenizer.path=y tokenizer.train_tokens=100M", "tokenizer.train_tokens has no effect, as tokenizer.path"),
        ("model.init_from=x tokenizer.train_tokens=100M", "tokenizer.train_tokens has no effect, as model.init_from"),
        ("tokenizer.train_tokens=100M", ""),
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
            if default is not None and key not in ("train", "source"):
                assert everything[table][key] == (list(default) if isinstance(default, tuple) else default), key
    settings = {f"{table}.{key}=" for table in known.keys() - {"held_out", "phase"} for key in known[table]}
    assert settings == {*setting_keys(), "data.source="}  # what the shell completes


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
        ("held_out.A=a.txt", r"held_out\.A: a name has lower-case letters"),
        ("held_out.a/b=a.txt", r"held_out\.a/b: a name has lower-case letters"),
        ("held_out.deadbeef=a.txt", r"held_out\.deadbeef: .* not eight hexadecimal digits"),
        ("held_out.a=3", r"held_out\.a must be text"),
        ("held_out.a=0.005", r"held_out\.a must be text, not 0.005"),
        ("data.held_out=0.005 held_out.held-out=a.txt", "held_out.held-out is the name of the held-out share"),
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


def sources(tmp_path: Path, content: str, *overrides: str) -> Config:
    (tmp_path / "config.toml").write_text(content)
    return load_config(tmp_path / "config.toml", overrides)


MIX = """
[data]
text_field = "body"
on_bad_row = "skip"
[[data.source]]
path = ["a.jsonl", "more.jsonl"]
weight = 2
[[data.source]]
path = "b.csv"
text_field = "content"
[[data.source]]
path = "c"
format = "text"
"""


def test_each_source_is_one_text(tmp_path):
    config = sources(tmp_path, MIX)
    assert config.data.sources == [
        Source(("a.jsonl", "more.jsonl"), "body", on_bad_row="skip"),
        Source("b.csv", "content", on_bad_row="skip"),
        Source("c", "body", format="text", on_bad_row="skip"),
    ]
    assert config.data.source_weights == (2.0, 1.0, 1.0)
    assert from_tables(json.loads(json.dumps(as_tables(config)))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data.train=d.txt", r"data.train and \[\[data.source\]\] exclude each other"),
        ("data.weights=[1,2,3]", r"data.weights and \[\[data.source\]\] exclude each other"),
        ("data.temperature=0.5", "data.source.weight and data.temperature are two ways"),
        ("data.source=[{path='a.txt',weight=2}]", "data.source.weight has no effect, as all are equal"),
        (
            "data.source=[{path='a.txt',text_field='x'},{path='a.jsonl'}]",
            "data.source.text_field has no effect on a.txt, a text file",
        ),
        ("data.source=[{path='a.jsonl',text_field='b'}]", "data.text_field has no effect"),
        ("data.source=[{path='a.jsonl',format='text'}]", "data.text_field has no effect, as text files"),
        ("data.source=[{path='a',format='jsonl'}]", ""),
        ("data.source=[{path='folder'}]", ""),
        ("data.source=[{path='hub:a',format='jsonl'}]", "data.source.format has no effect on hub: datasets"),
        ("data.source=[{path='a.txt',format='pdf'}]", "no format 'pdf': choose text, jsonl"),
        ("data.source=[{path=''}]", "data.source.path is empty"),
        ("data.source=[{weight=2}]", "data.source.path is missing"),
        ("data.source=a.txt", "data.source must be a table"),
        ("data.on_bad_row=ignore", "on_bad_row is 'ignore': choose error or skip"),
        ("data.held_out=0.5", "data.held_out must be a share above 0 and below 0.5, not 0.5"),
        ("data.held_out=0", "data.held_out must be a share above 0 and below 0.5, not 0.0"),
    ],
)
def test_what_a_source_cannot_have_is_named(tmp_path, settings, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").touch()
    folder = settings.replace("'folder'", f"'{tmp_path}/folder'")
    with pytest.raises(UserError, match=message) if message else nullcontext():
        sources(tmp_path, MIX, folder)


def test_a_phase_names_its_sources_and_drops_those_before(tmp_path):
    content = """
    [data]
    text_field = "body"
    [[data.source]]
    path = "a.jsonl"
    [[data.source]]
    path = "b.jsonl"
    weight = 2
    [[phase]]
    name = "one"
    train.steps = 1
    [[phase]]
    name = "two"
    train.steps = 1
    data.source = [{path = "c.jsonl"}, {path = "d.jsonl"}]
    [[phase]]
    name = "three"
    train.steps = 1
    data.temperature = 0.5
    [[phase]]
    name = "four"
    train.steps = 1
    data.train = "e.jsonl"
    """
    phases = [phase.data for phase in sources(tmp_path, content).phases.values()]
    assert [[text.name[0] for text in data.sources] for data in phases] == [["a", "b"], ["c", "d"], ["c", "d"], ["e"]]
    assert [data.source_weights for data in phases] == [(1.0, 2.0), (), (), ()]
    assert [data.temperature for data in phases] == [None, None, 0.5, 0.5]
    useless = content.replace('name = "one"', 'name = "one"\ndata.train = "x.jsonl"')
    with pytest.raises(UserError, match=r"data\.source has no effect, as the first phase sets it"):
        sources(tmp_path, useless)


def test_the_held_out_share_is_of_all_training_texts_read_alike(tmp_path):
    content = '[data]\ntrain = ["a.txt", "b.txt"]\nheld_out = 0.01\n'
    later = """[[phase]]\nname = "one"\ntrain.steps = 1\n[[phase]]\nname = "two"\ntrain.steps = 1\n"""
    config = sources(tmp_path, content)
    assert config.held_out_sources == {"held-out": Source(("a.txt", "b.txt"), keys=(0.0, 0.01))}
    assert [source.keys for source in config.data.sources] == [(0.01, 1.0)] * 2
    other = sources(tmp_path, content + later + 'data.train = ["b.txt", "c.txt"]', "held_out.old=o.txt")
    assert other.held_out_sources == {
        "held-out": Source(("a.txt", "b.txt", "c.txt"), keys=(0.0, 0.01)),
        "old": Source("o.txt"),
    }
    mix = sources(tmp_path, MIX, "data.held_out=0.01")
    assert list(mix.held_out_sources) == ["part-1", "part-2", "part-3"]
    read = {(path, text.text_field) for text in mix.held_out_sources.values() for path in text.locations}
    assert read == {(path, text.text_field) for text in mix.data.sources for path in text.locations}


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


def test_the_configuration_is_written_as_a_file_that_train_reads(tmp_path):
    """As in the model card: paths without their folders, a hub dataset and a URL by what they are."""
    path = tmp_path / "config.toml"
    path.write_text(
        '[[data.source]]\npath = ["/home/me/é.txt", "hub:user/name"]\nweight = 2.0\n[[data.source]]\npath = "b.txt"\n'
        '[held_out]\nnews = "https://host/a/news.txt?key=1"\n[optim]\nlr = 5e-5\nwarmup_tokens = "1k"\n'
        '[train]\ntokens = "1M"\nwandb = "mine"\n',
        encoding="utf-8",
    )
    config = load_config(path)
    path.write_text(to_toml(config), encoding="utf-8")
    read = load_config(path)
    assert [text.path for text in read.data.source] == [("é.txt", "hub:user/name"), ("b.txt",)]
    assert read.held_out == {"news": "news.txt"} and "mine" not in path.read_text(encoding="utf-8")
    assert (read.optim, read.train.tokens) == (config.optim, 1_000_000)
    assert read.data.source_weights == config.data.source_weights == (2.0, 1.0)
