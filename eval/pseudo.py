"""Pseudo-log-likelihood of single texts: `mlmkit score`."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, capacity
from mlmkit.corpus import tokenize
from mlmkit.documents import checked_text
from mlmkit.eval.plan import pseudo_plan
from mlmkit.eval.scoring import refuse_batch_coupling, run_plan
from mlmkit.eval.statistics import sum_by
from mlmkit.progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextScore:
    """One text: `token_ids` int64 and `log_prob` float32, both `[scored]`, and their sum in float64, natural log.

    A text without a scored token has no pseudo-log-likelihood: it is None, as 0 would mean certainty.
    """

    text: str
    pseudo_log_likelihood: float | None
    token_ids: NDArray[np.int64]
    log_prob: NDArray[np.float32]


def score_texts(
    backend: Backend,
    texts: Iterable[str],
    *,
    variant: str = "original",
    batch_tokens: int = 0,
    allow_batch_coupling: bool = False,
) -> list[TextScore]:
    """PLL of each text: the sum over its tokens of log P(token | the rest), each token masked alone.

    An unknown token is scored like any other; other special tokens are context. `variant="within-word"` masks the
    later tokens of the same word too.
    """
    refuse_batch_coupling(backend, allow_batch_coupling)
    texts = [checked_text(text, f"text {number}") for number, text in enumerate(texts)]
    if not texts:
        return []
    corpus = tokenize(texts, backend.tokenizer)
    plan = pseudo_plan(corpus, backend.tokenizer, capacity(backend), variant)
    with progress() as bar:
        task = bar.add_task("scoring, documents", total=len(corpus))
        scored = run_plan(backend, corpus, plan, batch_tokens, lambda documents: bar.advance(task, documents))
    ids = corpus.ids[corpus.starts[plan.document] + plan.offset].astype(np.int64)
    if unknown := int((ids == backend.tokenizer.unk_id).sum()):
        log.warning("%d of %d tokens are unknown to the tokenizer, and scored as its unknown token", unknown, len(ids))
    sums = sum_by(scored.log_prob, plan.document, len(corpus))
    ends = np.searchsorted(plan.document, np.arange(len(corpus) + 1))
    return [
        TextScore(text, float(sums[index]) if begin < end else None, ids[begin:end], scored.log_prob[begin:end])
        for index, (text, begin, end) in enumerate(zip(texts, ends, ends[1:], strict=False))
    ]
