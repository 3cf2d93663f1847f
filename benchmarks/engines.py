"""Engines that take turns at batches: what the export benchmarks share."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import Contestant, alternate
from numpy.typing import NDArray

from mlmkit.backends import Backend, Batch

Shape = tuple[int, int]  # rows, tokens a row
SHAPES: tuple[Shape, ...] = ((1, 16), (8, 128), (32, 128))
MATRICES = [(440, 768, 768), (440, 768, 3072), (440, 3072, 768), (2048, 768, 3072), (2048, 2048, 2048)]
LARGE_MATRICES = [(65536, 768, 3072), (8192, 8192, 8192)]  # what a GPU needs to be busy


class Engine(NamedTuple):
    """`forward` runs a batch; `finish` makes of its outputs the targets' log-probabilities, float32 `[masked]`."""

    forward: Callable[[Batch], Any]
    finish: Callable[[Any, Batch], NDArray[np.float32]]
    backend: Backend | None = None


class Turn(NamedTuple):
    """Seconds a batch, those of `forward` alone, and the log-probabilities of the last."""

    seconds: float
    forward_seconds: float
    log_prob: NDArray[np.float32]


def take_turn(engine: Engine, batch: Batch, repeats: int) -> Turn:
    """Run a batch `repeats` times."""
    forward_seconds, began, log_prob = 0.0, time.perf_counter(), np.zeros(0, np.float32)
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = engine.forward(batch)
        forward_seconds += time.perf_counter() - start
        log_prob = engine.finish(outputs, batch)
    return Turn((time.perf_counter() - began) / repeats, forward_seconds / repeats, log_prob)


def run_backend(path: str, name: str, device: str) -> Engine:
    """mlmkit as its users run it."""
    from mlmkit.backends import load

    backend = load(path, name, device)
    return Engine(backend.score, lambda scored, _: scored.log_prob, backend)


def cpu_session(graph: Path, threads: int, save: str = "") -> Any:
    """On ONNX Runtime; the graph as ONNX Runtime optimises it is left at `save`."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads
    settings.optimized_model_filepath = save
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    return onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])


def rounds_of(
    contestants: Mapping[str, Contestant],
    batches: Mapping[Shape, Batch],
    rounds: int,
    *,
    tokens: int = 2048,
    most: int = 20,
) -> dict[Shape, dict[str, list[Turn]]]:
    """Rounds of turns at each shape. A turn repeats a batch until it has about as many `tokens`, at `most` so often."""
    turns: dict[Shape, dict[str, list[Turn]]] = {}
    for shape, batch in batches.items():
        repeats = min(max(1, tokens // batch.input_ids.size), most)
        calls = {name: partial(contestant.call, take_turn, batch, repeats) for name, contestant in contestants.items()}
        turns[shape] = alternate(calls, rounds)
    return turns


# ---------------------------------------------------------------- figures


def matrix_rate(device: str, dtype: str = "float32") -> float:
    """Operations a second at which torch multiplies matrices here: the best over shapes like a model's, and large."""
    import torch

    best, kind = 0.0, getattr(torch, dtype)
    for rows, inner, columns in MATRICES + LARGE_MATRICES * (device == "cuda"):
        left = torch.randn(rows, inner, device=device).to(kind)
        right = torch.randn(inner, columns, device=device).to(kind)
        end = time.perf_counter() + 0.5
        while (began := time.perf_counter()) < end:
            torch.mm(left, right)[-1, -1].item()  # waits for the device
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best


def worst_difference(log_prob: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest |Δ log P| in nats; infinite where one is no number."""
    apart = np.abs(log_prob.astype(np.float64) - expected)
    return float(apart.max()) if np.isfinite(apart).all() else float("inf")
