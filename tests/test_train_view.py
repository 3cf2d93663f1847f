"""What a user sees of a training run: its log, the dry run and the curve."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import small_architecture, write_config
from transformers import AutoConfig, AutoModelForMaskedLM

from mlmkit.errors import UserError
from mlmkit.model import MaskedLM
from mlmkit.train import log as training_log
from mlmkit.train.config import Config, DataConfig, RunConfig
from mlmkit.train.cost import dry_run, figures, first_texts, flops_per_token, peak_flops
from mlmkit.train.log import TrainingLog, check_loggers, draw_loss, read_log

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
    defaults = RunConfig(steps=12, log_every=2, global_batch_tokens=1000, micro_batch_tokens=1000)
    return Config(data=DataConfig(train=("text.txt",)), train=replace(defaults, **train))


def write_steps(run: Path, config: Config, first: int, last: int, **options) -> None:
    """Log like a run that takes these steps and evaluates every four."""
    run.mkdir(exist_ok=True)
    with TrainingLog(run, config, first - 1, last_step=12, **options) as log:
        for step in range(first, last + 1):
            means: dict[str, Any] = {"learning_rate": 1e-3, "gradient_norm": 0.5, "mask_prob": 0.15, **place(step)}
            log.record(step, epoch=step // 5, loss=1.0 / step, tokens=990, masked=150, **means)
            if step % 4 == 0:
                log.held_out(step, {"held-out": held_out_result(2.0 / step)})


def place(step: int) -> dict[str, Any]:
    """Where a step is in a phase of 12 with 1,000 tokens each."""
    return {"capacity": 1000, "share": step / 12, "steps_left": 12 - step}


def held_out_result(value: float) -> dict:
    metrics = {
        "masked_cross_entropy": {"value": value, "low": value - 0.1, "high": value + 0.1},
        "masked_accuracy": {"value": 0.5, "low": None, "high": None},  # as of a single document
    }
    return {"backend": {"name": "torch"}, "mask_digest": DIGEST, "unigram_entropy": 6.5, "metrics": metrics}


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
    assert held_out[0]["held_out"] == {
        "name": "held-out",
        "mask_digest": DIGEST,
        "unigram_entropy": 6.5,
        **held_out_result(0.5)["metrics"],
    }


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
    write_steps(tmp_path / "other-rank", config, 1, 4, is_first=False)
    assert not list((tmp_path / "other-rank").iterdir())


def test_time_within_a_pause_is_not_training_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now)
    with TrainingLog(tmp_path, make_config(log_every=1), 0) as log:
        now = 2.0
        with log.paused():
            now = 50.0
        log.record(1, loss=1, learning_rate=1, tokens=100, masked=1, **place(1))
    assert read_log(tmp_path)[0]["tokens_per_second"] == pytest.approx(50)


def test_the_first_entry_after_a_resume_counts_the_steps_before_it(tmp_path, monkeypatch):
    """Steps of a second each, in two processes. The second has no target, so it does not count in the loss."""
    now, sums = 0.0, training_log.NO_STEPS
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now)
    for first in (1, 3):
        now += 1000
        with TrainingLog(tmp_path, make_config(log_every=4), first - 1, json.loads(json.dumps(sums))) as log:
            for step in (first, first + 1):
                now += 1
                masked = 0 if step == 2 else 10
                loss = float(step) if masked else 0.0
                log.record(step, loss=loss, tokens=100, masked=masked, learning_rate=1, **place(step))
            sums = log.open_sums()
    [entry] = read_log(tmp_path)
    assert entry.pop("learning_rate") == 1
    assert entry == {"step": 4, "loss": 8 / 3, "tokens": 400, "masked": 30, "fill": 0.1, "tokens_per_second": 100}


def test_without_a_terminal_a_line_comes_now_and_then(tmp_path, monkeypatch, caplog):
    now, parts = 0.0, [""]
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now)
    caplog.set_level(logging.INFO, logger="mlmkit")
    options = {"last_step": 12, "flops_per_token": 1e9, "peak_flops": 1e12}
    with TrainingLog(tmp_path, make_config(log_every=1), 0, **options) as log:
        for step in range(1, 13):
            now += 4.0
            parts = log.record(step, loss=1.5, learning_rate=1e-3, tokens=990, masked=1, **place(step))
    assert read_log(tmp_path)[-1]["mfu"] == pytest.approx(0.2475)
    assert parts == ["step 12/12", "loss 1.500", "248 tokens/s", "MFU 25%"]
    said = [re.match(r"step (\d+)/12  loss 1.500 .* (0:\d\d:\d\d) left", message) for message in caplog.messages]
    assert [match and int(match[1]) for match in said] == [1, 4, 7, 10, 12]
    assert [match and match[2] for match in said] == [f"0:00:{seconds:02}" for seconds in (44, 32, 20, 8, 0)]


@pytest.mark.parametrize(
    ("module", "name", "settings"),
    [("torch.utils.tensorboard", "tensorboard", {"tensorboard": True}), ("wandb", "wandb", {"wandb": "project"})],
)
def test_a_logger_that_is_not_installed_is_named(monkeypatch, module, name, settings):
    monkeypatch.setitem(__import__("sys").modules, module, None)  # importing it now fails
    with pytest.raises(UserError, match=rf"train.{name} needs .*: pip install '\.\[{name}\]'"):
        check_loggers(RunConfig(**settings))
    check_loggers(RunConfig())


@needs_tensorboard
def test_tensorboard_shows_a_resumed_run_without_doubled_points(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

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


# ------------------------------------------------------------------ estimates


def untrained(architecture: str, **settings) -> MaskedLM:
    """A model whose weights are never initialised, which is quick at any size."""
    with torch.device("meta"):
        network = AutoModelForMaskedLM.from_config(AutoConfig.for_model(architecture, **settings))
        model = MaskedLM(network)
    model.to_empty(device="cpu")
    network.tie_weights()
    for tensor in model.buffers():
        tensor.zero_()
    return model


@pytest.mark.parametrize(
    ("architecture", "length", "mask_prob", "gflop"),
    [("bert", 512, 0.15, 0.588), ("bert", 512, 0.30, 0.609), ("modernbert", 1024, 0.30, 0.824)],
)
def test_operations_of_the_published_sizes(architecture, length, mask_prob, gflop):
    """12 x 7.1 M encoder weights x 6, and so on; computed by hand."""
    flops = flops_per_token(untrained(architecture), np.array([length]), mask_prob)
    assert flops / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_attention_counts_what_a_token_sees():
    """With documents of 8 and 2 tokens, a token attends to 6.8 tokens on average."""
    model = untrained("bert", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    one, other = (flops_per_token(model, np.array(lengths), 0.15) for lengths in ([8, 2], [1]))
    assert one - other == pytest.approx(12 * 3 * 32 * (6.8 - 1))


def test_a_shared_layer_costs_as_often_as_it_runs():
    sizes = {"hidden_size": 32, "embedding_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    two, four = (
        flops_per_token(untrained("albert", num_hidden_layers=layers, **sizes), np.array([1]), 0.15)
        for layers in (2, 4)
    )
    layer = 4 * 32 * 32 + 2 * 32 * 48
    assert four - two == pytest.approx(2 * (6 * layer + 12 * 32))


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("Tesla T4", 0),
        ("Tesla V100-SXM2-16GB", 0),
    ],
)
def test_peak_rates_are_found_by_name(gpu, tflops):
    assert peak_flops(gpu) == tflops * 1e12


# ------------------------------------------------------------------ the dry run


def test_a_dry_run_shows_the_batch_and_leaves_nothing(tmp_path, text_file, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    report = dry_run(write_config(tmp_path, text_file, "bert-tiny", "masking.mask_prob=0.3"))[""]
    assert not list((tmp_path / "temporary").iterdir())
    assert report.packed
    assert 0.9 < report.fill <= 1
    assert report.tokens_per_step == report.fill * 512
    assert report.epochs == pytest.approx(12 * report.tokens_per_step / report.corpus_tokens, rel=0.2)
    assert 0.2 < report.masked < 0.4
    assert report.flops == pytest.approx(report.flops_per_token * report.tokens)
    assert report.step_seconds > 0
    text = " ".join(report.first_batch)
    marks = re.findall(r"\[([^\[\]]*)(→|=)([^\]]*)\]", text)
    shares = [
        sum(kind(mark) for mark in marks) / len(marks) for kind in (lambda m: m[0] == "MASK", lambda m: m[1] == "=")
    ]
    assert shares[0] == pytest.approx(0.8, abs=0.12)
    assert shares[1] == pytest.approx(0.1, abs=0.08)
    json.dumps(asdict(report))


def test_muon_keeps_one_number_per_hidden_weight(tmp_path, text_file):
    """And AdamW two, beside the weights and the gradients; all are float32. Each tensor also has a step count."""
    path = small_architecture(tmp_path)
    adamw, muon = (
        dry_run(write_config(tmp_path, text_file, path, f"optim.name={name}"))[""] for name in ("adamw", "muon")
    )
    assert adamw.state_bytes == pytest.approx(16 * adamw.parameters, abs=1000)
    assert adamw.state_bytes - muon.state_bytes == pytest.approx(4 * 2 * (4 * 32 * 32 + 2 * 32 * 48), abs=100)


@pytest.mark.parametrize("architecture", ["bert", "mpnet"])
def test_the_decoded_batch_is_the_text(tmp_path, text_file, architecture):
    """Packed and padded: with the original tokens put back, each text is a document or a window of one."""
    found = dry_run(write_config(tmp_path, text_file, small_architecture(tmp_path, model_type=architecture)))[""]
    assert found.packed == (architecture == "bert")
    squeezed = re.sub(r"\s", "", text_file.read_text(encoding="utf-8"))
    for text in found.first_batch:
        restored = re.sub(r"\[(?:[^\[\]]+→|=)(\S+?)\]", r"\1", text).removeprefix("[CLS]").removesuffix("[SEP]")
        assert re.sub(r"\s|##", "", restored) in squeezed.replace("##", "")


def test_the_console_shows_a_part_of_it(tmp_path, text_file):
    found = dry_run(write_config(tmp_path, text_file, "bert-tiny", "model.max_length=16"))[""]
    shown = figures(found)
    assert shown["model"].startswith(f"bert-tiny, {found.parameters / 1e3:.3g} k parameters")
    assert "s per step" in shown["time"]
    shown = first_texts(found)
    assert shown[-1] == f"  and {len(found.first_batch) - 6} more documents"
    assert max(map(len, shown)) <= 403


# ------------------------------------------------------------------ the bar

BARS = """
import fcntl, logging, struct, sys, termios, time
from mlmkit.console import MessageHandler
from mlmkit.progress import progress, progress_bars
logging.getLogger().addHandler(MessageHandler())
for columns in map(int, sys.argv[1:]):
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with progress_bars() as bars:
        bar = bars.add("", 20_000)
        bar.show(1, ["step 1/20,000", ""])
        time.sleep(0.02)
        bar.show(10_000, ["step 10,000/20,000", "loss 6.161", "1,234,567 tokens/s", "MFU 45%"])
        with progress("masked, seed 0", 356, "documents"):
            logging.warning("a message")
"""


def test_the_bar_shows_step_loss_and_time_left_at_any_width():
    """In a terminal: two bars, one below the other, with a message above them."""
    (master, terminal), widths = os.openpty(), (50, 80, 100)
    command = [sys.executable, "-c", BARS, *map(str, widths)]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    with subprocess.Popen(command, stderr=terminal, env=environment | {"TERM": "xterm"}) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # Linux says so at the end
            while block := os.read(master, 1 << 16):
                shown += block
    os.close(master)
    assert process.returncode == 0, shown
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown.decode()))]
    assert lines.count("a message") == len(widths)
    full = [line for line in lines if "loss" in line]
    for columns in widths:
        line = [line for line in full if len(line) <= columns][-1]
        assert re.match(r"step 10,000/20,000  loss 6\.161  \d:\d\d:\d\d left", line), lines
        assert ("tokens/s" in line, "MFU" in line, "━━" in line) == (columns > 50, columns > 50, columns > 80), line
    assert any(re.match("masked, seed 0  0/356 documents  -:--:-- left  ━━", line) for line in lines)


# ------------------------------------------------------------------ the curve


@pytest.mark.parametrize("steps", [1, 60, 10_000])
def test_short_and_long_runs_are_drawn(tmp_path, steps):
    pytest.importorskip("matplotlib")
    write_steps(tmp_path, make_config(steps=steps, log_every=1), 1, steps)
    with TrainingLog(tmp_path, make_config(), steps) as log:
        alone = {"masked_cross_entropy": {"value": 2.0, "low": None, "high": None}}  # of a single document
        log.held_out(steps, {"held-out": {"mask_digest": DIGEST, "metrics": alone}})
    assert draw_loss(tmp_path)


def test_each_held_out_text_has_a_curve(tmp_path, monkeypatch):
    plots = pytest.importorskip("mlmkit.eval.plots")
    write_steps(tmp_path, make_config(), 1, 12)
    path = tmp_path / "log.jsonl"
    path.write_text(
        path.read_text().replace('"name": "held-out", ', "").replace(' "unigram_entropy": 6.5,', "")
    )  # older
    with TrainingLog(tmp_path, make_config(), 12) as log:
        for _ in ("written once", "known"):
            other = {"mask_digest": "0"}
            log.held_out(12, {"held-out": held_out_result(7.0) | other, "web": held_out_result(3.0) | other})
    assert sum("held_out" in entry for entry in read_log(tmp_path)) == 3 + 2
    figures = []
    monkeypatch.setattr(plots, "save_png", lambda figure, path: figures.append(figure))
    draw_loss(tmp_path)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert lines["another text, last 0.167"] == [[4, 0.5], [8, 0.25], [12, 2 / 12]]
    assert lines["held out, 95 % interval, last 7.000"] == [[12, 7.0]]
    assert lines["web, 95 % interval, last 3.000"] == [[12, 3.0]]
    entropies = [line for line in figures[0].axes[0].lines if line.get_linestyle() == "--"]
    assert lines["unigram entropy of held out, 6.500"] == lines["unigram entropy of web, 6.500"] == [[0, 6.5], [1, 6.5]]
    assert [line.get_ydata()[0] for line in entropies] == [6.5, 6.5]
    assert len({line.get_color() for line in entropies}) == 2


def test_a_moving_average_is_the_mean_around_a_point():
    plots = pytest.importorskip("mlmkit.eval.plots")
    values = np.array([0.0, 3.0, 6.0, 0.0, 0.0])
    assert plots.moving_average(values, 3) == pytest.approx([1.5, 3, 3, 2, 0])
    assert plots.moving_average(values, 1) == pytest.approx(values)


def test_without_matplotlib_or_entries_there_is_no_picture(tmp_path, monkeypatch, caplog):
    assert draw_loss(tmp_path) is None
    write_steps(tmp_path, make_config(), 1, 4)
    monkeypatch.setattr(training_log, "find_spec", lambda _: None)
    caplog.set_level(logging.INFO, logger="mlmkit")
    caplog.clear()
    assert draw_loss(tmp_path) is None
    reason = "because it needs matplotlib: pip install '.[report]' in a clone of mlmkit"
    assert caplog.messages == [f"{tmp_path / 'loss.png'} is left out, {reason}"]
