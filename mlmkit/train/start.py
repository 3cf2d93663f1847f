"""Beginning a run, or finding that a folder holds the same one."""

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig

from mlmkit import model as masked_lm
from mlmkit.backends.torch import pick_device
from mlmkit.corpus import Corpus, load_corpus
from mlmkit.distributed import Ranks, available_memory
from mlmkit.documents import HUB, existing_file, read_documents
from mlmkit.errors import UserError
from mlmkit.files import RUN, atomic, content, locate_model, locked, read_record, sweep, write_record
from mlmkit.model import MaskedLM
from mlmkit.pretrained import save_tokenizer
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoint import checkpoints
from mlmkit.train.config import Config
from mlmkit.train.packs import Packs
from mlmkit.train.presets import build_config
from mlmkit.train.texts import load_texts
from mlmkit.train.tokenizer import train_tokenizer

log = logging.getLogger(__name__)

# Settings that may change on resume: they affect neither data nor weights. Texts are compared by their fingerprints.
FREE = {
    "data": ("train", "held_out", "text_field", "blank_line", "workers"),
    "train": ("device", "save_every", "keep_checkpoints", "log_every", "parallel", "tensorboard", "wandb"),
}


def begin_or_check(config: Config, run: Path, ranks: Ranks) -> tuple[Tokenizer, list[Corpus]]:
    """The run's tokenizer and tokenised texts.

    A new run's folder, with `tokenizer/` and `run.json`, appears whole, and only if training can start. A folder that
    was begun with another configuration, text or tokenizer is refused: `UserError` names the first difference. If it
    has no checkpoint yet, nothing is lost: it begins anew.
    """
    corpora: list[Corpus] = []

    def check() -> list[Path | None]:
        corpora.extend(_begin_or_check(config, run, ranks))
        return [corpus.folder for corpus in corpora]

    checked = ranks.from_first(check)
    tokenizer = masked_lm.load_tokenizer(str(run / "tokenizer"))
    if not corpora:
        # The first rank has hashed the texts, which takes long where they are large. A machine that does not share its
        # token cache hashes its own copies.
        folders = [folder if folder and folder.exists() else None for folder in checked]
        corpora = list(map(load_corpus, config.data.sources, repeat(tokenizer), folders))
    return tokenizer, corpora


def _begin_or_check(config: Config, run: Path, ranks: Ranks) -> list[Corpus]:
    if (config.train.global_batch_tokens // config.train.micro_batch_tokens) % ranks.world:
        raise UserError(
            f"{ranks.world} processes cannot share train.global_batch_tokens ({config.train.global_batch_tokens}) "
            f"evenly in parts of train.micro_batch_tokens ({config.train.micro_batch_tokens}): "
            f"make it a multiple of {config.train.micro_batch_tokens * ranks.world}"
        )
    if config.data.held_out and not config.data.held_out.startswith(HUB):
        existing_file(config.data.held_out)
    if not (run / RUN).exists() and not checkpoints(run):
        if run.exists() and not run.is_dir():
            raise UserError(f"{run} is not a folder: choose another --output")
        if run.is_dir() and content(run):
            raise UserError(f"{run} holds something else than a training run: choose another --output")
        return _begin(config, run)
    remedy = "delete that folder, or choose another --output and set model.init_from to a checkpoint of this run"
    before = read_record(run / RUN, remedy)
    try:
        tokenizer = masked_lm.load_tokenizer(str(run / "tokenizer"))
    except UserError as error:
        raise UserError(f"{error}: copy the tokenizer's files there from a checkpoint of the run") from None
    corpora = load_texts(config, tokenizer)
    if difference := _first_difference(before, _identity(config, tokenizer, corpora), ""):
        if checkpoints(run) or (run / "model").exists():
            raise UserError(
                f"{run} was begun with another {difference}: choose another --output, or delete that folder"
            )
        log.info("%s was begun with another %s and has no checkpoint: beginning anew", run, difference)
        return _begin(config, run)
    return corpora


def _begin(config: Config, run: Path) -> list[Corpus]:
    try:
        with atomic(run, folder=True) as building:
            tokenizer = _prepare_tokenizer(config, building / "tokenizer")
            build_model(config, tokenizer)
            corpora = load_texts(config, tokenizer)
            Packs(config, corpora, tokenizer, packed=True)
            write_record(building / RUN, _identity(config, tokenizer, corpora))
        return corpora
    except OSError as error:
        raise UserError(f"cannot write {run}: {error.strerror or error}") from error


@contextmanager
def run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Keep a second training out of the run's folder, and remove what one that was killed has left there."""
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(locked(run)))
        ranks.from_first(lambda: [sweep(folder, age=0) for folder in (run, run / "checkpoints", *checkpoints(run))])
        yield


def _prepare_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """The run's own copy: trained on the text, given by `tokenizer.path`, or that of `model.init_from`."""
    if given := config.model.init_from or config.tokenizer.path:
        masked_lm.load_tokenizer(given)  # refuses what mlmkit cannot use
        tokenizer = masked_lm.from_pretrained(AutoTokenizer, locate_model(given))
        known = tokenizer.model_max_length if config.model.init_from else 0
        tokenizer.model_max_length = max(known, config.model.max_length)
    else:
        log.info("training a %s tokenizer of %d entries", config.tokenizer.kind, config.tokenizer.vocab_size)
        sources = config.data.sources
        tokenizer = train_tokenizer(
            lambda: chain.from_iterable(map(read_documents, sources)), config.tokenizer, config.model.max_length
        )
    save_tokenizer(tokenizer, folder)
    return masked_lm.load_tokenizer(str(folder))


def build_model(config: Config, tokenizer: Tokenizer, resume_from: Path | None = None) -> MaskedLM:
    """From the checkpoint to resume, from `model.init_from`, or with random weights.

    Raises `UserError` when it does not take rows of `model.max_length`, or does not fit into memory.
    """
    if pretrained := resume_from or config.model.init_from:
        model = masked_lm.load_pretrained(str(pretrained))[0]
        if config.model.max_length > model.max_length():
            _lengthen(model, config.model.max_length, pretrained)
        return model
    name = config.model.architecture
    hf_config = build_config(name, tokenizer, config.model.max_length)
    # Weights are float32. On a CPU, gradients and AdamW's two moments come on top.
    count, room = _parameters(hf_config), available_memory() / 1e9
    if (needed := count / 1e9 * (16 if pick_device(config.train.device) == "cpu" else 4)) > room:
        raise UserError(f"{name} takes {needed:,.1f} GB of memory for {count:,} parameters; {room:,.1f} GB are free")
    return MaskedLM(AutoModelForMaskedLM.from_config(hf_config))


def _parameters(hf_config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return AutoModelForMaskedLM.from_config(hf_config).num_parameters()


def _lengthen(model: MaskedLM, length: int, name: str | Path) -> None:
    """Let a model whose positions are not parameters take rows of `length` tokens."""
    known, hf_config = model.max_length(), copy.deepcopy(model.network.config)
    hf_config.get_text_config().max_position_embeddings += length - known
    if _parameters(hf_config) != model.network.num_parameters():
        raise UserError(f"{name} has a table of {known} positions: model.max_length ({length}) must not exceed it")
    log.info("%s was made for rows of %d tokens; training it on %d", name, known, length)
    model.network.config.get_text_config().max_position_embeddings += length - known


def _identity(config: Config, tokenizer: Tokenizer, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """What must not change between the start of a run and its resumption, as JSON gives it back."""
    tables = {"train": {}, **asdict(config)}  # first, as other settings follow from its steps
    for table, keys in FREE.items():
        for key in keys:
            del tables[table][key]
    fingerprints = [corpus.fingerprint for corpus in corpora]
    return json.loads(json.dumps({"config": tables, "corpora": fingerprints, "tokenizer": tokenizer.fingerprint}))


def _first_difference(before: object, now: object, name: str) -> str:
    if name == "corpora" and before != now:
        return "text in data.train"
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := _first_difference(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")):
                return found
        return ""
    return "" if before == now else f"{name} ({before!r}, now {now!r})"
