"""A new vocabulary for an old model: add tokens to its tokenizer, and find the rows that new tokens start from."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from mlmkit.documents import read_documents
from mlmkit.errors import UserError
from mlmkit.locations import Source
from mlmkit.tokenizer import NAMED_TOKENS, Tokenizer

log = logging.getLogger(__name__)

BROKEN = "\ufffd"  # what the bytes of half a character decode to


# ---------------------------------------------------------------- adding tokens


def add_tokens(tokenizer: Any, file: str) -> Any:
    """A tokenizer of transformers with the words of a file, one per line, at the end of its vocabulary.

    They match as whole words only, so no other text is tokenised differently, and they are ordinary tokens: masked,
    drawn, and words of their own. Words that are single tokens already are left out, and counted in the log.

    WordPiece gets them as added tokens, found in the text before it is split into words. Byte-level BPE cannot: such a
    token does not include the space before it, and its bytes are decoded a second time ("avó" becomes "av\ufffd").
    There each word becomes two entries of the vocabulary, with and without a space before it, and `ignore_merges` looks
    a whole word up before it is put together from pieces.

    Raises `UserError` for a word that cannot be added, a file without a new word, or another kind of tokenizer.
    """
    old = Tokenizer.from_transformers(tokenizer)
    model, pre_tokenizer = tokenizer.backend_tokenizer.model, tokenizer.backend_tokenizer.pre_tokenizer
    words = [word.strip() for word in read_documents(Source(file))]
    for word in words:
        if len(word.split()) > 1 or old.token_id(word) in old.special_ids or not len(old.encode([word]).ids):
            raise UserError(f"{file}: {word!r} cannot be added: write one word, and no special token")
    if isinstance(model, WordPiece | WordLevel):
        new, count = _with_added_tokens(tokenizer, old, words)
    elif isinstance(model, BPE) and "ByteLevel" in str(pre_tokenizer):
        new, count = _with_vocabulary_entries(tokenizer, old, words, file)
    else:
        raise UserError(f"tokenizer.add needs a WordPiece or byte-level BPE tokenizer, not {type(model).__name__}")
    if not count:
        raise UserError(f"{file}: none of its {len(words)} words is new to the tokenizer: leave tokenizer.add out")
    log.info("%s: %d of %d words added; the others are repeated or in the vocabulary", file, count, len(words))
    if not extends(Tokenizer.from_transformers(new), old):
        raise UserError(
            "tokenizer.add: no word can be added, because unused ids in the vocabulary would renumber tokens"
        )
    return new


def _with_added_tokens(tokenizer: Any, old: Tokenizer, words: Sequence[str]) -> tuple[Any, int]:
    normalizer = tokenizer.backend_tokenizer.normalizer
    found = {normalizer.normalize_str(word) if normalizer else word: word for word in reversed(words)}
    new = [word for word in reversed(found.values()) if _is_cut(old, word)]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True, special=False) for word in new])
    return tokenizer, len(new)


def _with_vocabulary_entries(tokenizer: Any, old: Tokenizer, words: Sequence[str], file: str) -> tuple[Any, int]:
    rust = tokenizer.backend_tokenizer
    values = json.loads(rust.to_str())
    ordinary = [old.token(int(id)) for id in old.masking.ordinary]
    if not values["model"]["ignore_merges"] and any(len(rust.model.tokenize(entry)) != 1 for entry in ordinary):
        raise UserError(
            "tokenizer.add: no word can be added, because the tokenizer would then split other texts differently"
        )
    entries: dict[str, str] = {}
    for word in words:
        for text in (f" {word}", word):
            normal = rust.normalizer.normalize_str(text) if rust.normalizer else text
            pieces = [piece for piece, _ in rust.pre_tokenizer.pre_tokenize_str(normal)]
            if len(pieces) != 1:
                raise UserError(f"{file}: {word!r} cannot be added: the tokenizer splits it into {len(pieces)} words")
            if _is_cut(old, text):
                entries.setdefault(pieces[0], word)
    values["model"]["vocab"] |= {entry: old.vocabulary_size + index for index, entry in enumerate(entries)}
    values["model"]["ignore_merges"] = True
    # Not the class it was: RobertaTokenizer, for example, is built from vocabulary and merges, without this setting.
    kept = {name: value for name in NAMED_TOKENS if (value := getattr(tokenizer, name))}
    new = PreTrainedTokenizerFast(
        tokenizer_object=RustTokenizer.from_str(json.dumps(values)),
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        extra_special_tokens=[token for token in tokenizer.all_special_tokens if token not in kept.values()],
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **kept,
    )
    return new, len(set(entries.values()))


def _is_cut(tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode([text]).ids
    return len(ids) > 1 or ids[0] == tokenizer.unk_id


# ---------------------------------------------------------------- rows for new tokens


def extends(new: Tokenizer, old: Tokenizer) -> bool:
    """Whether every id of `old` is the same token in `new`."""
    return all(new.token(id) == old.token(id) for id in range(old.vocabulary_size))


def row_sources(new: Tokenizer, old: Tokenizer) -> list[list[int]]:
    """For each id of `new`, the ids of `old` whose rows it starts as the mean of. None: the mean of all rows.

    A token that both have keeps its row: of the same text, and beginning a word in both or in neither ("##x" as "x",
    "x" as "Ġx"). Special tokens correspond by their role. Any other token gets its pieces under `old`: the mean of
    subwords of Gee et al. 2022 ("Fast Vocabulary Transfer"), which needs no other data; see docs/decisions.md.
    """
    before, after = ([_surface(each, id) for id in range(each.vocabulary_size)] for each in (old, new))
    ids = {before[id]: id for id in reversed(old.masking.ordinary.tolist()) if BROKEN not in before[id][0]}
    roles = {new.token_id(new.named[name]): old.token_id(old.named[name]) for name in old.named if name in new.named}
    tokens = old.encode(["" if BROKEN in text else " " * begins + text for text, begins in after])
    sources: list[list[int]] = []
    for id, pieces in enumerate(np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])):
        (text, begins), same = after[id], old.token_id(new.token(id))
        if id in new.special_ids:
            row, pieces = roles.get(id, same), pieces[:0]
        elif same is not None and before[same] == after[id]:
            row = same
        else:
            # WordPiece has no space before a punctuation mark, byte-level BPE may have one: the mark is the same.
            row = ids.get(after[id], None if any(map(str.isalnum, text)) else ids.get((text, not begins)))
        ordinary = [piece for piece in pieces.tolist() if piece not in old.special_ids]
        if ordinary and not begins:  # encoded as the beginning of a word, which it is not
            ordinary[0] = ids.get((before[ordinary[0]][0], False), ordinary[0])
        sources.append(ordinary if row is None else [row])
    return sources


def _surface(tokenizer: Tokenizer, id: int) -> tuple[str, bool]:
    """A token's text without the marks for spaces, as decoding writes it, and whether it begins a word."""
    text = tokenizer.decode([tokenizer.mask_id, id]).removeprefix(tokenizer.mask_token)
    return text.strip(), text[:1].isspace()
