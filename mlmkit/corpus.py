"""Documents → token ids → windows, with a token cache on disk.

A token's place is its document (index in corpus order) and its offset there; windows only say which tokens a model sees
together.
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

from mlmkit.documents import HUB, Source, existing_file, load_hub, read_texts
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
CHARACTERS_PER_BATCH = 1 << 19  # tokenising takes up to 190 bytes for each
BLOCKS_COUNTED = 128  # about 131,000 documents, where a sample of the text is enough
LONGEST_MEAN_WORD = 3.0  # tokens; English has 1.2 to 1.5
GATHERED_AT_ONCE = 512  # entries; the kernel maps up to 64 KiB around each
TEXT_SIZES = ("words", "characters", "bytes", "unknown_characters")
_ARRAYS = ("ids", "words", "keys", "text_sizes")
META = "meta.json"
DAMAGE = (FileNotFoundError, DamagedError, ValueError)  # what a damaged cache raises


# ---------------------------------------------------------------- documents → token ids


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus, or a stretch of one. The arrays may be memory maps.

    `ids` and `words` `[tokens]` are flat; document d owns `ids[starts[d] : starts[d + 1]]`. Per document: `keys`
    uint64 and `text_sizes` int64 `[documents, 4]`: white-space words, characters, UTF-8 bytes, and the characters that
    the tokenizer lost to its unknown token. `fingerprint` identifies the texts and their order, whatever the tokenizer;
    a stretch has none. `empty_texts` counts the texts of white space that were left out. `name` is where it comes from,
    for messages; `folder` is its place in the cache.
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
        """To another process a cached corpus goes by its place."""
        if self.folder:
            return _map_corpus, (self.folder, self.name)
        return Corpus, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each document, `[documents]`."""
        return np.diff(self.starts)

    @property
    def unknown_share(self) -> float:
        """Share of the characters that the tokenizer lost to its unknown token."""
        _, characters, _, lost = self.text_sizes.sum(axis=0).tolist()
        return lost / max(characters, 1)

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, begin: int, end: int) -> "Corpus":
        """The documents from `begin` up to `end`, copied into memory."""
        starts = _copy(self.starts, begin, end + 1)
        first, last = int(starts[0]), int(starts[-1])
        return Corpus(
            _copy(self.ids, first, last),
            _copy(self.words, first, last),
            starts - first,
            _copy(self.keys, begin, end),
            _copy(self.text_sizes, begin, end),
        )

    def blocks(self) -> Iterator["Corpus"]:
        """All of it in stretches of `DOCUMENTS_PER_BLOCK` documents, each copied into memory."""
        for begin in range(0, len(self), DOCUMENTS_PER_BLOCK):
            yield self.part(begin, min(begin + DOCUMENTS_PER_BLOCK, len(self)))


def warn_of_words(corpus: Corpus) -> None:
    """Warn where whole-word masking is no use: words of one token, or of more than three on average.

    A text without spaces has either. The first documents are counted.
    """
    tokens = words = 0
    for block in islice(corpus.blocks(), BLOCKS_COUNTED):
        tokens += len(block.words)
        words += len(np.unique(first_token_of_word(block.words, block.lengths)))
    if tokens == words or tokens > LONGEST_MEAN_WORD * words:
        effect = "has no effect" if tokens == words else "hides whole stretches of a document, or none of it"
        mean, advice = tokens / max(words, 1), "leave it out, or put spaces between words"
        log.warning("%s: %.1f tokens per word on average: whole-word masking %s: %s", corpus.name, mean, effect, advice)


def _copy(array: NDArray, begin: int, end: int) -> NDArray:
    """Read, not mapped: the pages of a map count as this process's memory long after they were used."""
    if not isinstance(array, np.memmap):
        return array[begin:end].copy()
    width = int(np.prod(array.shape[1:]))
    offset = array.offset + begin * width * array.dtype.itemsize
    flat = np.fromfile(str(array.filename), array.dtype, (end - begin) * width, offset=offset)
    return flat.reshape(end - begin, *array.shape[1:])


def gather(array: NDArray, index: NDArray[np.int64]) -> NDArray:
    """`array[index]`, whose pages do not stay in this process's memory when the array is mapped."""
    if (mapped := getattr(array, "_mmap", None)) is None:
        return array[index]
    array = np.asarray(array)  # a map itself is slower to index
    found = np.empty((len(index), *array.shape[1:]), array.dtype)
    for begin in range(0, len(index), GATHERED_AT_ONCE):
        found[begin : begin + GATHERED_AT_ONCE] = array[index[begin : begin + GATHERED_AT_ONCE]]
        mapped.madvise(mmap.MADV_DONTNEED)
    return found


def concatenate(parts: Iterable[Corpus]) -> Corpus:
    """Stretches of a corpus, in order, as one."""
    parts = list(parts)
    starts = np.cumsum(np.concatenate([[0], *(part.lengths for part in parts)]))
    ids, words, keys, text_sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS)
    return Corpus(ids, words, starts, keys, text_sizes)


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """A few texts in memory; empty ones are documents here, with no tokens. Raises `UserError` for no text at all."""
    blocks = list(_encode(texts, tokenizer))
    if not blocks:
        raise UserError("there is no text")
    corpus = concatenate(blocks)
    fingerprint = blake2b(corpus.keys.astype("<u8").tobytes(), digest_size=16).hexdigest()
    return replace(corpus, fingerprint=fingerprint)


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Corpus]:
    for batch in _batches(texts):
        tokens = tokenizer.encode(batch)
        yield Corpus(
            tokens.ids.astype("<u2" if tokenizer.vocabulary_size <= 1 << 16 else "<u4"),
            tokens.words.astype("<i4"),
            np.concatenate([[0], np.cumsum(tokens.lengths)]),
            np.array([document_key(text) for text in batch], dtype="<u8"),
            np.array(
                [
                    [len(text.split()), len(text), len(text.encode()), unknown]
                    for text, unknown in zip(batch, tokens.unknown.tolist(), strict=True)
                ],
                dtype="<i8",
            ),
        )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts to be tokenised together. A longer one than `CHARACTERS_PER_BATCH` is a batch of its own."""
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
    """The tokenised corpus, memory-mapped, from the cache if this text was tokenised so before.

    `folder` is its `cache_folder`, where the caller knows it already.
    """
    folder = folder or cache_folder(source, tokenizer)
    if corpus := _cached_corpus(folder, source.location):
        return corpus
    for _ in stream_corpus(source, tokenizer, folder):
        pass
    return _map_corpus(folder, source.location)


def _cached_corpus(folder: Path, location: str) -> Corpus | None:
    """The corpus in the cache, every file compared with its hash; None if there is none.

    One that is damaged is removed, with a line in the log. Raises `UserError` for one that cannot be read.
    """
    with _cache_errors(folder):
        try:
            return _map_corpus(folder, location, check=True) if folder.exists() else None
        except DAMAGE:
            with locked(folder, wait=True):  # another process may have made it again meanwhile
                try:
                    return _map_corpus(folder, location, check=True)
                except DAMAGE:
                    log.warning("the token cache %s is damaged: tokenising %s again", folder, location)
                    remove(folder)
    return None


def cache_folder(source: Source, tokenizer: Tokenizer) -> Path:
    """Where the tokens are kept: in `$MLMKIT_CACHE` (default `~/.cache/mlmkit`), a folder for each corpus.

    Its name is a hash of the file's bytes, the reading options and the tokenizer.
    """
    if source.location.startswith(HUB):
        content = load_hub(source.location)._fingerprint
    else:
        path = existing_file(source.location)
        if not path.is_file():
            raise UserError(f"{source.location} is a pipe, which can be read once only: save its content to a file")
        content = file_sha256(path)
    options = asdict(source) | {"location": Path(source.location).suffix, "content": content}
    identity = json.dumps([CACHE_FORMAT, options, tokenizer.fingerprint], sort_keys=True)
    return cache_root() / "tokens" / sha256(identity.encode()).hexdigest()[:32]


def stream_corpus(source: Source, tokenizer: Tokenizer, folder: Path) -> Iterator[Corpus]:
    """The corpus in blocks of documents, tokenised as they are asked for; at the end it is in the cache at `folder`.

    It is appended to flat files, so that memory does not grow with the corpus.
    """
    fingerprint, tokens, dtypes, texts = blake2b(digest_size=16), 0, {}, _Counter(read_texts(source))
    with _cache_errors(folder), ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = stack.enter_context(atomic(folder, folder=True, keep=True))
        files = {name: stack.enter_context((partial / name).open("wb")) for name in ("starts", *_ARRAYS)}
        for block in _encode(texts, tokenizer):
            for name in _ARRAYS:
                files[name].write(getattr(block, name).tobytes())
            files["starts"].write((block.starts[:-1] + tokens).astype("<i8").tobytes())
            dtypes = {name: getattr(block, name).dtype.str for name in _ARRAYS}
            tokens += int(block.starts[-1])
            fingerprint.update(block.keys.tobytes())
            yield block
        if not dtypes:
            raise UserError(f"{source.location}: no documents in it (it is empty, or white space only)")
        files["starts"].write(np.array([tokens], "<i8").tobytes())
        if cache_folder(source, tokenizer) != folder:  # what was hashed is not what was read
            raise UserError(f"{source.location} was changed while it was being read: run the same command again")
        for file in files.values():
            file.flush()
        meta = {"dtypes": dtypes, "fingerprint": fingerprint.hexdigest(), "empty_texts": texts.empty}
        write_record(partial / META, {**meta, "files": hash_tree(partial)})


class _Counter:
    """Passes texts on but for those of white space only, which it counts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.empty = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if text and not text.isspace():
                yield text
            else:
                self.empty += 1


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:  # damage
        raise
    except OSError as error:
        raise UserError(
            f"cannot use the token cache {folder.parent}: {error.strerror}: point MLMKIT_CACHE elsewhere"
        ) from None


def _map_corpus(folder: Path, location: str, *, check: bool = False) -> Corpus:
    """Raises one of `DAMAGE`; with `check`, every file is compared with its hash."""
    meta = read_record(folder / META, "it is made again")
    if check and (name := changed_file(folder, meta["files"])):
        raise DamagedError(f"{name} is damaged")
    starts = np.memmap(folder / "starts", "<i8", "r")
    documents, tokens = len(starts) - 1, int(starts[-1])
    shapes = {"ids": (tokens,), "words": (tokens,), "keys": (documents,), "text_sizes": (documents, len(TEXT_SIZES))}
    arrays = {}
    for name, shape in shapes.items():
        dtype = np.dtype(meta["dtypes"][name])
        # an empty file cannot be mapped
        arrays[name] = (
            np.memmap(folder / name, dtype, "r", shape=shape) if tokens else np.fromfile(folder / name, dtype)
        )
    arrays["text_sizes"] = arrays["text_sizes"].reshape(documents, len(TEXT_SIZES))
    described = {name: meta[name] for name in ("fingerprint", "empty_texts")}
    return Corpus(**arrays, starts=starts, **described, name=location, folder=folder)


# ---------------------------------------------------------------- token ids → windows


@dataclass(frozen=True)
class Windows:
    """Spans of documents: window w is tokens `start[w] : start[w] + length[w]` of `document[w]`; each `[windows]`."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)


def ranges(begin: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """`begin[i], begin[i] + 1, ...` for `length[i]` entries, one after the other."""
    return np.arange(int(length.sum())) + np.repeat(begin - (np.cumsum(length) - length), length)


def cut_windows(lengths: NDArray[np.int64], capacity: int) -> Windows:
    """Cut each document into the fewest pieces of at most `capacity` tokens, equal to within one: for training.

    A document of no tokens has no window.
    """
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    piece = ranges(np.zeros_like(pieces), pieces)
    begin = piece * lengths[document] // pieces[document]
    end = (piece + 1) * lengths[document] // pieces[document]
    return Windows(document, begin, end - begin)


def window_table(corpus: Corpus, capacity: int) -> NDArray[np.int64]:
    """The windows that `cut_windows` makes of a corpus, `[windows, 4]`: document, start, length, and start of word.

    The last is the offset, in the document, of the first token of the word in which the window begins. A cached
    corpus's table is made once, block by block, and mapped from the cache.

    Raises `UserError` when the cache cannot be written.
    """
    if corpus.folder is None:
        return _window_rows(corpus, 0, len(corpus), capacity)
    folder = corpus.folder / f"windows-{capacity}"
    rows, hashed = folder / "rows", folder / "sha256"
    with _cache_errors(corpus.folder), locked(folder, wait=True):
        if not (rows.exists() and hashed.exists() and file_sha256(rows).encode() == hashed.read_bytes()):
            if folder.exists():
                log.warning("the token cache %s is damaged: making it again", folder)
            with atomic(folder, folder=True) as partial:
                with (partial / "rows").open("wb") as file:
                    for begin in range(0, len(corpus), DOCUMENTS_PER_BLOCK):
                        end = min(begin + DOCUMENTS_PER_BLOCK, len(corpus))
                        file.write(_window_rows(corpus, begin, end, capacity).astype("<i8").tobytes())
                (partial / "sha256").write_text(file_sha256(partial / "rows"))
    # an empty file cannot be mapped
    return np.memmap(rows, "<i8", "r").reshape(-1, 4) if rows.stat().st_size else np.empty((0, 4), np.int64)


def _window_rows(corpus: Corpus, begin: int, end: int, capacity: int) -> NDArray[np.int64]:
    """The rows of the documents from `begin` up to `end`, in memory. Words are read where a document is cut."""
    starts = _copy(corpus.starts, begin, end + 1)
    windows = cut_windows(np.diff(starts), capacity)
    word_start = windows.start.copy()
    for document in np.unique(windows.document[windows.start > 0]).tolist():
        words = _copy(corpus.words, *starts[document : document + 2].tolist())
        here = slice(*np.searchsorted(windows.document, [document, document + 1]))
        word_start[here] = first_token_of_word(words, np.array([len(words)]))[windows.start[here]]
    return np.stack([windows.document + begin, windows.start, windows.length, word_start], axis=1)


def overlapping_windows(lengths: NDArray[np.int64], capacity: int) -> Windows:
    """Windows for evaluation. A document that fits is one window.

    A longer one gets windows of `capacity` tokens, the fewest whose steps are at most half a window, spread evenly
    from its first token to its last: window k of m starts at `k * (n - capacity) // (m - 1)`.
    """
    excess = np.maximum(lengths - capacity, 0)
    step = max(capacity // 2, 1)
    count = np.where(lengths == 0, 0, 1 + -(-excess // step))
    document = np.repeat(np.arange(len(lengths)), count)
    index = ranges(np.zeros_like(count), count)
    start = index * excess[document] // np.maximum(count[document] - 1, 1)
    return Windows(document, start, np.minimum(lengths[document], capacity))


def nearest_window(windows: Windows, document: NDArray[np.int64], offset: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each token the window that scores it, `[tokens]`: the one whose centre is nearest, the earlier on a tie.

    `document` and `offset` `[tokens]` place the tokens. Each document's windows must be in order, and cover it.
    """
    # Window k of a document serves offsets up to the midpoint between its centre and the next one's. Twice the centre
    # is 2 * start + length - 1, an integer, so the comparison is exact.
    doubled = 2 * windows.start + windows.length - 1
    same_document = windows.document[1:] == windows.document[:-1]
    stride = int(offset.max(initial=0)) + 1
    to_the_end = stride - 1
    last_offset = np.append(np.where(same_document, (doubled[1:] + doubled[:-1]) // 4, to_the_end), to_the_end)
    served_up_to = windows.document * stride + np.minimum(last_offset[: len(windows)], to_the_end)
    return np.searchsorted(served_up_to, document * stride + offset)
