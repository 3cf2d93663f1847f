"""Filling masks, in the terms that users of Hugging Face know: `score`, `token`, `token_str`, `sequence`.

A text becomes a `Question`, whose batch of one row any backend predicts, alone or merged with others; `answer` reads
the candidates off the prediction. `fill` does all three.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, Batch, ModelInfo, Scored
from mlmkit.errors import CheckError, UserError
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Candidate(TypedDict):
    """`score` is the probability over the whole vocabulary; `sequence` the text with this candidate filled in."""

    score: float
    token: int
    token_str: str
    sequence: str


class NoMaskError(UserError):
    """The text has no mask."""


class TextTooLongError(UserError):
    """The text, or a target, has more tokens than the model takes, or more characters than so many tokens hold."""


class TargetError(UserError):
    """A target that no token stands for."""


@dataclass(frozen=True)
class Question:
    """A text to fill: `ids` `[seq]` with special tokens, `masks` `[masks]` their places, both int64.

    With `targets`, ids, only these are ranked. `stand_ins` gives each target of more than one token the first of its
    pieces, which stands for it.
    """

    ids: NDArray[np.int64]
    masks: NDArray[np.int64]
    targets: list[int]
    top_k: int
    stand_ins: dict[str, str]

    @property
    def batch(self) -> Batch:
        """One row. It asks for each mask, or for every target at each mask: positions may repeat."""
        positions = np.repeat(self.masks, max(len(self.targets), 1))
        targets = np.tile(np.array(self.targets or [0], dtype=np.int64), len(self.masks))
        return Batch(self.ids[None], np.ones_like(self.ids)[None], positions, targets)


def ask(tokenizer: Tokenizer, info: ModelInfo, text: str, *, top_k: int = 5, targets: Sequence[str] = ()) -> Question:
    """The question that a text puts. Raises `UserError`, in one of its kinds above, for what cannot be asked."""
    return ask_all(tokenizer, info, [text], top_k=top_k, targets=targets)[0]


def ask_all(
    tokenizer: Tokenizer, info: ModelInfo, texts: Sequence[str], *, top_k: int = 5, targets: Sequence[str] = ()
) -> list[Question]:
    """The questions of several texts, with the same targets."""
    if not all(_is_unicode(string) for string in (*texts, *targets)):
        raise UserError("a text or a target is not valid UTF-8")
    if not 1 <= top_k <= info.top_k:
        raise UserError(f"top_k must be between 1 and {info.top_k}, not {top_k}")
    target_ids, stand_ins = _target_ids(tokenizer, info, targets)
    return [Question(*_masked_ids(tokenizer, info, text), target_ids, top_k, stand_ins) for text in texts]


def _masked_ids(tokenizer: Tokenizer, info: ModelInfo, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A text's ids with special tokens, and where its masks stand."""
    ids = np.array(_control_ids(tokenizer, info, text), dtype=np.int64)
    masks = np.flatnonzero(ids == tokenizer.mask_id)
    if not len(masks):
        raise NoMaskError(f"the text has no {tokenizer.mask_token}: put it where a word is to be filled in")
    return ids, masks


def _control_ids(tokenizer: Tokenizer, info: ModelInfo, text: str, what: str = "text") -> list[int]:
    check_length(len(text), "characters", info.max_length * tokenizer.characters_per_token, what)
    encoding = tokenizer.encode_control(text)
    check_length(len(encoding), "tokens", info.max_length, what)
    return encoding.ids


def check_length(count: int, unit: str, most: int, what: str = "text") -> None:
    """Raise `TextTooLongError` for a text of more characters or tokens than are taken."""
    if count > most:
        raise TextTooLongError(f"a {what} has {count} {unit}, and at most {most} are taken: shorten it")


def answer(tokenizer: Tokenizer, question: Question, predicted: Scored) -> list[list[Candidate]]:
    """Candidates for each mask, best first, from the prediction of the question's batch.

    Several masks are filled independently, each with the others still masked. Raises `CheckError` when the scores are
    not finite.
    """
    if question.targets:
        scores = np.exp(predicted.log_prob).reshape(len(question.masks), len(question.targets))
        order = np.argsort(-scores, axis=1, kind="stable")[:, : question.top_k]
        ids, scores = np.array(question.targets)[order], np.take_along_axis(scores, order, axis=1)
    else:
        ids, scores = predicted.top_id[:, : question.top_k], np.exp(predicted.top_log_prob[:, : question.top_k])
    if not np.isfinite(scores).all():
        raise CheckError("the model gives scores that are not finite: its weights or activations are not")
    return [
        [_candidate(tokenizer, question, int(mask), id, score) for id, score in zip(*row, strict=True)]
        for mask, *row in zip(question.masks, ids.tolist(), scores.tolist(), strict=True)
    ]


def fill(backend: Backend, text: str, *, top_k: int = 5, targets: Sequence[str] = ()) -> list[list[Candidate]]:
    """Candidates for each mask of the text, best first: a list a mask.

    Raises `UserError` when there is no mask, the text is too long, a target has no token or `top_k` is out of range,
    and `CheckError` when the model's scores are not finite.
    """
    question = ask(backend.tokenizer, backend.info, text, top_k=top_k, targets=targets)
    for target, piece in question.stand_ins.items():
        log.warning("%r is more than one token: its first piece %r stands for it", target, piece)
    return answer(backend.tokenizer, question, backend.score(question.batch))


def _is_unicode(text: str) -> bool:
    """A shell hands bytes that are not UTF-8 on as half surrogate pairs."""
    return text.encode("utf-8", "ignore").decode() == text


def _target_ids(tokenizer: Tokenizer, info: ModelInfo, targets: Sequence[str]) -> tuple[list[int], dict[str, str]]:
    """Ids in the order given, each once. As in transformers' pipeline, a text's first token stands for all of it."""
    ids: list[int] = []
    stand_ins: dict[str, str] = {}
    for target in targets:
        id = tokenizer.token_id(target)
        if id is None:
            framed = _control_ids(tokenizer, info, target, "target")
            pieces = framed[len(tokenizer.prefix) : len(framed) - len(tokenizer.suffix)]
            if not pieces or pieces[0] == tokenizer.unk_id:
                raise TargetError(f"the target {target!r} has no token in this vocabulary")
            id = pieces[0]
            if len(pieces) > 1:
                stand_ins[target] = tokenizer.token(id)
        ids.append(id)
    return list(dict.fromkeys(ids)), stand_ins


def _candidate(tokenizer: Tokenizer, question: Question, mask: int, id: int, score: float) -> Candidate:
    filled = question.ids.copy()
    filled[mask] = id
    if "pad_token" in tokenizer.named:
        filled = filled[filled != tokenizer.pad_id]  # as the pipeline does
    # With other masks still open, the special tokens stay, or the text would not show where they are.
    sequence = tokenizer.decode(filled.tolist(), skip_special_tokens=len(question.masks) == 1)
    return Candidate(score=score, token=id, token_str=tokenizer.decode([id]), sequence=sequence)
