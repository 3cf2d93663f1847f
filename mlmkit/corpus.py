"""Tokenised documents in memory: a few texts, or some documents of a stored corpus.

The pipeline:

    documents.read_pieces   files → pieces of texts
    encode_documents        pieces → stretches of token ids with their documents' keys and sizes
    shards.make_shards      stretches → shards on disk
    stored.StoredCorpus     shards → blocks of documents, each a `Corpus`, or the windows that training reads
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mlmkit.documents import is_selected, until_end
from mlmkit.errors import UserError
from mlmkit.lines import is_blank
from mlmkit.locations import EVERY_KEY
from mlmkit.masking import document_key, first_token_of_word
from mlmkit.tokenizer import Tokenizer, Tokens

DOCUMENTS_PER_BLOCK = 1024
CHARACTERS_PER_BATCH = 1 << 19  # tokenising takes up to 190 bytes of memory per character
TEXT_SIZES = ("words", "characters", "bytes", "unknown_characters")


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents in memory.

    `ids` and `words` `[tokens]` are flat: document d owns `ids[starts[d] : starts[d + 1]]`. `words` is the index of the
    token's word in its document, counting the words that have tokens. Per document there are `keys` `[documents]`
    uint64 and `text_sizes` `[documents, 4]` int64, with the columns `TEXT_SIZES`: words between spaces, characters,
    UTF-8 bytes, and characters lost to the unknown token.

    `fingerprint` identifies the texts and their order, whatever the tokenizer; only a whole corpus has one.
    `empty_texts` counts the blank texts that were left out. `name` says in messages where the texts come from.
    """

    ids: NDArray[np.integer]
    words: NDArray[np.int32]
    starts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    text_sizes: NDArray[np.int64]
    fingerprint: str = ""
    empty_texts: int = 0
    name: str = "text"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per document, `[documents]`."""
        return np.diff(self.starts)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    @property
    def words_begun(self) -> int:
        """The number of words that have tokens."""
        return len(np.unique(first_token_of_word(self.words, self.lengths)))

    @property
    def sizes(self) -> dict[str, int]:
        """The sum of each column of `text_sizes`."""
        return dict(zip(TEXT_SIZES, self.text_sizes.sum(axis=0).tolist(), strict=True))

    @property
    def unknown_share(self) -> float:
        """Share of the characters that the tokenizer lost to its unknown token."""
        return self.sizes["unknown_characters"] / max(self.sizes["characters"], 1)

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, begin: int, end: int) -> "Corpus":
        """Copy documents `begin` to `end` (exclusive)."""
        first, last = self.starts[[begin, end]].tolist()
        return Corpus(
            self.ids[first:last].copy(),
            self.words[first:last].copy(),
            self.starts[begin : end + 1] - first,
            self.keys[begin:end].copy(),
            self.text_sizes[begin:end].copy(),
        )

    def blocks(self) -> Iterator["Corpus"]:
        """Yield the corpus in parts of `DOCUMENTS_PER_BLOCK` documents."""
        for begin in range(0, len(self), DOCUMENTS_PER_BLOCK):
            yield self.part(begin, min(begin + DOCUMENTS_PER_BLOCK, len(self)))

    def key_blocks(self) -> Iterator[NDArray[np.uint64]]:
        """Yield the documents' keys, in order."""
        yield self.keys


def concatenate(parts: Iterable[Corpus]) -> Corpus:
    """Join parts of a corpus, in order."""
    parts = list(parts)
    starts = np.cumsum(np.concatenate([[0], *(part.lengths for part in parts)]))
    arrays = ("ids", "words", "keys", "text_sizes")
    ids, words, keys, text_sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in arrays)
    return Corpus(ids, words, starts, keys, text_sizes)


def word_indices(begins: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """The index of each token's word in its document, `[tokens]`, from whether a token begins a word."""
    words = np.cumsum(begins, dtype=np.int32)
    filled = lengths[lengths > 0]
    return words - np.repeat(words[np.cumsum(filled) - filled], filled)


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """Tokenise a few texts in memory. An empty text is a document without tokens. Raises `UserError` for no texts."""
    stretches = list(encode_documents(((text, True) for text in texts), tokenizer, keep_blank=True))
    if not stretches:
        raise UserError("there is no text")
    ids, begins, lengths, keys, text_sizes = (
        np.concatenate([getattr(stretch, field.name) for stretch in stretches]) for field in fields(Stretch)[:5]
    )
    starts = np.concatenate([[0], np.cumsum(lengths)])
    fingerprint = blake2b(keys.astype("<u8").tobytes(), digest_size=16).hexdigest()
    return Corpus(ids, word_indices(begins, lengths), starts, keys, text_sizes, fingerprint)


# ---------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of a corpus: `ids` and `word_begins` `[tokens]`, as in `Tokens`.

    `lengths`, `keys` and `text_sizes` `[documents, ...]` are of the documents that end in the stretch; the first may
    have begun before it. `texts` were read for it, of which `blank` were blank. If `is_dropped`, its tokens since the
    last document, and those of the stretches before it, are not wanted.
    """

    ids: NDArray[np.integer]
    word_begins: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    keys: NDArray[np.uint64]
    text_sizes: NDArray[np.int64]
    texts: int = 0
    blank: int = 0
    is_dropped: bool = False


def encode_documents(
    pieces: Iterable[tuple[str, bool]],
    tokenizer: Tokenizer,
    *,
    words: bool = True,
    keys: tuple[float, float] = EVERY_KEY,
    keep_blank: bool = False,
) -> Iterator[Stretch]:
    """Tokenise texts, given in pieces with whether the text ends there, in memory that does not grow with them.

    Without `words`, no `word_begins` are computed: they are all False. Leaves out documents whose keys `is_selected`
    does not select and, unless told to `keep_blank`, blank ones.
    """
    pieces = iter(pieces)
    batch: list[str] = []
    characters = 0
    for text, ends in pieces:
        is_long = not ends or len(text) > CHARACTERS_PER_BATCH
        if batch and (is_long or len(batch) == DOCUMENTS_PER_BLOCK or characters + len(text) > CHARACTERS_PER_BATCH):
            yield _encode_batch(batch, tokenizer, words, keys, keep_blank)
            batch, characters = [], 0
        if is_long:
            rest = chain([text], () if ends else until_end(pieces))
            yield from _encode_long(rest, tokenizer, words, keys, keep_blank)
        else:
            batch.append(text)
            characters += len(text)
    if batch:
        yield _encode_batch(batch, tokenizer, words, keys, keep_blank)


def _encode_batch(
    texts: list[str], tokenizer: Tokenizer, words: bool, keys: tuple[float, float], keep_blank: bool
) -> Stretch:
    filled = texts if keep_blank else [text for text in texts if not is_blank(text)]
    counts = {"texts": len(texts), "blank": len(texts) - len(filled)}
    keyed = {text: document_key(text) for text in filled}
    if keys != EVERY_KEY:
        filled = [text for text in filled if is_selected(keyed[text], keys)]
    tokens = tokenizer.encode(filled, words=words)
    sizes = [
        # An ASCII text has as many bytes as characters.
        [len(text.split()), len(text), len(text) if text.isascii() else len(text.encode()), unknown]
        for text, unknown in zip(filled, tokens.unknown.tolist(), strict=True)
    ]
    return replace(
        _stretch(tokens, tokenizer),
        lengths=tokens.lengths,
        keys=np.array([keyed[text] for text in filled], "<u8"),
        text_sizes=np.array(sizes, np.int64).reshape(-1, len(TEXT_SIZES)),
        **counts,
    )


def _stretch(tokens: Tokens, tokenizer: Tokenizer) -> Stretch:
    """The tokens, in which no document ends."""
    begins = np.zeros(len(tokens.ids), np.bool_) if tokens.word_begins is None else tokens.word_begins
    none, ids = np.empty(0, np.int64), tokens.ids.astype(tokenizer.id_type)
    return Stretch(ids, begins, none, none.astype("<u8"), none.reshape(0, len(TEXT_SIZES)))


def _encode_long(
    pieces: Iterable[str], tokenizer: Tokenizer, words: bool, keys: tuple[float, float], keep_blank: bool
) -> Iterator[Stretch]:
    """The stretches of one document, the last of which ends it."""
    hashed, size, length, ended_in_word = blake2b(digest_size=8), np.zeros((1, len(TEXT_SIZES)), np.int64), 0, False

    def watched() -> Iterator[str]:
        nonlocal ended_in_word
        for piece in filter(None, pieces):
            encoded = piece.encode()
            hashed.update(encoded)
            joined = ended_in_word and not piece[0].isspace()
            size[0, :3] += [len(piece.split()) - joined, len(piece), len(encoded)]
            ended_in_word = not piece[-1].isspace()
            yield piece

    for tokens in tokenizer.encode_pieces(watched(), words=words):
        length += len(tokens.ids)
        size[0, 3] += int(tokens.unknown.sum())
        yield _stretch(tokens, tokenizer)
    key = int.from_bytes(hashed.digest(), "little")
    end = _stretch(Tokens(np.empty(0, np.int64), None, *(np.empty(0, np.int64),) * 2), tokenizer)
    is_empty = not keep_blank and not size[0, 0]
    if is_empty or not is_selected(key, keys):
        yield replace(end, texts=1, blank=int(is_empty), is_dropped=True)
    else:
        documents = {"lengths": np.array([length]), "keys": np.array([key], "<u8"), "text_sizes": size}
        yield replace(end, texts=1, **documents)
