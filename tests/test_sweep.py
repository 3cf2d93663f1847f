"""A sweep: its trials, that the others continue when one fails, and its table and plot."""

import json
from itertools import product
from pathlib import Path

import pytest
from training import small_architecture, write_config

from mlmkit.errors import CheckError, UserError
from mlmkit.train.loop import train
from mlmkit.train.sweep import check, explain, make_trials, sweep, table


@pytest.fixture
def path(tmp_path: Path, text_file: Path) -> Path:
    text, config = tmp_path / "text.txt", tmp_path / "config.toml"
    text.write_text("".join(text_file.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")
    write_config(tmp_path, text, small_architecture(tmp_path))
    content = config.read_text().replace("steps = 12", "steps = 2").replace("batch_tokens = 256", "batch_tokens = 512")
    config.write_text(content.replace("[data]", f"[data]\nheld_out = {str(text)!r}"))
    return config


# ------------------------------------------------------------------ the plan


def test_two_sweeps_make_a_grid(path):
    trials = make_trials(path, ["train.steps=3"], ["masking.mask_prob=0.15,0.3", "optim.lr = 1e-3, 1e-2"])
    assert [trial.values for trial in trials] == [
        {"masking.mask_prob": mask_prob, "optim.lr": lr} for mask_prob in (0.15, 0.3) for lr in (1e-3, 1e-2)
    ]
    assert trials[1].name == "masking.mask_prob=0.15,optim.lr=1e-2"
    assert trials[1].config.train.steps == 3


def test_values_may_be_lists_and_paths(path):
    trials = make_trials(path, [], ["data.train=['a/b.txt', 'c.txt'],d/e.txt"])
    assert [trial.config.data.train for trial in trials] == [("a/b.txt", "c.txt"), ("d/e.txt",)]
    assert [trial.name for trial in trials] == ["data.train=__a_b.txt____c.txt__", "data.train=d_e.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mask_prob=0.1,0.2"], "write it as table.key=value,value"),
        (["masking.mask_prob"], "write it as table.key=value,value"),
        (["masking.mask_prob=0.1,,0.2"], "write it as table.key=value,value"),
        (["masking.mask_prob=0.1,1.5"], "mask_prob must be at least 0.001 and below 1, not 1.5"),
        (["masking.maskprob=0.1"], "unknown setting masking.maskprob: did you mean masking.mask_prob"),
        (["masking.mask_prob=0.1,0.10"], "mask_prob=0.10 occurs twice"),
        (["optim.lr=1e-3", "optim.lr=1e-2"], "names optim.lr twice"),
        (["data.held_out="], "write it as table.key=value,value"),
    ],
)
def test_a_wrong_sweep_is_refused_before_the_first_run(path, given, message):
    with pytest.raises(UserError, match=message):
        make_trials(path, [], given)


def test_a_sweep_needs_held_out_text(path):
    with pytest.raises(UserError, match=r"name it with data\.held_out"):
        make_trials(path, ["data.held_out="], ["masking.mask_prob=0.15,0.3"])


# ------------------------------------------------------------------ the runs


def test_runs_are_measured_alike_and_compared(path, tmp_path, caplog):
    trials = make_trials(path, [], ["masking.mask_prob=0.15,0.5", "optim.lr=1e-9,1e-2"])
    output = tmp_path / "sweep"
    with caplog.at_level("INFO", logger="mlmkit"):
        found = sweep(trials, output)
    check(found)
    assert caplog.text.count("training a wordpiece tokenizer") == 1
    assert caplog.text.count("the tokenizer was trained on this text before") == 3
    assert json.loads((output / "sweep.json").read_text()) == found
    results = {row["run"]: row["masked_cross_entropy"] for row in found["runs"]}
    assert set(results) == {trial.name for trial in trials}
    lowest = min(results, key=lambda run: results[run]["value"])
    assert found["lowest"] == lowest and "optim.lr=1e-2" in lowest  # the other does not learn
    differences = {row["run"]: row["above_lowest"] for row in found["runs"] if row["run"] != lowest}
    assert found["best"] == (lowest if all(each["distinguishable"] for each in differences.values()) else None)
    for run, difference in differences.items():
        assert difference["value"] == pytest.approx(results[run]["value"] - results[lowest]["value"])
        assert difference["low"] > 0 or "optim.lr=1e-2" in run
    # Models that did not learn have the same loss: the held-out masks do not depend on the training masks.
    same = [results[f"masking.mask_prob={rate},optim.lr=1e-9"]["value"] for rate in ("0.15", "0.5")]
    assert same[0] == pytest.approx(same[1], abs=1e-5)
    lines = (output / "sweep.md").read_text().splitlines()
    assert lines[2 + list(results).index(lowest)].endswith(("| best |", "| lowest |"))
    assert found["mask_digest"] in "".join(lines[6:])
    pytest.importorskip("matplotlib")
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_run_does_not_lose_the_others(path, tmp_path):
    trials = make_trials(path, ["train.steps=6"], ["optim.lr=1e-9,2e-9,1e12"])
    found = sweep(trials, tmp_path / "sweep")
    assert [bool(row["error"]) for row in found["runs"]] == [False, False, True]
    assert found["best"] is None  # as neither learns
    assert sorted(row[-1] for row in table(found)[1:]) == ["failed", "lowest", "tied"]
    assert "failed: step" in explain(found)[-1]
    (tmp_path / "sweep" / found["lowest"] / "checkpoints").rename(tmp_path / "gone")
    found = sweep(trials, tmp_path / "sweep")
    assert sorted(row[-1] for row in table(found)[1:]) == ["failed", "lowest", "not compared"]
    assert sweep([trials[0]], tmp_path / "sweep")["best"] is None  # there is nothing to compare it with
    with pytest.raises(CheckError, match=r"1 of 3 runs failed: optim\.lr=1e12: step \d"):
        check(found)


def test_what_fails_everywhere_is_the_error(path, tmp_path):
    trials = make_trials(path, ["data.train=none.txt"], ["optim.lr=1e-3,1e-2"])
    with pytest.raises(UserError, match=r"none\.txt"):
        sweep(trials, tmp_path / "sweep")


def test_other_masks_do_not_compare(path, tmp_path):
    trials = make_trials(path, [], ["tokenizer.vocab_size=300,600"])
    with pytest.raises(CheckError, match="different masks"):
        sweep(trials, tmp_path / "sweep")


def test_a_run_is_no_sweep(path, tmp_path):
    [trial] = make_trials(path, [], ["train.seed=1"])
    train(trial.config, tmp_path / "run")
    with pytest.raises(UserError, match="not the folder of a sweep"):
        sweep([trial], tmp_path / "run")


# ------------------------------------------------------------------ the plot


def made_up(**settings: list) -> list[dict]:
    """The runs of a sweep, with the best near the middle."""
    runs = []
    for number, values in enumerate(product(*settings.values())):
        value = 3 + 0.02 * (number - 2) ** 2
        metric = {"value": value, "low": value - 0.03, "high": value + 0.04}
        runs.append(
            {"run": str(number), "values": dict(zip(settings, values, strict=True)), "masked_cross_entropy": metric}
        )
    return runs


@pytest.mark.parametrize(
    "settings",
    [
        {"optim.lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]},
        {"masking.mask_prob": [0.05, 0.15, 0.3]},
        {"optim.name": ["adamw", "muon", "other"]},
        {"masking.whole_word": [True, False], "optim.lr": [1e-3, 1e-2]},
        {"masking.mask_prob": [0.15, 0.3, 0.4], "model.architecture": ["bert-tiny", "modernbert-tiny"]},
    ],
)
def test_a_plot_takes_any_setting(tmp_path, settings):
    plots = pytest.importorskip("mlmkit.eval.plots")
    plots.sweep_curves(made_up(**settings), "2", "held.txt", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
