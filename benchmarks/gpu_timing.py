"""How gpu.py times and records: its setting, rows, alternatives that take turns, and the rates of the device.

A section is a generator of rows, each a name with its figures. A row replaces an earlier one of the same name, so a
section can yield a first value early and refine it later.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import inputs
import numpy as np
from harness import SkippedError, alternate, matrix_rate, ratios
from numpy.typing import NDArray

Figures = dict[str, Any]
Row = tuple[str, Figures]
Function = Callable[..., Any]
LogProbs = NDArray[np.float32]
FAILED, NEEDS_GPU = "failed", "needs a GPU"


@dataclass(frozen=True)
class Setting:
    """`device` is cuda or cpu, `name` its name. `rates` are measured operations per second by dtype."""

    device: str
    name: str
    quick: bool
    rounds: int
    all_runtimes: bool = False  # in every precision and shape
    rates: Mapping[str, float] = field(default_factory=dict)

    def checkpoint(self, architecture: str) -> Path:
        """A checkpoint with random weights; a tiny one for a dry run."""
        return inputs.checkpoint(architecture, **(inputs.TINY if self.quick else {}))

    def seconds_per_call(self, call: Function) -> float:
        """The mean over calls queued back to back, after one uncounted call."""
        once = self._seconds_of(call, 1)
        return self._seconds_of(call, min(max(round((0.2 if self.device == "cuda" else 0.05) / once), 1), 1000))

    def _seconds_of(self, call: Function, count: int) -> float:
        import torch

        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        began = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - began) / count


def attempt(function: Function, *arguments: object) -> Any:
    """The result of a call, or figures that say why it failed, so that a failure does not affect other rows."""
    try:
        return function(*arguments)
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> Figures:
    reason = " ".join(str(error).split())[:300]
    return {FAILED: reason if isinstance(error, SkippedError) else f"{type(error).__name__}: {reason}"}


class Alternative(NamedTuple):
    """An alternative that is ready to run: `tokens` and `rows` per call, and further `figures` of its row.

    If it has `operations` per call, its figures include their share of `rate`.
    """

    call: Function
    tokens: int
    rows: int = 0
    operations: float = 0.0
    rate: float = 0.0
    figures: Figures = {}  # noqa: RUF012

    def speed(self, taken: list[float], default: list[float] | None) -> Figures:
        """The figures of its row, from the seconds per call of each round, its own and the default's."""
        seconds = median(taken)
        speed: Figures = {"ms per call": 1e3 * seconds, "tokens/s": self.tokens / seconds}
        if self.rows:
            speed["rows/s"] = self.rows / seconds
        if self.operations:
            speed["of the matrix rate"] = self.operations / seconds / self.rate if self.rate else None
        speed["x the default"] = median(ratios(taken, default)) if default else None
        return speed | self.figures


def compared(setting: Setting, makers: Mapping[str, Callable[[], Alternative]], default: str) -> Iterator[Row]:
    """Run each alternative once beside the default as soon as it is made, as the next may take too long.

    Then all of them take turns.
    """
    made: dict[str, Alternative] = {}

    def take_turns(names: Iterable[str], rounds: int) -> Iterator[Row]:
        calls = {name: partial(setting.seconds_per_call, made[name].call) for name in names}
        seconds = alternate(calls, rounds, warm=True)
        for name, taken in seconds.items():
            yield name, made[name].speed(taken, seconds.get(default))

    for name, make in makers.items():
        result = attempt(make)
        if isinstance(result, Alternative):
            made[name] = result
            yield from take_turns(made.keys() & {name, default}, 1)
        else:
            yield name, result
    yield from take_turns(made, setting.rounds)


def rates(setting: Setting) -> Iterator[Row]:
    """Matrix products, beside the data sheet's rate if it is known; copies within the device and to and from it."""
    for name in ("bfloat16", "float16", "tf32", "float32"):
        yield name, attempt(_matrix_rate, setting, name)
    yield "device to device", attempt(_bandwidth, setting, False, False)
    yield "host to device, pinned", attempt(_bandwidth, setting, True, False)
    yield "device to host, pinned", attempt(_bandwidth, setting, False, True)


def _matrix_rate(setting: Setting, name: str) -> Figures:
    import torch

    from mlmkit.train.cost import peak_flops

    if name in ("tf32", "float16") and setting.device == "cpu":  # CPUs have no tf32, and float16 is emulated
        raise SkippedError(NEEDS_GPU)
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    rate = matrix_rate(setting.device, "float32" if name == "tf32" else name)
    nominal = peak_flops(setting.name) if name == "bfloat16" else 0.0
    return {
        "TFLOP/s": rate / 1e12,
        "nominal TFLOP/s": nominal / 1e12 or None,
        "of the nominal": rate / nominal if nominal else None,
    }


def _bandwidth(setting: Setting, from_host: bool, to_host: bool) -> Figures:
    """Within the device, bytes read and bytes written both count; otherwise only those transferred."""
    import torch

    if setting.device == "cpu" and (from_host or to_host):
        raise SkippedError(NEEDS_GPU)
    size = 1 << 20 if setting.quick else 1 << 30
    source, target = (
        torch.ones(size, dtype=torch.uint8, device="cpu" if on_host else setting.device, pin_memory=on_host)
        for on_host in (from_host, to_host)
    )
    seconds = setting.seconds_per_call(lambda: target.copy_(source, non_blocking=True))
    return {"GB/s": (1 if from_host or to_host else 2) * size / seconds / 1e9}
