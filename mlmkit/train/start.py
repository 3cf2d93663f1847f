"""The start of a run: create its folder or check that an existing one fits, tokenise the texts, build the model."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from mlmkit.corpus import Corpus, load_corpus, warn_of_words
from mlmkit.distributed import Ranks
from mlmkit.documents import HUB, existing_file, read_documents
from mlmkit.errors import UserError
from mlmkit.files import RUN, atomic, content, locate_model, locked, read_record, sweep, write_record
from mlmkit.model import MaskedLM
from mlmkit.packing import enable_packing
from mlmkit.pretrained import from_pretrained, load_tokenizer, save_tokenizer
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.data import TrainingData
from mlmkit.train.held_out import held_out_digest
from mlmkit.train.model_setup import build_model
from mlmkit.train.presets import fit_output_bias
from mlmkit.train.rows import RowBuilder
from mlmkit.train.step import freeze_unused
from mlmkit.train.tokenizer import train_tokenizer
from mlmkit.train.vocabulary import add_tokens

log = logging.getLogger(__name__)

# Settings that may change on resume: they affect neither data nor weights. Texts are compared by their fingerprints.
CHANGEABLE = {
    "data": ("train", "held_out", "text_field", "blank_line", "workers"),
    "train": ("device", "save_every", "keep_checkpoints", "log_every", "parallel", "tensorboard", "wandb"),
}
# Continued pretraining: BioBERT 5e-5, Gururangan et al. 2020 1e-4 (batches of 256) and 5e-4 (batches of 2,048).
HIGHEST_RATE = 5e-4
WARN_ABOVE, REFUSE_ABOVE = 0.01, 0.5  # shares of a text's characters that become unknown tokens


# ---------------------------------------------------------------- the run's folder


@contextmanager
def run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Lock the run's folder against a second training, and remove what a killed one left there."""
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(locked(run)))
        folders = (run, run / "checkpoints", *saved_checkpoints(run))
        ranks.from_first(lambda: [sweep(folder, age=0) for folder in folders])
        yield


def begin_or_check(config: Config, run: Path, ranks: Ranks) -> tuple[Tokenizer, list[Corpus]]:
    """The run's tokenizer and tokenised texts.

    The folder of a new run, with `tokenizer/` and `run.json`, is created atomically, and only if training can start. A
    folder begun with another configuration, text or tokenizer raises `UserError` that names the first difference; if it
    has no checkpoint yet, nothing is lost and it begins anew.
    """
    corpora: list[Corpus] = []

    def check() -> list[Path | None]:
        corpora.extend(_begin_or_check(config, run, ranks))
        return [corpus.folder for corpus in corpora]

    cached = ranks.from_first(check)
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    if not corpora:
        # Finding a text's cache folder hashes the text, which only the first rank does. A machine that does not share
        # the token cache hashes its own copy.
        folders = [folder if folder and folder.exists() else None for folder in cached]
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
    if not (run / RUN).exists() and not saved_checkpoints(run):
        if run.exists() and not run.is_dir():
            raise UserError(f"{run} is not a folder: choose another --output")
        if run.is_dir() and content(run):
            raise UserError(f"{run} holds something else than a training run: choose another --output")
        return _begin(config, run)
    remedy = "delete that folder, or choose another --output and set model.init_from to a checkpoint of this run"
    before = read_record(run / RUN, remedy)
    try:
        tokenizer = load_tokenizer(str(run / "tokenizer"))
    except UserError as error:
        raise UserError(f"{error}: copy the tokenizer's files there from a checkpoint of the run") from None
    corpora = _load_texts(config, tokenizer)
    if difference := _first_difference(before, _identity(config, tokenizer, corpora), ""):
        if saved_checkpoints(run) or (run / "model").exists():
            raise UserError(
                f"{run} was begun with another {difference}: choose another --output, or delete that folder"
            )
        log.info("%s was begun with another %s and has no checkpoint: beginning anew", run, difference)
        return _begin(config, run)
    return corpora


def _begin(config: Config, run: Path) -> list[Corpus]:
    try:
        with atomic(run, folder=True) as building:
            _warn_of_rate(config)
            tokenizer = _prepare_tokenizer(config, building / "tokenizer")
            build_model(config, tokenizer, quiet=True)
            corpora = _load_texts(config, tokenizer)
            RowBuilder(config, corpora, tokenizer, packed=True)  # refuses texts that give no rows
            write_record(building / RUN, _identity(config, tokenizer, corpora))
        return corpora
    except OSError as error:
        raise UserError(f"cannot write {run}: {error.strerror or error}") from error


def _warn_of_rate(config: Config) -> None:
    """Warn of a learning rate for a new model where an old one is trained further."""
    if config.model.init_from and config.optim.lr > HIGHEST_RATE:
        log.warning(
            "optim.lr (%g) is a rate for new models: model.init_from forgets much at first. Published rates for "
            "continued pretraining are 5e-5 to 5e-4",
            config.optim.lr,
        )


def _identity(config: Config, tokenizer: Tokenizer, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """Everything that must stay the same when a run resumes, as it is read back from JSON."""
    tables = {"train": {}, **asdict(config)}  # first, because other settings follow from train.steps
    for table, keys in CHANGEABLE.items():
        for key in keys:
            del tables[table][key]
    fingerprints = [corpus.fingerprint for corpus in corpora]
    return json.loads(json.dumps({"config": tables, "corpora": fingerprints, "tokenizer": tokenizer.fingerprint}))


def _first_difference(before: object, now: object, name: str) -> str:
    if name == "corpora" and before != now:
        return "text in data.train"
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if difference := _first_difference(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")):
                return difference
        return ""
    return "" if before == now else f"{name} ({before!r}, now {now!r})"


# ---------------------------------------------------------------- tokenizer and texts


def _prepare_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """The run's own: trained on the text, or a copy from `tokenizer.path` or `model.init_from`, with added tokens."""
    settings, init_from = config.tokenizer, config.model.init_from
    if given := settings.path or ("" if settings.vocab_size else init_from):
        load_tokenizer(given)  # refuses what mlmkit cannot use
        tokenizer = from_pretrained(AutoTokenizer, locate_model(given))
        limit = tokenizer.model_max_length if given == init_from else 0
        tokenizer.model_max_length = max(limit, config.model.max_length)
    else:
        log.info("training a %s tokenizer with %d entries", settings.kind, settings.entries)
        sources = config.data.sources
        tokenizer = train_tokenizer(
            lambda: chain.from_iterable(map(read_documents, sources)), settings, config.model.max_length
        )
    if settings.add:
        tokenizer = add_tokens(tokenizer, settings.add)
    save_tokenizer(tokenizer, folder)
    return load_tokenizer(str(folder))


def _load_texts(config: Config, tokenizer: Tokenizer) -> list[Corpus]:
    """The tokenised training texts.

    Raises `UserError` if one of them, or the held-out text, cannot be read, is mostly unknown tokens, or has nothing to
    predict.
    """
    corpora = [load_corpus(source, tokenizer) for source in config.data.sources]
    held_out = [load_corpus(config.data.held_out_source, tokenizer)] if config.data.held_out else []
    for corpus in [*corpora, *held_out]:
        _check_vocabulary(corpus, tokenizer)
    if config.masking.whole_word:
        for corpus in corpora:
            warn_of_words(corpus)
    held_out_digest(config, tokenizer, *held_out)
    return corpora


def _check_vocabulary(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Report the unknown share of a text. Raises `UserError` if most of it is unknown, or all tokens are special."""
    counts = np.zeros(tokenizer.vocabulary_size)
    for block in corpus.blocks():
        counts += np.bincount(block.ids, minlength=len(counts))
    counts /= max(counts.sum(), 1)
    characters, tokens = corpus.unknown_share, 0.0 if tokenizer.unk_id is None else counts[tokenizer.unk_id]
    message = f"{corpus.name}: {characters:.2%} of the characters ({tokens:.2%} of the tokens) are unknown"
    if characters > WARN_ABOVE:
        message += ': a tokenizer trained with tokenizer.kind = "bpe" has no unknown tokens'
    if characters > REFUSE_ABOVE:
        raise UserError(message)
    if counts[sorted(tokenizer.special_ids)].sum() == 1:
        raise UserError(f"{corpus.name}: all tokens are special ones, so there is nothing to predict")
    if characters:
        log.log(logging.WARNING if characters > WARN_ABOVE else logging.INFO, message)


# ---------------------------------------------------------------- the model


def prepare(
    model: MaskedLM, config: Config, tokenizer: Tokenizer, corpora: Sequence[Corpus], *, resumed: bool = False
) -> TrainingData:
    """Make a model on the CPU ready for training, packed if its architecture allows, and return its batches."""
    if not resumed and (config.model.new_head or not config.model.init_from):
        fit_output_bias(model, corpora, config.data.passes)
    freeze_unused(model)
    packed = enable_packing(model)
    if not packed:
        log.warning("%s cannot be packed: training on padded batches", type(model.network).__name__)
    return TrainingData(config, corpora, tokenizer, packed=packed, position_offset=model.position_offset)
