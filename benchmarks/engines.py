"""Engines that take turns at batches: shared by the benchmarks of exported graphs and of the GPU."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from harness import Contestant, alternate, calls
from numpy.typing import NDArray

from mlmkit.backends import Batch

Shape = tuple[int, int]  # rows, tokens per row
SHAPES: tuple[Shape, ...] = ((1, 16), (8, 128), (32, 128))
MATRICES = [(440, 768, 768), (440, 768, 3072), (440, 3072, 768), (2048, 768, 3072), (2048, 2048, 2048)]
LARGE_MATRICES = [(65536, 768, 3072), (8192, 8192, 8192)]  # large enough to fill a GPU


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
    """Run a batch `repeats` times."""
    forward_seconds, began, log_prob = 0.0, time.perf_counter(), np.zeros(0, np.float32)
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = engine.forward(batch)
        forward_seconds += time.perf_counter() - start
        log_prob = engine.finish(outputs, batch)
    return Turn((time.perf_counter() - began) / repeats, forward_seconds / repeats, log_prob)


def rounds_at(
    started: Mapping[str, Contestant], batch: Batch, rounds: int, *, tokens: int = 2048, most: int = 20
) -> dict[str, list[Turn]]:
    """Rounds of turns at a batch, each of which repeats it for about `tokens` tokens, at most `most` times."""
    repeats = min(max(1, tokens // batch.input_ids.size), most)
    return alternate(calls(started, take_turn, batch, repeats), rounds)


def run_backend(path: str, name: str, device: str) -> Engine:
    """mlmkit's backend as its users run it."""
    from mlmkit.backends import load

    backend = load(path, name, device)
    return Engine(backend.score, lambda scored, _: scored.log_prob)


def matrix_rate(device: str, dtype: str = "float32") -> float:
    """The most operations per second at which torch multiplies matrices here, of a model's shapes and of large ones."""
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
    """The largest |Δ log P| in nats; infinite if any value is not a number."""
    apart = np.abs(log_prob.astype(np.float64) - expected)
    return float(apart.max()) if np.isfinite(apart).all() else float("inf")
