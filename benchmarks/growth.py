"""How time and memory grow with the corpus: tokenising, evaluating and training, each row on four times as much text.

The training text is repeated with a number before each document, so no two documents are equal and no cache applies.
The model is tiny, with random weights, as only the corpus matters. Each measurement runs in a process of its own;
memory is its peak above what it was before it opened the text. For training: a whole epoch's batches, built and laid
out, and 20 steps on text that has been tokenised, whose seconds must not depend on the corpus. Evaluation is linear
and slow, so it stops after `--evaluated` sizes.
"""

import argparse
import os
import tempfile
import time
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

from harness import Report, main, table
from inputs import TINY, artifact, checkpoint, documents, logged_steps
from processes import isolated, memory_mib
from train_data import epoch, training_data

from mlmkit.locations import Source

STEPS, MAX_LENGTH = 20, 128


def measure(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MLMKIT_CACHE"] = str(folder / "cache")
        source, target = checkpoint("bert-mini", **TINY), artifact("bert-mini", **TINY)
        texts = [write_text(folder / f"{size:g}.txt", size) for size in options.megabytes]
        figures: dict[str, list[dict[str, float]]] = {}
        # In this order: tokenising fills the cache that training reads; evaluation has its own.
        for name, work, model, count in (
            ("tokenising", tokenise, source, len(texts)),
            ("tokenising again, from the cache", tokenise, source, len(texts)),
            ("evaluating (masked, ONNX Runtime)", evaluate, target, options.evaluated),
            ("an epoch of training batches", read_epoch, source, len(texts)),
            (f"{STEPS} steps of training", train, source, len(texts)),
        ):
            output = folder / f"output-{len(figures)}"
            figures[name] = [isolated(work, model, text, output) for text in texts[:count]]
    sizes = [f"{size:g} MB" for size in options.megabytes]
    linear = " : ".join(f"{size / options.megabytes[0]:g}" for size in options.megabytes)
    return Report(
        [table(name, records(sizes, rows)) for name, rows in figures.items()],
        [
            f"Linear growth would be {linear} in seconds. Evaluation is linear; it stops at "
            f"{sizes[options.evaluated - 1]}. It works in parts of about 262,144 tokens, so a text smaller than one "
            "part takes less memory. The text is repeated with a number before each document."
        ],
        figures=figures,
    )


def records(sizes: list[str], rows: list[dict[str, float]]) -> list[dict[str, object]]:
    return [
        {
            "text": size,
            "documents, or steps": row["documents"],
            "tokens": row["tokens"],
            "seconds": row["seconds"],
            "tokens/s": row["tokens"] / row["seconds"],
            "seconds, x the first row": row["seconds"] / rows[0]["seconds"],
            **({"without the steps, s": row["without_steps"]} if "without_steps" in row else {}),
            "peak above the start, MiB": row["growth"],
        }
        for size, row in zip(sizes, rows, strict=False)  # evaluation has fewer rows
    ]


def write_text(path: Path, megabytes: float) -> Path:
    """Write documents of the training text up to this size; each has the number of its repetition before it."""
    texts = documents()
    size = 0
    with path.open("wb") as file:
        for index, document in enumerate(cycle(texts)):
            size += file.write(f"{index // len(texts)} {document}\n".encode())
            if size >= megabytes * 1e6:
                break
    return path


def tokenise(source: Path, text: Path, _output: Path) -> dict[str, Any]:
    """Tokenise the text into the cache, or read it from there."""
    from mlmkit.token_cache import load_corpus
    from mlmkit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(source)
    before, began = memory_mib(), time.perf_counter()
    corpus = load_corpus(Source(str(text)), tokenizer, words=False)  # as training asks for it
    return _figures(before, began, len(corpus), corpus.tokens)


def evaluate(target: Path, text: Path, output: Path) -> dict[str, Any]:
    from mlmkit.backends import load
    from mlmkit.eval.api import evaluate

    backend = load(str(target))
    before, began = memory_mib(), time.perf_counter()
    corpus = evaluate(backend, Source(str(text)), metrics=["masked"], output=output, overwrite=True).result["corpus"]
    return _figures(before, began, corpus["documents"], corpus["tokens"])


def read_epoch(source: Path, text: Path, _output: Path) -> dict[str, Any]:
    import_module("mlmkit.train.data")  # its imports are not part of the measurement
    before, began = memory_mib(), time.perf_counter()
    data, count = training_data(source, text, 8192, MAX_LENGTH)
    return _figures(before, began, count, sum(epoch(data)))


def train(source: Path, text: Path, output: Path) -> dict[str, Any]:
    from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig, TokenizerConfig

    config = Config(
        data=DataConfig(train=(str(text),)),
        tokenizer=TokenizerConfig(path=str(source)),
        model=ModelConfig(architecture=str(source / "config.json"), max_length=MAX_LENGTH),
        train=RunConfig(steps=STEPS, global_batch_tokens=2048, micro_batch_tokens=2048, device="cpu", log_every=1),
    )
    import_module("mlmkit.train.loop")  # its imports are not part of the measurement
    before, began = memory_mib(), time.perf_counter()
    steps = logged_steps(config, output / text.stem)
    figures = _figures(before, began, len(steps), sum(step["tokens"] for step in steps))
    in_steps = sum(step["tokens"] / step["tokens_per_second"] for step in steps)
    return figures | {"without_steps": figures["seconds"] - in_steps}  # its start and its end


def _figures(memory_before: float, began: float, documents: int, tokens: int) -> dict[str, Any]:
    seconds, growth = time.perf_counter() - began, memory_mib() - memory_before
    return {"documents": documents, "tokens": tokens, "seconds": seconds, "growth": growth}


if __name__ == "__main__":
    main(__doc__, measure, megabytes=((0.4, 1.6, 6.4, 25.6, 102.4, 409.6), (0.1, 0.2)), evaluated=(3, 1))
