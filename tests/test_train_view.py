"""What a user sees of a training run: its log, estimates, dry run and curve."""

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlmkit.errors import UserError
from mlmkit.train import log as training_log
from mlmkit.train.config import Config, DataConfig, RunConfig
from mlmkit.train.log import TrainingLog, check_loggers, read_log

DIGEST = "1c044900ad748e10e57622261079d324"


def installed(module: str, name: str) -> bool:
    try:
        return hasattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        return False


needs_tensorboard = pytest.mark.skipif(
    not installed("torch.utils.tensorboard", "SummaryWriter"), reason="tensorboard is not installed"
)
needs_wandb = pytest.mark.skipif(not installed("wandb", "init"), reason="wandb is not installed")


def make_config(**train) -> Config:
    settings = {"steps": 12, "log_every": 2, "global_batch_tokens": 1000, "micro_batch_tokens": 1000} | train
    return Config(data=DataConfig(train=("text.txt",)), train=RunConfig(**settings))


def write_steps(run: Path, config: Config, first: int, last: int, **options) -> None:
    """As a run does that takes these steps, with an evaluation every four."""
    run.mkdir(exist_ok=True)
    with TrainingLog(run, config, first - 1, **options) as log:
        for step in range(first, last + 1):
            log.record(
                step,
                epoch=step // 5,
                loss=1.0 / step,
                learning_rate=1e-3,
                gradient_norm=0.5,
                tokens=990,
                masked=150,
                mask_prob=0.15,
            )
            if step % 4 == 0:
                log.held_out(step, held_out_result(2.0 / step))


def held_out_result(value: float) -> dict:
    return {
        "masked_cross_entropy": {"value": value, "low": value - 0.1, "high": value + 0.1},
        "masked_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6},
        "mask_digest": DIGEST,
    }


# ------------------------------------------------------------------ the log


def test_an_entry_holds_means_and_sums_since_the_last(tmp_path):
    write_steps(tmp_path, make_config(log_every=5), 1, 12)
    entries = [entry for entry in read_log(tmp_path) if "loss" in entry]
    assert [entry["step"] for entry in entries] == [5, 10, 12]  # the last step is never left out
    assert entries[0]["loss"] == pytest.approx(sum(1 / step for step in range(1, 6)) / 5)
    assert entries[0] | {"loss": 0, "tokens_per_second": 0} == {
        "step": 5,
        "epoch": 1,
        "loss": 0,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "mask_prob": 0.15,
        "tokens": 5 * 990,
        "masked": 5 * 150,
        "fill": 0.99,
        "tokens_per_second": 0,
    }
    held_out = [entry for entry in read_log(tmp_path) if "held_out" in entry]
    assert [entry["step"] for entry in held_out] == [4, 8, 12]
    assert held_out[0]["held_out"] == held_out_result(0.5)


def test_mfu_is_the_share_of_the_peak_rate(tmp_path):
    write_steps(tmp_path, make_config(), 1, 2, flops_per_token=6e8, peak_flops=1e15)
    [entry] = read_log(tmp_path)
    assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * 6e8 / 1e15)


def test_a_resumed_log_has_every_step_once(tmp_path):
    config = make_config()
    write_steps(tmp_path / "straight", config, 1, 12)
    write_steps(tmp_path / "broken", config, 1, 9)
    with (tmp_path / "broken" / "log.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # as a kill leaves it
    write_steps(tmp_path / "broken", config, 5, 12)  # from the checkpoint of step 4
    logs = [
        [(entry["step"], entry.get("loss"), entry.get("held_out")) for entry in read_log(tmp_path / name)]
        for name in ("straight", "broken")
    ]
    assert logs[0] == logs[1]
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["log.jsonl"]


def test_other_ranks_write_nothing(tmp_path):
    write_steps(tmp_path, make_config(), 1, 4, is_first=False)
    assert not list(tmp_path.iterdir())


def test_time_within_a_pause_is_not_training_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now)
    with TrainingLog(tmp_path, make_config(log_every=1), 0) as log:
        now = 2.0
        with log.paused():
            now = 50.0
        log.record(1, epoch=0, loss=1, learning_rate=1, gradient_norm=1, tokens=100, masked=1, mask_prob=0.15)
    assert read_log(tmp_path)[0]["tokens_per_second"] == pytest.approx(50)


def test_without_a_terminal_a_line_comes_now_and_then(tmp_path, monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now)
    caplog.set_level(logging.INFO, logger="mlmkit")
    with TrainingLog(tmp_path, make_config(log_every=1), 0, flops_per_token=1e9, peak_flops=1e12) as log:
        for step in range(1, 13):
            now += 4.0
            line = log.record(
                step, epoch=0, loss=1.5, learning_rate=1e-3, gradient_norm=1, tokens=990, masked=1, mask_prob=0.15
            )
    assert line == "training  loss 1.500  248 tokens/s  MFU 25%  lr 1.00e-03  fill 99.0%"
    said = [re.match(r"step (\d+)/12  loss 1.500 .* (0:\d\d:\d\d) left", message) for message in caplog.messages]
    assert [match and match.groups() for match in said] == [
        ("1", "0:00:44"),
        ("4", "0:00:32"),
        ("7", "0:00:20"),
        ("10", "0:00:08"),
        ("12", "0:00:00"),
    ]


@pytest.mark.parametrize(
    ("module", "name", "settings"),
    [("torch.utils.tensorboard", "tensorboard", {"tensorboard": True}), ("wandb", "wandb", {"wandb": "project"})],
)
def test_a_logger_that_is_not_installed_is_named(monkeypatch, module, name, settings):
    monkeypatch.setitem(__import__("sys").modules, module, None)  # importing it now fails
    with pytest.raises(UserError, match=rf"train.{name} needs .*: pip install 'mlmkit\[{name}\]'"):
        check_loggers(RunConfig(**settings))
    check_loggers(RunConfig())


@needs_tensorboard
def test_tensorboard_shows_a_resumed_run_without_doubled_points(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tensorboard=True)
    check_loggers(config.train)
    write_steps(tmp_path, config, 1, 9)
    write_steps(tmp_path, config, 5, 12)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in losses] == [2, 4, 6, 8, 10, 12]
    assert losses[-1][1] == pytest.approx((1 / 11 + 1 / 12) / 2)
    held_out = events.Scalars("held_out/masked_cross_entropy")
    assert [(event.step, round(event.value, 4)) for event in held_out] == [(4, 0.5), (8, 0.25), (12, 0.1667)]
    assert [event.step for event in events.Scalars("held_out/masked_cross_entropy_low")] == [4, 8, 12]


@needs_wandb
def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_config(wandb="mlmkit-tests")
    check_loggers(config.train)
    for first, last in ((1, 9), (5, 12)):
        write_steps(tmp_path, config, first, last)
    id = (tmp_path / "wandb-id.txt").read_text()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert {file.stem for file in files} == {f"run-{id}"}
