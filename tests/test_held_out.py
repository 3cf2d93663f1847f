"""Held-out texts: several of them, the value before the first step, and what a finished run says about both."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run, run_json
from test_train_resume import kill_when
from training import Ranks, log_lines, same_weights, weights, write_config

from mlmkit.pretrained import load_tokenizer
from mlmkit.token_cache import load_corpus
from mlmkit.train.checkpoints import saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.loop import train
from mlmkit.train.sweep import explain, make_trials, sweep, table


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, text_file: Path, checkpoint: Callable[[str], Path]) -> Config:
    """A model trained further, on two held-out texts."""
    folder = tmp_path_factory.mktemp("config")
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for begin, name in enumerate("ab"):
        (folder / f"{name}.txt").write_text("".join(lines[begin::30]), encoding="utf-8")
    texts = [f"held_out.{name}={folder / name}.txt" for name in "ab"]
    settings = (f"model.init_from={checkpoint('bert')}", "train.steps=6", "train.save_every=2", *texts)
    return write_config(folder, text_file, "", *settings)


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(config, folder)
    return folder


def evaluations(folder: Path) -> list[tuple[int, str]]:
    return [(entry["step"], entry["held_out"]["name"]) for entry in log_lines(folder) if "held_out" in entry]


def test_every_text_is_evaluated_at_each_checkpoint_and_before_the_first_step(config, finished):
    assert evaluations(finished) == [(step, name) for step in (0, 2, 4, 6) for name in "ab"]
    results = {}
    for name, source in config.held_out_sources.items():
        for checkpoint in (finished / "initial", *saved_checkpoints(finished)):
            result = json.loads((checkpoint / f"held-out-{name}" / "result.json").read_text())
            assert result["corpus"]["source"]["location"] == source.location
            results[name] = result
    summary = json.loads((finished / "held_out.json").read_text())
    assert list(summary)[:2] == ["a", "b"]
    for name, result in results.items():  # of the last checkpoint
        assert summary[name] == {
            "mask_digest": result["mask_digest"],
            "unigram_entropy": result["unigram_entropy"],
            **result["metrics"],
        }
    assert not list((finished / "model").glob("held-out*"))


def test_the_initial_model_is_saved_and_changes_nothing(config, finished, tmp_path, checkpoint):
    assert same_weights(finished / "initial", checkpoint("bert"))
    assert not {"optimizer", "trainer.json"} & {path.name for path in (finished / "initial").iterdir()}
    load_tokenizer(str(finished / "initial"))
    without = train(replace(config, held_out={}), tmp_path / "run")
    assert not (tmp_path / "run" / "initial").exists()
    assert same_weights(without, finished / "model")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_save_the_initial_model(config, finished, tmp_path, parallel, checkpoint):
    ranks = Ranks(replace(config, train=replace(config.train, parallel=parallel)), tmp_path / "run", 2)
    assert ranks.wait() == [0, 0], ranks.messages()
    initial = weights(tmp_path / "run" / "initial")  # FSDP writes tied weights twice
    assert all(torch.equal(initial[name], value) for name, value in weights(checkpoint("bert")).items())
    assert evaluations(tmp_path / "run") == evaluations(finished)


@pytest.mark.parametrize(
    "moment", ["initial/config.json", "initial/held-out-a/result.json", "checkpoints/step-00000002"]
)
def test_a_kill_around_the_first_step_loses_no_value(config, finished, tmp_path, moment):
    folder = tmp_path / "run"
    kill_when((folder / moment).exists, Ranks(config, folder))
    train(config, folder)
    assert evaluations(folder) == evaluations(finished)
    assert same_weights(folder / "model", finished / "model")


def test_another_text_is_measured_on_the_initial_model_too(config, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    swapped = replace(config, held_out={"a": config.held_out["b"], "c": config.held_out["b"]})
    train(swapped, folder)
    assert evaluations(folder)[-4:] == [(0, "a"), (0, "c"), (6, "a"), (6, "c")]
    assert json.loads((folder / "held_out.json").read_text()).keys() >= {"a", "c"}
    # The older results are still there, by the digest of their masks.
    older = json.loads((finished / "held_out.json").read_text())["a"]["mask_digest"]
    for checkpoint in (folder / "initial", saved_checkpoints(folder)[-1]):
        assert json.loads((checkpoint / f"held-out-{older[:8]}" / "result.json").read_text())["mask_digest"] == older

    shutil.rmtree(folder / "initial")  # its weights cannot be had again
    train(config, folder)
    assert not (folder / "initial").exists()
    assert (folder / "held_out.json").read_bytes() == (finished / "held_out.json").read_bytes()


def test_the_unigram_entropy_is_that_of_the_tokens_that_masks_can_select(config, finished):
    tokenizer = load_tokenizer(str(finished / "tokenizer"))
    logged = {entry["held_out"]["name"]: entry["held_out"] for entry in log_lines(finished) if "held_out" in entry}
    for name, source in config.held_out_sources.items():
        corpus = load_corpus(source, tokenizer)
        ids = [id for id in corpus.part(0, len(corpus)).ids.tolist() if id not in tokenizer.special_ids]
        shares = [count / len(ids) for count in Counter(ids).values()]
        expected = -math.fsum(share * math.log(share) for share in shares)
        assert logged[name]["unigram_entropy"] == pytest.approx(expected, rel=1e-12)


def test_a_sweep_compares_by_the_first_text(config, tmp_path):
    path = Path(next(iter(config.held_out_sources.values())).location).with_name("config.toml")
    texts = [f"held_out.{name}={location}" for name, location in config.held_out.items()]
    base = [f"model.init_from={config.model.init_from}", "train.steps=2", "train.save_every=2", *texts]
    lines = path.read_text().splitlines()
    ours = tmp_path / "config.toml"
    ours.write_text("\n".join(line for line in lines if not line.startswith(("vocab_size", "architecture"))))
    result = sweep(make_trials(ours, base, ["optim.lr=1e-9,1e-2"]), tmp_path / "sweep")
    assert result["held_out"] == config.held_out["a"]
    stored = {}
    for row in result["runs"]:
        stored = json.loads((tmp_path / "sweep" / row["run"] / "held_out.json").read_text())
        assert row["masked_cross_entropy"] == stored["a"]["masked_cross_entropy"]
        assert row["other_sets"] == {"b": stored["b"]}
    header, *rows = table(result)
    assert f"{stored['b']['masked_cross_entropy']['value']:.4f}" == rows[-1][header.index("b")]
    assert f"unigram entropy, to beat: {stored['a']['unigram_entropy']:.4f}." in explain(result)[0]


def test_a_run_ends_with_what_it_has_reached_and_the_next_commands(config, finished, capsys, tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    held_out = "".join(f'{name} = "{location}"\n' for name, location in config.held_out.items())
    path.write_text(
        f'[data]\ntrain = "{config.data.train[0]}"\n[held_out]\n{held_out}[model]\nmax_length = 48\n'
        f'init_from = "{config.model.init_from}"\n[optim]\nlr = 2e-3\nwarmup_steps = 1\n[train]\nsteps = 6\n'
        "global_batch_tokens = 512\nmicro_batch_tokens = 256\n"
    )
    summary = run_json(capsys, "train", path, "--output", finished)
    entries = [entry for entry in log_lines(finished) if "held_out" in entry]
    for name, values in summary["held_out"].items():
        losses = {e["step"]: e["held_out"]["masked_cross_entropy"] for e in entries if e["held_out"]["name"] == name}
        best = min((2, 4, 6), key=lambda step: losses[step]["value"])
        assert values["best"] == {"checkpoint": str(finished / "checkpoints" / f"step-{best:08d}"), **losses[best]}
        assert values["last"] == losses[6]
        assert values["initial"] == {"checkpoint": str(finished / "initial"), **losses[0]}
    assert summary["model"] == str(finished / "model") and Path(summary["model"], "config.json").exists()
    assert summary["last_log_entry"]["step"] == 6

    code, out, _ = run(capsys, "train", path, "--output", finished)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"model: {summary['model']}"
    for name, values in summary["held_out"].items():
        assert f"best checkpoint on {name}: {values['best']['checkpoint']} ({values['best']['value']:.4f})" in lines
        [row] = [line.split() for line in lines if line.startswith(f"{name} ")]
        numbers = [values["unigram_entropy"], *(values[point]["value"] for point in ("initial", "best", "last"))]
        assert [row[1], *row[2::2]] == [f"{number:.3f}" for number in numbers]
        assert max(len(line) for line in lines if line.startswith(f"{name} ")) <= 80
    assert lines[-3:] == ["next:", *(f"  {command}" for command in summary["next"])]

    monkeypatch.chdir(tmp_path)
    for command in summary["next"]:
        code, _, err = run(capsys, *command.split()[1:3], *command.split()[3:])
        assert code == 0, err
