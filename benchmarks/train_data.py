"""Training data: how full packs are, and how fast text becomes batches.

Rows of at most 512 tokens. A perfect packing fills 100 %. A worker must build batches far faster than a device trains
on them. Each measurement runs in a process of its own. Memory by corpus size: growth.py.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from harness import Report, main, table
from inputs import documents, tokenizer_folder, write_lines
from processes import isolated, memory_mib

BUDGETS = (512, 4096, 8192, 16384)


def measure(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MLMKIT_CACHE"] = str(folder / "cache")
        tokenizer = tokenizer_folder()
        text = write_lines(folder / "train.txt", documents()[: options.documents])
        plans = {budget: isolated(plan, tokenizer, text, budget) for budget in BUDGETS}
        reads = {workers: isolated(read, tokenizer, text, workers) for workers in options.workers}
    return Report(
        [
            table("Planning", [{"packs of": budget, **row} for budget, row in plans.items()]),
            table("Reading an epoch", [{"workers": workers, **row} for workers, row in reads.items()]),
        ],
        headlines={"pack_fill_8192": plans[8192]["fill, %"] / 100},
        figures={"plans": plans, "reads": reads},
    )


def training_data(
    tokenizer_path: Path, text: Path, budget: int, max_length: int = 512, micro_batches: int = 1
) -> tuple[Any, int]:
    """`TrainingData` as `mlmkit train` opens it, and the number of documents."""
    from mlmkit.locations import Source
    from mlmkit.token_cache import load_corpus
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig
    from mlmkit.train.data import TrainingData

    tokenizer = Tokenizer.from_folder(tokenizer_path)
    corpus = load_corpus(Source(str(text)), tokenizer, words=False)
    run = RunConfig(steps=1 << 30, global_batch_tokens=micro_batches * budget, micro_batch_tokens=budget)
    config = Config(data=DataConfig(train=(str(text),)), model=ModelConfig(max_length=max_length), train=run)
    return TrainingData(config, [corpus], tokenizer, packed=True), len(corpus)


def plan(tokenizer: Path, text: Path, budget: int) -> dict[str, Any]:
    """The packs of an epoch, planned but not built."""
    from mlmkit.train.order import Cursor

    rows = training_data(tokenizer, text, budget)[0].rows
    count, windows, tokens, most = 0, 0, 0, 0
    seconds, began = 0.0, time.perf_counter()
    for cursor, block, members in rows.packs(Cursor()):
        seconds += time.perf_counter() - began  # the counting below is not planning
        if cursor.epoch:
            break
        count += 1
        windows += len(members)
        tokens += int(block.length[members].sum()) + rows.added * len(members)
        most = max(most, len(members))
        began = time.perf_counter()
    return {
        "fill, %": 100 * tokens / count / budget,
        "windows/s": windows / seconds,
        "tokens/s": tokens / seconds,
        "documents per pack, mean": windows / count,
        "most": most,
    }


def epoch(data: Any, workers: int = 0) -> Iterator[int]:
    """The tokens of each step of an epoch, whose micro-batches are built and laid out."""
    from mlmkit.train.order import Cursor

    for cursor, batch in data.batches(Cursor(), workers=workers):
        if cursor.epoch:
            break
        yield sum(micro.tokens for micro in batch)


def read(tokenizer: Path, text: Path, workers: int) -> dict[str, Any]:
    """An epoch's micro-batches of 8,192 tokens; the first step, which starts the workers, has a figure of its own."""
    import_module("mlmkit.train.data")  # its imports are not part of the measurement
    before, began = memory_mib(), time.perf_counter()
    steps = epoch(training_data(tokenizer, text, 8192, micro_batches=4)[0], workers)
    next(steps, 0)
    first, began = time.perf_counter() - began, time.perf_counter()
    tokens, worker = 0, 0.0
    for step, of_step in enumerate(steps):
        tokens += of_step
        if step % 64 == 0:
            children = multiprocessing.active_children()
            worker = max([worker, *(memory_mib(process=str(child.pid)) for child in children)])
    return {
        "tokens": tokens,
        "tokens/s": tokens / (time.perf_counter() - began),
        "first batch, s": first,
        "above the start, MiB": memory_mib() - before,
        "largest worker, MiB": worker,
    }


if __name__ == "__main__":
    main(__doc__, measure, documents=(1 << 30, 300), workers=((0, 1, 2), (0, 1)))
