"""Fills masks. Results have the fields of Hugging Face's pipeline: `score`, `token`, `token_str`, `sequence`.

A text becomes a `Question` (`ask_all`), whose one-row batch any backend can score, alone or merged with other rows;
`answer` reads the candidates from the scores. `answer_all` scores in batches, and `fill` does all of it for one text.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, Batch, ModelInfo, Scored, score_together
from mlmkit.batching import BATCH_TOKENS, LOOKAHEAD, length_batches
from mlmkit.errors import CheckError, UserError
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

POSITION_TOKENS = 8  # a position's logits take about as much memory as so many tokens


class Candidate(TypedDict):
    """A token for a mask: `score` is its probability over the vocabulary, `sequence` the text with it filled in."""

    score: float
    token: int
    token_str: str
    sequence: str


class NoMaskError(UserError):
    """The text has no mask."""


class TextTooLongError(UserError):
    """The text or a target has more tokens than the model takes, or more characters than so many tokens can hold."""


class TargetError(UserError):
    """A target has no token in the vocabulary."""


@dataclass(frozen=True)
class Question:
    """A text to fill.

    `ids` `[seq]` includes special tokens, `masks` `[masks]` holds the positions of its masks; both are int64. If there
    are `targets` (ids), only these are ranked. `stand_ins` maps each target of several tokens to its first token, which
    is scored in its place.
    """

    ids: NDArray[np.int64]
    masks: NDArray[np.int64]
    targets: list[int]
    top_k: int
    stand_ins: dict[str, str]

    @property
    def batch(self) -> Batch:
        """One row, with a position per mask, or per mask and target: positions may repeat."""
        positions = np.repeat(self.masks, max(len(self.targets), 1))
        targets = np.tile(np.array(self.targets or [0], dtype=np.int64), len(self.masks))
        return Batch(self.ids[None], np.ones_like(self.ids)[None], positions, targets)


def ask_all(
    tokenizer: Tokenizer,
    info: ModelInfo,
    texts: Sequence[str],
    *,
    top_k: int = 5,
    targets: Sequence[str] = (),
    names: Sequence[str] = (),
) -> list[Question]:
    """The questions for several texts with the same targets. `names` say in errors which text it is.

    Raises `NoMaskError` for a text without a mask, `TextTooLongError` for a text or target that the model cannot take,
    `TargetError` for a target without a token, and `UserError` for invalid UTF-8 and a `top_k` that is out of range.
    """
    if not all(_is_unicode(string) for string in (*texts, *targets)):
        raise UserError("a text or a target is not valid UTF-8")
    if not 1 <= top_k <= info.top_k:
        raise UserError(f"top_k must be between 1 and {info.top_k}, not {top_k}")
    target_ids, stand_ins = _target_ids(tokenizer, info, targets)
    questions = []
    for index, text in enumerate(texts):
        try:
            masked = _masked_ids(tokenizer, info, text)
        except UserError as error:
            raise type(error)(f"{names[index]}: {error}" if names else str(error)) from None
        questions.append(Question(*masked, target_ids, top_k, stand_ins))
    return questions


def _masked_ids(tokenizer: Tokenizer, info: ModelInfo, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids of a text with special tokens, and the positions of its masks."""
    ids = np.array(_control_ids(tokenizer, info, text), dtype=np.int64)
    masks = np.flatnonzero(ids == tokenizer.mask_id)
    if not len(masks):
        raise NoMaskError(f"the text has no {tokenizer.mask_token}: put it where a word is to be filled in")
    return ids, masks


def _control_ids(tokenizer: Tokenizer, info: ModelInfo, text: str, kind: str = "text") -> list[int]:
    check_length(len(text), "characters", info.max_length * tokenizer.characters_per_token, kind)
    encoding = tokenizer.encode_control(text)
    check_length(len(encoding), "tokens", info.max_length, kind)
    return encoding.ids


def check_length(count: int, unit: str, most: int, kind: str = "text") -> None:
    """Raise `TextTooLongError` if a text has more than `most` characters or tokens."""
    if count > most:
        raise TextTooLongError(f"a {kind} has {count} {unit}, and at most {most} are taken: shorten it")


def answer(tokenizer: Tokenizer, question: Question, scored: Scored) -> list[list[Candidate]]:
    """The candidates for each mask, best first, from the scores of the question's batch.

    Each mask is filled independently of the others. Raises `CheckError` if a score is not finite.
    """
    if question.targets:
        scores = np.exp(scored.log_prob).reshape(len(question.masks), len(question.targets))
        order = np.argsort(-scores, axis=1, kind="stable")[:, : question.top_k]
        ids, scores = np.array(question.targets)[order], np.take_along_axis(scores, order, axis=1)
    else:
        ids, scores = scored.top_id[:, : question.top_k], np.exp(scored.top_log_prob[:, : question.top_k])
    if not np.isfinite(scores).all():
        raise CheckError("the model's scores are not finite: its weights or activations are not either")
    return [
        [_candidate(tokenizer, question, int(mask), id, score) for id, score in zip(*row, strict=True)]
        for mask, *row in zip(question.masks, ids.tolist(), scores.tolist(), strict=True)
    ]


def answer_all(backend: Backend, questions: Sequence[Question]) -> Iterator[list[list[Candidate]]]:
    """Yield the candidates for the masks of each question, in order, scored in batches of bounded size.

    Warns of targets that are cut. Raises `CheckError` if the model cannot run a batch or a score is not finite.
    """
    for target, piece in questions[0].stand_ins.items() if questions else ():
        log.warning("the target %r has several tokens: its first, %r, is scored instead", target, piece)
    runs_alone = backend.info.couples_batch or backend.info.sees_padding
    for begin in range(0, len(questions), LOOKAHEAD):
        stretch = questions[begin : begin + LOOKAHEAD]
        rows = [question.batch for question in stretch]
        sizes = np.array([max(row.input_ids.size, POSITION_TOKENS * len(row.positions)) for row in rows])
        answers: dict[int, list[list[Candidate]]] = {}
        for batch in length_batches(sizes, 1 if runs_alone else BATCH_TOKENS[backend.device]):
            scored = score_together(backend, [rows[index] for index in batch])
            for index, own in zip(batch.tolist(), scored, strict=True):
                answers[index] = answer(backend.tokenizer, stretch[index], own)
        yield from (answers[index] for index in range(len(stretch)))


def fill(backend: Backend, text: str, *, top_k: int = 5, targets: Sequence[str] = ()) -> list[list[Candidate]]:
    """The candidates for each mask of the text, best first: one list per mask.

    Raises `UserError` like `ask_all`, and `CheckError` if the model cannot run the text or a score is not finite.
    """
    return next(answer_all(backend, ask_all(backend.tokenizer, backend.info, [text], top_k=top_k, targets=targets)))


def _is_unicode(text: str) -> bool:
    """False for the surrogates that Python puts in place of command-line bytes that are not UTF-8."""
    return text.encode("utf-8", "ignore").decode() == text


def _target_ids(tokenizer: Tokenizer, info: ModelInfo, targets: Sequence[str]) -> tuple[list[int], dict[str, str]]:
    """Distinct ids in the given order, and the stand-ins of targets with several tokens (as transformers' pipeline)."""
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
    # While other masks are open, special tokens stay in the text, because they show where these masks are.
    sequence = tokenizer.decode(filled.tolist(), skip_special_tokens=len(question.masks) == 1)
    return Candidate(score=score, token=id, token_str=tokenizer.decode([id]), sequence=sequence)
