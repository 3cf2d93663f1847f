"""How time and memory grow with the corpus: tokenising, evaluating and training at 1, 4 and 16 times as much text.

The text is repeated with a number before each document, so that no two are alike and nothing can be taken from a
cache. The model is a tiny one with random weights, as it is the corpus whose cost is asked for. Each measurement is a
process of its own; memory is its peak above what it was before it opened the text. Training counts the seconds of a
whole epoch's batches, built and laid out, and of 20 steps, which must not depend on the corpus.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Bars, Report, Table, isolated, main, memory_mib
from inputs import TINY, artifact, checkpoint, documents

from mlmkit.documents import Source

STEPS = 20
MAX_LENGTH, BUDGET = 128, 8192
HEADER = ["text", "documents, or steps", "tokens", "seconds", "tokens/s", "x the first's", "peak above the start, MiB"]


def measure(options: argparse.Namespace) -> Report:
    """A table a kind of work."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MLMKIT_CACHE"] = str(folder / "cache")
        source, target = checkpoint("bert-mini", **TINY), artifact("bert-mini", **TINY)
        texts = {times: write_text(folder / f"{times}.txt", options.megabytes, times) for times in options.times}
        figures: dict[str, list[dict[str, float]]] = {}
        # In this order: tokenising fills the cache that training reads; evaluation has its own.
        for name, work, model in (
            ("tokenising", tokenise, source),
            ("tokenising again, from the cache", tokenise, source),
            ("evaluating (masked, ONNX Runtime)", evaluate, target),
            ("an epoch of training batches", read_epoch, source),
            (f"{STEPS} steps of training", train, source),
        ):
            figures[name] = [isolated(work, model, text, folder / f"output-{len(figures)}") for text in texts.values()]
    tables = []
    for name, found in figures.items():
        rows = [
            [
                f"{options.megabytes * times:g} MB",
                f"{row['documents']:,}",
                f"{row['tokens']:,}",
                f"{row['seconds']:.2f}",
                f"{row['tokens'] / row['seconds']:,.0f}",
                f"{row['seconds'] / found[0]['seconds']:.2f}",
                f"{row['growth']:.0f}",
            ]
            for times, row in zip(options.times, found, strict=True)
        ]
        tables.append(Table(name, HEADER, rows))
    evaluated, epoch = figures["evaluating (masked, ONNX Runtime)"], figures["an epoch of training batches"]
    return Report(
        tables,
        [
            f"Linear is {' : '.join(f'{times / options.times[0]:g}' for times in options.times)} in seconds. "
            "Evaluation works in parts of about 262,144 tokens: with less text than one its memory is smaller."
        ],
        {
            "evaluation_memory_growth_mib": evaluated[-1]["growth"] - evaluated[0]["growth"],
            "training_memory_growth_mib": epoch[-1]["growth"] - epoch[0]["growth"],
        },
        Bars(
            "Peak memory above the start, evaluating",
            "MiB",
            {
                f"{options.megabytes * times:g} MB of text": [row["growth"]]
                for times, row in zip(options.times, evaluated, strict=True)
            },
        ),
        figures,
    )


# ---------------------------------------------------------------- text


def write_text(path: Path, megabytes: float, times: int) -> Path:
    """`times` copies of the same documents, each with the copy's number before it."""
    size, chosen = 0, []
    for document in documents():
        chosen.append(document)
        size += len(document.encode()) + 1
        if size > megabytes * 1e6:
            break
    with path.open("w", encoding="utf-8") as file:
        for copy in range(times):
            file.writelines(f"{copy} {document}\n" for document in chosen)
    return path


# ---------------------------------------------------------------- the work, each in a process of its own


def tokenise(source: Path, text: Path, _output: Path) -> dict[str, Any]:
    """The text into the cache, or from there."""
    from mlmkit.corpus import load_corpus
    from mlmkit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(source)
    before, began = memory_mib(), time.perf_counter()
    corpus = load_corpus(Source(str(text)), tokenizer)
    return found(before, time.perf_counter() - began, len(corpus), len(corpus.ids))


def evaluate(target: Path, text: Path, output: Path) -> dict[str, Any]:
    """`mlmkit eval`, masked."""
    from mlmkit.backends import load
    from mlmkit.eval.evaluate import evaluate
    from mlmkit.eval.material import TextMaterial
    from mlmkit.eval.passes import Settings

    backend = load(str(target))
    before, began = memory_mib(), time.perf_counter()
    material = TextMaterial(Source(str(text)), backend.tokenizer)
    corpus = evaluate(backend, material, Settings(), output, overwrite=True)["corpus"]
    return found(before, time.perf_counter() - began, corpus["documents"], corpus["tokens"])


def read_epoch(source: Path, text: Path, _output: Path) -> dict[str, Any]:
    """An epoch's micro-batches."""
    from mlmkit.corpus import load_corpus
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig
    from mlmkit.train.data import TrainingData
    from mlmkit.train.order import Cursor

    tokenizer = Tokenizer.from_folder(source)
    before, began = memory_mib(), time.perf_counter()
    corpus = load_corpus(Source(str(text)), tokenizer)
    run = RunConfig(global_batch_tokens=BUDGET, micro_batch_tokens=BUDGET)
    config = Config(data=DataConfig(train=(str(text),)), model=ModelConfig(max_length=MAX_LENGTH), train=run)
    data, tokens = TrainingData(config, [corpus], tokenizer, packed=True), 0
    for cursor, batch in data.batches(Cursor(), micro_batches=1, steps=1 << 30, workers=0):
        if cursor.epoch:
            break
        tokens += sum(micro.tokens for micro in batch)
    return found(before, time.perf_counter() - began, len(corpus), tokens)


def train(source: Path, text: Path, output: Path) -> dict[str, Any]:
    """`mlmkit train`, from the cache."""
    import json

    from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig, TokenizerConfig
    from mlmkit.train.loop import train

    output = output / text.stem
    config = Config(
        data=DataConfig(train=(str(text),)),
        tokenizer=TokenizerConfig(path=str(source)),
        model=ModelConfig(architecture=str(source / "config.json"), max_length=MAX_LENGTH),
        train=RunConfig(steps=STEPS, global_batch_tokens=2048, micro_batch_tokens=2048, device="cpu", log_every=1),
    )
    before, began = memory_mib(), time.perf_counter()
    train(config, output)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return found(before, time.perf_counter() - began, STEPS, sum(line["tokens"] for line in lines))


def found(before: float, seconds: float, documents: int, tokens: int) -> dict[str, Any]:
    """A row's figures."""
    return {"documents": documents, "tokens": tokens, "seconds": seconds, "growth": memory_mib() - before}


if __name__ == "__main__":
    main(__doc__, measure, megabytes=(0.4, 0.1), times=((1, 4, 16), (1, 2)))
