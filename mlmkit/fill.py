"""Fills masks. Results have the fields of Hugging Face's pipeline: `score`, `token`, `token_str`, `sequence`.

    ask_all           texts -> questions, checked (questions.py)
    rank_together     questions -> rows to score, in one round or several -> rankings
    answer            a ranking -> candidates

`answer_all` scores the rows in batches; the server merges them with those of other requests. `fill` is for one text.
"""

import logging
import math
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, Batch, Scored, score_together
from mlmkit.batching import BATCH_TOKENS, LOOKAHEAD, length_batches
from mlmkit.errors import CheckError
from mlmkit.questions import Question, ask_all
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

POSITION_TOKENS = 8  # a position's logits take about as much memory as so many tokens

Result = TypeVar("Result")
Rounds: TypeAlias = Generator[list[Batch], list[Scored], Result]  # yields rows, `[1, seq]` each; receives their scores
# Of each mask, or of all masks together: natural log of the probability and ids of what fills it, best first.
Ranking: TypeAlias = list[list[tuple[float, tuple[int, ...]]]]


class Candidate(TypedDict):
    """A token for a mask: `score` is its probability over the vocabulary, `sequence` the text with it filled in."""

    score: float
    token: int
    token_str: str
    sequence: str


class TargetCandidate(TypedDict):
    """A whole target for a mask, `token_str` as it was given.

    `log_prob` is the sum of the log-probabilities of its tokens, `score` the geometric mean of their probabilities.
    """

    score: float
    log_prob: float
    tokens: list[int]
    token_str: str
    sequence: str


class JointCandidate(TypedDict):
    """A token for each mask: `score` is their joint probability, filled in from left to right, `log_prob` its log."""

    score: float
    log_prob: float
    tokens: list[int]
    token_strs: list[str]
    sequence: str


Answer: TypeAlias = list[list[Candidate]] | list[list[TargetCandidate]] | list[list[JointCandidate]]


class Truncation(TypedDict, total=False):
    """Options of `fill` for texts that are too long."""

    truncation: bool
    max_length: int | None


def rank_together(questions: Sequence[Question]) -> Rounds[list[Ranking]]:
    """Rank what fills the masks of each question. Raises `CheckError` if a score is not finite."""
    programs = [(_rank_targets if question.targets else _rank_vocabulary)(question) for question in questions]
    rows, rankings = [next(program) for program in programs], [Ranking() for _ in questions]
    while True:
        scored = iter((yield [row for own in rows for row in own]))
        for index, own in enumerate(rows):
            if own:
                rows[index], ranking = step(programs[index], list(islice(scored, len(own))))
                rankings[index] = ranking or []
        if not any(rows):
            return rankings


def step(rounds: Rounds[Result], scored: Any = None) -> tuple[list[Batch], Result | None]:
    """Give the scores of the last rows, none at first. Returns the next rows, and after the last round the result."""
    try:
        return rounds.send(scored), None
    except StopIteration as end:
        return [], end.value


def _rank_vocabulary(question: Question) -> Rounds[Ranking]:
    """Tokens for each mask while the others stay open; if `joint`, fillings of all masks, by a beam from left to right.

    A filling's probability is the product of P(token | text, earlier masks filled, later masks open), so it depends on
    the order. The best fillings are certain to be found if the beam holds every filling of the masks before the last.
    """
    if not question.joint:
        [scored] = yield [_row(question.ids, question.masks)]
        log_prob = _finite(scored.top_log_prob[:, : question.top_k])
        return [_ranking(*mask) for mask in zip(log_prob, scored.top_id[:, : question.top_k], strict=True)]
    total, fillings = np.zeros(1), np.zeros((1, 0), dtype=np.int64)  # [beam] and [beam, masks so far]
    for number, mask in enumerate(question.masks):
        rows = np.tile(question.ids, (len(fillings), 1))
        rows[:, question.masks[:number]] = fillings
        scored = yield [_row(ids, mask[None]) for ids in rows]
        log_prob = total[:, None] + _finite(np.concatenate([own.top_log_prob for own in scored]))
        best = np.argsort(-log_prob, axis=None, kind="stable")[: question.beam]
        before, rank = np.unravel_index(best, log_prob.shape)
        tokens = np.concatenate([own.top_id for own in scored])[before, rank]
        total, fillings = log_prob[before, rank], np.column_stack([fillings[before], tokens])
    return [_ranking(total, fillings)[: question.top_k]]


def _rank_targets(question: Question) -> Rounds[Ranking]:
    """The targets for each mask while the others stay open.

    A target of n pieces takes the place of the mask, and its log-probability is the sum of
    log P(piece | text, earlier pieces, later pieces masked), its pseudo-log-likelihood within the word (Kauf and
    Ivanova 2023). The mean over its pieces decides, as in X-FACTR (Jiang et al. 2020) and mLAMA (Kassner et al. 2021).
    """
    rows, members, targets = [], [], list(question.targets)
    all_masks, mask_id = np.arange(len(question.masks)), int(question.ids[question.masks[0]])
    for (size, known), own in question.contexts.items():
        pieces = [targets[index][len(known)] for index in own]
        for masks in [all_masks] if size == 1 else all_masks[:, None]:  # targets of one piece share one row
            place = int(question.masks[masks[0]])
            ids = np.insert(question.ids, place, [*known, *[mask_id] * (size - 1 - len(known))])  # then comes the mask
            rows.append(_row(ids, np.repeat(question.masks[masks] + len(known), len(own)), np.tile(pieces, len(masks))))
            members.append(np.ix_(masks, np.array(own)))
    scored = yield rows
    log_prob = np.zeros((len(all_masks), len(targets)))
    for own, scores in zip(members, scored, strict=True):
        log_prob[own] += _finite(scores.log_prob).reshape(log_prob[own].shape)
    order = np.argsort(-log_prob / [len(pieces) for pieces in targets], axis=1, kind="stable")[:, : question.top_k]
    return [[(float(log_prob[mask, index]), targets[index]) for index in best] for mask, best in enumerate(order)]


def _row(ids: NDArray[np.int64], positions: NDArray[np.int64], targets: NDArray[np.int64] | int = 0) -> Batch:
    return Batch(ids[None], np.ones_like(ids)[None], positions, np.zeros_like(positions) + targets)


def _ranking(log_prob: NDArray, tokens: NDArray[np.int64]) -> list[tuple[float, tuple[int, ...]]]:
    return list(zip(log_prob.tolist(), map(tuple, tokens.reshape(len(log_prob), -1).tolist()), strict=True))


def _finite(log_prob: NDArray[np.float32]) -> NDArray[np.float64]:
    if not np.isfinite(log_prob).all():
        raise CheckError("the model's scores are not finite: its weights or activations contain NaN or infinity")
    return log_prob.astype(np.float64)


def answer(tokenizer: Tokenizer, question: Question, ranking: Ranking) -> Answer:
    """The candidates for each mask, best first; of a `joint` question, one list for all its masks."""
    places: Any = [question.masks] if question.joint else question.masks[:, None]
    return [
        [_candidate(tokenizer, question, masks, list(tokens), log_prob) for log_prob, tokens in best]
        for masks, best in zip(places, ranking, strict=True)
    ]


def _candidate(
    tokenizer: Tokenizer, question: Question, masks: NDArray[np.int64], tokens: list[int], log_prob: float
) -> Any:
    filled = question.ids.copy()
    filled[masks] = tokens[: len(masks)]
    filled = np.insert(filled, masks[-1] + 1, tokens[len(masks) :])
    if "pad_token" in tokenizer.named:
        filled = filled[filled != tokenizer.pad_id]  # as the pipeline does
    # While other masks are open, special tokens stay in the text, because they show where these masks are.
    sequence = tokenizer.decode(filled.tolist(), skip_special_tokens=len(masks) == len(question.masks))
    score, strings = math.exp(log_prob), [tokenizer.decode([id]) for id in tokens]
    if question.joint:
        return JointCandidate(score=score, log_prob=log_prob, tokens=tokens, token_strs=strings, sequence=sequence)
    if question.whole_targets:
        score, string = math.exp(log_prob / len(tokens)), question.targets[tuple(tokens)]
        return TargetCandidate(score=score, log_prob=log_prob, tokens=tokens, token_str=string, sequence=sequence)
    return Candidate(score=score, token=tokens[0], token_str=strings[0], sequence=sequence)


def answer_all(backend: Backend, questions: Sequence[Question]) -> Iterator[Answer]:
    """Yield the candidates for each question, in order, scored in batches of bounded size.

    Warns of targets and texts that are cut. Raises `CheckError` if the model cannot run a batch or a score is not
    finite.
    """
    for target, piece in questions[0].stand_ins.items() if questions else ():
        option = "whole_targets (--whole-targets) scores all of it"
        log.warning("the target %r has several tokens: its first, %r, is scored instead; %s", target, piece, option)
    blocks = np.cumsum([question.rows for question in questions], dtype=np.int64) // LOOKAHEAD
    for indices in np.split(np.arange(len(questions)), np.flatnonzero(np.diff(blocks)) + 1):
        block = [questions[index] for index in indices]
        for question in block:
            if question.is_truncated:
                lengths = len(question.ids), question.tokens
                log.warning("%s is truncated to %d of its %d tokens, around the masks", question.name, *lengths)
        rounds = rank_together(block)
        rows, rankings = step(rounds)
        while rankings is None:
            rows, rankings = step(rounds, _score(backend, rows))
        for question, ranking in zip(block, rankings, strict=True):
            yield answer(backend.tokenizer, question, ranking)


def _score(backend: Backend, rows: Sequence[Batch]) -> list[Scored]:
    """The scores of each row, from batches of rows of similar length."""
    runs_alone = backend.info.couples_batch or backend.info.sees_padding
    sizes = np.array([max(row.input_ids.size, POSITION_TOKENS * len(row.positions)) for row in rows], dtype=np.int64)
    scored: dict[int, Scored] = {}
    budget = 1 if runs_alone else BATCH_TOKENS[backend.device]
    for batch in length_batches(sizes, budget):
        scored |= zip(batch.tolist(), score_together(backend, [rows[index] for index in batch]), strict=True)
    return [scored[index] for index in range(len(rows))]


@overload
def fill(
    backend: Backend, text: str, *, top_k: int = 5, targets: str | Sequence[str] = (), **cut: Unpack[Truncation]
) -> list[list[Candidate]]: ...
@overload
def fill(
    backend: Backend,
    text: str,
    *,
    top_k: int = 5,
    targets: str | Sequence[str],
    whole_targets: Literal[True],
    **cut: Unpack[Truncation],
) -> list[list[TargetCandidate]]: ...
@overload
def fill(
    backend: Backend, text: str, *, top_k: int = 5, joint: Literal[True], **cut: Unpack[Truncation]
) -> list[list[JointCandidate]]: ...
def fill(
    backend: Backend,
    text: str,
    *,
    top_k: int = 5,
    targets: str | Sequence[str] = (),
    whole_targets: bool = False,
    joint: bool = False,
    truncation: bool = False,
    max_length: int | None = None,
) -> Answer:
    """The candidates for each mask of the text, best first: one list per mask.

    - `top_k`: candidates per mask.
    - `targets`: rank only these, exactly as written.
    - `whole_targets`: score all tokens of a target, not only its first. See `TargetCandidate`.
    - `joint`: rank fillings of all masks together, in one list. See `JointCandidate`.
    - `truncation`: cut a text that is too long to a window around its masks, with a warning. The window leaves room for
      the longest of the `whole_targets`.
    - `max_length`: the tokens of that window, special ones included; by default as many as the model takes.

    Raises `UserError` like `ask_all`, and `CheckError` if the model cannot run the text or a score is not finite.
    """
    questions = ask_all(
        backend.tokenizer,
        backend.info,
        [text],
        top_k=top_k,
        targets=targets,
        whole_targets=whole_targets,
        joint=joint,
        truncation=truncation,
        max_length=max_length,
    )
    return next(answer_all(backend, questions))
