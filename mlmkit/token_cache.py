"""The cache of tokenised texts and trained tokenizers: each is made once, and later starts open what is there."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlmkit.errors import DamagedError, UserError
from mlmkit.files import cache_root, locked, remove
from mlmkit.locations import EVERY_KEY, Source, content_identities, file_format, find_files, is_tokens
from mlmkit.progress import progress
from mlmkit.shards import FORMAT, Plan, finish, make_shards, plan_corpus, warn_of_losses
from mlmkit.stored import TOKENS, StoredCorpus, check_tokenizer
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CACHE_FORMAT = (9, FORMAT)


def load_corpus(
    source: Source, tokenizer: Tokenizer, *, words: bool = True, folder: Path | None = None
) -> StoredCorpus:
    """Return a tokenised text, from the cache if the same text was tokenised before.

    If the source is the folder of a tokenised corpus, that is opened. Pass the text's `cache_folder` as `folder` if it
    is already known. `words` asks for the beginnings of words.

    Raises `UserError` for text that cannot be read, a source without documents, tokens of another tokenizer or without
    words, or a cache that cannot be used.
    """
    if is_tokens(source.location):
        corpus = open_tokens(source, tokenizer, words=words)
    else:
        corpus = _cached(source, tokenizer, folder or cache_folder(source, tokenizer, words=words), words=words)
    warn_of_losses(corpus)
    return corpus


def open_tokens(source: Source, tokenizer: Tokenizer, *, words: bool) -> StoredCorpus:
    """Open a folder that `mlmkit tokenize` has written. Raises `UserError` if it does not fit."""
    folder = Path(source.locations[0])
    if not (folder / TOKENS).exists():
        raise UserError(f"{folder} is incomplete: run the same mlmkit tokenize command again")
    corpus = StoredCorpus.open(folder, source.name)
    check_tokenizer(corpus, tokenizer.fingerprint)
    if source.keys != EVERY_KEY and source.keys != Plan.read(folder).source.keys:
        raise UserError(
            f"{folder} is tokenised, so no share of it can be held out: name the held-out tokens beside it as "
            "data.held_out"
        )
    if words and not corpus.has_words:
        raise UserError(f"{folder} does not say where words begin, which is needed here: tokenise with --words")
    return corpus


def cache_folder(source: Source, tokenizer: Tokenizer, *, words: bool = True) -> Path:
    """Return the text's folder in `$MLMKIT_CACHE` (default `~/.cache/mlmkit`).

    Its name is a hash of the files' content, the reading options and the tokenizer. Raises `UserError` for a source
    that is missing, unreadable, or a pipe, which can be read once only.
    """
    return cache_root() / "tokens" / _hash(CACHE_FORMAT, _identity(source), words, tokenizer.fingerprint)


def tokenizer_file(sources: Sequence[Source], settings: Mapping[str, Any]) -> Path:
    """Return where the cache keeps the tokenizer that training with these settings on these texts gives.

    Raises `UserError` as `cache_folder` does.
    """
    identities = [_identity(source) for source in sources]
    return cache_root() / "tokenizers" / f"{_hash(version('tokenizers'), identities, dict(settings))}.json"


def _identity(source: Source) -> dict[str, Any]:
    """What is in a source, and how it is read."""
    files = find_files(source)
    kinds = [file_format(file, source.format) for file in files]
    return asdict(source) | {"location": list(zip(kinds, content_identities(files), strict=True))}


def _hash(*identity: object) -> str:
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _cached(source: Source, tokenizer: Tokenizer, folder: Path, *, words: bool) -> StoredCorpus:
    with cache_errors(folder):
        if (folder / TOKENS).exists():
            try:
                return StoredCorpus.open(folder, source.name)
            except DamagedError:
                pass
        with locked(folder, wait=True):
            return _open_or_make(source, tokenizer, folder, words=words)


def _open_or_make(source: Source, tokenizer: Tokenizer, folder: Path, *, words: bool) -> StoredCorpus:
    try:
        if (folder / TOKENS).exists():  # another process may have made it meanwhile
            return StoredCorpus.open(folder, source.name)
        return _make(source, tokenizer, folder, words=words)
    except DamagedError:
        log.warning("the token cache %s is damaged: tokenising %s again", folder, source.name)
        remove(folder)
        return _make(source, tokenizer, folder, words=words)


def _make(source: Source, tokenizer: Tokenizer, folder: Path, *, words: bool) -> StoredCorpus:
    """Tokenise a text into the cache. A killed process leaves its work there, a text that cannot be read nothing."""
    try:
        plan = plan_corpus(source, tokenizer, folder, words=words, restart=True)
        with progress(f"tokenising {source.name}", len(plan.splits), "parts") as bar:
            for index in range(len(plan.splits)):
                make_shards(folder, index, tokenizer)
                bar.advance()
        return finish(folder)
    except (UserError, OSError):
        remove(folder)
        raise


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn an `OSError` in the block into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot use the token cache {folder.parent}: {error.strerror}: set MLMKIT_CACHE to another folder"
        ) from None
