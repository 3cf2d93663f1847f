"""The training data: how full packs are, and how fast text becomes batches.

Rows of at most 512 tokens. The floor of packing is a fill of 100 %; what one builds a second is to be seen against what
a device trains a second: two workers must be far above it. Each measurement is a process of its own. Memory: growth.py.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Report, Table, isolated, main, memory_mib
from inputs import documents, tokenizer_folder, write_lines

MAX_LENGTH = 512
BUDGETS = (512, 4096, 8192, 16384)


def measure(options: argparse.Namespace) -> Report:
    """A table a question."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MLMKIT_CACHE"] = str(folder / "cache")
        tokenizer_folder()
        text = write_lines(folder / "train.txt", documents()[: options.documents])
        plans = {budget: isolated(plan, text, budget) for budget in BUDGETS}
        reads = {workers: isolated(read, text, workers) for workers in options.workers}
    planning = [
        [
            budget,
            f"{found['tokens'] / found['packs'] / budget:.2%}",
            f"{found['windows'] / found['seconds']:,.0f}",
            f"{found['tokens'] / found['seconds']:,.0f}",
            f"{found['windows'] / found['packs']:.0f}",
            found["most"],
        ]
        for budget, found in plans.items()
    ]
    reading = [
        [
            workers,
            f"{found['tokens']:,}",
            f"{found['tokens'] / found['seconds']:,.0f}",
            f"{found['first']:.2f}",
            f"{found['growth']:.0f}",
            f"{found['worker']:.0f}",
        ]
        for workers, found in reads.items()
    ]
    return Report(
        [
            Table(
                "Planning", ["packs of", "fill", "windows/s", "tokens/s", "documents a pack, mean", "most"], planning
            ),
            Table(
                "Reading an epoch",
                ["workers", "tokens", "tokens/s", "first batch, s", "above the start, MiB", "largest worker, MiB"],
                reading,
            ),
        ],
        headlines={"pack_fill_8192": plans[8192]["tokens"] / plans[8192]["packs"] / 8192},
        figures={"plans": plans, "reads": reads},
    )


# ---------------------------------------------------------------- measurements, each in a process of its own


def training_data(text: Path, budget: int) -> Any:
    """As `mlmkit train` opens it."""
    from mlmkit.corpus import load_corpus
    from mlmkit.documents import Source
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig
    from mlmkit.train.data import TrainingData

    tokenizer = Tokenizer.from_folder(tokenizer_folder())
    corpus = load_corpus(Source(str(text)), tokenizer)
    run = RunConfig(global_batch_tokens=budget, micro_batch_tokens=budget)
    config = Config(data=DataConfig(train=(str(text),)), model=ModelConfig(max_length=MAX_LENGTH), train=run)
    return TrainingData(config, [corpus], tokenizer, packed=True)


def plan(text: Path, budget: int) -> dict[str, Any]:
    """The packs of an epoch, not built."""
    from mlmkit.train.order import Cursor

    packs = training_data(text, budget).packs
    found = {"packs": 0, "windows": 0, "tokens": 0, "most": 0}
    seconds, began = 0.0, time.perf_counter()
    for place, block, members in packs.plan(Cursor()):
        seconds += time.perf_counter() - began  # counting below is not planning
        if place.epoch:
            break
        found["packs"] += 1
        found["windows"] += len(members)
        found["tokens"] += int(block.length[members].sum()) + packs.added * len(members)
        found["most"] = max(found["most"], len(members))
        began = time.perf_counter()
    return {**found, "seconds": seconds}


def read(text: Path, workers: int) -> dict[str, Any]:
    """An epoch's micro-batches of 8,192 tokens, built and laid out."""
    import mlmkit.train.data
    from mlmkit.train.order import Cursor

    assert mlmkit.train.data  # its imports belong to the start
    before, began = memory_mib(), time.perf_counter()
    data = training_data(text, 8192)
    tokens, first, worker = 0, 0.0, 0.0
    for cursor, batch in data.batches(Cursor(), micro_batches=4, steps=1 << 30, workers=workers):
        if not first:
            first = time.perf_counter() - began
            began = time.perf_counter()
        elif cursor.epoch:
            break
        else:
            tokens += sum(micro.tokens for micro in batch)
        if cursor.step % 64 == 0:
            pids = [str(child.pid) for child in multiprocessing.active_children()]
            worker = max([worker, *(memory_mib(process=pid) for pid in pids)])
    seconds = time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds, "first": first, "growth": memory_mib() - before, "worker": worker}


if __name__ == "__main__":
    main(__doc__, measure, documents=(1 << 30, 300), workers=((0, 1, 2), (0, 1)))
