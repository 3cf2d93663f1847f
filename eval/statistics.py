"""Bootstrap intervals over documents."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK = 1 << 22

Estimator = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def sum_by_document(values: NDArray[np.floating], document: NDArray[np.int64], documents: int) -> NDArray[np.float64]:
    """Float64 sums of per-token values, `[documents]`; tokens in document order fix the order of adding."""
    return np.bincount(document, weights=values.astype(np.float64), minlength=documents).astype(np.float64)


def bootstrap(
    sums: NDArray[np.float64], estimators: dict[str, Estimator], resamples: int = RESAMPLES
) -> dict[str, dict[str, float]]:
    """Value and percentile interval of statistics of column sums, resampling documents with replacement.

    `sums` is `[documents, columns]`; each estimator maps totals `[..., columns]` to `[...]` (Efron and Tibshirani 1993,
    chapter 13). Returns `{name: {value, low, high}}`. The generator is fixed, so the same sums give the same interval.
    """
    totals = resampled_totals(sums, resamples)
    tail = (1 - CONFIDENCE) / 2
    result = {}
    for name, estimator in estimators.items():
        low, high = np.quantile(estimator(totals), [tail, 1 - tail])
        result[name] = {"value": float(estimator(sums.sum(axis=0))), "low": float(low), "high": float(high)}
    return result


def resampled_totals(sums: NDArray[np.float64], resamples: int) -> NDArray[np.float64]:
    """Column sums of resampled documents, `[resamples, columns]`."""
    documents = len(sums)
    generator = np.random.Generator(np.random.Philox(0))
    totals = np.empty((resamples, sums.shape[1]))
    step = max(CHUNK // documents, 1)
    for begin in range(0, resamples, step):
        count = min(step, resamples - begin)
        drawn = generator.integers(documents, size=(count, documents)) + np.arange(count)[:, None] * documents
        weights = np.bincount(drawn.ravel(), minlength=count * documents).reshape(count, documents)
        totals[begin : begin + count] = weights @ sums
    return totals
