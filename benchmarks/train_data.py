"""The training data: how full packs are, how fast text becomes batches, and that memory does not grow with the corpus.

The text is wiki_en, a paragraph a document, with the vocabulary of bert-base-uncased, at most 512 tokens a row. For
memory it is read a second time as a file of ten copies: the same documents again, but nothing in mlmkit knows that.
Each measurement is a process of its own. Memory is the peak of the main process, whose imports (torch, transformers)
take most of it, above what it was before the data was opened; and the peak of the largest worker, all in all.

MLMKIT_DATA names a folder with wiki_en/train.txt and tokenizers/bert-base-uncased/vocab.txt.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = "wiki_en/train.txt"
MAX_LENGTH = 512
BUDGETS = (512, 4096, 8192, 16384)


def main() -> None:
    """Prints a table a question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=10, help="how often the text stands in the larger file")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--megabytes", type=int, help="of the text, less than all for a quick look")
    parser.add_argument("--measure", choices=("tokenize", "plan", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure = {"tokenize": tokenize, "plan": plan, "read": read}[options.measure]
        print(json.dumps(measure(**options.arguments)))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = prepare(folder, options.copies, options.megabytes)
        os.environ["MLMKIT_CACHE"] = str(folder / "cache")
        show("tokenising | documents | tokens | MB/s | tokens/s | above the start, MiB")
        for text in texts:
            found = run("tokenize", folder, text)
            size = text.stat().st_size / 1e6
            rate = f"{size / found['seconds']:.1f} | {found['tokens'] / found['seconds']:,.0f}"
            row = f"{size:.0f} MB | {found['documents']:,} | {found['tokens']:,} | {rate} | {found['growth']:.0f}"
            print(f"| {row} |", flush=True)  # noqa: T201
        show("planning, packs of | fill | windows/s | tokens/s | documents a pack, mean | most")
        for budget in BUDGETS:
            found = run("plan", folder, texts[0], budget=budget)
            rates = f"{found['windows'] / found['seconds']:,.0f} | {found['tokens'] / found['seconds']:,.0f}"
            fill, mean = found["tokens"] / found["packs"] / budget, found["windows"] / found["packs"]
            print(f"| {budget} | {fill:.2%} | {rates} | {mean:.0f} | {found['most']} |", flush=True)  # noqa: T201
        show("reading an epoch | workers | tokens/s | first batch, s | above the start, MiB | largest worker, MiB")
        for text in texts:
            for workers in options.workers:
                found = run("read", folder, text, workers=workers)
                size = f"{text.stat().st_size / 1e6:.0f} MB"
                rate = f"{found['tokens'] / found['seconds']:,.0f} | {found['first']:.2f}"
                row = f"{size} | {workers} | {rate} | {found['growth']:.0f} | {found['worker']:.0f}"
                print(f"| {row} |", flush=True)  # noqa: T201


def show(header: str) -> None:
    """A table's head."""
    columns = "|".join("---" for _ in header.split("|"))
    print(f"\n| {header} |\n|{columns}|", flush=True)  # noqa: T201


def prepare(folder: Path, copies: int, megabytes: int | None) -> list[Path]:
    """The tokenizer at `folder/tokenizer`; the text once, and `copies` times."""
    from pll_sharing import bert_tokenizer, lines_of

    bert_tokenizer().save_pretrained(folder / "tokenizer")
    lines = lines_of(TEXT)
    text = "\n".join(lines)[: megabytes * 1_000_000 if megabytes else None] + "\n"
    paths = [folder / "once.txt", folder / "copies.txt"]
    for path, count in zip(paths, (1, copies), strict=True):
        with path.open("w", encoding="utf-8") as file:
            for _ in range(count):
                file.write(text)
    return paths


def run(measure: str, folder: Path, text: Path, **arguments: Any) -> dict[str, Any]:
    """What one of the functions below returns, in a process of its own."""
    values = json.dumps({"folder": str(folder), "text": str(text), **arguments})
    command = [sys.executable, __file__, "--measure", measure, "--arguments", values]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


# ---------------------------------------------------------------- measurements, each a process of its own


def tokenize(folder: str, text: str) -> dict[str, Any]:
    """The text into the cache."""
    from mlmkit.corpus import load_corpus
    from mlmkit.documents import Source
    from mlmkit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(Path(folder) / "tokenizer")
    before, began = peak(), time.perf_counter()
    corpus = load_corpus(Source(text), tokenizer)
    seconds = time.perf_counter() - began
    return {"documents": len(corpus), "tokens": len(corpus.ids), "seconds": seconds, "growth": peak() - before}


def training_data(folder: str, text: str, budget: int) -> Any:
    """As `mlmkit train` opens it."""
    from mlmkit.corpus import load_corpus
    from mlmkit.documents import Source
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.config import MaskingConfig
    from mlmkit.train.data import TrainingData

    tokenizer = Tokenizer.from_folder(Path(folder) / "tokenizer")
    corpus = load_corpus(Source(text), tokenizer)
    settings = {"max_length": MAX_LENGTH, "micro_batch_tokens": budget, "seed": 0, "packed": True}
    return TrainingData([corpus], (1.0,), tokenizer, MaskingConfig(), **settings)


def plan(folder: str, text: str, budget: int) -> dict[str, Any]:
    """The packs of an epoch, not built."""
    from mlmkit.train.order import Cursor

    packs = training_data(folder, text, budget).packs
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


def read(folder: str, text: str, workers: int) -> dict[str, Any]:
    """An epoch's micro-batches of 8,192 tokens, built and laid out."""
    import mlmkit.train.data
    from mlmkit.train.order import Cursor

    assert mlmkit.train.data  # its imports belong to the start
    before, began = peak(), time.perf_counter()
    data = training_data(folder, text, 8192)
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
            worker = max([worker, *(peak(pid) for pid in pids)])
    seconds = time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds, "first": first, "growth": peak() - before, "worker": worker}


def peak(pid: str = "self") -> float:
    """Peak resident MiB. Not ru_maxrss, which a process inherits from the one that started it."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
