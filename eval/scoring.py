"""Scoring rows: length-sorted batches through a backend, results in corpus order.

(part, rows) → padded batches of distinct rows, prepared ahead in a thread → backend.score → `TokenScores` per part
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, Batch
from mlmkit.batching import BATCH_TOKENS, CALL_TOKENS, length_batches
from mlmkit.corpus import Corpus
from mlmkit.errors import CheckError, UserError
from mlmkit.eval.data import Part
from mlmkit.eval.rows import Rows
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import ranges

BATCHES_AHEAD = 8
STRETCH_TOKENS = 1 << 18  # rows x longest row that are compared at once, 2 MiB of ids: as much as an ordinary part


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of some rows, each `[scored]`: `log_prob` and `top_log_prob` float32, the others int64.

    `rank` counts the ids with a logit at least the target's. `top_id` is the most probable id.
    """

    log_prob: NDArray[np.float32]
    rank: NDArray[np.int64]
    top_log_prob: NDArray[np.float32]
    top_id: NDArray[np.int64]


@dataclass(frozen=True)
class _Step:
    """A batch of a part, and the indices of the tokens that it scores; without a batch the part is complete."""

    part: Part
    rows: Rows
    batch: Batch | None
    scored: NDArray[np.int64]


def score_parts(
    backend: Backend,
    work: Iterable[tuple[Part, Rows]],
    *,
    batch_tokens: int = 0,
    advance: Callable[[float], object] = lambda _: None,
) -> Iterator[tuple[Part, Rows, TokenScores]]:
    """Score the rows of each part. Reading, tokenising and padding run ahead in a thread while the model computes.

    `batch_tokens` bounds rows x longest row of a batch; 0 chooses by device. `advance` is called with the number of
    documents done: a batch counts as its share of the part's scored tokens. Raises `CheckError` naming the document
    and token when a score is not finite.
    """
    scores: TokenScores | None = None
    with closing(_ahead(_steps(work, backend, batch_tokens))) as steps:
        for step in steps:
            scores = scores or _empty_scores(len(step.rows.offset))
            if step.batch is not None:
                _score(backend, step, scores)
                advance(len(step.part.corpus) * len(step.scored) / len(step.rows.offset))
            else:
                yield step.part, step.rows, scores
                scores = None


def score_rows(
    backend: Backend,
    corpus: Corpus,
    rows: Rows,
    batch_tokens: int = 0,
    advance: Callable[[float], object] = lambda _: None,
) -> TokenScores:
    """Score the rows of a corpus in memory, with the arguments and errors of `score_parts`."""
    work = [(Part(0, 0, 0, corpus), rows)]
    ((_, _, scores),) = score_parts(backend, work, batch_tokens=batch_tokens, advance=advance)
    return scores


def refuse_batch_coupling(backend: Backend, allow: bool) -> None:
    """Raise `UserError` if scores change with the other rows of a batch, unless the user allows it."""
    if backend.info.couples_batch and not allow:
        raise UserError(
            f"{backend.info.path} is quantized dynamically: a score changes with the rows in its batch, by up to a few "
            "hundredths of a nat. Evaluate the fp32 artifact, or insist with --allow-batch-coupling"
        )


def build_batch(
    corpus: Corpus, rows: Rows, index: NDArray[np.int64], tokenizer: Tokenizer
) -> tuple[Batch, NDArray[np.int64]]:
    """The rows at `index` as a padded batch, and the indices of the scored tokens in it, `[masked]`."""
    begin = corpus.starts[rows.windows.document[index]]
    start, length = rows.windows.start[index], rows.windows.length[index]
    row, column = np.arange(len(index)), np.arange(rows.lengths[index].max() + tokenizer.added_tokens)
    first, end = len(tokenizer.prefix), len(tokenizer.prefix) + rows.lengths[index][:, None]
    input_ids = np.where(column < end, tokenizer.mask_id, tokenizer.pad_id)
    input_ids[:, :first] = tokenizer.prefix
    input_ids[(first <= column) & (column < first + length[:, None])] = rows.input_ids[ranges(begin + start, length)]
    input_ids[row[:, None], end + np.arange(len(tokenizer.suffix))] = tokenizer.suffix
    hide_from, hidden = rows.hide_from[index], rows.hide_to[index] - rows.hide_from[index]
    input_ids[np.repeat(row, hidden), ranges(hide_from - start + first, hidden)] = tokenizer.mask_id
    attention_mask = (column < end + len(tokenizer.suffix)).astype(np.int64)
    counts = rows.first[index + 1] - rows.first[index]
    row_of_token = np.repeat(row, counts)
    scored = ranges(rows.first[index], counts)
    positions = row_of_token * len(column) + rows.offset[scored] - start[row_of_token] + first
    targets = np.asarray(corpus.ids[begin[row_of_token] + rows.offset[scored]], dtype=np.int64)
    return Batch(input_ids, attention_mask, positions, targets), scored


def distinct_batches(
    batch: Batch, budget: int, *, equal: bool, call_tokens: float
) -> Iterator[tuple[Batch, NDArray[np.int64]]]:
    """Cut a padded batch into batches of its distinct rows, by length; each comes with the indices of its targets.

    Rows with the same ids become one row with all of their targets: a pair whose sentences differ in one token shares
    the row that masks it. `budget`, `equal` and `call_tokens` are those of `length_batches`.
    """
    lengths = batch.attention_mask.sum(axis=1)
    shown = np.column_stack([lengths, batch.input_ids]).astype(np.int32)  # with lengths, as a text may hold padding ids
    _, first, row_of = np.unique(shown.view(f"V{shown[0].nbytes}").ravel(), return_index=True, return_inverse=True)
    row, column = np.divmod(batch.positions, batch.input_ids.shape[1])
    order = np.argsort(row_of[row], kind="stable")
    counts = np.bincount(row_of[row], minlength=len(first))
    begin = np.cumsum(counts) - counts
    for index in length_batches(lengths[first], budget, equal=equal, call_tokens=call_tokens):
        rows, longest = first[index], int(lengths[first[index]].max())
        targets = order[ranges(begin[index], counts[index])]
        positions = np.repeat(np.arange(len(index)), counts[index]) * longest + column[targets]
        shape = (batch.input_ids[rows, :longest], batch.attention_mask[rows, :longest])
        yield Batch(*shape, positions, batch.targets[targets]), targets


def _score(backend: Backend, step: _Step, scores: TokenScores) -> None:
    assert step.batch is not None
    log_prob, rank, top_log_prob, top_id = backend.score(step.batch)
    scores.log_prob[step.scored], scores.rank[step.scored] = log_prob, rank
    scores.top_log_prob[step.scored], scores.top_id[step.scored] = top_log_prob[:, 0], top_id[:, 0]
    if not np.isfinite(log_prob).all():
        bad = int(np.flatnonzero(~np.isfinite(log_prob))[0])
        token = step.scored[bad]
        raise CheckError(
            f"the model gives {log_prob[bad]} for document {step.part.first_document + step.rows.document[token]}, "
            f"token {step.rows.offset[token]}: its weights or activations are not finite"
        )


def _empty_scores(size: int) -> TokenScores:
    return TokenScores(*(np.empty(size, kind) for kind in (np.float32, np.int64, np.float32, np.int64)))


def _steps(work: Iterable[tuple[Part, Rows]], backend: Backend, batch_tokens: int) -> Generator[_Step]:
    tokenizer, budget = backend.tokenizer, batch_tokens or BATCH_TOKENS[backend.device]
    equal, call_tokens = backend.info.sees_padding, CALL_TOKENS[backend.device]
    for part, rows in work:
        for stretch in length_batches(rows.lengths + tokenizer.added_tokens, max(budget, STRETCH_TOKENS)):
            padded, scored = build_batch(part.corpus, rows, stretch, tokenizer)
            for batch, targets in distinct_batches(padded, budget, equal=equal, call_tokens=call_tokens):
                yield _Step(part, rows, batch, scored[targets])
        yield _Step(part, rows, None, np.zeros(0, dtype=np.int64))


def _ahead(steps: Generator[_Step]) -> Generator[_Step]:
    """The same steps, computed up to `BATCHES_AHEAD` ahead in a thread; what it raises is raised here.

    Closing this generator stops the thread and closes `steps`, so that no file stays open.
    """
    with closing(steps), ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, steps, None) for _ in range(BATCHES_AHEAD))
        try:
            while (step := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, steps, None))
                yield step
        finally:
            thread.shutdown(cancel_futures=True)
