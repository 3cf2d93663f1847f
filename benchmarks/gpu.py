"""All that is to be measured on a GPU, in one go of less than nine minutes.

In this order: matrix products and copies; parity of packed with padded, compiled with eager, GPU with CPU; torch
evaluation; training against transformers.Trainer; ONNX Runtime and TensorRT; three experiments. The files of the
sections say what each measures (gpu_eval.py, gpu_parity.py, gpu_train.py, gpu_export.py, gpu_experiments.py).

A section has a time by which it must be done, and what one does not need the next may use. One that fails or is
stopped there costs no other, and its rows so far stay. The report is written again with each row, to
results/<gpu>-<date>.json or where --json says, so a machine that is taken away leaves what was measured.

Without a GPU, `--quick` makes a dry run on the CPU with tiny models; it writes nothing but where --json says.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from gpu_eval import device_rates, evaluation
from gpu_experiments import autotuned, flash_attention, graphs_by_length
from gpu_export import runtimes
from gpu_parity import parity
from gpu_shared import FAILED, Figures, Row, Setting, failure, find_device, tables
from gpu_train import training
from harness import ROOT, Report, SkippedError, isolated, main, say, write
from inputs import kept_folder

RATES = "Matrix products and copies"
REST = "the rest"
RESULTS = ROOT / "benchmarks" / "results"


class Section(NamedTuple):
    """`until`: seconds after the start of all."""

    measure: Callable[[Setting], Iterator[Row]]
    until: float


SECTIONS = {
    RATES: Section(device_rates, 45),
    "Parity": Section(parity, 140),
    "Evaluation": Section(evaluation, 235),
    "Training": Section(training, 365),
    "ONNX Runtime and TensorRT": Section(runtimes, 445),
    "Experiment: CUDA graphs a length": Section(graphs_by_length, 475),
    "Experiment: FlashAttention": Section(flash_attention, 490),
    "Experiment: autotuned": Section(autotuned, 530),  # the one whose time is least known
}
Found = dict[str, dict[str, Figures]]  # by section, rows


def measure(options: argparse.Namespace) -> Report:
    """Every section, in a process that only a failure or too long a section replaces."""
    began = time.perf_counter()
    device, name = isolated(find_device, options.device)
    if device == "cpu" and not options.quick:
        raise SkippedError("torch finds no GPU here: --quick makes a dry run on the CPU")
    setting = Setting(device, name, options.quick, options.rounds)
    os.environ.setdefault("MLMKIT_CACHE", str(kept_folder() / "cache"))
    path = options.json or (None if options.quick else RESULTS / f"{slug(name)}-{datetime.now(UTC):%Y-%m-%d}.json")
    found: Found = {title: {} for title in SECTIONS}
    ended: dict[str, float] = {}

    def keep(title: str, row: Row | None) -> None:
        if row:
            found[title][row[0]] = row[1]
        else:
            ended[title] = time.perf_counter() - began
        if path:
            write(report(setting, found, ended), path, time.perf_counter() - began)

    titles = list(SECTIONS)
    while titles:
        titles = run(titles, replace(setting, rates=rates(found[RATES])), began, keep)
    return report(setting, found, ended)


# ---------------------------------------------------------------- processes


def run(titles: list[str], setting: Setting, began: float, keep: Callable[[str, Row | None], None]) -> list[str]:
    """Sections one after another in one process. Returns those that are left where one fails or takes too long."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, titles, setting))
    process.start()
    theirs.close()
    try:
        for place, title in enumerate(titles):
            say(f"{time.perf_counter() - began:.0f} s: {title}")
            ended = _follow(pipe, began + SECTIONS[title].until, partial(keep, title))
            keep(title, None)
            if not ended:
                return titles[place + 1 :]
        return []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # with the processes that it has started
        process.join()


def _follow(pipe: Any, until: float, keep: Callable[[Row], None]) -> bool:
    """Keep a section's rows; whether it ended by itself."""
    while (left := until - time.perf_counter()) > 0 and pipe.poll(left):
        try:
            row = pipe.recv()
        except (EOFError, OSError):
            keep((REST, {FAILED: "its process died"}))
            return False
        if isinstance(row, bool):
            return row
        keep(row)
    keep((REST, {FAILED: "stopped: out of time"}))
    return False


def _work(pipe: Any, titles: list[str], setting: Setting) -> None:
    """In the process: a section's rows, then whether the next may run here: a failure may have spoiled CUDA."""
    import torch

    os.setsid()
    sys.stdout = sys.stderr  # libraries print, and the report is to stand alone
    rows: dict[str, Figures] = {}
    for title in titles:
        try:
            for row in SECTIONS[title].measure(setting):
                pipe.send(row)
                rows[row[0]] = row[1]
        except Exception as error:
            pipe.send((REST, failure(error)))
            if not isinstance(error, SkippedError):
                pipe.send(False)
                return
        pipe.send(True)
        if title == RATES:
            setting = replace(setting, rates=rates(rows))
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


# ---------------------------------------------------------------- the report


def rates(rows: dict[str, Figures]) -> dict[str, float]:
    """Operations a second, by dtype."""
    return {name: 1e12 * figures["TFLOP/s"] for name, figures in rows.items() if "TFLOP/s" in figures}


def report(setting: Setting, found: Found, ended: dict[str, float]) -> Report:
    """Of what is there so far."""
    notes = [f"On {setting.name}."]
    if setting.quick:
        notes.append("A dry run with tiny models: these figures mean nothing.")
    return Report(
        [table for title, rows in found.items() for table in tables(title, rows)],
        notes,
        headlines(found),
        figures={"device": setting.name, "quick": setting.quick, "ended_after_seconds": ended, "sections": found},
    )


def headlines(found: Found) -> dict[str, float]:
    """Those that are there: what other pages quote."""
    wanted = {
        "gpu_matrix_tflops": (RATES, "bfloat16", "TFLOP/s"),
        **{
            f"gpu_{name}": ("Training", row, figure)
            for case, short in (("bert-base at 512", "bert"), ("modernbert-base at 1024", "modernbert"))
            for name, row, figure in (
                (f"{short}_training_tokens_per_second", f"{case}, mlmkit", "real tokens/s"),
                (f"{short}_training_mfu", f"{case}, mlmkit", "MFU, measured"),
                (f"{short}_training_ratio", f"{case}, Trainer, run_mlm.py", "mlmkit is x times as fast"),
            )
        },
    }
    values = {name: found[title].get(row, {}).get(figure) for name, (title, row, figure) in wanted.items()}
    return {name: value for name, value in values.items() if value}


def slug(name: str) -> str:
    """Fit for a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main(__doc__, measure, device=("auto", "auto"), rounds=(3, 1), threads=(os.cpu_count() or 2, 2))
