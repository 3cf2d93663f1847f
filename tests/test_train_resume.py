"""A run that is killed, stopped, out of disk or on another number of ranks resumes as if nothing had happened."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import Ranks, log_lines, same_weights, small_architecture, weights, write_config

from mlmkit import evaluate
from mlmkit.distributed import ranks as find_ranks
from mlmkit.errors import StoppedError, UserError
from mlmkit.train.checkpoints import HELD_OUT, saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.loop import stop_signals, train


@pytest.fixture(scope="module")
def config(tmp_path_factory, text_file) -> Config:
    """With dropout, which must depend on the micro-batch alone."""
    folder = tmp_path_factory.mktemp("config")
    settings = ("train.steps=18", "train.save_every=3", "train.log_every=1")
    return write_config(folder, text_file, small_architecture(folder, hidden_dropout_prob=0.2), *settings)


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory) -> Path:
    """A run that was killed after its first checkpoint. A test that resumes it takes a copy."""
    run = tmp_path_factory.mktemp("killed") / "run"
    kill_when(lambda: saved_checkpoints(run), Ranks(config, run))
    return run


def last_step(run: Path) -> int:
    return max((line["step"] for line in log_lines(run)), default=0) if (run / "log.jsonl").exists() else 0


def wait_for(condition: Callable[[], object], ranks: Ranks) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, ranks.messages()
        time.sleep(0.02)


def kill_when(condition: Callable[[], object], ranks: Ranks, seconds: float = 0) -> None:
    """Kill all ranks some seconds after the condition holds."""
    wait_for(condition, ranks)
    time.sleep(seconds)
    ranks.signal(signal.SIGKILL)
    ranks.wait()


def complete(config: Config, run: Path, world: int) -> None:
    ranks = Ranks(config, run, world)
    assert ranks.wait() == [0] * world, ranks.messages()


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ()),
        (1, ("optim.name=muon", "data.workers=1", "masking.final_mask_prob=0.3")),
        (1, ("optim.name=stable_adamw",)),
        (2, ("optim.name=stable_adamw", "train.parallel=fsdp", "train.checkpoint_activations=true")),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_weights(config, tmp_path, text_file, world, overrides):
    """Two ranks with AdamW, whole and sharded, are in test_phases.py. The first kill comes while the run begins."""
    steps, kills = (24, (0, 6, 14)) if world == 1 else (14, (0, 8))  # a step of two ranks takes three times as long
    settings = (f"train.steps={steps}", "train.save_every=3", "train.log_every=4", *overrides)
    config = write_config(tmp_path, text_file, config.model.architecture, *settings)
    expected, run, began = tmp_path / "straight", tmp_path / "killed", time.perf_counter()
    complete(config, expected, world)
    longest = (time.perf_counter() - began) / 2
    for reached in kills:
        seconds = random.Random().uniform(0, 0.2 if reached else longest)
        kill_when(lambda step=reached: last_step(run) >= step, Ranks(config, run, world), seconds)
    complete(config, run, world)
    assert same_weights(run / "model", expected / "model")
    kept, whole = ([entry | {"tokens_per_second": 0} for entry in log_lines(each)] for each in (run, expected))
    assert kept == whole
    assert not list(run.rglob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("world", [1, 2])
def test_a_signal_saves_and_leaves(config, tmp_path, world, number):
    """Until then, a second training in its folder is refused."""
    config = replace(config, train=replace(config.train, steps=100_000, save_every=100_000))
    run = tmp_path / "run"
    ranks = Ranks(config, run, world)
    wait_for(lambda: last_step(run), ranks)
    with pytest.raises(UserError, match=r"another process is using .*run: wait for it"):
        train(config, run)
    ranks.signal(number)
    assert ranks.wait() == [128 + number] * world, ranks.messages()
    [saved] = saved_checkpoints(run)
    step = json.loads((saved / "trainer.json").read_text())["position"]["cursor"]["step"]
    assert ranks.messages()[0] == (f"{number.name}: saved step {step} in {saved}: the same command resumes")


@pytest.mark.parametrize(("world", "second"), [(1, signal.SIGINT), (2, signal.SIGTERM)])  # as torchrun passes it on
def test_a_second_interrupt_stops_at_once(config, tmp_path, world, second):
    """In a step that takes minutes."""
    config = replace(config, train=replace(config.train, global_batch_tokens=256 * 100_000))
    run = tmp_path / "run"
    ranks = Ranks(config, run, world)
    wait_for(lambda: (run / "log.jsonl").exists(), ranks)
    ranks.signal(signal.SIGINT)
    time.sleep(0.5)
    assert all(process.is_alive() for process in ranks.processes)
    ranks.signal(second)
    assert ranks.wait() == [130] * world, ranks.messages()
    assert ranks.messages()[0] == "interrupted: all steps are lost"


def test_an_interrupt_that_python_ignores_comes_again(tmp_path):
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(StoppedError, match="all steps are lost"), stop_signals(tmp_path, find_ranks()):
        signal.raise_signal(signal.SIGINT)
        Interrupted()
        time.sleep(60)


def test_the_number_of_ranks_and_workers_may_change(config, killed, tmp_path):
    """The same documents and masks in every global batch, so the same loss but for rounding."""
    for world, workers in ((1, 0), (2, 0), (1, 2)):
        run = shutil.copytree(killed, tmp_path / f"{world}-{workers}")
        complete(replace(config, data=replace(config.data, workers=workers)), run, world)
    first, *others = (log_lines(run) for run in sorted(tmp_path.iterdir()) if run.is_dir())
    for other in others:
        for entry, same in zip(first, other, strict=True):
            assert [entry[name] for name in ("step", "tokens", "masked")] == [
                same[name] for name in ("step", "tokens", "masked")
            ]
            assert same["loss"] == pytest.approx(entry["loss"], abs=2e-5)
            assert same["gradient_norm"] == pytest.approx(entry["gradient_norm"], rel=1e-3)


def test_a_disk_that_is_full_leaves_the_last_checkpoint(config, killed, tmp_path):
    """A limit on file size stands in for the full disk."""
    run = shutil.copytree(killed, tmp_path / "run")
    saved = saved_checkpoints(run)
    ranks = Ranks(config, run, limits=((resource.RLIMIT_FSIZE, 20_000),))
    assert ranks.wait() == [2], ranks.messages()
    [message] = ranks.messages()
    assert "File too large" in message and f"the same command resumes from {saved[-1]}" in message
    assert saved_checkpoints(run) == saved
    assert same_weights(saved[-1], killed / saved[-1].relative_to(run))
    assert not list((run / "checkpoints").glob(".*"))


def test_held_out_evaluation_keeps_the_best(config, tmp_path, text_file):
    """The same masks at every checkpoint, the same metrics as `mlmkit eval`, and the best checkpoint kept."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("".join(text_file.read_text().splitlines(keepends=True)[::20]))
    # The learning rate is so high, at the end of a constant schedule, that the last checkpoints are worse.
    config = replace(
        config,
        data=replace(config.data, held_out=str(held_out)),
        optim=replace(config.optim, lr=0.1, warmup_steps=39, schedule="wsd", decay_share=0.01),
        train=replace(config.train, steps=40, save_every=5),
    )
    run = tmp_path / "run"
    model = train(config, run)
    entries = [line for line in log_lines(run) if "held_out" in line]
    assert [entry["step"] for entry in entries] == list(range(5, 41, 5))
    assert len({entry["held_out"]["mask_digest"] for entry in entries}) == 1
    losses = {entry["step"]: entry["held_out"]["masked_cross_entropy"]["value"] for entry in entries}
    best = min(losses, key=lambda step: losses[step])
    assert best < 35, losses  # else this tests nothing
    assert [int(folder.name[5:]) for folder in saved_checkpoints(run)] == [best, 35, 40]
    again = evaluate(model, held_out)
    summary = json.loads((run / "held_out.json").read_text())["held-out"]
    assert summary["mask_digest"] == again.result["mask_digest"]
    assert summary["masked_cross_entropy"] == again.metrics["masked_cross_entropy"]
    assert (saved_checkpoints(run)[-1] / HELD_OUT / "tokens.parquet").exists()
    assert not (model / HELD_OUT).exists()


def test_another_held_out_text_is_measured_anew(config, tmp_path, text_file):
    """Losses on two texts are not compared, so the best checkpoint of each is kept."""
    lines, texts = text_file.read_text().splitlines(keepends=True), {name: tmp_path / f"{name}.txt" for name in "ab"}
    for begin, path in enumerate(texts.values()):
        path.write_text("".join(lines[begin::30]))
    # The rate is so high, and the schedule constant, that an early checkpoint is the best on either text.
    optim = replace(config.optim, lr=0.1, warmup_steps=39, schedule="wsd", decay_share=0.01)
    train_settings = replace(config.train, steps=40, save_every=5, keep_checkpoints=1)
    first, second = (
        replace(config, data=replace(config.data, held_out=str(path)), optim=optim, train=train_settings)
        for path in texts.values()
    )
    run = tmp_path / "run"
    kill_when(lambda: last_step(run) >= 17, Ranks(first, run))
    resumed = saved_checkpoints(run)[-1]
    model = train(second, run)
    evaluations = [(line["step"], line["held_out"]) for line in log_lines(run) if "held_out" in line]
    losses = [(step, each["mask_digest"], each["masked_cross_entropy"]["value"]) for step, each in evaluations]
    measured = [(step, digest) for step, digest, _ in losses]
    digests = list(dict.fromkeys(digest for _, digest in measured))
    step = int(resumed.name[5:])
    assert len(digests) == 2
    assert [number for number, digest in measured if digest == digests[0]] == list(range(5, step + 1, 5))
    assert [number for number, digest in measured if digest == digests[1]] == list(range(step, 41, 5))
    results = {
        (folder.parent.name, json.loads((folder / "result.json").read_text())["mask_digest"])
        for folder in run.glob(f"checkpoints/*/{HELD_OUT}*")
    }
    best = [min((loss, step) for step, each, loss in losses if each == digest)[1] for digest in digests]
    assert best[0] < 40, losses  # else this tests nothing
    kept = {(f"step-{step:08d}", digest) for step, digest in zip([*best, 40], [*digests, digests[1]], strict=True)}
    assert kept <= results
    assert {folder.name for folder in saved_checkpoints(run)} == {name for name, _ in kept}

    before = weights(model)
    for config, digest in ((first, digests[0]), (second, digests[1])):  # of a finished run too
        assert train(config, run) == model
        assert json.loads((run / "held_out.json").read_text())["held-out"]["mask_digest"] == digest
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert not list(model.glob(f"{HELD_OUT}*"))
    for checkpoint in saved_checkpoints(run):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="is finished and has no checkpoint to evaluate: use mlmkit eval"):
        train(first, run)


TRAINS = """
if __name__ == "__main__":
    import multiprocessing, sys, time
    from pathlib import Path
    from mlmkit.token_cache import load_corpus
    from mlmkit.locations import Source
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig
    from mlmkit.train.data import TrainingData
    from mlmkit.train.order import Cursor

    tokenizer = Tokenizer.from_folder(Path(sys.argv[2]))
    corpus = load_corpus(Source(sys.argv[1]), tokenizer)
    run = RunConfig(steps=10**9, global_batch_tokens=32000, micro_batch_tokens=64)
    config = Config(data=DataConfig(train=("text.txt",)), model=ModelConfig(max_length=32), train=run)
    data = TrainingData(config, [corpus], tokenizer, packed=True)
    batches = data.batches(Cursor(), workers=2)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[3] == "raise":
        raise SystemExit(3)
    for _ in batches:
        time.sleep(0.01)
"""


@pytest.mark.parametrize("end", ["kill", "raise"])
def test_workers_end_with_the_trainer(text_file, tokenizer_folder, tmp_path, end):
    """The trainer is killed, or exits with the batches still open."""
    (tmp_path / "trains.py").write_text(TRAINS)
    shared = set(Path("/dev/shm").iterdir())
    command = [sys.executable, str(tmp_path / "trains.py"), str(text_file), str(tokenizer_folder("wordpiece")), end]
    trainer = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())}
    )
    assert trainer.stdout
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2
    if end == "kill":
        assert all(is_alive(pid) for pid in workers)
        trainer.kill()
    assert trainer.wait(timeout=30) == (-9 if end == "kill" else 3)
    trainer.stdout.close()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)
    assert set(Path("/dev/shm").iterdir()) <= shared


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
