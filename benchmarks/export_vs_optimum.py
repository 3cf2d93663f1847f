"""Masked-LM scoring on the CPU: mlmkit's artifact against optimum-onnx's graph of the same weights, one ONNX Runtime.

BERT-base's shape with random weights in float32, on real text with 15 % of its positions masked; asked for is the
log-probability of what each mask hides. Contestants, each in a process of its own, taking turns:

- mlmkit: the artifact through its ONNX backend, as `mlmkit score` and `eval` run it,
- optimum: what `optimum-cli export onnx --task fill-mask` writes, which returns the logits of every position; of these
  its user takes the masked rows and their log-softmax, here in numpy. Both times are shown, with and without that,
- optimum -O2: the same with optimum's strongest optimisation that does not approximate,
- PyTorch: the eager model of transformers with full logits, for orientation.

optimum-onnx pins an older transformers, so it exports from a virtual environment of its own, made on the first run
(its graphs are run in the environment at hand). Fails if log-probabilities differ by more than `BOUND`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from engines import SHAPES, Engine, Shape, Turn, cpu_session, rounds_of, run_backend, take_turn, worst_difference
from harness import (
    ROOT,
    Bars,
    Contestant,
    Report,
    SkippedError,
    Table,
    last_line,
    main,
    peak_mib,
    ratios,
    say,
    spread,
)
from inputs import artifact, checkpoint, real_batch

from mlmkit.backends import Batch

OPTIMUM = "optimum-onnx[onnxruntime]==0.1.0"
BOUND = 1e-3  # nats
PEER = "PyTorch, eager"
VENV = ROOT / "build" / "optimum-venv"  # git ignores build/


def optimum_environment(folder: Path) -> Path:
    """The folder of its commands. The environment is made if it is not there, with the torch version at hand."""
    commands = folder / "bin"
    if not (commands / "optimum-cli").exists():
        say(f"installing {OPTIMUM} into {folder}")
        torch = f"torch=={version('torch').split('+')[0]}"
        try:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([commands / "python", "-m", "pip", "install", "--quiet", torch, OPTIMUM], check=True)
        except subprocess.CalledProcessError as error:
            raise SkippedError(f"{OPTIMUM} could not be installed: {error}") from None
    return commands


def export_with_optimum(commands: Path, source: Path, output: Path, *flags: str) -> None:
    """Quietly, unless it fails."""
    command = [commands / "optimum-cli", "export", "onnx", "--task", "fill-mask", "--model", source, *flags, output]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if result.returncode:
        raise SkippedError(f"optimum-cli failed: {last_line(result.stderr)}")


def run_optimum(graph: Path, threads: int) -> Engine:
    """A session as `ORTModelForMaskedLM` makes it, and the least that its user does to score."""
    session = cpu_session(graph, threads)
    names = {value.name for value in session.get_inputs()}

    def forward(batch: Batch) -> Any:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        inputs |= {"token_type_ids": np.zeros_like(batch.input_ids)}
        return session.run(["logits"], {name: values for name, values in inputs.items() if name in names})[0]

    def finish(logits: Any, batch: Batch) -> Any:
        rows = logits.reshape(-1, logits.shape[-1])[batch.positions]
        rows -= rows.max(axis=-1, keepdims=True)
        return rows[np.arange(len(rows)), batch.targets] - np.log(np.exp(rows).sum(axis=-1))

    return Engine(forward, finish)


def run_torch(source: Path, threads: int) -> Engine:
    """The eager model with full logits."""
    import torch
    from transformers import AutoModelForMaskedLM

    torch.set_num_threads(threads)
    model = AutoModelForMaskedLM.from_pretrained(source).eval()

    def forward(batch: Batch) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)).logits

    def finish(logits: Any, batch: Batch) -> Any:
        rows = logits.flatten(0, 1)[torch.from_numpy(batch.positions)].log_softmax(-1)
        return rows.gather(-1, torch.from_numpy(batch.targets)[:, None])[:, 0].numpy()

    return Engine(forward, finish)


def measure(options: argparse.Namespace) -> Report:
    """Export, check that all agree, let them take turns."""
    commands = optimum_environment(VENV)
    source = checkpoint("bert-base", num_hidden_layers=options.layers)
    target = artifact("bert-base", num_hidden_layers=options.layers)
    with tempfile.TemporaryDirectory() as temporary:
        plain, optimised = Path(temporary) / "plain", Path(temporary) / "O2"
        export_with_optimum(commands, source, plain)
        export_with_optimum(commands, source, optimised, "--optimize", "O2")
        contestants = {
            "mlmkit": Contestant(run_backend, str(target), "onnx", "cpu"),
            "optimum": Contestant(run_optimum, plain / "model.onnx", options.threads),
            "optimum -O2": Contestant(run_optimum, optimised / "model.onnx", options.threads),
            PEER: Contestant(run_torch, source, options.threads),
        }
        apart = check(contestants)
        turns = rounds_of(contestants, {shape: real_batch(*shape) for shape in SHAPES}, options.rounds)
        memory = {name: contestant.call(peak_mib) / 1024 for name, contestant in contestants.items()}
        for contestant in contestants.values():
            contestant.stop()
    fast = {shape: times_as_fast(of_shape) for shape, of_shape in turns.items()}
    return Report(
        [table(turns, fast, memory)],
        [f"Log-probabilities differ by at most {apart:.1e} nats."],
        {f"optimum_{rows}x{length}_times_as_fast": median(fast[rows, length]["optimum"]) for rows, length in SHAPES},
        Bars(
            "Scoring 32 rows of 128 tokens",
            "tokens a second",
            {name: [32 * 128 / turn.seconds for turn in taken] for name, taken in turns[32, 128].items()},
        ),
        {
            f"{rows} x {length}": {name: [turn.seconds for turn in taken] for name, taken in of_shape.items()}
            for (rows, length), of_shape in turns.items()
        },
    )


def check(contestants: dict[str, Contestant]) -> float:
    """The largest difference from PyTorch, on a full and on a ragged batch."""
    worst = 0.0
    for batch in (real_batch(2, 64), real_batch(5, 48, ragged=True)):
        found = {name: contestant.call(take_turn, batch, 1).log_prob for name, contestant in contestants.items()}
        for name, log_prob in found.items():
            apart = worst_difference(log_prob, found[PEER])
            if not apart <= BOUND:
                raise AssertionError(f"{name}: log-probabilities differ by {apart:.1e} nats from PyTorch's")
            worst = max(worst, apart)
    return worst


def times_as_fast(turns: dict[str, list[Turn]]) -> dict[str, list[float]]:
    """How many times as fast as each mlmkit was, in each round: scores against scores."""
    ours = [turn.seconds for turn in turns["mlmkit"]]
    return {name: ratios(ours, [turn.seconds for turn in taken]) for name, taken in turns.items()}


def table(
    turns: dict[Shape, dict[str, list[Turn]]], fast: dict[Shape, dict[str, list[float]]], memory: dict[str, float]
) -> Table:
    """A row a shape and contestant: medians, and mlmkit's ratio to it with its range within a round."""
    rows = []
    for (size, length), of_shape in turns.items():
        for name, taken in of_shape.items():
            seconds = [turn.seconds for turn in taken], [turn.forward_seconds for turn in taken]
            rates = [f"{size * length / median(values):,.0f}" for values in seconds]
            rows.append([f"{size} x {length}", name, *rates, spread(fast[size, length][name]), f"{memory[name]:.2f}"])
    header = ["shape", "", "tokens/s", "tokens/s, session alone", "mlmkit is x times as fast", "peak RSS GiB"]
    return Table("", header, rows)


if __name__ == "__main__":
    main(__doc__, measure, layers=(0, 2), rounds=(3, 1))
