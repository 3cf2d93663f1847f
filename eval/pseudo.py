"""Pseudo-log-likelihood of single texts: `mlmkit score`."""

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


@dataclass(frozen=True)
class TextScore:
    """One text: `token_ids` int64 and `log_prob` float32, both `[scored]`, and their sum in float64, natural log.

    A text without ordinary tokens scores 0.0 over no tokens.
    """

    text: str
    pseudo_log_likelihood: float
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

    Special tokens are context, never targets. `variant="within-word"` masks the later tokens of the same word too.
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
    sums = sum_by(scored.log_prob, plan.document, len(corpus))
    ends = np.searchsorted(plan.document, np.arange(len(corpus) + 1))
    ids = corpus.ids[corpus.starts[plan.document] + plan.offset].astype(np.int64)
    return [
        TextScore(text, float(sums[index]), ids[begin:end], scored.log_prob[begin:end])
        for index, (text, begin, end) in enumerate(zip(texts, ends, ends[1:], strict=False))
    ]
