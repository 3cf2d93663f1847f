"""Pseudo-log-likelihood as rows for the batcher: one row a token, that token masked."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlmkit.backends import Backend, Batch, Scored, capacity
from mlmkit.corpus import Corpus, concatenate, tokenize
from mlmkit.errors import CheckError
from mlmkit.eval.plan import Plan, pseudo_plan
from mlmkit.eval.pseudo import TextScore, text_scores
from mlmkit.eval.scoring import build_batch
from mlmkit.fill import check_length
from mlmkit.serve.batcher import split
from mlmkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scoring:
    """Texts to score, and the plan of their rows."""

    texts: list[str]
    corpus: Corpus
    plan: Plan

    def rows(self, tokenizer: Tokenizer) -> list[Batch]:
        """One row a scored token, in the plan's order."""
        # The windows of a text have one length, so its rows make a batch without padding.
        texts = np.split(np.arange(len(self.plan)), np.flatnonzero(np.diff(self.plan.document)) + 1)
        batches = (build_batch(self.corpus, self.plan, rows, tokenizer)[0] for rows in texts if len(rows))
        return [row for batch in batches for row in split(batch)]


def plan_scores(backend: Backend, texts: list[str], variant: str, limit: int) -> Scoring:
    """The plan for a few texts of at most `limit` tokens each. Raises `UserError` for longer ones."""
    parts = []
    for text in texts:  # one after the other, so that the first that is too long is the last that is tokenised
        check_length(len(text), "characters", limit * backend.tokenizer.characters_per_token)
        parts.append(tokenize([text], backend.tokenizer))
        check_length(len(parts[-1].ids) + backend.tokenizer.added_tokens, "tokens", limit)
    corpus = concatenate(parts)
    return Scoring(texts, corpus, pseudo_plan(corpus, backend.tokenizer, capacity(backend), variant))


def read_scores(
    tokenizer: Tokenizer, scoring: Scoring, predicted: list[Scored], *, per_token: bool
) -> list[dict[str, Any]]:
    """What `ScoredText` holds, for each text. Sums in float64. Raises `CheckError` for scores that are not finite."""
    log_prob = np.array([row.log_prob[0] for row in predicted], dtype=np.float32)
    if not np.isfinite(log_prob).all():
        raise CheckError("the model gives scores that are not finite: its weights or activations are not")
    scores = text_scores(scoring.texts, scoring.corpus, scoring.plan, log_prob)
    return [_answer(tokenizer, score, per_token) for score in scores]


def _answer(tokenizer: Tokenizer, score: TextScore, per_token: bool) -> dict[str, Any]:
    total, count = score.pseudo_log_likelihood, len(score.token_ids)
    answer = {"pseudo_log_likelihood": total, "pseudo_perplexity": _perplexity(total or 0.0, count), "tokens": count}
    if per_token:
        spans = tokenizer.spans(score.text)
        rows = zip(score.token_ids.tolist(), score.offset.tolist(), score.log_prob.tolist(), strict=True)
        answer["per_token"] = [
            {
                "token": id,
                "token_str": tokenizer.readable(id),
                "start": spans[offset][0],
                "end": spans[offset][1],
                "log_prob": value,
            }
            for id, offset, value in rows
        ]
    return answer


def _perplexity(total: float, count: int) -> float | None:
    """exp(-PLL / N), Salazar et al. 2020; None without tokens, or beyond what a float holds."""
    try:
        return math.exp(-total / count) if count else None
    except OverflowError:
        return None
