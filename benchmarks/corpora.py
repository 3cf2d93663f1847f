"""Text at any size: tokenising per core, its serial share, memory, disk, the start of a training, and cold reads.

Texts are the training text, repeated with a number before each document, so no two documents are equal; and one line of
`--line` MB. Each measurement runs in a process of its own. The model is tiny: only the text matters. Cold reads count
what the disk delivered after the files left the page cache, for windows in mlmkit's order and for single windows drawn
at random, as the order was before it kept neighbours together.
"""

import argparse
import os
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from growth import write_text
from harness import Report, main, table
from inputs import TINY, checkpoint, documents
from processes import isolated, memory_mib

CORES, TERABYTE = 64, 10**12
MAX_LENGTH, BATCH, BATCHES, RANKS = 512, 8192, 100, 64


def measure(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["MLMKIT_CACHE"] = str(folder / "cache")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # figures are per core
        model = checkpoint("bert-mini", **TINY)
        texts = {f"{size:g} MB": write_text(folder / f"{size:g}.txt", size) for size in options.megabytes}
        texts[f"one line of {options.line:g} MB"] = write_line(folder / "line.txt", options.line)
        tokenised, starts, cold = {}, {}, {}
        for name, text in texts.items():
            tokenised[name] = isolated(tokenise, model, text, folder / text.stem)
        for name in tokenised:
            tokens = folder / texts[name].stem
            isolated(begin_run, model, tokens, folder / f"run-{tokens.name}")
            starts[name] = isolated(resume, model, tokens, folder / f"run-{tokens.name}")
        largest = folder / f"{max(options.megabytes):g}"
        for name, chunk in (("neighbours together", 64), ("single windows", 1)):
            for world in (1, RANKS):
                reader = f"one of {RANKS} ranks" if world > 1 else "one process"
                cold[f"{name}, {reader}"] = isolated(read_cold, model, largest, chunk, world)
    seconds = tokenised[f"{max(options.megabytes):g} MB"]
    hours = {"parallel": seconds["per byte"] * TERABYTE / CORES / 3600}
    hours["serial"] = seconds["serial per byte"] * TERABYTE / 3600
    return Report(
        [
            table("Tokenising on one core", [{"text": name, **row} for name, row in tokenised.items()]),
            table(f"1 TB of text on {CORES} cores, hours, extrapolated", [{**hours, "sum": sum(hours.values())}]),
            table("Start of a training that resumes", [{"text": name, **row} for name, row in starts.items()]),
            table("Reading batches from a cold disk", [{"order": name, **row} for name, row in cold.items()]),
        ],
        headlines={"tokens_per_second_per_core": seconds["tokens/s"], "bytes_per_token": seconds["bytes/token"]},
        figures={"tokenised": tokenised, "hours": hours, "starts": starts, "cold": cold},
    )


def write_line(path: Path, megabytes: float) -> Path:
    """Write one document of this size: the text in one line."""
    size, texts = 0, documents()
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            for text in texts:
                size += file.write(text + " ")
                if size >= megabytes * 1e6:
                    break
    return path


def tokenise(model: Path, text: Path, output: Path) -> dict[str, Any]:
    from mlmkit.locations import Source
    from mlmkit.shards import finish, make_shards, plan_corpus
    from mlmkit.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(model)
    before, began = memory_mib(), time.perf_counter()
    plan = plan_corpus(Source(str(text)), tokenizer, output, words=False)
    planned = time.perf_counter()
    for index in range(len(plan.splits)):
        make_shards(output, index, tokenizer)
    made = time.perf_counter()
    corpus = finish(output)
    ended, size = time.perf_counter(), text.stat().st_size
    return {
        "tokens": corpus.tokens,
        "tokens/s": corpus.tokens / (made - planned),
        "MB/s": size / 1e6 / (made - planned),
        "serial, %": 100 * (planned - began + ended - made) / (ended - began),
        "bytes/token": sum(path.stat().st_size for path in output.rglob("*.npy")) / corpus.tokens,
        "peak above the start, MiB": memory_mib() - before,
        "per byte": (made - planned) / size,
        "serial per byte": (planned - began + ended - made) / size,
    }


def _config(model: Path, tokens: Path) -> Any:
    from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig, TokenizerConfig

    return Config(
        data=DataConfig(train=(str(tokens),)),
        tokenizer=TokenizerConfig(path=str(model)),
        model=ModelConfig(architecture=str(model / "config.json"), max_length=128),
        train=RunConfig(steps=2, global_batch_tokens=BATCH, micro_batch_tokens=BATCH, device="cpu", precision="fp32"),
    )


def begin_run(model: Path, tokens: Path, run: Path) -> None:
    """A run of two steps without its final model, as if it had been killed."""
    from mlmkit.train.loop import train

    train(_config(model, tokens), run)
    shutil.rmtree(run / "model")


def resume(model: Path, tokens: Path, run: Path) -> dict[str, Any]:
    """The checks of a start and its first batch, without imports."""
    from mlmkit.distributed import Ranks
    from mlmkit.pretrained import load_pretrained
    from mlmkit.train.order import Cursor
    from mlmkit.train.start import begin_or_check, corpora_of, prepare

    network = load_pretrained(str(model))[0]
    config = _config(model, tokens)
    before, began = memory_mib(), time.perf_counter()
    tokenizer, texts = begin_or_check(config, run, Ranks())
    data = prepare(network, config, tokenizer, corpora_of(config, texts), is_fresh=False)
    next(data.batches(Cursor(step=1)))
    return {"seconds": time.perf_counter() - began, "peak above the start, MiB": memory_mib() - before}


def read_cold(model: Path, tokens: Path, chunk: int, world: int) -> dict[str, Any]:
    """This rank's batches of windows of at most `MAX_LENGTH` tokens, after the files have left the page cache."""
    from mlmkit.stored import StoredCorpus
    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train import order
    from mlmkit.train.config import Config, DataConfig, ModelConfig, RunConfig
    from mlmkit.train.data import TrainingData
    from mlmkit.train.order import Cursor

    order.LARGEST_CHUNK = chunk
    run = RunConfig(steps=1 << 30, global_batch_tokens=world * BATCH, micro_batch_tokens=BATCH)
    config = Config(data=DataConfig(train=(str(tokens),)), model=ModelConfig(max_length=MAX_LENGTH), train=run)
    corpus = StoredCorpus.open(tokens, tokens.name)
    data = TrainingData(config, [corpus], Tokenizer.from_folder(model), packed=True)
    len(data.rows.windows[0])  # the index is made once per text
    for path in tokens.rglob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read, began, count = _bytes_read(), time.perf_counter(), 0
    for _, batch in islice(data.batches(Cursor(), world=world), BATCHES):
        count += sum(micro.tokens for micro in batch)
    seconds, pages = time.perf_counter() - began, (_bytes_read() - read) / 4096
    ids = 1000 * corpus.record["tokens"] * 2 / 4096 / corpus.tokens
    return {
        "tokens": count,
        "tokens/s": count / seconds,
        "pages of 4 KiB per 1,000 tokens": 1000 * pages / count,
        "of which the ids need": ids,
    }


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


if __name__ == "__main__":
    main(__doc__, measure, megabytes=((40.0, 400.0), (0.2, 0.4)), line=(100.0, 1.0))
