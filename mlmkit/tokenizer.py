"""Tokenise corpus text, and tell mask-v1 which ids are special.

Needs only the `tokenizers` library, so that an exported artifact runs without transformers.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, WordLevel

from mlmkit.bounds import check_tokenizer
from mlmkit.chunks import ChunkCache, cuts_before_spaces, last_cut
from mlmkit.errors import UserError, as_user_error
from mlmkit.long_texts import OVERLAP, WINDOW, Window, encode_windows, regroup
from mlmkit.masking import MaskVocabulary
from mlmkit.slow_tokenizer import PythonTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer_config.json")
CLEAN_UP = "clean_up_tokenization_spaces"
CLEAN_UP_BPE = f"{CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output"
# transformers' `clean_up_tokenization` removes the spaces in these, in this order.
CLEANED_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
LONGEST_TEXT = 1 << 19  # characters; longer ones are encoded in parts
BATCH_TEXTS = 1024  # whose encodings are in memory at once
_NONE = np.array([], dtype=np.int64)
TOTALS = ("lengths", "unknown")
LIMIT = "model_max_length"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokens:
    """A batch of tokenised documents, flat: `ids` and `word_begins` `[tokens]`; `lengths` and `unknown` `[documents]`.

    `word_begins` says of each token whether it begins a word, or is None if words were not asked for. The first token
    of a document always does; a token that the tokenizer puts in no word is a word of its own. `unknown` counts the
    characters (code points) lost to the unknown token.
    """

    ids: NDArray[np.int64]
    word_begins: NDArray[np.bool_] | None
    lengths: NDArray[np.int64]
    unknown: NDArray[np.int64]


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer` and its `tokenizer_config.json`, in which most entries may be absent.

    A token is special if the tokenizer marks it so or names it (unknown, padding, mask, ...). Truncation and padding
    are switched off, so nothing is cut silently. The wrapper takes over `rust`, which callers must not use afterwards.

    Raises `UserError` if there is no mask token, or special tokens are added inside a text.
    """

    def __init__(self, rust: RustTokenizer, config: dict[str, Any]) -> None:
        rust.no_truncation()
        rust.no_padding()
        self._serialized = rust.to_str()
        # Two copies, because the switch is part of the object's state: corpus text is data, where "[MASK]" is several
        # ordinary pieces; text for `fill` contains real mask tokens.
        self._data = rust.from_str(self._serialized)
        self._data.encode_special_tokens = True
        self._control = rust
        self._control.encode_special_tokens = False

        self.named = {name: _content(config[name]) for name in NAMED_TOKENS if config.get(name)}
        if "unk_token" not in self.named and (spelled := _unknown_of(json.loads(self._serialized)["model"])):
            self.named |= {"unk_token": spelled} if rust.token_to_id(spelled) is not None else {}
        if "mask_token" not in self.named:
            raise UserError("the tokenizer has no mask token: name it as mask_token in tokenizer_config.json")
        limit = config.get(LIMIT)  # transformers writes 1e30 for no limit
        self.limit = int(limit) if isinstance(limit, int | float) and 0 < limit < 1 << 30 else None
        self.special_ids = self._find_special_ids(config)
        self.mask_token = self.named["mask_token"]
        self.mask_id = self._id_of("mask_token")
        self.unk_id = self._id_of("unk_token") if "unk_token" in self.named else None
        self.pad_id = self._id_of("pad_token") if "pad_token" in self.named else 0
        self.prefix, self.suffix = self._frame()
        self._word_begins = self._find_word_begins()
        self._drops = any(not self._data.encode(char, add_special_tokens=False).ids for char in "𒀀日é.-0")
        does_harm = isinstance(rust.model, BPE) and not config.get(CLEAN_UP_BPE)
        is_exact = cuts_before_spaces(json.loads(self._serialized)) and not self._drops
        self._chunks = ChunkCache(self._encode_batch, self._unknown_characters, self.unk_id) if is_exact else None
        self._window, self._overlap = WINDOW, OVERLAP
        self._cleans_up = bool(config.get(CLEAN_UP)) and not does_harm

    def _id_of(self, name: str) -> int:
        id = self._control.token_to_id(self.named[name])
        if id is None:
            raise UserError(f"the tokenizer's {name} {self.named[name]!r} is not in its vocabulary")
        return id

    def _find_special_ids(self, config: dict[str, Any]) -> frozenset[int]:
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = map(_content, extra.values() if isinstance(extra, dict) else extra)
        by_name = map(self.token_id, (*self.named.values(), *extra))
        special = {id for id, token in self._control.get_added_tokens_decoder().items() if token.special}
        special |= {id for id in by_name if id is not None}
        bytes_ = {id for id in special if re.fullmatch("<0x[0-9A-F]{2}>", self.token(id))}
        if bytes_ and json.loads(self._serialized)["model"].get("byte_fallback"):
            special -= bytes_  # they spell a text's bytes, whatever they are marked as
        return frozenset(special)

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the post-processor puts before and after a text."""
        # With a vocabulary of its own: the real one may have no token for any given text.
        probe = RustTokenizer(WordLevel({"a": 0}, unk_token="a"))
        probe.post_processor = self._data.post_processor
        encoding = probe.encode("a")
        added = np.flatnonzero(np.diff([1, *encoding.special_tokens_mask, 1]))
        if len(added) != 2:
            raise UserError("the tokenizer adds special tokens inside a text, which mlmkit cannot score")
        return encoding.ids[: added[0]], encoding.ids[added[1] :]

    def _find_word_begins(self) -> NDArray[np.int64]:
        """Return the ids that begin a word if the tokenizer does not split text at spaces; otherwise none.

        Gemma's, for example, writes a space as "▁" and treats the whole text as one word. See `docs/masking.md`.
        """
        text, normalizer, pre_tokenizer = "a b\tc\nd\re", self._data.normalizer, self._data.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]
        if not any(re.search("a.+b", piece, re.IGNORECASE) for piece in pieces):
            return np.array([], dtype=np.int64)
        marks = [mark for piece in pieces for mark in re.findall("(?<=[a-e])[^a-e]+(?=[a-e])", piece, re.IGNORECASE)]
        begins = (*marks, "<0x20>", "<0x09>", "<0x0A>", "<0x0D>")
        return np.array([id for token, id in self._control.get_vocab().items() if token.startswith(begins)])

    @classmethod
    def from_folder(cls, folder: Path, contents: Mapping[str, bytes] | None = None) -> "Tokenizer":
        """Load `tokenizer.json` and `tokenizer_config.json`, without transformers.

        Pass the bytes of both files as `contents` if they were read already. Raises `UserError` if a file is missing
        or cannot be used.
        """
        with as_user_error(folder, "the tokenizer cannot be read"):
            files = contents or {name: (folder / name).read_bytes() for name in FILES}
            check_tokenizer(json.loads(files["tokenizer.json"]))
            rust = RustTokenizer.from_buffer(files["tokenizer.json"])
            return cls(rust, json.loads(files["tokenizer_config.json"]))

    @classmethod
    def from_transformers(cls, tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
        """Wrap a tokenizer of transformers; one that it has in Python only is used as it is.

        Raises `UserError` if it has no mask token, is too large (`mlmkit.bounds`), or of another kind.
        """
        rust: Any = getattr(tokenizer, "backend_tokenizer", None)
        config = {name: getattr(tokenizer, name, None) for name in (*NAMED_TOKENS, LIMIT, CLEAN_UP, CLEAN_UP_BPE)}
        config["extra_special_tokens"] = tokenizer.all_special_tokens
        if not isinstance(rust, RustTokenizer):
            if not hasattr(tokenizer, "_tokenize"):
                raise UserError(f"{type(tokenizer).__name__} has no tokenizer.json, and is not a tokenizer in Python")
            python: Any = PythonTokenizer(tokenizer)
            return cls(python, config)
        serialized = rust.to_str()  # checked here, because transformers may have converted it from another format
        check_tokenizer(json.loads(serialized))
        return cls(RustTokenizer.from_str(serialized), config)

    @cached_property
    def vocabulary_size(self) -> int:
        """One more than the largest id: the size that a model's embedding needs."""
        vocabulary = self._control.get_vocab(with_added_tokens=True)
        return max(*vocabulary.values(), *self.prefix, *self.suffix) + 1

    @property
    def id_type(self) -> str:
        """The NumPy type in which ids are stored."""
        return "<u2" if self.vocabulary_size <= 1 << 16 else "<u4"

    @cached_property
    def masking(self) -> MaskVocabulary:
        """The mask id, the special ids and the ordinary ids, for mask-v1."""
        ids = np.array(list(self._control.get_vocab(with_added_tokens=True).values()), dtype=np.int64)
        return MaskVocabulary.build(ids, self.special_ids, self.mask_id)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the ids and words of a text."""
        identity = [json.loads(self._serialized), self.named, sorted(self.special_ids)]
        identity += ["words begin at spaces"] if len(self._word_begins) else []
        return sha256(json.dumps(identity, sort_keys=True).encode("utf-8")).hexdigest()

    @cached_property
    def characters_per_token(self) -> int:
        """An upper bound on a token's characters, counting those that the normalizer drops: at least 100."""
        return max(100, *map(len, self._control.get_vocab(with_added_tokens=True)))

    @property
    def added_tokens(self) -> int:
        """How many special tokens `frame` adds."""
        return len(self.prefix) + len(self.suffix)

    def encode(self, texts: Sequence[str], *, words: bool = True) -> Tokens:
        """Tokenise corpus text without adding special tokens. The text itself yields none except the unknown token.

        Without `words`, `word_begins` is None. Raises `UserError` for a text that the tokenizer cannot process.
        """
        if max(map(len, texts), default=0) <= LONGEST_TEXT:
            return self._encode(texts, words)
        whole = [list(self.encode_pieces([text], words=words)) for text in texts]
        parts = [part for each in whole for part in each]
        totals = (np.array([sum(int(getattr(part, name).sum()) for part in each) for each in whole]) for name in TOTALS)
        begins = np.concatenate([part.word_begins for part in parts if part.word_begins is not None]) if words else None
        return Tokens(np.concatenate([part.ids for part in parts]), begins, *totals)

    def encode_pieces(self, pieces: Iterable[str], *, words: bool = True) -> Iterator[Tokens]:
        """Tokenise one text of any length, given in consecutive pieces cut anywhere, in bounded memory.

        Each `Tokens` has a part of the text as its one document; together they equal those of `encode([text])`, by
        construction for some tokenizers and by a check for the others: see `long_texts.py`. Where a tokenizer drops
        characters, their count may differ by those at a border. Raises `UserError` as `encode` does.
        """
        texts, rest = regroup(pieces, self._window), ""
        if self._chunks:
            for text in texts:
                rest += text
                if cut := last_cut(rest):
                    yield self._encode([rest[:cut]], words)
                    rest = rest[cut:]
                elif len(rest) > LONGEST_TEXT:
                    break
        for part in encode_windows(self._encode_window, regroup(chain([rest], texts), self._window), self._overlap):
            unknown = self._unknown_characters(part.text, part.ids, part.spans)
            begins, sizes = part.word_begins if words else None, ([len(part.ids)], [unknown])
            yield self._spell_out(Tokens(part.ids, begins, *(np.array(size, dtype=np.int64) for size in sizes)))

    def _encode(self, texts: Sequence[str], words: bool) -> Tokens:
        if self._chunks:
            ids, begins, lengths, unknown = self._chunks.encode(texts)
            return self._spell_out(Tokens(ids, begins if words else None, lengths, unknown))
        encodings = self._encode_batch(texts)
        parts = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        ids, begins = np.concatenate([_NONE, *parts]), None
        if words:
            begins = self._begins(ids, np.concatenate([_NONE, *map(_words, encodings)]), lengths)
        unknown = np.zeros_like(lengths)
        if self._drops or (ids == self.unk_id).any():
            unknown[:] = [
                self._unknown_characters(text, part, _spans(encoding))
                for text, part, encoding in zip(texts, parts, encodings, strict=True)
            ]
        return self._spell_out(Tokens(ids, begins, lengths, unknown))

    def _encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        return _encode(self._data, texts, add_special_tokens=False)

    def _encode_window(self, text: str) -> Window:
        [encoding] = self._encode_batch([text])
        ids = np.array(encoding.ids, dtype=np.int64)
        return Window(text, ids, self._begins(ids, _words(encoding), np.array([len(ids)])), _spans(encoding))

    def _begins(self, ids: NDArray[np.int64], words: NDArray, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        return _changes(words, lengths) | np.isin(ids, self._word_begins)

    def _spell_out(self, tokens: Tokens) -> Tokens:
        """Replace each control token that came from plain text by the pieces of its spelling.

        Needed where the vocabulary has the token as a piece (Unigram models: XLM-R's "<s>", ALBERT's "[SEP]").
        """
        control = self.special_ids - {self.unk_id}
        if not np.isin(tokens.ids, list(control)).any():
            return tokens
        pieces = {id: self._pieces_of(id) for id in control}
        replaced = [pieces.get(int(id), [int(id)]) for id in tokens.ids]
        counts = np.array([len(ids) for ids in replaced], dtype=np.int64)
        document = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)
        lengths = np.bincount(document, weights=counts, minlength=len(tokens.lengths)).astype(np.int64)
        begins = tokens.word_begins
        if begins is not None:
            spelled = _changes(np.repeat(np.cumsum(begins), counts), lengths)
            spelled[:1] = begins[:1]  # a part of a long text may begin inside a word
            begins = spelled
        return Tokens(np.array([id for ids in replaced for id in ids], np.int64), begins, lengths, tokens.unknown)

    def _unknown_characters(self, text: str, ids: NDArray[np.int64], spans: NDArray[np.int64]) -> int:
        """Count the characters covered by unknown tokens, without white space at the edges of a token's span.

        If the tokenizer drops what it cannot spell, characters covered by no token count too.
        """
        if not self._drops and not (ids == self.unk_id).any():
            return 0
        count = reached = covered = 0
        end_of_text = (None, (len(text), len(text)))
        for id, (begin, end) in chain(zip(ids.tolist(), spans.tolist(), strict=True), [end_of_text]):
            if self._drops and (gap := text[covered:begin].strip()):
                kept = self._data.normalizer.normalize_str(gap) if self._data.normalizer else gap
                count += min(len(gap), len("".join(kept.split())))  # without what the normalizer removes
            if id is not None and id == self.unk_id:
                count += len(text[max(begin, reached) : end].strip())
                reached = max(reached, end)
            covered = max(covered, end)
        return count

    def spans(self, texts: Sequence[str]) -> Iterator[NDArray[np.int64]]:
        """Yield for each text the begin and end of each token of `encode([text])` in code points, `[tokens, 2]`.

        Pieces of the same character share its span. Raises `UserError` as `encode` does.
        """
        control = list(self.special_ids - {self.unk_id})
        for begin in range(0, len(texts), BATCH_TEXTS):
            for encoding in self._encode_batch(texts[begin : begin + BATCH_TEXTS]):
                spans = _spans(encoding)
                if np.isin(encoding.ids, control).any():
                    pieces = [len(self._pieces_of(id)) if id in control else 1 for id in encoding.ids]
                    spans = np.repeat(spans, pieces, axis=0)
                yield spans

    def _pieces_of(self, control_id: int) -> list[int]:
        spelling = self.token(control_id)
        parts = [part for part in (spelling[:1], spelling[1:]) if part]
        ids = [token.id for part in parts for token in self._control.model.tokenize(part)]
        return [id for id in ids if id not in self.special_ids or id == self.unk_id]

    def frame(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add the special tokens that the model expects around the ids."""
        return np.concatenate([self.prefix, ids, self.suffix]).astype(np.int64)

    def encode_control(self, text: str) -> Encoding:
        """Tokenise text for `fill`: special tokens in it keep their meaning, and `frame` is applied.

        Raises `UserError` as `encode` does.
        """
        return _encode(self._control, [text])[0]

    def token_id(self, token: str) -> int | None:
        """Return the id of a vocabulary entry, spelled as in the vocabulary, or None."""
        return self._control.token_to_id(token)

    def token(self, id: int) -> str:
        """Return the vocabulary entry of an id, spelled as in the vocabulary, or ""."""
        return self._control.id_to_token(id) or ""

    def readable(self, id: int) -> str:
        """Return a token as people read it, without the marks for the beginning or continuation of a word."""
        text = self._control.decode([id], skip_special_tokens=False)
        return text.strip().removeprefix("##") or self.token(id)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Turn ids into text exactly as transformers' tokenizer does."""
        text = self._control.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self._cleans_up:
            for spaced in CLEANED_UP:
                text = text.replace(spaced, spaced.strip())
        return text


def _encode(rust: RustTokenizer, texts: Sequence[str], **options: Any) -> list[Encoding]:
    """Encode as a batch: `encode` blocks all other threads. Raises `UserError` if a regular expression fails."""
    with as_user_error("a text", "the tokenizer cannot process it"):
        return rust.encode_batch(list(texts), **options)


def _words(encoding: Encoding) -> NDArray[np.float64]:
    """Return the word index of each token; None becomes NaN, which differs from every other."""
    return np.array(encoding.word_ids, dtype=np.float64)


def _spans(encoding: Encoding) -> NDArray[np.int64]:
    return np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _changes(words: NDArray, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether each token's entry differs from the one before, or the token is the first of its document."""
    begins = np.ones(len(words), dtype=np.bool_)
    begins[1:] = words[1:] != words[:-1]
    begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return begins


def _unknown_of(model: dict[str, Any]) -> str | None:
    """Return the unknown token named by the model in a `tokenizer.json`."""
    return model["vocab"][model["unk_id"]][0] if isinstance(model.get("unk_id"), int) else model.get("unk_token")


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
