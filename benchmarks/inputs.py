"""What the benchmarks measure on: text, a tokenizer, models with random weights, their artifacts, batches.

The text is Python's own documentation, so everyone measures on the same and nothing is downloaded. If MLMKIT_DATA names
a folder, it is English Wikipedia and web sentences from there: wiki_en/train.txt, wiki_en/heldout.txt,
ud_en_ewt/test.txt and tokenizers/bert-base-uncased/vocab.txt. Times do not depend on the weights, so these are random.
They are three times the usual size: smaller ones give nearly flat distributions, which hide errors. Files that take
long to build are kept for one run of the suite.
"""

import atexit
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from processes import isolated, run_command

from mlmkit.backends import Batch

KEPT = "MLMKIT_BENCHMARK_FOLDER"
VOCABULARY = 30_522  # bert-base-uncased's
MASKED_SHARE, WEIGHT_SCALE = 0.15, 3.0
SHAPES = ((1, 16), (8, 128), (32, 128))  # rows and tokens per row of the batches that exported graphs run
HELD_OUT_EVERY = 8  # every eighth section of Python's documentation is held out
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


# ---------------------------------------------------------------- text


def documents() -> list[str]:
    """The training text."""
    lines = _lines("wiki_en/train.txt")
    return lines or [text for index, text in enumerate(_documentation()) if index % HELD_OUT_EVERY]


def held_out() -> list[str]:
    """The evaluation text; none of it is in `documents`."""
    return _lines("wiki_en/heldout.txt") or _documentation()[::HELD_OUT_EVERY]


def sentences(count: int, tokens: int, tokenizer: Any) -> list[str]:
    """The `count` sentences whose length is nearest to `tokens` wordpieces, in their original order."""
    lines = _lines("ud_en_ewt/test.txt")
    lines = lines or list(chain.from_iterable(re.split(r"(?<=[.?!]) +", text) for text in held_out()))
    apart = [abs(len(ids) - tokens) for ids in tokenizer(lines, add_special_tokens=False)["input_ids"]]
    return [lines[index] for index in sorted(sorted(range(len(lines)), key=apart.__getitem__)[:count])]


def short_documents(count: int, most: int, tokenizer: Any) -> list[str]:
    """The first `count` held-out documents of at most `most` tokens."""
    return [text for text, tokens in _measured(held_out(), tokenizer) if tokens <= most][:count]


def long_documents(count: int, least: int, most: int, tokenizer: Any) -> list[str]:
    """The first `count` of `least` to `most` tokens, each of consecutive held-out documents joined by spaces."""
    joined: list[str] = []
    parts: list[str] = []
    total = 0
    for text, tokens in _measured(held_out(), tokenizer):
        if total + tokens > most:
            joined += [" ".join(parts)] if total >= least else []
            parts, total = [], 0
        if tokens <= most:
            parts, total = [*parts, text], total + tokens
    return joined[:count]


def _measured(texts: list[str], tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Each text and its tokens, without special tokens."""
    return ((text, len(tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts)


def _lines(name: str) -> list[str]:
    folder = os.environ.get("MLMKIT_DATA")
    text = (Path(folder) / name).read_text(encoding="utf-8") if folder else ""
    return [line for line in text.split("\n") if line.strip()]


@cache
def _documentation() -> list[str]:
    from mlmkit.pydocs import python_documentation

    texts = python_documentation()
    random.Random(0).shuffle(texts)  # otherwise the long texts of the language reference come first
    return texts


def write_lines(path: Path, lines: list[str]) -> Path:
    """Write one document per line; return the path."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# ---------------------------------------------------------------- built once and kept


@cache
def kept_folder() -> Path:
    """The suite's folder, or one for this process and its children."""
    if folder := os.environ.get(KEPT):
        return Path(folder)
    os.environ[KEPT] = folder = tempfile.mkdtemp(prefix="mlmkit-benchmarks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def kept(name: str, make: Callable[..., None], *arguments: object) -> Path:
    """The folder of that name; `make(path, *arguments)` writes it in a process of its own if it is not there."""
    path = kept_folder() / name
    if not path.exists():
        unfinished = path.with_name(f"{name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        isolated(make, unfinished, *arguments)
        unfinished.rename(path)
    return path


def tokenizer_folder() -> Path:
    """bert-base-uncased's tokenizer, or one of that kind and size trained on the documentation."""
    return kept("tokenizer", _write_tokenizer)


def bert_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder())


def _write_tokenizer(folder: Path) -> None:
    if vocabulary := _lines("tokenizers/bert-base-uncased/vocab.txt"):
        from transformers import BertTokenizer

        tokenizer: Any = BertTokenizer(vocab={token: id for id, token in enumerate(vocabulary)}, model_max_length=512)
        tokenizer.save_pretrained(folder)
    else:
        write_tokenizer(folder, _documentation(), VOCABULARY, 512)


def write_tokenizer(folder: Path, texts: list[str], vocabulary: int, length: int) -> None:
    from mlmkit.train.config import TokenizerConfig
    from mlmkit.train.tokenizer import train_tokenizer

    settings = TokenizerConfig(kind="wordpiece", vocab_size=vocabulary)
    train_tokenizer(lambda: texts, settings, length).save_pretrained(folder)


def checkpoint(architecture: str, **changes: int) -> Path:
    """A checkpoint of one of `mlmkit train`'s architectures with `changes` to its configuration; 0 changes nothing."""
    changes = {name: value for name, value in changes.items() if value}
    name = "-".join([architecture, *(f"{name}-{value}" for name, value in changes.items())])
    return kept(name, _write_checkpoint, architecture, changes, tokenizer_folder())


def artifact(architecture: str, *flags: str, **changes: int) -> Path:
    """The artifact of that checkpoint, exported with `flags` and proven on a few texts."""
    source = checkpoint(architecture, **changes)
    return kept("-".join([source.name, "artifact", *(flag.strip("-") for flag in flags)]), _export, source, flags)


def _write_checkpoint(folder: Path, architecture: str, changes: dict[str, int], tokenizer: Path) -> None:
    import torch
    from transformers import AutoModelForMaskedLM

    from mlmkit.tokenizer import Tokenizer
    from mlmkit.train.presets import PRESETS, build_config

    shutil.copytree(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(PRESETS[architecture] | changes))
    config = build_config(str(folder / "config.json"), Tokenizer.from_folder(folder), 512)
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    network = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(WEIGHT_SCALE)
    network.save_pretrained(folder)


def _export(folder: Path, source: Path, flags: tuple[str, ...]) -> None:
    text = write_lines(folder.with_suffix(".txt"), [line[:400] for line in held_out()[:64]])
    run_command("-m", "mlmkit", "export", source, "--output", folder, "--text", text, *flags)


def logged_steps(config: Any, folder: Path) -> list[dict[str, Any]]:
    """Run a training; return what its log says of each step."""
    from mlmkit.train.loop import train

    train(config, folder)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def encoder_parameters(source: Any) -> int:
    """The parameters of a checkpoint's or configuration's network without embedding tables and vocabulary head."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    config = AutoConfig.from_pretrained(source) if isinstance(source, str) else source
    encoder = AutoModelForMaskedLM.from_config(config).base_model
    tables = (table.weight for table in encoder.modules() if isinstance(table, torch.nn.Embedding))
    return sum(p.numel() for p in encoder.parameters()) - sum(p.numel() for p in tables)


# ---------------------------------------------------------------- batches


def real_batch(rows: int, length: int, *, ragged: bool = False, seed: int = 0) -> Batch:
    """Rows of text with `MASKED_SHARE` of their positions masked; the rows are full unless `ragged`."""
    tokenizer: Any = bert_tokenizer()
    generator = np.random.default_rng(seed)
    lines = held_out()[seed * 100 :][: rows * length // 8 + 100]
    ids = np.fromiter(chain(*tokenizer(lines, add_special_tokens=False)["input_ids"]), np.int64)
    input_ids = np.full((rows, length), tokenizer.pad_token_id, dtype=np.int64)
    ends = generator.integers(3, length + 1, rows) if ragged else np.full(rows, length)
    ends[0] = length
    for row, end in enumerate(ends):
        text = ids[row * length : row * length + end - 2]
        input_ids[row, :end] = [tokenizer.cls_token_id, *text, tokenizer.sep_token_id]
    column = np.arange(length)
    scored = np.flatnonzero((column > 0) & (column < ends[:, None] - 1))
    count = max(1, round(MASKED_SHARE * int(ends.sum())))
    positions = np.sort(generator.choice(scored, min(count, len(scored)), replace=False))
    targets = input_ids.reshape(-1)[positions]
    input_ids.reshape(-1)[positions] = tokenizer.mask_token_id
    return Batch(input_ids, (column < ends[:, None]).astype(np.int64), positions, targets)
