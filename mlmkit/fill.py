"""Filling masks, in the terms that users of Hugging Face know: `score`, `token`, `token_str`, `sequence`."""

import logging
import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from mlmkit.backends import Backend, Batch
from mlmkit.errors import CheckError, UserError
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Candidate(TypedDict):
    """`score` is the probability over the whole vocabulary; `sequence` the text with this candidate filled in."""

    score: float
    token: int
    token_str: str
    sequence: str


def fill(backend: Backend, text: str, *, top_k: int = 5, targets: Sequence[str] = ()) -> list[list[Candidate]]:
    """Candidates for each mask of the text, best first: a list a mask.

    Several masks are filled independently, each with the others still masked. With `targets`, only these are ranked.
    Raises `UserError` when there is no mask, the text is too long, or `top_k` is out of range, and `CheckError` when
    the model's scores are not finite.
    """
    tokenizer = backend.tokenizer
    if not all(_is_unicode(string) for string in (text, *targets)):
        raise UserError("the text or a target is not valid UTF-8")
    ids = np.array(tokenizer.encode_control(text).ids, dtype=np.int64)
    masks = np.flatnonzero(ids == tokenizer.mask_id)
    if not len(masks):
        raise UserError(f"the text has no {tokenizer.mask_token}: put it where a word is to be filled in")
    if len(ids) > backend.info.max_length:
        raise UserError(f"the text has {len(ids)} tokens, and this model takes {backend.info.max_length}: shorten it")
    if not 1 <= top_k <= backend.info.top_k:
        raise UserError(f"top_k must be between 1 and {backend.info.top_k}, not {top_k}")
    if targets:
        ranked = _rank_targets(backend, ids, masks, _target_ids(tokenizer, targets), top_k)
    else:
        batch = Batch(ids[None], np.ones_like(ids)[None], masks, np.full(len(masks), tokenizer.mask_id))
        predicted = backend.predict(batch)
        ranked = [
            list(zip(row_ids[:top_k].tolist(), np.exp(row[:top_k]).tolist(), strict=True))
            for row_ids, row in zip(predicted.top_id, predicted.top_log_prob, strict=True)
        ]
    if not all(math.isfinite(score) for row in ranked for _, score in row):
        raise CheckError("the model gives scores that are not finite: its weights or activations are not")
    return [
        [_candidate(tokenizer, ids, int(mask), id, score, several=len(masks) > 1) for id, score in row]
        for mask, row in zip(masks, ranked, strict=True)
    ]


def _is_unicode(text: str) -> bool:
    """A shell hands bytes that are not UTF-8 on as half surrogate pairs."""
    return text.encode("utf-8", "ignore").decode() == text


def _rank_targets(
    backend: Backend, ids: np.ndarray, masks: np.ndarray, target_ids: list[int], top_k: int
) -> list[list[tuple[int, float]]]:
    """Score every target at every mask: positions may repeat in one batch."""
    batch = Batch(
        ids[None], np.ones_like(ids)[None], np.repeat(masks, len(target_ids)), np.tile(target_ids, len(masks))
    )
    scores = np.exp(backend.score(batch).log_prob).reshape(len(masks), len(target_ids))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    return [[(target_ids[i], float(row[i])) for i in best] for row, best in zip(scores, order, strict=True)]


def _target_ids(tokenizer: Tokenizer, targets: Sequence[str]) -> list[int]:
    """Ids in the order given, each once. As Hugging Face does it, an unknown target becomes its first piece."""
    ids: list[int] = []
    for target in targets:
        id = tokenizer.token_id(target)
        if id is None:
            pieces = tokenizer.encode([target]).ids
            if not len(pieces):
                raise UserError(f"the target {target!r} has no token")
            id = int(pieces[0])
            log.warning("%r is not in the vocabulary: its first piece %r stands for it", target, tokenizer.token(id))
        ids.append(id)
    return list(dict.fromkeys(ids))


def _candidate(tokenizer: Tokenizer, ids: np.ndarray, mask: int, id: int, score: float, *, several: bool) -> Candidate:
    filled = ids.copy()
    filled[mask] = id
    # With other masks still open, the special tokens stay, or the text would not show where they are.
    sequence = tokenizer.decode(filled.tolist(), skip_special_tokens=not several)
    return Candidate(score=score, token=id, token_str=tokenizer.decode([id]), sequence=sequence)
