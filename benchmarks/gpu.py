"""Everything that is measured on a GPU, in one run of less than nine minutes.

Sections, in this order:

- rates: matrix products per precision, and copies,
- parity: whether packed and padded, compiled and eager, GPU and CPU give the same log-probabilities,
- evaluation: torch in float32, bfloat16 and float16, eager, compiled and as a CUDA graph, against the matrix rate,
- training: mlmkit beside transformers.Trainer in real tokens per second, with MFU,
- runtimes: ONNX Runtime and TensorRT beside torch, in fp16, at two shapes,
- graphs, flash, autotune: three experiments, each beside the default.

Each section has a deadline, and the next one may use the time that it leaves. A section that fails or runs out of time
keeps its rows and does not stop the others. The report is written after every row, to results/<gpu>-<date>.json or to
`--json`, so nothing is lost if the machine is taken away. `--only SECTION ...` runs these without deadlines, and the
runtimes then in every precision and shape.

Without a GPU, `--quick` is a dry run on the CPU with tiny models. It writes a file only with `--json`.
"""

import argparse
import gc
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from typing import Any, NamedTuple

import inputs
from gpu_timing import FAILED, Figures, Row, Setting, failure
from harness import Report, SkippedError, main, processor, say, table, write
from processes import ROOT, Contestant, ContestantError, isolated

SKIPPED, STOPPED = "the section", "the rest"  # names of the rows that say why a section was skipped or stopped
NO_DEADLINE = 86_400  # seconds


class Section(NamedTuple):
    """`module` has a function of the section's name that yields its rows; only the worker loads it, with torch.

    `until` is the deadline, in seconds after the start of the run.
    """

    title: str
    module: str
    until: float


SECTIONS = {
    "rates": Section("Matrix products and copies", "gpu_timing", 45),
    "parity": Section("Parity", "gpu_parity", 140),
    "evaluation": Section("Evaluation", "gpu_evaluation", 235),
    "training": Section("Training", "gpu_training", 365),
    "runtimes": Section("ONNX Runtime and TensorRT", "gpu_evaluation", 445),
    "graphs": Section("Experiment: a CUDA graph per length", "gpu_evaluation", 475),
    "flash": Section("Experiment: FlashAttention", "gpu_training", 490),
    "autotune": Section("Experiment: autotuned", "gpu_training", 530),  # last, as its duration is the least certain
}
Results = dict[str, dict[str, Figures]]  # rows by section


def measure(options: argparse.Namespace) -> Report:
    """Every section, in one process that is replaced only after a failure or a missed deadline."""
    began = time.perf_counter()
    only = [name for name in options.only if name]
    if unknown := set(only) - SECTIONS.keys():
        raise SkippedError(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    device, name = isolated(find_device)
    if device == "cpu" and not options.quick:
        raise SkippedError("torch finds no GPU here: --quick makes a dry run on the CPU")
    setting = Setting(device, name, options.quick, options.rounds, all_runtimes=bool(only))
    os.environ.setdefault("MLMKIT_CACHE", str(inputs.kept_folder() / "cache"))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    default_path = ROOT / "benchmarks" / "results" / f"{slug}-{datetime.now(UTC):%Y-%m-%d}.json"
    path = options.json or (None if options.quick else default_path)
    results: Results = {section: {} for section in only or SECTIONS}
    ended: dict[str, float] = {}
    worker = None
    for section, rows in results.items():
        title, _, until = SECTIONS[section]
        say(f"{time.perf_counter() - began:.0f} s: {title}")
        worker = worker or Contestant(start_worker)
        for name, figures in _rows(worker, section, setting, began + (NO_DEADLINE if only else until)):
            rows[name] = figures
            if path:
                write(report(setting, results, ended), path, time.perf_counter() - began)
        ended[title] = time.perf_counter() - began
        if section == "rates":
            measured = {name: 1e12 * row["TFLOP/s"] for name, row in rows.items() if "TFLOP/s" in row}
            setting = replace(setting, rates=measured)
        if FAILED in rows.get(STOPPED, {}):
            worker.kill()
            worker = None
    if worker:
        worker.kill()
    return report(setting, results, ended)


def find_device() -> tuple[str, str]:
    """The device to measure, cuda or cpu, and its name."""
    import torch

    return ("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", processor())


def _rows(worker: Contestant, section: str, setting: Setting, until: float) -> Iterator[Row]:
    """A section's rows as the worker measures them; the last one says so if it failed or ran out of time."""
    try:
        while row := worker.call(next_row, section, setting, timeout=max(until - time.perf_counter(), 0.0)):
            yield row
    except ContestantError as error:
        yield STOPPED, {FAILED: str(error)}


def report(setting: Setting, results: Results, ended: dict[str, float]) -> Report:
    notes = [f"On {setting.name}."]
    if setting.quick:
        notes.append("A dry run with tiny models: these figures mean nothing.")
    titled = {SECTIONS[section].title: rows for section, rows in results.items()}
    return Report(
        [table(title, [{"": name, **row} for name, row in rows.items()]) for title, rows in titled.items()],
        notes,
        figures={"device": setting.name, "quick": setting.quick, "ended_after_seconds": ended, "sections": titled},
    )


def start_worker() -> dict[str, Any]:
    """The worker's state. It leads a process group, which includes the processes that it starts."""
    os.setsid()
    return {}


def next_row(state: dict[str, Any], section: str, setting: Setting) -> Row | None:
    """The next row of a section, which is started if it is not the current one; None at its end."""
    import torch

    if state.get("section") != section:
        state.update(section=section, rows=getattr(import_module(SECTIONS[section].module), section)(setting))
    try:
        return next(state["rows"])
    except StopIteration:
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()
        return None
    except SkippedError as error:  # any other error may have broken CUDA, and ends the worker
        return SKIPPED, failure(error)


if __name__ == "__main__":
    cores = os.cpu_count() or 2
    main(__doc__, measure, rounds=(3, 1), only=(("",), ("",)), threads=(cores, 2))
