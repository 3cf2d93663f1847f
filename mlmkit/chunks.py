"""Tokenise text chunk by chunk, each distinct chunk once, with the tokenizers for which that is exact.

split_chunks      a text → chunks: "The cat, the cat." → "The", " cat,", " the", " cat."
ChunkCache.encode chunks → tokens, remembered: text repeats its words, so it takes half the time
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, filterfalse, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

CUT = re.compile(r"(?<=\S)(?= )")
# In a text without these, every space follows a character that is not white space, so str.split will do.
SPLIT_WITH_CARE = ("\0", *(chr(code) + " " for code in range(sys.maxunicode + 1) if chr(code).isspace()))
CACHE_BYTES = 48 << 20  # 240,000 chunks: 7 % of the chunks of Wikipedia are not there; at 24 MiB 10, at 96 MiB 5 %
CHUNK_BYTES = 200  # an entry: the string, the bytes of its tokens, a slot; and 8 bytes per character
CHUNKS_PER_TEXT = 256  # 2,000 characters: 5 us per chunk; one by one they take 13, all in one text 9
CHUNKS_AT_ONCE = 1 << 14  # about 150,000 characters

# Steps that look at one character and the combining characters after it, and leave a space a space.
LOCAL_STEPS = {"NFC", "NFD", "Lowercase"}
# These may also turn other characters into spaces, or remove characters.
REMOVING_STEPS = LOCAL_STEPS | {"NFKC", "NFKD", "Nmt", "StripAccents", "BertNormalizer"}
WHITE_SPACE_SPLITS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
LATER_SPLITS = WHITE_SPACE_SPLITS | {"Punctuation", "Digits", "FixedLength"}


def cuts_before_spaces(tokenizer: dict[str, Any]) -> bool:
    """Return whether the tokens of a text are those of its chunks, for any text, given a `tokenizer.json`.

    A chunk ends before a space (U+0020) that follows a character other than white space. This holds by construction
    if no normalizer looks across such a place, the first pre-tokenizer always splits there, and no added token can
    contain it. So BERT's WordPiece and GPT-2's byte-level BPE qualify. Other pre-tokenizers may split there too, but
    that does not follow from their type.
    """
    steps, splits = _parts(tokenizer.get("normalizer")), _parts(tokenizer.get("pre_tokenizer"))
    first, *later = splits or [{"type": None}]
    added = [unicodedata.normalize("NFKC", token["content"]) for token in tokenizer.get("added_tokens") or ()]
    if first["type"] == "ByteLevel":  # its pattern looks ahead by one character, and only from white space
        splits_there = first.get("use_regex", True)
        allowed, straddles = LOCAL_STEPS, any(re.search(r"\S\s|^\s+\S", content) for content in added)
    else:
        splits_there = first["type"] in WHITE_SPACE_SPLITS
        allowed, straddles = REMOVING_STEPS, any(re.search(r"\s", content) for content in added)
    straddles |= any(token["rstrip"] for token in tokenizer.get("added_tokens") or ())
    is_random = bool(tokenizer["model"].get("dropout"))
    types = {step["type"] for step in steps}, {split["type"] for split in later}
    return splits_there and types[0] <= allowed and types[1] <= LATER_SPLITS and not straddles and not is_random


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, those of sequences one by one."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [part for key in ("normalizers", "pretokenizers") for each in step.get(key, ()) for part in _parts(each)]


def split_chunks(text: str) -> list[str]:
    """Cut a text before each space that follows a character other than white space."""
    if any(map(text.__contains__, SPLIT_WITH_CARE)):
        return CUT.split(text)
    return text.replace(" ", "\0 ").split("\0")


def last_cut(text: str) -> int:
    """Return where the last chunk of a text begins."""
    cut = text.rfind(" ")
    while cut > 0 and text[cut - 1].isspace():
        cut = text.rfind(" ", 0, cut)
    return max(cut, 0)


def _size(chunks: Iterable[str]) -> int:
    return sum(CHUNK_BYTES + 8 * len(chunk) for chunk in chunks)


class ChunkCache:
    """Encodes texts chunk by chunk and keeps the tokens of each chunk, in about 48 MiB.

    `encode_batch` encodes texts; `count_unknown` counts the characters that a text loses to `unk_id`, given its ids and
    their spans. Several threads may share a cache.
    """

    def __init__(
        self,
        encode_batch: Callable[[Sequence[str]], list[Encoding]],
        count_unknown: Callable[[str, NDArray[np.int64], NDArray[np.int64]], int],
        unk_id: int | None,
    ) -> None:
        self._encode_batch, self._count_unknown, self._unk_id = encode_batch, count_unknown, unk_id
        self._packed = {"": b""}
        self._room = CACHE_BYTES

    def encode(
        self, texts: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Return `ids` `[tokens]`, `word_begins` `[tokens]` bool, `lengths` and `unknown` `[documents]`."""
        packed = self._packed  # another thread may replace it meanwhile
        chunks = [split_chunks(text) for text in texts]
        missing = list(dict.fromkeys(filterfalse(packed.__contains__, chain.from_iterable(chunks))))
        for begin in range(0, len(missing), CHUNKS_AT_ONCE):
            packed.update(self._pack(missing[begin : begin + CHUNKS_AT_ONCE]))
        documents = [b"".join(map(packed.__getitem__, each)) for each in chunks]
        self._room -= _size(missing)
        if self._room < 0:  # keep the first half: what is frequent comes early
            self._packed = dict(islice(packed.items(), len(packed) // 2))
            self._room = CACHE_BYTES - _size(self._packed)
        ends: NDArray[np.int64] = np.cumsum([len(document) // 8 for document in documents], dtype=np.int64)
        tokens = np.frombuffer(b"".join(documents), dtype=np.int64)
        lost: NDArray[np.int64] = np.concatenate([[0], np.cumsum(tokens >> 33)])[ends]
        begins = (tokens >> 32 & 1).astype(np.bool_)
        return tokens & 0xFFFFFFFF, begins, np.diff(ends, prepend=0), np.diff(lost, prepend=0)

    def _pack(self, chunks: list[str]) -> dict[str, bytes]:
        """Return int64 tokens: the id; bit 32, whether it begins a word; from bit 33, the chunk's lost characters."""
        joined = [chunk for chunk in chunks if chunk[0] == " " and not chunk[-1].isspace()]
        alone = [chunk for chunk in chunks if chunk[0] != " " or chunk[-1].isspace()]  # the ends of a text
        groups = [[chunk] for chunk in alone]
        groups += [joined[begin : begin + CHUNKS_PER_TEXT] for begin in range(0, len(joined), CHUNKS_PER_TEXT)]
        packed = {}
        for group, encoding in zip(groups, self._encode_batch(["".join(group) for group in groups]), strict=True):
            ids, spans = np.array(encoding.ids, dtype=np.int64), encoding.offsets
            begins = np.diff(np.array(encoding.word_ids, dtype=np.float64), prepend=-1) != 0
            tokens = ids | begins.astype(np.int64) << 32
            starts = np.cumsum([0, *map(len, group)])
            firsts = [*np.searchsorted([begin for begin, _ in spans], starts[:-1]).tolist(), len(ids)]
            unknown = np.flatnonzero(ids == self._unk_id)
            for index in np.unique(np.searchsorted(firsts, unknown, side="right") - 1).tolist():
                here = slice(firsts[index], firsts[index + 1])
                places = np.array(spans[here], dtype=np.int64) - starts[index]
                tokens[here.start] += self._count_unknown(group[index], ids[here], places) << 33
            content = tokens.tobytes()
            packed |= {c: content[8 * i : 8 * j] for c, i, j in zip(group, firsts, firsts[1:], strict=False)}
        return packed
