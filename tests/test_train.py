"""Training: configuration, the loop, resuming."""

import json

import pytest
import torch
from training import log_lines, weights, write_config

import mlmkit
from mlmkit import corpus
from mlmkit.cli import main
from mlmkit.distributed import Ranks
from mlmkit.errors import CheckError, UserError
from mlmkit.export.export import export
from mlmkit.export.proof_text import ProofText
from mlmkit.files import file_sha256
from mlmkit.model import MaskedLM, load_pretrained, load_tokenizer
from mlmkit.train import loop
from mlmkit.train.checkpoint import checkpoints
from mlmkit.train.config import Config, load_config
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
        ("optim.lr=fast", "optim.lr must be float"),
        ("train.steps=1.5", "train.steps must be int"),
        ("train.steps=true", "train.steps must be int"),
        ("train.steps=0", "train.steps must be positive"),
        ("masking.mask_prob=1.5", "mask_prob must be between"),
        ("masking.mask_prob=nan", "mask_prob must be between"),
        ("masking.mask_prob=1e-300", "masking.mask_prob must be at least 0.001 and below 1, not 1e-300"),
        ("masking.mask_prob=1", "masking.mask_prob must be at least 0.001 and below 1, not 1:"),
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
    ],
)
def test_wrong_settings_are_named(tmp_path, text_file, override, message):
    with pytest.raises(UserError, match=message):
        write_config(tmp_path, text_file, "bert-tiny", override)


def test_overrides_take_values_of_their_type(tmp_path, text_file):
    config = write_config(tmp_path, text_file, "bert-tiny", "optim.lr=1", "data.train=some file.txt", "train.steps=7")
    assert (config.optim.lr, config.data.train, config.train.steps) == (1.0, ("some file.txt",), 7)


def test_a_file_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "a.toml").write_text("[data\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(tmp_path / "a.toml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "b.toml")


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
    from dataclasses import replace

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


def test_the_folder_of_a_run_stands_for_its_model(config, tmp_path, text_file, caplog, capsys):
    caplog.set_level("INFO", "mlmkit")
    run, taken = tmp_path / "run", f"{tmp_path}/run is a training run: taking the model in it, {tmp_path}/run/model"
    model = loop.train(config, run)
    assert mlmkit.load(str(run)).info.path == str(model)
    assert load_tokenizer(str(run)).fingerprint == load_tokenizer(str(model)).fingerprint
    export(str(run), tmp_path / "artifact", text=ProofText("a text", ["The statement of the text."] * 3))
    for command in (["fill", run, "The [MASK]"], ["score", run, text_file], ["eval", run, "--set", text_file]):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in command])
        assert not stop.value.code, capsys.readouterr().err
    further = write_config(tmp_path, text_file, "bert-tiny", f"model.init_from={run}", "train.steps=1")
    loop.train(further, tmp_path / "further")
    assert caplog.messages.count(taken) == 1
    (run / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"unfinished training run: train on, or name a folder in .*run/checkpoints"):
        mlmkit.load(str(run))


def test_a_finished_run_is_not_trained_again(config, tmp_path, monkeypatch):
    first = loop.train(config, tmp_path / "run")
    monkeypatch.setattr(loop, "backward", lambda *_, **__: pytest.fail("trained again"))
    assert loop.train(config, tmp_path / "run") == first


def test_another_configuration_or_text_is_refused(config, tmp_path, text_file):
    loop.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"another config\.optim\.lr \(0.002, now 0.1\)"):
        loop.train(write_config(tmp_path, text_file, "bert-tiny", "optim.lr=0.1"), tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("another text\n" * 20)
    with pytest.raises(UserError, match="begun with another"):
        loop.train(write_config(tmp_path, other, "bert-tiny"), tmp_path / "run")


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
    ],
)
def test_nothing_is_written_when_training_cannot_start(tmp_path, text_file, settings, message):
    with pytest.raises(UserError, match=message):
        loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".run*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "gpt2"}', "no masked LM for"),
        ('{"model_type": "bert", "is_decoder": true}', "causal"),
        ('{"model_type": "bert", "hidden_size": "32"}', "cannot be loaded"),
        ('{"model_type": "nothing"}', "no model_type 'nothing'"),
        ("{}", "no model_type None"),
        ("[]", "no JSON object"),
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
    import shutil

    shutil.rmtree(tmp_path / "run" / "model")
    newest = checkpoints(tmp_path / "run")[-1]
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


def test_held_out_text_may_be_a_dataset(tmp_path, text_file):
    """As the training text may: here a local folder that `datasets` reads."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.txt").write_text("".join(text_file.read_text().splitlines(keepends=True)[::30]))
    settings = ("train.steps=2", f"data.held_out=hub:{folder}")
    loop.train(write_config(tmp_path, text_file, "bert-tiny", *settings), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "held_out.json").read_text())["masked_cross_entropy"]["value"] > 0


def test_each_start_hashes_a_text_once(config, tmp_path, monkeypatch):
    [source], hashed = config.data.sources, []
    monkeypatch.setattr(corpus, "file_sha256", lambda path: hashed.append(str(path)) or file_sha256(path))
    for _ in ("a new run", "one that is there"):
        hashed.clear()
        tokenizer, [found] = begin_or_check(config, tmp_path / "run", Ranks())
        assert hashed == [source.location]
        assert found.folder == corpus.cache_folder(source, tokenizer)
