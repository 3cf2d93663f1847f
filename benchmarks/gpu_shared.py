"""What the sections of gpu.py and gpu_export.py share: where they run, rows as they are found, alternatives, the clock.

A section is a function of a `Setting` that yields rows, a name and figures each. A name that comes again replaces what
it said before, so a section may say early what it refines later.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from harness import SkippedError, Table, processor, ratios
from inputs import TINY, checkpoint

Figures = dict[str, Any]
Row = tuple[str, Figures]
FAILED, NEEDS_GPU = "failed", "needs a GPU"
LEAST_SECONDS = {"cuda": 0.2, "cpu": 0.05}  # of a measurement


@dataclass(frozen=True)
class Setting:
    """`device` is cuda or cpu, `name` what it is called. `rates` are operations a second, measured, by dtype."""

    device: str
    name: str
    quick: bool
    rounds: int
    rates: Mapping[str, float] = field(default_factory=dict)

    def checkpoint(self, architecture: str) -> Path:
        """Random weights; tiny ones where it is quick."""
        return checkpoint(architecture, **(TINY if self.quick else {}))


def find_device(device: str) -> tuple[str, str]:
    """What `device` (auto, cuda, cpu) is here, and its name. Raises `UserError` for CUDA where torch finds none."""
    import torch

    from mlmkit.backends.torch import pick_device

    device = pick_device(device)
    return device, torch.cuda.get_device_name() if device == "cuda" else processor()


# ---------------------------------------------------------------- rows


def attempt(name: str, function: Callable[..., Any], *arguments: object) -> tuple[str, Any]:
    """A row, or why there is none: what fails costs no other."""
    try:
        return name, function(*arguments)
    except Exception as error:
        return name, failure(error)


def failure(error: Exception) -> Figures:
    """Why there is no row, in one line."""
    said = " ".join(str(error).split())[:300]
    return {FAILED: said if isinstance(error, SkippedError) else f"{type(error).__name__}: {said}"}


def tables(title: str, rows: Mapping[str, Figures]) -> Iterator[Table]:
    """Neighbours with the same figures share a table; what failed comes last, with the reason."""
    worked = [(name, figures) for name, figures in rows.items() if FAILED not in figures]
    for header, group in groupby(worked, key=lambda row: tuple(row[1])):
        cells = [[name, *map(cell, figures.values())] for name, figures in group]
        yield Table(title, ["", *header], cells)
    if failed := [[name, figures[FAILED]] for name, figures in rows.items() if FAILED in figures]:
        yield Table(f"{title}: not measured" if title else "Not measured", ["", "because"], failed)


def cell(value: object) -> str:
    """Three digits that count."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------- alternatives


class Made(NamedTuple):
    """An alternative, ready to run, with `tokens` and `rows` a call; `figures` are what else is to be said of it.

    The share of `rate` that its `operations` reach is shown where there are any.
    """

    call: Callable[[], Any]
    tokens: int
    rows: int = 0
    operations: float = 0.0
    rate: float = 0.0
    figures: Figures = {}  # noqa: RUF012


def compared(setting: Setting, makers: Mapping[str, Callable[[], Made]], default: str) -> Iterator[Row]:
    """Alternatives, first each once beside the default, as the next may take too long to make, then all in turns."""
    made: dict[str, Made] = {}

    def rounds(names: Iterable[str], count: int) -> Iterator[Row]:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(count):
            for name, taken in seconds.items():
                taken.append(seconds_a_call(made[name].call, setting.device))
        for name, taken in seconds.items():
            yield name, _figures(made[name], taken, seconds.get(default))

    for name, make in makers.items():
        _, found = attempt(name, make)
        if isinstance(found, Made):
            made[name] = found
            yield from rounds(made.keys() & {name, default}, 1)
        else:
            yield name, found
    yield from rounds(made, setting.rounds)


def _figures(made: Made, taken: list[float], default: list[float] | None) -> Figures:
    seconds = median(taken)
    found: Figures = {"ms a call": 1e3 * seconds, "tokens/s": made.tokens / seconds}
    if made.rows:
        found["rows/s"] = made.rows / seconds
    if made.operations:
        found["of the matrix rate"] = made.operations / seconds / made.rate if made.rate else None
    found["x the default"] = median(ratios(taken, default)) if default else None
    return found | made.figures


def seconds_a_call(call: Callable[[], object], device: str) -> float:
    """At the device's own pace: calls queued one behind another, after one alone."""
    once = _queued(call, device, 1)
    return _queued(call, device, min(max(round(LEAST_SECONDS[device] / once), 1), 1000))


def _queued(call: Callable[[], object], device: str, calls: int) -> float:
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - began) / calls


# ---------------------------------------------------------------- ways to run


def compiled(function: Callable[..., Any], device: str, mode: str | None = None) -> Callable[..., Any]:
    """For each shape anew, as GPUs like it. On a CPU the graph is traced, and run as it is: it shows what can be."""
    import torch

    how: dict[str, Any] = {"mode": mode} if device == "cuda" else {"backend": "aot_eager"}
    return torch.compile(function, dynamic=False, **how)


class Captured:
    """A function of tensors recorded as a CUDA graph, for their shapes.

    A call copies its inputs in and replays; what it returns is overwritten by the next. Raises `SkippedError` without
    a GPU.
    """

    def __init__(self, function: Callable[..., Any], inputs: Iterable[Any]) -> None:
        import torch

        if not torch.cuda.is_available():
            raise SkippedError(NEEDS_GPU)
        self._inputs = [values.clone() for values in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up on a first run must not be recorded
            for _ in range(3):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Any) -> Any:
        for kept, values in zip(self._inputs, inputs, strict=True):
            kept.copy_(values)
        self._graph.replay()
        return self._output
