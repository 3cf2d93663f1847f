"""Running plans: length-sorted batches through a backend, made ahead of it, results in corpus order."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, Batch
from mlmkit.batching import length_batches
from mlmkit.corpus import Corpus
from mlmkit.errors import CheckError, UserError
from mlmkit.eval.parts import Part
from mlmkit.eval.plan import Plan
from mlmkit.tokenizer import Tokenizer
from mlmkit.windows import ranges

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # on a CPU larger batches leave the cache: docs/decisions.md
BATCHES_AHEAD = 8

Item = TypeVar("Item")


@dataclass(frozen=True)
class TokenScores:
    """A plan's scores, each `[scored]`: `log_prob` and `top_log_prob` float32, `rank` and `top_id` int64.

    `top_id` is the likeliest token and `top_log_prob` its log-probability.
    """

    log_prob: NDArray[np.float32]
    rank: NDArray[np.int64]
    top_log_prob: NDArray[np.float32]
    top_id: NDArray[np.int64]

    @classmethod
    def empty(cls, size: int) -> "TokenScores":
        """Room for the scores of `size` tokens."""
        return cls(*(np.empty(size, kind) for kind in (np.float32, np.int64, np.float32, np.int64)))


@dataclass(frozen=True)
class _Step:
    """A batch of a part's plan, and the tokens of the plan that it scores; no batch where there is nothing to score."""

    part: Part
    plan: Plan
    batch: Batch | None
    scored: NDArray[np.int64]
    is_last: bool


def score_parts(
    backend: Backend,
    work: Iterable[tuple[Part, Plan]],
    *,
    batch_tokens: int = 0,
    advance: Callable[[float], object] = lambda _: None,
) -> Iterator[tuple[Part, Plan, TokenScores]]:
    """Score each part's plan. Reading, planning and padding run ahead in a thread while the model computes.

    `batch_tokens` bounds rows x longest of a batch (0: by device). `advance` is called with the documents done, a
    batch's rows counting as their share of the part's. Raises `CheckError` naming the document and token when a score
    is not finite.
    """
    scores, begun = TokenScores.empty(0), None
    with _Ahead(_steps(work, backend, batch_tokens), BATCHES_AHEAD) as steps:
        for step in steps:
            if step.part is not begun:
                scores, begun = TokenScores.empty(len(step.plan.offset)), step.part
            if step.batch is not None:
                _score(backend, step, scores)
                advance(len(step.part.corpus) * len(step.batch.input_ids) / len(step.plan))
            if step.is_last:
                yield step.part, step.plan, scores


def run_plan(
    backend: Backend,
    corpus: Corpus,
    plan: Plan,
    batch_tokens: int = 0,
    advance: Callable[[float], object] = lambda _: None,
) -> TokenScores:
    """Score the plan of a corpus in memory: the scores are in the plan's order."""
    ((_, _, scores),) = score_parts(
        backend, [(Part(0, 0, 0, corpus), plan)], batch_tokens=batch_tokens, advance=advance
    )
    return scores


def refuse_batch_coupling(backend: Backend, allow: bool) -> None:
    """Raise `UserError` for a model whose scores change with a row's batch-mates, unless the user insists."""
    if backend.info.couples_batch and not allow:
        raise UserError(
            f"{backend.info.path} is quantized dynamically: a score changes with the rows in its batch, by up to a few "
            "hundredths of a nat. Evaluate the fp32 artifact, or insist with --allow-batch-coupling"
        )


def _score(backend: Backend, step: _Step, scores: TokenScores) -> None:
    assert step.batch is not None
    log_prob, rank, top_log_prob, top_id = backend.score(step.batch)
    scores.log_prob[step.scored], scores.rank[step.scored] = log_prob, rank
    scores.top_log_prob[step.scored], scores.top_id[step.scored] = top_log_prob[:, 0], top_id[:, 0]
    if not np.isfinite(log_prob).all():
        bad = np.flatnonzero(~np.isfinite(log_prob))[0]
        place = step.scored[bad]
        raise CheckError(
            f"the model gives {log_prob[bad]} for document {step.part.first_document + step.plan.document[place]}, "
            f"token {step.plan.offset[place]}: its weights or activations are not finite"
        )


def _steps(work: Iterable[tuple[Part, Plan]], backend: Backend, batch_tokens: int) -> Generator[_Step]:
    budget = batch_tokens or BATCH_TOKENS[backend.device]
    for part, plan in work:
        lengths = plan.rows.length + backend.tokenizer.added_tokens
        batches = length_batches(lengths, budget, equal=backend.info.sees_padding)
        for number, rows in enumerate(batches, start=1):
            batch, scored = build_batch(part.corpus, plan, rows, backend.tokenizer)
            yield _Step(part, plan, batch, scored, is_last=number == len(batches))
        if not batches:
            yield _Step(part, plan, None, np.zeros(0, dtype=np.int64), is_last=True)


def build_batch(
    corpus: Corpus, plan: Plan, rows: NDArray[np.int64], tokenizer: Tokenizer
) -> tuple[Batch, NDArray[np.int64]]:
    """The rows as a padded batch, and which scored tokens of the plan it holds."""
    begin = corpus.starts[plan.rows.document[rows]]
    start, length = plan.rows.start[rows], plan.rows.length[rows]
    row, column = np.arange(len(rows)), np.arange(length.max() + tokenizer.added_tokens)
    first, end = len(tokenizer.prefix), len(tokenizer.prefix) + length[:, None]
    input_ids = np.full((len(row), len(column)), tokenizer.pad_id, dtype=np.int64)
    input_ids[:, :first] = tokenizer.prefix
    input_ids[(first <= column) & (column < end)] = plan.input_ids[ranges(begin + start, length)]
    input_ids[row[:, None], end + np.arange(len(tokenizer.suffix))] = tokenizer.suffix
    hide_from, hidden = plan.hide_from[rows], plan.hide_to[rows] - plan.hide_from[rows]
    input_ids[np.repeat(row, hidden), ranges(hide_from - start + first, hidden)] = tokenizer.mask_id
    attention_mask = (column < end + len(tokenizer.suffix)).astype(np.int64)
    counts = plan.first[rows + 1] - plan.first[rows]
    row_of_token = np.repeat(row, counts)
    scored = ranges(plan.first[rows], counts)
    place = plan.offset[scored] - start[row_of_token] + first
    targets = np.asarray(corpus.ids[begin[row_of_token] + plan.offset[scored]], dtype=np.int64)
    return Batch(input_ids, attention_mask, row_of_token * len(column) + place, targets), scored


class _Ahead(Generic[Item]):
    """Iterates over `items` made by a thread that runs up to `depth` ahead; what it raises is raised here.

    Leaving the `with` block stops the thread, and closes `items`, before anything else happens.
    """

    def __init__(self, items: Generator[Item], depth: int) -> None:
        self._items, self._stopped = items, threading.Event()
        self._queue: queue.Queue[Item | BaseException] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._take()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # it may be waiting for room
                self._queue.get_nowait()
            self._thread.join(0.01)

    def _run(self) -> None:
        outcome: BaseException = StopIteration()
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stopped.is_set():
                    break
            self._items.close()
        except BaseException as error:
            outcome = error
        self._queue.put(outcome)

    def _take(self) -> Iterator[Item]:
        while True:
            item = self._queue.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
