"""From scores to metrics, with the definitions of `docs/evaluation.md`."""

import math

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Scored
from mlmkit.corpus import Corpus
from mlmkit.eval.plan import Plan
from mlmkit.eval.statistics import Metrics, bootstrap, sum_by_document

Columns = NDArray[np.float64]


def masked_metrics(corpus: Corpus, plan: Plan, scored: Scored) -> Metrics:
    """Cross-entropy L = -(1/|M|) sum of log P over all selected tokens M, its exponential, accuracy, reciprocal rank.

    A tie counts against the model: the rank is the number of other ids at least as likely.
    """
    columns = [np.ones(len(scored.rank)), -scored.log_prob, scored.rank == 0, 1.0 / (1 + scored.rank)]
    sums = np.stack([sum_by_document(column, plan.document, len(corpus)) for column in columns], axis=1)

    def mean(column: int):
        return lambda totals: totals[..., column] / totals[..., 0]

    return bootstrap(
        sums,
        {
            "masked_cross_entropy": mean(1),
            "masked_perplexity": lambda totals: np.exp(mean(1)(totals)),
            "masked_accuracy": mean(2),
            "mean_reciprocal_rank": mean(3),
        },
    )


def pseudo_metrics(corpus: Corpus, plan: Plan, scored: Scored, scorable: NDArray[np.int64]) -> Metrics:
    """Pseudo-log-likelihood PLL = sum of log P(w_t | rest) and what follows from it (Salazar et al. 2020).

    `scorable` `[documents]` counts the tokens that a full run would score. When the plan holds a sample of them, PLL is
    estimated as their count times the sample's mean, which is unbiased as every token is as likely to be drawn.
    """
    counted = sum_by_document(np.ones(len(scored.rank)), plan.document, len(corpus))
    pll = sum_by_document(scored.log_prob, plan.document, len(corpus))
    sums = np.column_stack([pll, counted, scorable, corpus.text_sizes]).astype(np.float64)

    def total(totals: Columns) -> Columns:
        return totals[..., 0] / totals[..., 1] * totals[..., 2]

    def per(column: int):
        return lambda totals: -total(totals) / totals[..., column]

    return bootstrap(
        sums,
        {
            "pseudo_log_likelihood": total,
            "pseudo_perplexity": lambda totals: np.exp(per(2)(totals)),
            "pseudo_perplexity_per_word": lambda totals: np.exp(per(3)(totals)),
            "pseudo_perplexity_per_character": lambda totals: np.exp(per(4)(totals)),
            "bits_per_byte": lambda totals: per(5)(totals) / math.log(2),
        },
    )
