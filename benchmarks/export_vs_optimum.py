"""Masked-LM scoring on the CPU: mlmkit's artifact against optimum-onnx's graph of the same weights, one ONNX Runtime.

BERT-base's shape with random weights in float32, on real text with 15 % of its positions masked; asked for is the
log-probability of what each mask hides. Contestants, each in a process of its own, taking turns:

- mlmkit: the artifact through its ONNX backend, as `mlmkit score` and `eval` run it,
- optimum: what `optimum-cli export onnx --task fill-mask` writes, which returns the logits of every position; of these
  its user takes the masked rows and their log-softmax, here in numpy. Both times are shown, with and without that,
- optimum -O2: the same with optimum's strongest optimisation that does not approximate,
- PyTorch: the eager model of transformers with full logits, for orientation.

optimum-onnx pins an older transformers, so it exports from a virtual environment of its own, made on the first run
(its graphs are run in the environment at hand). MLMKIT_DATA: see engines.py. Fails if log-probabilities differ by more
than `BOUND`.
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
from engines import (
    SHAPES,
    Contestant,
    Engine,
    Shape,
    Turn,
    cpu_session,
    export_artifact,
    isolated,
    markdown,
    peak_gib,
    real_batch,
    rounds_of,
    run_backend,
    spread,
    take_turn,
    worst_difference,
    write_checkpoint,
)

from mlmkit.backends import Batch

OPTIMUM = "optimum-onnx[onnxruntime]==0.1.0"
BOUND = 1e-3  # nats
VENV = Path(__file__).resolve().parent.parent / "build" / "optimum-venv"  # git ignores build/


def optimum_environment(folder: Path) -> Path:
    """The folder of its commands. The environment is made if it is not there, with the torch version at hand."""
    commands = folder / "bin"
    if not (commands / "optimum-cli").exists():
        print(f"Installing {OPTIMUM} into {folder}", file=sys.stderr)  # noqa: T201
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        torch = f"torch=={version('torch').split('+')[0]}"
        subprocess.run([commands / "python", "-m", "pip", "install", "--quiet", torch, OPTIMUM], check=True)
    return commands


def export_with_optimum(commands: Path, checkpoint: Path, output: Path, *flags: str) -> None:
    """Quietly, unless it fails."""
    command = [commands / "optimum-cli", "export", "onnx", "--task", "fill-mask", "--model", checkpoint, *flags, output]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if result.returncode:
        sys.exit(f"optimum-cli failed:\n{result.stderr}")


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


def run_torch(checkpoint: Path, threads: int) -> Engine:
    """The eager model with full logits."""
    import torch
    from transformers import AutoModelForMaskedLM

    torch.set_num_threads(threads)
    model = AutoModelForMaskedLM.from_pretrained(checkpoint).eval()

    def forward(batch: Batch) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)).logits

    def finish(logits: Any, batch: Batch) -> Any:
        rows = logits.flatten(0, 1)[torch.from_numpy(batch.positions)].log_softmax(-1)
        return rows.gather(-1, torch.from_numpy(batch.targets)[:, None])[:, 0].numpy()

    return Engine(forward, finish)


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Export, check that all agree, measure, print."""
    commands = optimum_environment(options.optimum_venv)
    checkpoint = folder / "checkpoint"
    isolated(write_checkpoint, checkpoint, "bert-base", options.layers)
    export_artifact(checkpoint, folder / "artifact")
    export_with_optimum(commands, checkpoint, folder / "optimum")
    export_with_optimum(commands, checkpoint, folder / "optimum-O2", "--optimize", "O2")
    contestants = {
        "mlmkit": Contestant(run_backend, str(folder / "artifact"), "onnx", "cpu"),
        "optimum": Contestant(run_optimum, folder / "optimum" / "model.onnx", options.threads),
        "optimum -O2": Contestant(run_optimum, folder / "optimum-O2" / "model.onnx", options.threads),
        "PyTorch, eager": Contestant(run_torch, checkpoint, options.threads),
    }
    batches = {shape: real_batch(shape) for shape in SHAPES}
    print(f"log-probabilities differ by at most {check(contestants):.1e} nats", flush=True)  # noqa: T201
    turns = rounds_of(contestants, batches, options.rounds)
    memory = {name: contestant.call(peak_gib) for name, contestant in contestants.items()}
    print(table(turns, memory))  # noqa: T201
    print(verdict(turns))  # noqa: T201


def check(contestants: dict[str, Contestant]) -> float:
    """The largest difference from PyTorch, on a full and on a ragged batch."""
    worst = 0.0
    for batch in (real_batch((2, 64)), real_batch((5, 48), ragged=True)):
        found = {name: contestant.call(take_turn, batch, 1).log_prob for name, contestant in contestants.items()}
        for name, log_prob in found.items():
            apart = worst_difference(log_prob, found["PyTorch, eager"])
            if not apart <= BOUND:
                sys.exit(f"{name}: log-probabilities differ by {apart:.1e} nats from PyTorch's")
            worst = max(worst, apart)
    return worst


def table(turns: dict[Shape, dict[str, list[Turn]]], memory: dict[str, float]) -> str:
    """A row a shape and contestant: medians, and mlmkit's ratio to it with its range within a round."""
    rows = []
    for (size, length), of_shape in turns.items():
        for name, taken in of_shape.items():
            seconds = [turn.seconds for turn in taken], [turn.forward_seconds for turn in taken]
            rates = [f"{size * length / median(values):.0f}" for values in seconds]
            rows.append([f"{size} x {length}", name, *rates, spread(ratios(of_shape, name)), f"{memory[name]:.2f}"])
    header = ["shape", "", "tokens/s", "tokens/s, session alone", "mlmkit is x times as fast", "peak RSS GiB"]
    return markdown(header, rows)


def ratios(turns: dict[str, list[Turn]], other: str) -> list[float]:
    """How many times as fast mlmkit was, in each round: scores against scores."""
    return [theirs.seconds / ours.seconds for ours, theirs in zip(turns["mlmkit"], turns[other], strict=True)]


def verdict(turns: dict[Shape, dict[str, list[Turn]]]) -> str:
    """Against optimum as its command writes by default, and without its user's log-softmax too."""
    parts = []
    for (size, length), of_shape in turns.items():
        alone = [b.forward_seconds / a.seconds for a, b in zip(of_shape["mlmkit"], of_shape["optimum"], strict=True)]
        parts.append(
            f"{size} x {length}: {median(ratios(of_shape, 'optimum')):.2f} (session alone {median(alone):.2f})"
        )
    return f"\nmlmkit against optimum: {', '.join(parts)}."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 12, "rounds": 4, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--optimum-venv", type=Path, default=VENV, help="its environment, made if it is not there")
    parser.add_argument("--quick", action="store_true", help="a dry run: two layers, two rounds")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds = 2, 2
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # mlmkit's backend counts them
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        compare(options, Path(temporary))
