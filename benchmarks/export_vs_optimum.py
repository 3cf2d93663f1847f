"""Masked-LM scoring on the CPU: mlmkit's artifact against optimum-onnx's graph of the same weights, one ONNX Runtime.

BERT-base's shape with random weights in float32, on real text with 15 % of its positions masked. Each contestant
computes the log-probability of every masked token. They take turns, each in a process of its own:

- mlmkit: the artifact through its ONNX backend, as `mlmkit score` and `eval` run it,
- optimum: what `optimum-cli export onnx --task fill-mask` writes. It returns the logits of every position; its user
  takes the masked rows and their log-softmax, here in numpy. Times are shown with and without that,
- optimum -O2: the same with optimum's strongest optimisation that does not approximate,
- PyTorch: the eager model of transformers with full logits, for orientation.

optimum-onnx needs transformers 4, so it exports in a process of its own from build/transformers4, which `make
build/transformers4/installed` installs; its graphs run in this environment. Fails if log-probabilities differ by more
than `BOUND`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from harness import Report, alternate, installed, main, ratios, table
from inputs import SHAPES, artifact, checkpoint, real_batch
from numpy.typing import NDArray
from processes import Contestant, ContestantError, calls, contestants, last_line

from mlmkit.backends import Batch

BOUND = 1e-3  # nats
TURN_TOKENS = 2048  # per turn, in 20 batches at most
PEER = "PyTorch, eager"


class Engine(NamedTuple):
    """`forward` runs a batch; `finish` turns its outputs into the targets' log-probabilities, float32 `[masked]`."""

    forward: Callable[[Batch], Any]
    finish: Callable[[Any, Batch], NDArray[np.float32]]


class Turn(NamedTuple):
    """Seconds per batch, in all and in `forward` alone, and the log-probabilities of the last batch."""

    seconds: float
    forward_seconds: float
    log_prob: NDArray[np.float32]


def take_turn(engine: Engine, batch: Batch, repeats: int) -> Turn:
    forward_seconds, began, log_prob = 0.0, time.perf_counter(), np.zeros(0, np.float32)
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = engine.forward(batch)
        forward_seconds += time.perf_counter() - start
        log_prob = engine.finish(outputs, batch)
    return Turn((time.perf_counter() - began) / repeats, forward_seconds / repeats, log_prob)


def export_with_optimum(packages: Path, source: Path, output: Path, *flags: str) -> Path:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--task", "fill-mask"]
    result = subprocess.run(
        [*command, "--model", source, *flags, output],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(packages)},
    )
    if result.returncode:
        raise ContestantError(f"optimum-cli failed: {last_line(result.stderr)}")
    return output / "model.onnx"


def run_optimum(graph: Path, threads: int) -> Engine:
    """A session as `ORTModelForMaskedLM` makes it, and the least that its user does to score."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
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


def run_mlmkit(artifact: Path) -> Engine:
    from mlmkit.backends import load

    backend = load(str(artifact), "onnx", "cpu")
    return Engine(backend.score, lambda scored, _: scored.log_prob)


def run_torch(source: Path, threads: int) -> Engine:
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
    packages = installed("transformers4")
    source = checkpoint("bert-base", num_hidden_layers=options.layers)
    target = artifact("bert-base", num_hidden_layers=options.layers)
    with tempfile.TemporaryDirectory() as temporary:
        plain = export_with_optimum(packages, source, Path(temporary) / "plain")
        optimised = export_with_optimum(packages, source, Path(temporary) / "O2", "--optimize", "O2")
        makers = {
            "mlmkit": (run_mlmkit, target),
            "optimum": (run_optimum, plain, options.threads),
            "optimum -O2": (run_optimum, optimised, options.threads),
            PEER: (run_torch, source, options.threads),
        }
        with contestants(makers) as started:
            apart = check(started)
            turns: dict[tuple[int, int, str], list[Turn]] = {}
            for size, length in SHAPES:
                repeats = min(max(1, TURN_TOKENS // (size * length)), 20)
                taken = alternate(calls(started, take_turn, real_batch(size, length), repeats), options.rounds)
                turns |= {(size, length, name): of_name for name, of_name in taken.items()}
            memory = {name: contestant.peak_gib() for name, contestant in started.items()}
    seconds = {key: [turn.seconds for turn in taken] for key, taken in turns.items()}
    fast = {key: ratios(seconds[*key[:2], "mlmkit"], taken) for key, taken in seconds.items()}
    rows = [
        {
            "shape": f"{size} x {length}",
            "": name,
            "tokens/s": size * length / median(seconds[size, length, name]),
            "tokens/s, session alone": size * length / median(turn.forward_seconds for turn in taken),
            "mlmkit is x times as fast": fast[size, length, name],
            "peak RSS GiB": memory[name],
        }
        for (size, length, name), taken in turns.items()
    ]
    return Report(
        [table("", rows)],
        [f"Log-probabilities differ by at most {apart:.1e} nats."],
        {f"optimum_{size}x{length}_times_as_fast": median(fast[size, length, "optimum"]) for size, length in SHAPES},
        figures={f"{size} x {length}, {name}": taken for (size, length, name), taken in seconds.items()},
    )


def check(started: dict[str, Contestant]) -> float:
    """The largest difference from PyTorch, on a full and on a ragged batch."""
    worst = 0.0
    for batch in (real_batch(2, 64), real_batch(5, 48, ragged=True)):
        log_probs = {name: contestant.call(take_turn, batch, 1).log_prob for name, contestant in started.items()}
        for name, log_prob in log_probs.items():
            apart = float(np.abs(log_prob.astype(np.float64) - log_probs[PEER]).max())
            assert apart <= BOUND, f"{name}: log-probabilities differ by {apart:.1e} nats from PyTorch's"
            worst = max(worst, apart)
    return worst


if __name__ == "__main__":
    main(__doc__, measure, layers=(0, 2), rounds=(3, 1))
