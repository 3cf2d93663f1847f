"""Pseudo-log-likelihood of single texts: `mlmkit score`."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Backend, capacity
from mlmkit.console import progress
from mlmkit.corpus import Corpus, tokenize
from mlmkit.documents import checked_text
from mlmkit.eval.plan import Plan, pseudo_plan
from mlmkit.eval.scoring import refuse_batch_coupling, run_plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextScore:
    """One text: `token_ids` and `offset` int64 and `log_prob` float32, all `[scored]`; its sum in float64, natural log.

    A token's offset counts the text's tokens before it. A text without a scored token has no pseudo-log-likelihood: it
    is None, as 0 would mean certainty.
    """

    text: str
    pseudo_log_likelihood: float | None
    token_ids: NDArray[np.int64]
    offset: NDArray[np.int64]
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
    scores = text_scores(texts, corpus, plan, scored.log_prob)
    if unknown := int(corpus.text_sizes[:, 3].sum()):
        log.warning("%d characters are unknown to the tokenizer: scored as its unknown token, or not at all", unknown)
    return scores


def text_scores(texts: Sequence[str], corpus: Corpus, plan: Plan, log_prob: NDArray[np.float32]) -> list[TextScore]:
    """The scores `[scored]` of a `pseudo_plan` by text."""
    ids = corpus.ids[corpus.starts[plan.document] + plan.offset].astype(np.int64)
    ends = np.searchsorted(plan.document, np.arange(len(corpus) + 1))
    found = []
    for text, begin, end in zip(texts, ends, ends[1:], strict=False):
        own = log_prob[begin:end]
        total = float(own.sum(dtype=np.float64)) if len(own) else None
        found.append(TextScore(text, total, ids[begin:end], plan.offset[begin:end], own))
    return found
