"""A tokenised corpus, kept in a cache on disk and memory-mapped.

The pipeline:

    documents.read_texts    files or a hub dataset → texts
    Tokenizer.encode        texts → token ids, word indices, counts of unknown characters
    stream_corpus           blocks of documents, appended to flat files in the cache
    load_corpus             the whole as a `Corpus`, mapped from the cache; `windows.py` cuts it into model inputs
"""

import json
import logging
import mmap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.documents import HUB, Source, existing_file, is_blank, is_selected, load_hub, read_texts, why_empty
from mlmkit.errors import DamagedError, UserError
from mlmkit.files import (
    atomic,
    cache_root,
    changed_file,
    file_sha256,
    hash_tree,
    locked,
    read_record,
    remove,
    write_record,
)
from mlmkit.masking import document_key, first_token_of_word
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CACHE_FORMAT = 8
DOCUMENTS_PER_BLOCK = 1024
CHARACTERS_PER_BATCH = 1 << 19  # tokenising takes up to 190 bytes of memory per character
BLOCKS_COUNTED = 128  # about 131,000 documents, where a sample of the text is enough
LONGEST_MEAN_WORD = 3.0  # tokens; English has 1.2 to 1.5
GATHERED_AT_ONCE = 512  # entries; the kernel maps up to 64 KiB around each
TEXT_SIZES = ("words", "characters", "bytes", "unknown_characters")
_ARRAYS = ("ids", "words", "keys", "text_sizes")
META = "meta.json"
DAMAGE = (FileNotFoundError, DamagedError, ValueError)  # what `_map_corpus` raises for a damaged cache


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus, or some of its documents. The arrays may be memory maps.

    `ids` and `words` (the word index) `[tokens]` are flat: document d owns `ids[starts[d] : starts[d + 1]]`. Per
    document there are `keys` `[documents]` uint64 and `text_sizes` `[documents, 4]` int64, with the columns
    `TEXT_SIZES`: words between spaces, characters, UTF-8 bytes, and characters lost to the unknown token.

    `fingerprint` identifies the texts and their order, whatever the tokenizer; only a whole corpus has one.
    `empty_texts` counts the blank texts that were left out. `name` says in messages where the texts come from, and
    `folder` is the corpus's folder in the cache.
    """

    ids: NDArray[np.integer]
    words: NDArray[np.int32]
    starts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    text_sizes: NDArray[np.int64]
    fingerprint: str = ""
    empty_texts: int = 0
    name: str = "text"
    folder: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a cached corpus as its folder: another process maps it again."""
        if self.folder:
            return _map_corpus, (self.folder, self.name)
        return Corpus, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per document, `[documents]`."""
        return np.diff(self.starts)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    @property
    def sizes(self) -> dict[str, int]:
        """The sum of each column of `TEXT_SIZES`."""
        return dict(zip(TEXT_SIZES, self.text_sizes.sum(axis=0).tolist(), strict=True))

    def key_blocks(self) -> Iterator[NDArray[np.uint64]]:
        """Yield the documents' keys, in order, in arrays of bounded size."""
        for begin in range(0, len(self), 1 << 20):
            yield copy_slice(self.keys, begin, min(begin + (1 << 20), len(self)))

    @property
    def unknown_share(self) -> float:
        """Share of the characters that the tokenizer lost to its unknown token."""
        _, characters, _, lost = self.text_sizes.sum(axis=0).tolist()
        return lost / max(characters, 1)

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, begin: int, end: int) -> "Corpus":
        """Copy documents `begin` to `end` (exclusive) into memory."""
        starts = copy_slice(self.starts, begin, end + 1)
        first, last = int(starts[0]), int(starts[-1])
        return Corpus(
            copy_slice(self.ids, first, last),
            copy_slice(self.words, first, last),
            starts - first,
            copy_slice(self.keys, begin, end),
            copy_slice(self.text_sizes, begin, end),
        )

    def blocks(self) -> Iterator["Corpus"]:
        """Yield the corpus in parts of `DOCUMENTS_PER_BLOCK` documents, each copied into memory."""
        for begin in range(0, len(self), DOCUMENTS_PER_BLOCK):
            yield self.part(begin, min(begin + DOCUMENTS_PER_BLOCK, len(self)))


def warn_of_words(corpus: Corpus) -> None:
    """Warn if whole-word masking is useless because words have one token, or more than three, on average.

    Text without spaces gives one or the other. Counts the first documents only.
    """
    tokens = words = 0
    for block in islice(corpus.blocks(), BLOCKS_COUNTED):
        tokens += len(block.words)
        words += len(np.unique(first_token_of_word(block.words, block.lengths)))
    if tokens == words or tokens > LONGEST_MEAN_WORD * words:
        effect = "has no effect" if tokens == words else "hides long stretches of a document, or none of it"
        mean, advice = tokens / max(words, 1), "leave it out, or put spaces between words"
        log.warning("%s: %.1f tokens per word on average: whole-word masking %s: %s", corpus.name, mean, effect, advice)


def copy_slice(array: NDArray, begin: int, end: int) -> NDArray:
    """Copy `array[begin:end]`. A memory map is read instead: mapped pages would count as this process's memory."""
    if not isinstance(array, np.memmap):
        return array[begin:end].copy()
    width = int(np.prod(array.shape[1:]))
    offset = array.offset + begin * width * array.dtype.itemsize
    flat = np.fromfile(str(array.filename), array.dtype, (end - begin) * width, offset=offset)
    return flat.reshape(end - begin, *array.shape[1:])


def gather(array: NDArray, index: NDArray[np.int64]) -> NDArray:
    """Return `array[index]`. Pages of a memory map are released again, so that this process's memory does not grow."""
    if (mapped := getattr(array, "_mmap", None)) is None:
        return array[index]
    array = np.asarray(array)  # np.memmap is slower to index
    gathered = np.empty((len(index), *array.shape[1:]), array.dtype)
    for begin in range(0, len(index), GATHERED_AT_ONCE):
        gathered[begin : begin + GATHERED_AT_ONCE] = array[index[begin : begin + GATHERED_AT_ONCE]]
        mapped.madvise(mmap.MADV_DONTNEED)
    return gathered


def concatenate(parts: Iterable[Corpus]) -> Corpus:
    """Join parts of a corpus, in order."""
    parts = list(parts)
    starts = np.cumsum(np.concatenate([[0], *(part.lengths for part in parts)]))
    ids, words, keys, text_sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS)
    return Corpus(ids, words, starts, keys, text_sizes)


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """Tokenise a few texts in memory. An empty text is a document without tokens. Raises `UserError` for no texts."""
    blocks = list(_encode(texts, tokenizer))
    if not blocks:
        raise UserError("there is no text")
    corpus = concatenate(blocks)
    fingerprint = blake2b(corpus.keys.astype("<u8").tobytes(), digest_size=16).hexdigest()
    return replace(corpus, fingerprint=fingerprint)


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Corpus]:
    for batch in _batches(texts):
        tokens = tokenizer.encode(batch)
        sizes = [
            [len(text.split()), len(text), len(text.encode()), unknown]
            for text, unknown in zip(batch, tokens.unknown.tolist(), strict=True)
        ]
        yield Corpus(
            tokens.ids.astype("<u2" if tokenizer.vocabulary_size <= 1 << 16 else "<u4"),
            tokens.words.astype("<i4"),
            np.concatenate([[0], np.cumsum(tokens.lengths)]),
            np.array([document_key(text) for text in batch], dtype="<u8"),
            np.array(sizes, dtype="<i8"),
        )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts to tokenise together. A text longer than `CHARACTERS_PER_BATCH` is a batch of its own."""
    batch, characters = [], 0
    for text in texts:
        if len(batch) == DOCUMENTS_PER_BLOCK or (batch and characters + len(text) > CHARACTERS_PER_BATCH):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


# ---------------------------------------------------------------- the token cache


def load_corpus(source: Source, tokenizer: Tokenizer, folder: Path | None = None) -> Corpus:
    """Return the tokenised corpus, memory-mapped, from the cache if the same text was tokenised before.

    Pass its `cache_folder` as `folder` if it is already known. Raises `UserError` for text that cannot be read, a
    source without documents, or a cache that cannot be used.
    """
    folder = folder or cache_folder(source, tokenizer)
    if corpus := _cached_corpus(folder, source.name):
        return corpus
    for _ in stream_corpus(source, tokenizer, folder):
        pass
    return _map_corpus(folder, source.name)


def open_corpus(folder: Path, name: str) -> Corpus | None:
    """A corpus that was tokenised before, or None if it is gone or damaged."""
    try:
        return _map_corpus(folder, name)
    except DAMAGE:
        return None


def _cached_corpus(folder: Path, location: str) -> Corpus | None:
    """Return the corpus in the cache once every file matches its hash, or None if there is none.

    A damaged one is removed and logged. Raises `UserError` if the cache cannot be read.
    """
    with cache_errors(folder):
        try:
            return _map_corpus(folder, location, check=True) if folder.exists() else None
        except DAMAGE:
            with locked(folder, wait=True):  # another process may have rebuilt it meanwhile
                try:
                    return _map_corpus(folder, location, check=True)
                except DAMAGE:
                    log.warning("the token cache %s is damaged: tokenising %s again", folder, location)
                    remove(folder)
    return None


def cache_folder(source: Source, tokenizer: Tokenizer) -> Path:
    """Return the corpus's folder in `$MLMKIT_CACHE` (default `~/.cache/mlmkit`).

    Its name is a hash of the file's bytes, the reading options and the tokenizer. Raises `UserError` for a source that
    is missing, unreadable, or a pipe, which can be read once only.
    """
    content = []
    for location in source.locations:
        if location.startswith(HUB):
            content.append(["", load_hub(location)._fingerprint])
            continue
        path = existing_file(location)
        if not path.is_file():
            raise UserError(f"{location} is a pipe, which can be read once only: save its content to a file")
        content.append([path.suffix, file_sha256(path)])
    options = asdict(source) | {"location": "", "content": content}
    identity = json.dumps([CACHE_FORMAT, options, tokenizer.fingerprint], sort_keys=True)
    return cache_root() / "tokens" / sha256(identity.encode()).hexdigest()[:32]


def stream_corpus(source: Source, tokenizer: Tokenizer, folder: Path) -> Iterator[Corpus]:
    """Yield the corpus in blocks of documents, tokenised on demand. At the end it is in the cache at `folder`.

    Blocks are appended to flat files, so memory does not grow with the corpus. Raises `UserError` as `load_corpus`
    does, and for a file that changed while it was read.
    """
    fingerprint, tokens, dtypes, empty = blake2b(digest_size=16), 0, {}, 0

    def documents() -> Iterator[str]:
        nonlocal empty
        for text in read_texts(source):
            if is_blank(text):
                empty += 1
            elif is_selected(document_key(text), source.keys):
                yield text

    with cache_errors(folder), ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = stack.enter_context(atomic(folder, folder=True, keep=True))
        files = {name: stack.enter_context((partial / name).open("wb")) for name in ("starts", *_ARRAYS)}
        for block in _encode(documents(), tokenizer):
            for name in _ARRAYS:
                files[name].write(getattr(block, name).tobytes())
            files["starts"].write((block.starts[:-1] + tokens).astype("<i8").tobytes())
            dtypes = {name: getattr(block, name).dtype.str for name in _ARRAYS}
            tokens += int(block.starts[-1])
            fingerprint.update(block.keys.tobytes())
            yield block
        if not dtypes:
            raise UserError(f"{source.name}: no documents in it ({why_empty(source)})")
        files["starts"].write(np.array([tokens], "<i8").tobytes())
        if cache_folder(source, tokenizer) != folder:  # what was read is not what was hashed
            raise UserError(f"{source.name} was changed while it was being read: run the same command again")
        for file in files.values():
            file.flush()
        meta = {"dtypes": dtypes, "fingerprint": fingerprint.hexdigest(), "empty_texts": empty}
        write_record(partial / META, {**meta, "files": hash_tree(partial)})


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turn an `OSError` in the block into a `UserError`, except for a missing file, which means damage."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot use the token cache {folder.parent}: {error.strerror}: point MLMKIT_CACHE elsewhere"
        ) from None


def _map_corpus(folder: Path, location: str, *, check: bool = False) -> Corpus:
    """Map a corpus from the cache. Raises one of `DAMAGE`; `check` compares every file with its hash."""
    meta = read_record(folder / META, "it is rebuilt")
    if check and (name := changed_file(folder, meta["files"])):
        raise DamagedError(f"{name} is damaged")
    starts = np.memmap(folder / "starts", "<i8", "r")
    documents, tokens = len(starts) - 1, int(starts[-1])
    shapes = {"ids": (tokens,), "words": (tokens,), "keys": (documents,), "text_sizes": (documents, len(TEXT_SIZES))}
    arrays = {}
    for name, shape in shapes.items():
        dtype = np.dtype(meta["dtypes"][name])
        if tokens:
            arrays[name] = np.memmap(folder / name, dtype, "r", shape=shape)
        else:  # an empty file cannot be mapped
            arrays[name] = np.fromfile(folder / name, dtype).reshape(shape)
    described = {name: meta[name] for name in ("fingerprint", "empty_texts")}
    return Corpus(**arrays, starts=starts, **described, name=location, folder=folder)
