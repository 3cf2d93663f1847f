"""Bootstrap intervals over documents."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK = 1 << 22

Estimator = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Metrics = dict[str, dict[str, float | None]]


def sum_by_document(values: NDArray[np.floating], document: NDArray[np.int64], documents: int) -> NDArray[np.float64]:
    """Float64 sums of per-token values, `[documents]`; tokens in document order fix the order of adding."""
    return np.bincount(document, weights=values.astype(np.float64), minlength=documents).astype(np.float64)


def bootstrap(sums: NDArray[np.float64], estimators: dict[str, Estimator], resamples: int = RESAMPLES) -> Metrics:
    """Value and percentile interval of statistics of column sums, resampling documents with replacement.

    `sums` is `[documents, columns]`; each estimator maps totals `[..., columns]` to `[...]` (Efron and Tibshirani 1993,
    chapter 13). Returns `{name: {value, low, high}}`, None where a number overflows float64. The generator is fixed, so
    the same sums give the same interval.
    """
    totals = resampled_totals(sums, resamples)
    tail = (1 - CONFIDENCE) / 2
    result = {}
    for name, estimator in estimators.items():
        with np.errstate(all="ignore"):
            values = estimator(totals)
            # A resample without a scored token has no value (0 / 0), which is not the same as a perfect one. Order
            # statistics instead of interpolation keep an overflow to infinity from becoming NaN.
            low, high = np.nanquantile(values, [tail, 1 - tail], method="nearest")
            value = estimator(sums.sum(axis=0))
        result[name] = {key: _finite(number) for key, number in (("value", value), ("low", low), ("high", high))}
    return result


def _finite(number: NDArray[np.float64] | float) -> float | None:
    """JSON has no infinity."""
    return float(number) if np.isfinite(number) else None


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
