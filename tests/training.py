"""Shared by the tests of training: a small configuration, and runs in processes that can be killed."""

import gc
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from interruptions import PROCESSES, be_rank, free_port
from safetensors.torch import load_file

from mlmkit.corpus import Corpus
from mlmkit.errors import CheckError, StoppedError, UserError
from mlmkit.files import hash_tree, write_record
from mlmkit.masking import first_token_of_word
from mlmkit.stored import DOCUMENT, StoredCorpus
from mlmkit.train import loop
from mlmkit.train.config import Config
from mlmkit.train.config_file import load_config

# No test's training draws its curve, which takes half a second, but the one in test_train.py whose curve is looked at.
loop.draw_loss = lambda run: None

CONFIG = """
[data]
train = {text!r}
[tokenizer]
vocab_size = 600
[model]
architecture = {architecture!r}
max_length = 48
[optim]
lr = 2e-3
warmup_steps = 1
[train]
steps = 12
global_batch_tokens = 512
micro_batch_tokens = 256
save_every = 4
log_every = 2
device = "cpu"
precision = "fp32"  # also on a CPU with bfloat16 units: some bounds hold for float32 alone
"""


def write_config(tmp_path: Path, text_file: Path, architecture: str, *overrides: str) -> Config:
    path = tmp_path / "config.toml"
    content = CONFIG.format(text=str(text_file), architecture=architecture)
    idle = {"vocab_size": ("model.init_from", "tokenizer.path"), "architecture": ("model.init_from",)}
    for key, names in idle.items():  # a setting without effect is refused
        if any(override.startswith(names) for override in overrides):
            content = "".join(line for line in content.splitlines(True) if not line.startswith(key))
    path.write_text(content)
    return load_config(path, overrides)


def stored(corpus: Corpus, folder: Path, name: str = "text", shards: int = 1) -> StoredCorpus:
    """The corpus on disk, in shards of about equal numbers of documents, written independently of `mlmkit.shards`."""
    bounds, records = [len(corpus) * shard // shards for shard in range(shards + 1)], []
    for shard, (begin, end) in enumerate(pairwise(bounds)):
        part, home = corpus.part(begin, end), folder / "shards" / f"{shard:05d}-000"
        home.mkdir(parents=True)
        begins = first_token_of_word(part.words, part.lengths) == np.arange(len(part.ids))
        documents = np.zeros(len(part), DOCUMENT)
        documents["end"], documents["key"] = part.starts[1:], part.keys
        np.save(home / "ids.npy", part.ids.astype("<u2"))
        np.save(home / "documents.npy", documents)
        np.save(home / "sizes.npy", part.text_sizes.astype("<u4"))
        np.save(home / "words.npy", np.packbits(begins, bitorder="little"))
        counts = {"documents": len(part), "tokens": len(part.ids), "files": hash_tree(home)}
        records.append({"name": home.name, **counts})
    record = {"tokenizer": "", "has_words": True, "documents": len(corpus), "tokens": len(corpus.ids), "blank": 0}
    record |= {"words_begun": corpus.words_begun, "shards": records, "bad_rows": 0, **corpus.sizes}
    write_record(folder / "tokens.json", {**record, "fingerprint": f"{corpus.keys} {corpus.starts}"})
    return StoredCorpus.open(folder, name)


def small_architecture(folder: Path, **settings: object) -> str:
    """A file with a small BERT, or with these settings instead of its own."""
    from conftest import ARCHITECTURES  # not above: a rank imports this module, and pytest takes time

    path = folder / "architecture.json"
    path.write_text(json.dumps(json.loads(ARCHITECTURES["bert"]) | settings))
    return str(path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    before, after = weights(one), weights(other)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def log_lines(run: Path) -> list[dict]:
    """The entries of `log.jsonl`, without a last line that is cut off."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines(True) if line.endswith("\n")]


def losses(run: Path) -> np.ndarray:
    """The losses in `log.jsonl`, `[entries of training]`."""
    return np.array([line["loss"] for line in log_lines(run) if "loss" in line])


class Ranks:
    """A training run in `world` processes, started at once. Error messages go to `RUN.RANK.errors`.

    With `deterministic`, only kernels run that give the same bits each time, as those for the CPU do anyway.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        world: int = 1,
        limits: tuple[tuple[int, int], ...] = (),
        *,
        deterministic: bool = False,
    ) -> None:
        port = free_port()
        self.errors = [run.with_name(f"{run.name}.{rank}.errors") for rank in range(world)]
        self.processes = [
            PROCESSES.Process(target=_one_rank, args=(config, run, rank, world, port, file, limits, deterministic))
            for rank, file in enumerate(self.errors)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def wait(self, timeout: float = 120) -> list[int | None]:
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def messages(self) -> list[str]:
        return [path.read_text() for path in self.errors if path.exists()]


def _one_rank(
    config: Config,
    run: Path,
    rank: int,
    world: int,
    port: int,
    errors: Path,
    limits: tuple[tuple[int, int], ...],
    deterministic: bool,
) -> None:
    import resource

    from mlmkit.train.loop import train

    gc.freeze()  # what the fork server has imported is not searched for garbage
    for kind, value in limits:
        resource.setrlimit(kind, (value, resource.RLIM_INFINITY))
    if world > 1:
        be_rank(rank, world, port)
    torch.set_num_threads(1)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS requires it
        torch.use_deterministic_algorithms(True)
    try:
        train(config, run)
    except (UserError, CheckError, StoppedError) as error:
        errors.write_text(str(error))
        sys.exit(error.exit_code)
