"""Tokenizers that transformers has in Python only (ESM, BertJapanese, PhoBERT, BERTweet, ...), used as they are."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from mlmkit.files import file_sha256

SEARCHED_CHARACTERS = 32  # after the token before, per token that was not found
WRITTEN_BY = ("backend", "is_local", "local_files_only")  # settings that tell of the process that saved a tokenizer
# Settings that determine no id. What the vocabulary's files hold is hashed, wherever they lie.
INCIDENTAL = (*WRITTEN_BY, "model_max_length", "name_or_path")


@dataclass(frozen=True)
class PythonEncoding:
    """The part of `tokenizers.Encoding` that mlmkit reads, each `[tokens]`."""

    ids: list[int]
    word_ids: list[int]
    offsets: list[tuple[int, int]]


class PythonTokenizer:
    """A tokenizer of transformers without a Rust version, as `mlmkit.tokenizer.Tokenizer` uses `tokenizers.Tokenizer`.

    Special tokens in a text keep their meaning here; `Tokenizer` spells them out where a text is data.
    """

    normalizer = None
    pre_tokenizer = WhitespaceSplit()

    def __init__(self, slow: Any) -> None:
        self._slow, self.model = slow, self
        self._vocabulary: dict[str, int] = slow.get_vocab()
        self._ends_words = any(token.endswith("</w>") for token in self._vocabulary)
        self._begins_words = any(token.startswith("▁") for token in self._vocabulary)
        framed = ["$A" if id < 0 else self.id_to_token(id) for id in slow.build_inputs_with_special_tokens([-1])]
        special = [(token, self._vocabulary[token]) for token in {*framed} - {"$A"}]
        self.post_processor = TemplateProcessing(framed, special_tokens=special)

    def no_truncation(self) -> None:
        """Do nothing: texts are never cut or padded here."""

    no_padding = no_truncation

    def to_str(self) -> str:
        """Return, as JSON, what determines the ids of a text: the class, its settings, and the vocabulary's files."""
        settings = {
            name: str(value)
            for name, value in self._slow.init_kwargs.items()
            if "_file" not in name and name not in INCIDENTAL
        }
        added = {id: repr(token) for id, token in sorted(self._slow.added_tokens_decoder.items())}
        with TemporaryDirectory() as folder:
            files = {Path(file).name: file_sha256(Path(file)) for file in self._slow.save_vocabulary(folder, None)}
        return json.dumps(
            {"model": {}, "class": type(self._slow).__name__, "settings": settings, "added": added, "files": files},
            sort_keys=True,
        )

    def from_str(self, _serialized: str) -> "PythonTokenizer":
        """Return itself, because no state differs between copies."""
        return self

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        return self._vocabulary

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return self._slow.added_tokens_decoder

    def token_to_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def id_to_token(self, id: int) -> str:
        return self._slow.convert_ids_to_tokens(int(id))

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return self._slow.decode([int(id) for id in ids], clean_up_tokenization_spaces=False, **options)

    def tokenize(self, text: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(id=id) for id in self.encode(text, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str], **options: Any) -> list[PythonEncoding]:
        return [self.encode(text, **options) for text in texts]

    def encode(self, text: str, add_special_tokens: bool = True) -> PythonEncoding:
        """Return the encoding of a text; with special tokens its ids alone."""
        tokens = self._slow.tokenize(text)
        ids = self._slow.convert_tokens_to_ids(tokens)
        if add_special_tokens:
            return PythonEncoding(self._slow.build_inputs_with_special_tokens(ids), [], [])
        pieces = ["" if token == self._slow.unk_token else _without_marks(token) for token in tokens]
        return PythonEncoding(ids, self._word_ids(text, tokens), align(text, pieces))

    def _word_ids(self, text: str, tokens: Sequence[str]) -> list[int]:
        """Return the word of each token: those of the word tokenizer if there is one, else by the tokens' marks.

        Without marks, as in ESM, every token is a word.
        """
        slow = self._slow
        if getattr(slow, "do_word_tokenize", False) and slow.do_subword_tokenize:  # BertJapanese
            words = slow.word_tokenizer.tokenize(text, never_split=slow.all_special_tokens)
            counts = [len(slow.subword_tokenizer.tokenize(word)) for word in words]
            if sum(counts) == len(tokens):  # not if there are added tokens in the text
                return np.repeat(np.arange(len(counts)), counts).tolist()
        begins = [
            not token.startswith("##")
            and not before.endswith("@@")
            and (before.endswith("</w>") or not self._ends_words)
            and (token.startswith("▁") or not self._begins_words)
            for before, token in zip(["", *tokens], tokens, strict=False)
        ]
        return np.cumsum(begins).tolist()


def _without_marks(token: str) -> str:
    return token.removeprefix("##").removeprefix("▁").removesuffix("@@").removesuffix("</w>")


def align(text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Return where each piece begins and ends in the text, in code points.

    Consecutive pieces that the text does not spell (unknown tokens, "", or normalised ones) share what lies between
    their neighbours.
    """
    lowered = text.lower() if len(text.lower()) == len(text) else text
    spans: list[tuple[int, int]] = []
    reached = unplaced = 0
    for piece in pieces:
        last = reached + SEARCHED_CHARACTERS * (unplaced + 1) + len(piece)
        places = [source.find(piece, reached + bool(unplaced), last) for source in (text, lowered)] if piece else []
        begin = min((place for place in places if place >= 0), default=-1)
        if begin < 0 or (not unplaced and text[reached:begin].strip()):
            unplaced += 1
            continue
        spans += [_stripped(text, reached, begin)] * unplaced + [(begin, begin + len(piece))]
        reached, unplaced = begin + len(piece), 0
    return spans + [_stripped(text, reached, len(text))] * unplaced


def _stripped(text: str, begin: int, end: int) -> tuple[int, int]:
    """Return the span without white space at its edges."""
    inner = text[begin:end]
    begin += len(inner) - len(inner.lstrip())
    return begin, begin + len(inner.strip())
