"""The start of a run: create its folder or check that an existing one fits, tokenise the texts, build the model."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mlmkit.distributed import Ranks
from mlmkit.documents import no_documents, read_documents
from mlmkit.errors import UserError, as_user_error, require
from mlmkit.files import RUN, atomic, content, file_sha256, locate_model, locked, read_record, sweep, write_record
from mlmkit.locations import Source, find_files, is_tokens
from mlmkit.model import MaskedLM
from mlmkit.overlap import record_texts
from mlmkit.packing import enable_packing
from mlmkit.pretrained import from_pretrained, load_tokenizer, require_rust, save_tokenizer
from mlmkit.stored import StoredCorpus, warn_of_words
from mlmkit.token_cache import load_corpus, tokenizer_file
from mlmkit.tokenizer import Tokenizer
from mlmkit.train.checkpoints import CURSOR, last_checkpoint, origin_folder, read_state, resuming, saved_checkpoints
from mlmkit.train.config import CHANGEABLE, LENGTHS, WARMUPS, Config, RunConfig, TokenizerConfig, as_tables, named
from mlmkit.train.data import TrainingData
from mlmkit.train.held_out import held_out_digests
from mlmkit.train.model_setup import build_model, fit_model
from mlmkit.train.order import NOWHERE, ORDER, Cursor, Position
from mlmkit.train.precision import unrecorded_precision
from mlmkit.train.presets import fit_output_bias, read_architecture
from mlmkit.train.rows import RowBuilder, passes_per_epoch, phase_schedule
from mlmkit.train.schedule import may_follow
from mlmkit.train.step import checkpoint_layers, freeze_unused
from mlmkit.train.tokenizer import sample_documents, train_tokenizer
from mlmkit.train.vocabulary import add_tokens

log = logging.getLogger(__name__)

# Continued pretraining: BioBERT 5e-5, Gururangan et al. 2020 1e-4 (batches of 256) and 5e-4 (batches of 2,048).
HIGHEST_RATE = 5e-4
WORDS = "file tokenizer.add"
Texts = tuple[dict[Source, StoredCorpus], dict[str, StoredCorpus]]  # to train on; held out, by name
WARN_ABOVE, REFUSE_ABOVE = 0.01, 0.5  # shares of a text's characters that become unknown tokens
FEW_BYTES_PER_TOKEN = 3.2  # in 15 languages, own vocabularies have 3.7 or more, foreign ones at most 2.8


# ---------------------------------------------------------------- the run's folder


@contextmanager
def run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Lock the run's folder against a second training, and remove what a killed one left there."""
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(locked(run)))
        folders = (run, run / "checkpoints", *saved_checkpoints(run))
        ranks.from_first(lambda: [sweep(folder, age=0) for folder in folders])
        yield


def begin_or_check(
    config: Config, run: Path, ranks: Ranks, start_from: Path | None = None
) -> tuple[Tokenizer, dict[Source, StoredCorpus]]:
    """The run's tokenizer and the tokenised texts of all phases.

    The folder of a new run, with `tokenizer/` and `run.json`, is created atomically, and only if training can start. A
    folder begun with another configuration, text or tokenizer raises `UserError` that names the first difference; if it
    has no checkpoint yet, nothing is lost and it begins anew. Phases that have not begun may change, and the length of
    a phase on its plateau.
    """
    texts: dict[Source, StoredCorpus] = {}

    def check() -> list[Path]:
        loaded, held_out = _begin_or_check(config, run, ranks, start_from)
        with as_user_error(run, "cannot be written"):
            record_texts(run, start_from or config.model.init_from, [*loaded.values()], [*held_out.values()])
        texts.update(loaded)
        return [corpus.folder for corpus in texts.values()]

    cached = ranks.from_first(check)
    tokenizer = load_tokenizer(str(run / "tokenizer"))
    if not texts:
        # Finding a text's cache folder may hash the text, which only the first rank does. A machine that does not share
        # the token cache hashes its own copy.
        for source, folder in zip(config.train_sources, cached, strict=True):
            found = folder if folder.exists() else None
            texts[source] = load_corpus(source, tokenizer, words=config.needs_words, folder=found)
    return tokenizer, texts


def begun_precision(config: Config, run: Path) -> str:
    """The resolved `train.precision` of the run in this folder; empty if none was begun, or it would start over."""
    has_steps = last_checkpoint(run) or (run / "model").exists()
    phases = _read_identity(config, run).get("phases") if has_steps and (run / RUN).exists() else None
    return phases[0]["train"]["precision"] if phases else ""


def corpora_of(phase: Config, texts: dict[Source, StoredCorpus]) -> list[StoredCorpus]:
    """The training texts of a phase, in its order."""
    return [texts[source] for source in phase.data.sources]


def _begin_or_check(config: Config, run: Path, ranks: Ranks, start_from: Path | None) -> Texts:
    if config.optim.name == "stable_adamw":
        with as_user_error("optim.name"):
            require("stable-adamw", "optimi")
    for phase in config.phases.values():
        _check_shares(phase.train, ranks)
    for source in config.held_out_sources.values():
        if not is_tokens(source.location):
            find_files(source)
    if not (run / RUN).exists() and not saved_checkpoints(run):
        if run.exists() and not run.is_dir():
            raise UserError(f"{run} is not a folder: choose another --output")
        if run.is_dir() and content(run):
            raise UserError(f"{run} holds something other than a training run: choose another --output")
        return _begin(config, run, start_from)
    before = _read_identity(config, run)
    try:
        tokenizer = load_tokenizer(str(run / "tokenizer"))
    except UserError as error:
        raise UserError(f"{error}: copy the tokenizer's files there from a checkpoint of the run") from None
    texts, held_out = _load_texts(config, tokenizer)
    now = _identity(config, tokenizer, texts, start_from and origin_folder(run, start_from))
    if not now[WORDS]:
        now[WORDS] = before.get(WORDS, "")  # the file is needed at the start only
    if before == now:
        return texts, held_out
    last = last_checkpoint(run)
    with resuming(last):
        cursor = read_state(last, verify=False).position.cursor if last else None
    difference = _first_difference(before, now, cursor)
    if not difference:
        _check_models(config, tokenizer, last, cursor.phase if cursor else 0)
        _check_rows(config, tokenizer, texts)
        write_record(run / RUN, now)
        log.info("%s resumes; settings that do not affect past steps were changed", run)
    elif cursor or (run / "model").exists():
        raise UserError(f"{run} was begun with another {difference}: choose another --output, or delete that folder")
    else:
        log.info("%s was begun with another %s and has no checkpoint: starting over", run, difference)
        return _begin(config, run, start_from)
    return texts, held_out


def _read_identity(config: Config, run: Path) -> dict[str, Any]:
    """What `_identity` was when the run began."""
    remedy = "delete that folder, or choose another --output and set model.init_from to a checkpoint of this run"
    identity = read_record(run / RUN, remedy)
    unrecorded = [phase["train"] for phase in identity.get("phases", []) if "precision" not in phase["train"]]
    for settings in unrecorded:
        settings["precision"] = unrecorded_precision(config.train.device)
    if unrecorded:  # kept, as another start may find another device
        write_record(run / RUN, identity)
    return identity


def _check_shares(train: RunConfig, ranks: Ranks) -> None:
    """Raise `UserError` if the ranks cannot share a batch evenly."""
    micro = train.micro_batch_tokens
    for name in ("initial_batch_tokens", "global_batch_tokens"):
        if (batch := getattr(train, name)) and batch // micro % ranks.world:
            raise UserError(
                f"{ranks.world} processes cannot share train.{name} ({batch}) evenly in parts of "
                f"train.micro_batch_tokens ({micro}): make it a multiple of {micro * ranks.world}"
            )


def _begin(config: Config, run: Path, start_from: Path | None) -> Texts:
    try:
        with atomic(run, folder=True) as building:
            if not start_from:
                _warn_of_rate(config)
                if not config.model.init_from:
                    read_architecture(config.model.architecture)  # a wrong one fails before a tokenizer is trained
            tokenizer = prepare_tokenizer(config, building / "tokenizer", start_from)
            _check_models(config, tokenizer, start_from)
            texts, held_out = _load_texts(config, tokenizer)
            _check_rows(config, tokenizer, texts)
            if start_from:
                shutil.copy(start_from / CURSOR, building)
            write_record(building / RUN, _identity(config, tokenizer, texts, start_from))
        return texts, held_out
    except OSError as error:
        raise UserError(f"cannot write {run}: {error.strerror or error}") from error


def _check_models(config: Config, tokenizer: Tokenizer, start: Path | None, first: int = 0) -> None:
    """Raise `UserError` unless the model, from the checkpoint `start` on, fits each phase from `first` on."""
    model = None
    for name, phase in list(config.phases.items())[first:]:
        with named(name):
            if model:
                model = fit_model(model, tokenizer, tokenizer, phase.model)
            else:
                model = build_model(phase, tokenizer, start, quiet=True)


def _check_rows(config: Config, tokenizer: Tokenizer, texts: dict[Source, StoredCorpus]) -> None:
    """Raise `UserError` for a phase whose texts give no rows, or whose schedule does not fit."""
    for name, phase in config.phases.items():
        with named(name):
            RowBuilder(phase, corpora_of(phase, texts), tokenizer, packed=True)


def _warn_of_rate(config: Config) -> None:
    """Warn of a learning rate for new models if an existing model is trained further."""
    rate = max(phase.optim.lr for phase in config.phases.values())
    if config.model.init_from and rate > HIGHEST_RATE:
        log.warning(
            "optim.lr (%g) is a rate for new models: model.init_from forgets much at first. Published rates for "
            "continued pretraining are 5e-5 to 5e-4",
            rate,
        )


def _identity(
    config: Config, tokenizer: Tokenizer, texts: dict[Source, StoredCorpus], origin: Path | None
) -> dict[str, Any]:
    """Everything that must stay the same when a run resumes, as it is read back from JSON."""
    phases = []
    for name, phase in config.phases.items():
        corpora, tables = corpora_of(phase, texts), as_tables(phase)
        del tables["held_out"]  # may change on resume
        changeable = {table: keys.split() for table, keys in CHANGEABLE.items()}
        for table, keys in [*changeable.items(), ("train", LENGTHS), ("optim", WARMUPS)]:
            for key in keys:
                del tables[table][key]
        tables["data"]["weights"] = phase.data.source_weights
        schedule = phase_schedule(phase, corpora, tokenizer)
        identity = {"length": schedule.identity, **tables, "corpora": [corpus.fingerprint for corpus in corpora]}
        phases.append({"phase": name, **identity})
    branch = file_sha256(origin / CURSOR) if origin else ""
    file = Path(config.tokenizer.add)  # "" is the folder "."
    words = file_sha256(file) if file.is_file() and not branch else ""
    identity = {"phases": phases, "tokenizer": tokenizer.fingerprint, WORDS: words, "--from": branch}
    return json.loads(json.dumps({**identity, "order of the data": ORDER}))


def _first_difference(before: dict[str, Any], now: dict[str, Any], cursor: Cursor | None) -> str:
    """The first difference in what the run has done up to `cursor`; without one, in anything."""
    if "phases" not in before:
        return "version of mlmkit"
    old, new = before["phases"], now["phases"]
    if cursor:
        old, new = old[: cursor.phase + 1], new[: cursor.phase + 1]
        if len(old) == len(new) and may_follow(old[-1]["length"], new[-1]["length"], cursor):
            old[-1] = {**old[-1], "length": new[-1]["length"]}
    if len(new) < len(old):
        return f"number of phases ({old[-1]['phase']} has begun and is missing)"
    for one, other in zip(old, new, strict=False):
        if difference := _difference(one, other, ""):
            return f"{difference} in phase {other['phase']}" if other["phase"] else difference
    return _difference({**before, "phases": []}, {**now, "phases": []}, "")


def _difference(before: object, now: object, name: str) -> str:
    if name == "corpora" and before != now:
        return "text in data.train"
    if name == "length" and isinstance(before, dict) and isinstance(now, dict) and before != now:
        old, new = ("{total} {unit}, {warmup} of warm-up".format(**each) for each in (before, now))
        reason = "only a constant learning rate with the same warm-up can be extended: see --from"
        return f"length ({old}, now {new}; {reason})"
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if difference := _difference(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")):
                return difference
        return ""
    return "" if before == now else f"{name} ({before!r}, now {now!r})"


# ---------------------------------------------------------------- tokenizer and texts


def prepare_tokenizer(config: Config, folder: Path, start_from: Path | None = None) -> Tokenizer:
    """The run's tokenizer: trained on the text, or copied from `tokenizer.path` or `model.init_from`, with added
    tokens.

    A branch has that of its checkpoint.
    """
    settings, init_from = config.tokenizer, config.model.init_from
    if start_from:
        settings, init_from = TokenizerConfig(), str(start_from)
    if given := settings.path or ("" if settings.vocab_size else init_from):
        load_tokenizer(given)  # refuses what mlmkit cannot use
        tokenizer = from_pretrained(AutoTokenizer, locate_model(given))
        require_rust(tokenizer)
        limit = tokenizer.model_max_length if given == init_from else 0
        tokenizer.model_max_length = max(limit, _longest(config))
    else:
        sources = config.train_sources

        @cache
        def sample() -> list[str]:
            return sample_documents(documents(), settings.train_tokens) if settings.train_tokens else []

        def documents() -> Iterator[str]:
            return chain.from_iterable(map(read_documents, sources))

        if next(documents(), None) is None:
            raise no_documents(sources[0])
        cached = tokenizer_file(sources, asdict(replace(settings, add="")))
        tokenizer = train_tokenizer(lambda: sample() or documents(), settings, _longest(config), cached)
    if settings.add:
        tokenizer = add_tokens(tokenizer, settings.add)
    save_tokenizer(tokenizer, folder)
    return load_tokenizer(str(folder))


def _longest(config: Config) -> int:
    return max(phase.model.max_length for phase in config.phases.values())


def _load_texts(config: Config, tokenizer: Tokenizer) -> Texts:
    """The tokenised training texts of all phases, and the held-out texts.

    Raises `UserError` if one of them, or a held-out text, cannot be read, is mostly unknown tokens, or has nothing to
    predict.
    """
    words = config.needs_words
    texts = {source: load_corpus(source, tokenizer, words=words) for source in config.train_sources}
    held_out = {name: load_corpus(source, tokenizer) for name, source in config.held_out_sources.items()}
    for corpus in [*texts.values(), *held_out.values()]:
        _check_vocabulary(corpus)
    if words:
        for corpus in texts.values():
            warn_of_words(corpus)
    held_out_digests(config, tokenizer, held_out)
    return texts, held_out


def _check_vocabulary(corpus: StoredCorpus) -> None:
    """Report how a text is tokenised. Raises `UserError` if most of it is unknown, or all tokens are special."""
    counts, sizes, count = corpus.record, corpus.sizes, max(corpus.tokens, 1)
    characters, tokens = corpus.unknown_share, counts["unknown_tokens"] / count
    message = (
        f"{corpus.name}: {count / max(sizes['words'], 1):.2f} tokens per word, {sizes['bytes'] / count:.1f} bytes per "
        f"token; {characters:.2%} of the characters ({tokens:.2%} of the tokens) are unknown"
    )
    if characters > WARN_ABOVE:
        message += ': a tokenizer trained with tokenizer.kind = "bpe" has no unknown tokens'
    elif sizes["bytes"] < FEW_BYTES_PER_TOKEN * count:
        message += (
            ": a tokenizer of its own, with a larger tokenizer.vocab_size or the other tokenizer.kind, may need fewer"
        )
    if characters > REFUSE_ABOVE:
        raise UserError(message)
    if counts["tokens"] and counts["special_tokens"] == counts["tokens"]:
        raise UserError(f"{corpus.name}: all tokens are special ones, so there is nothing to predict")
    log.log(logging.WARNING if characters > WARN_ABOVE else logging.INFO, message)


# ---------------------------------------------------------------- the model


def prepare(
    model: MaskedLM,
    config: Config,
    tokenizer: Tokenizer,
    corpora: Sequence[StoredCorpus],
    *,
    position: Position = NOWHERE,
    is_fresh: bool = True,
) -> TrainingData:
    """Make a model on the CPU ready for training, packed if its architecture allows, and return its batches.

    `is_fresh` says that the weights do not come from a checkpoint of a run.
    """
    if is_fresh and (config.model.new_head or not config.model.init_from):
        fit_output_bias(model, corpora, passes_per_epoch(config.data, corpora))
    if config.train.checkpoint_activations:
        checkpoint_layers(model)
    freeze_unused(model)
    packed = enable_packing(model)
    if not packed:
        log.warning("%s cannot be packed: training on padded batches", type(model.network).__name__)
    return TrainingData(
        config, corpora, tokenizer, packed=packed, position_offset=model.position_offset, position=position
    )
