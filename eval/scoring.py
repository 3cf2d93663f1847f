"""Running a plan: length-sorted batches through a backend, results in corpus order."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, Batch, Scored
from mlmkit.batching import length_batches, pad
from mlmkit.corpus import Corpus, ranges
from mlmkit.errors import CheckError
from mlmkit.eval.plan import Plan
from mlmkit.tokenizer import Tokenizer

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # on a CPU larger batches leave the cache: docs/decisions.md


def run_plan(
    backend: Backend,
    corpus: Corpus,
    plan: Plan,
    batch_tokens: int = 0,
    advance: Callable[[int], object] = lambda _: None,
) -> Scored:
    """Score every token of the plan: `log_prob` float32 and `rank` int64, `[scored]`, in the plan's order.

    `batch_tokens` bounds rows x longest of a batch (0: by device). `advance` is called with the rows done.
    Raises `CheckError` naming the document and token when a score is not finite.
    """
    log_prob = np.empty(len(plan.offset), dtype=np.float32)
    rank = np.empty(len(plan.offset), dtype=np.int64)
    lengths = plan.rows.length + backend.tokenizer.added_tokens
    budget = batch_tokens or BATCH_TOKENS[backend.device]
    for rows in length_batches(lengths, budget, equal=backend.info.sees_padding):
        batch, scored = build_batch(corpus, plan, rows, backend.tokenizer)
        log_prob[scored], rank[scored] = backend.score(batch)
        if not np.isfinite(log_prob[scored]).all():
            place = scored[~np.isfinite(log_prob[scored])][0]
            raise CheckError(
                f"the model gives {log_prob[place]} for document {plan.document[place]}, token {plan.offset[place]}: "
                "its weights or activations are not finite"
            )
        advance(len(rows))
    return Scored(log_prob, rank)


def build_batch(
    corpus: Corpus, plan: Plan, rows: NDArray[np.int64], tokenizer: Tokenizer
) -> tuple[Batch, NDArray[np.int64]]:
    """The rows as a padded batch, and which scored tokens of the plan it holds."""
    begin = corpus.starts[plan.rows.document[rows]]
    start, length = plan.rows.start[rows], plan.rows.length[rows]
    framed = []
    for row, place, offset, size in zip(rows.tolist(), begin.tolist(), start.tolist(), length.tolist(), strict=True):
        ids = np.array(plan.input_ids[place + offset : place + offset + size], dtype=np.int64)
        ids[plan.hide_from[row] - offset : plan.hide_to[row] - offset] = tokenizer.mask_id
        framed.append(tokenizer.frame(ids))
    input_ids, attention_mask = pad(framed, tokenizer.pad_id)
    counts = plan.first[rows + 1] - plan.first[rows]
    row_of_token = np.repeat(np.arange(len(rows)), counts)
    scored = ranges(plan.first[rows], counts)
    column = plan.offset[scored] - start[row_of_token] + len(tokenizer.prefix)
    targets = np.asarray(corpus.ids[begin[row_of_token] + plan.offset[scored]], dtype=np.int64)
    positions = row_of_token * input_ids.shape[1] + column
    return Batch(input_ids, attention_mask, positions, targets), scored


def shown_ids(corpus: Corpus, plan: Plan, mask_id: int) -> NDArray[np.int64]:
    """What stood at each scored token when it was scored, `[scored]`."""
    if plan.metric == "pseudo":
        return np.full(len(plan.offset), mask_id, dtype=np.int64)
    return plan.input_ids[corpus.starts[plan.document] + plan.offset].astype(np.int64)
