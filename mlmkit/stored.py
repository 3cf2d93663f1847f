"""A tokenised corpus on disk, in shards. Read with `pread`, so that this process's memory does not grow with it.

FOLDER/plan.json              what is tokenised, and how: see `shards.Plan`
FOLDER/tokens.json            written last: all shards, and the fingerprint of the text
FOLDER/shards/00000-000/      shard 000 of split 00000
    ids.npy                   [tokens] uint16, or uint32 for more than 65,536 entries
    documents.npy             [documents] end (of its tokens) uint32, key uint64
    sizes.npy                 [documents, 4], the columns `TEXT_SIZES`, in the smallest type that holds them
    words.npy                 [tokens / 8] uint8, a bit per token, lowest first: set if it begins a word. May be missing
    shard.json                counts, and the SHA-256 of each file
"""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mlmkit.corpus import DOCUMENTS_PER_BLOCK, TEXT_SIZES, Corpus, concatenate, word_indices
from mlmkit.errors import DamagedError, UserError
from mlmkit.files import read_record, recorded_sha256

log = logging.getLogger(__name__)

TOKENS = "tokens.json"
DOCUMENT = np.dtype([("end", "<u4"), ("key", "<u8")])
LONGEST_MEAN_WORD = 3.0  # tokens; English has 1.2 to 1.5


class Column:
    """An array in a `.npy` file, of which entries are read from disk as they are asked for.

    Raises `DamagedError` for a file that is not one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                version = npy.read_magic(file)
                self.shape, is_fortran, self.dtype = npy.read_array_header_1_0(file)
                self.begin, self._row_bytes = file.tell(), self.dtype.itemsize * int(np.prod(self.shape[1:]))
                if version != (1, 0) or is_fortran or self.dtype.hasobject:
                    raise ValueError("not an array of this format")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
            raise DamagedError(f"{path} is damaged ({error})") from None

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _descriptor(self) -> int:
        _allow_open_files()
        return os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if "_descriptor" in vars(self):
            os.close(self._descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_descriptor"}

    def read(self, begin: int, end: int, into: NDArray | None = None) -> NDArray:
        """Copy entries `begin` to `end`, to an array of their shape and type if it is given."""
        array = np.empty((end - begin, *self.shape[1:]), self.dtype) if into is None else into
        buffer, position = array.data.cast("B") if array.size else memoryview(b""), self.begin + begin * self._row_bytes
        while len(buffer):  # a read returns at most 2 GiB
            content = os.pread(self._descriptor, len(buffer), position)
            if not content:
                raise DamagedError(f"{self.path} ends too early")
            buffer[: len(content)] = content
            buffer, position = buffer[len(content) :], position + len(content)
        return array


def _allow_open_files() -> None:
    """Raise this process's limit of open files as far as the system allows: each shard needs up to three."""
    with suppress(ImportError, ValueError, OSError):  # Windows, and systems with a lower limit of their own
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Shard:
    """One shard's columns. `first` is the number of its first document in the corpus."""

    def __init__(self, folder: Path, first: int, documents: int) -> None:
        self.folder, self.first, self.size = folder, first, documents

    @cached_property
    def ids(self) -> Column:
        """Token ids."""
        return Column(self.folder / "ids.npy")

    @cached_property
    def documents(self) -> Column:
        """Documents: where the tokens end, and the key."""
        return Column(self.folder / "documents.npy")

    @cached_property
    def word_bits(self) -> Column:
        """Whether a token begins a word, in bits."""
        return Column(self.folder / "words.npy")

    def bounds(self, begin: int, end: int) -> NDArray[np.int64]:
        """Where the tokens of documents `begin` to `end` of the shard begin, and the last one's end."""
        ends = self.documents.read(max(begin - 1, 0), end)["end"].astype(np.int64)
        return ends if begin else np.concatenate([[0], ends])

    def word_begins(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Whether tokens `begin` to `end` begin words."""
        bits = np.unpackbits(self.word_bits.read(begin // 8, -(-end // 8)), bitorder="little")
        return bits[begin % 8 : begin % 8 + end - begin].astype(np.bool_)

    def part(self, begin: int, end: int, *, words: bool) -> Corpus:
        """Copy documents `begin` to `end` of the shard."""
        bounds = self.bounds(begin, end)
        first, last = int(bounds[0]), int(bounds[-1])
        ids = self.ids.read(first, last)
        indices = word_indices(self.word_begins(first, last), np.diff(bounds)) if words else np.full(len(ids), -1)
        keys = self.documents.read(begin, end)["key"]
        sizes = Column(self.folder / "sizes.npy").read(begin, end).astype(np.int64)
        return Corpus(ids, indices.astype(np.int32), bounds - first, keys, sizes)


@dataclass(frozen=True)
class StoredCorpus:
    """A tokenised corpus on disk. `name` says in messages where the texts come from.

    `record` is the content of `tokens.json`. `fingerprint` identifies the texts and their order, whatever the
    tokenizer.
    """

    folder: Path
    name: str
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, name: str) -> "StoredCorpus":
        """Open a finished corpus, each of whose files matches its SHA-256.

        A file of the same size and time of modification is not hashed again. Raises `DamagedError`.
        """
        record = read_record(folder / TOKENS, "tokenise the text again")
        expected = file_hashes(folder, record)
        damaged = [path for path in expected if not path.is_file()]
        if not damaged:
            found = zip(expected.items(), recorded_sha256([*expected]), strict=True)
            damaged = [path for (path, sha256), now in found if now != sha256]
        if damaged:
            raise DamagedError(f"{damaged[0]} is damaged: tokenise the text again")
        return cls(folder, name, record)

    @property
    def fingerprint(self) -> str:
        """Identifies the texts and their order, whatever the tokenizer."""
        return self.record["fingerprint"]

    @property
    def has_words(self) -> bool:
        """Whether it is known where words begin."""
        return self.record["has_words"]

    @property
    def empty_texts(self) -> int:
        """Blank texts that were left out."""
        return self.record["blank"]

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.record["tokens"]

    @property
    def words_begun(self) -> int:
        """The number of words, if it is known where they begin."""
        return self.record["words_begun"]

    @property
    def sizes(self) -> dict[str, int]:
        """The sum of each column of `TEXT_SIZES`."""
        return {name: self.record[name] for name in TEXT_SIZES}

    @property
    def unknown_share(self) -> float:
        """Share of the characters that the tokenizer lost to its unknown token."""
        return self.sizes["unknown_characters"] / max(self.sizes["characters"], 1)

    def __len__(self) -> int:
        return self.record["documents"]

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards, in the order of the text."""
        counts = [shard["documents"] for shard in self.record["shards"]]
        names = [shard["name"] for shard in self.record["shards"]]
        firsts = np.cumsum([0, *counts])[:-1].tolist()
        return [Shard(self.folder / "shards" / name, *of) for name, *of in zip(names, firsts, counts, strict=True)]

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        return np.array([shard.first for shard in self.shards])

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: another process opens its own."""
        return {name: getattr(self, name) for name in ("folder", "name", "record")}

    def stretches(self, begin: int, end: int) -> Iterator[tuple[int, Shard, int, int]]:
        """Yield the number of each shard with some of documents `begin` to `end`, the shard, and which of its own."""
        for index in range(max(int(np.searchsorted(self._firsts, begin, side="right")) - 1, 0), len(self.shards)):
            shard = self.shards[index]
            if shard.first >= end:
                return
            if (first := max(begin - shard.first, 0)) < (last := min(end - shard.first, shard.size)):
                yield index, shard, first, last

    def part(self, begin: int, end: int) -> Corpus:
        """Copy documents `begin` to `end` (exclusive) into memory."""
        stretches = [*self.stretches(begin, end)] or [(0, self.shards[0], 0, 0)]
        parts = [shard.part(*stretch, words=self.has_words) for _, shard, *stretch in stretches]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def blocks(self) -> Iterator[Corpus]:
        """Yield the corpus in parts of at most `DOCUMENTS_PER_BLOCK` documents, each copied into memory."""
        for shard in self.shards:
            for begin in range(0, shard.size, DOCUMENTS_PER_BLOCK):
                yield shard.part(begin, min(begin + DOCUMENTS_PER_BLOCK, shard.size), words=self.has_words)

    def _document_blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """Lengths and keys of consecutive documents."""
        for shard in self.shards:
            for begin in range(0, shard.size, 1 << 20):
                end = min(begin + (1 << 20), shard.size)
                yield np.diff(shard.bounds(begin, end)), shard.documents.read(begin, end)["key"]

    def length_blocks(self) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens per document, in order, in arrays of bounded size."""
        return (lengths for lengths, _ in self._document_blocks())

    def key_blocks(self) -> Iterator[NDArray[np.uint64]]:
        """Yield the documents' keys, in order, in arrays of bounded size."""
        return (keys for _, keys in self._document_blocks())

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per document, `[documents]`."""
        return np.concatenate([*self.length_blocks(), np.empty(0, np.int64)])


def warn_of_words(corpus: Corpus | StoredCorpus) -> None:
    """Warn if whole-word masking is useless because words have one token, or more than three, on average.

    Text without spaces gives one or the other.
    """
    tokens, words = corpus.tokens, corpus.words_begun
    if tokens == words or tokens > LONGEST_MEAN_WORD * words:
        effect = "has no effect" if tokens == words else "hides long stretches of a document, or none of it"
        mean, advice = tokens / max(words, 1), "leave it out, or put spaces between words"
        log.warning("%s: %.1f tokens per word on average: whole-word masking %s: %s", corpus.name, mean, effect, advice)


def file_hashes(folder: Path, record: dict[str, Any]) -> dict[Path, str]:
    """The SHA-256 of each file of the shards, as `tokens.json` has them."""
    shards = ((folder / "shards" / shard["name"], shard["files"]) for shard in record["shards"])
    return {home / file: sha256 for home, files in shards for file, sha256 in files.items()}


def check_tokenizer(corpus: StoredCorpus, fingerprint: str) -> None:
    """Raise `UserError` unless the corpus was tokenised with the tokenizer of this fingerprint."""
    if corpus.record["tokenizer"] != fingerprint:
        raise UserError(
            f"{corpus.name} was tokenised with another tokenizer: use the one in the folder beside it, or tokenise the "
            "text again"
        )
