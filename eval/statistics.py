"""Bootstrap intervals over documents, in memory that does not grow with their number; and the unigram entropy."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from mlmkit.eval.result import Metric, Metrics

RESAMPLES = 1000
CONFIDENCE = 0.95
WEIGHTS_AT_ONCE = 1 << 22  # entries of the matrix of drawn documents

Estimator = Callable[[NDArray[np.float64]], NDArray[np.float64]]
ALL = slice(None)


def sum_by(values: NDArray, group: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """Float64 sums of values by group, `[groups]`, added in the order of the values."""
    return np.bincount(group, weights=values.astype(np.float64), minlength=groups).astype(np.float64)


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """−Σ p log p in nats, where p are the relative frequencies of tokens that occur `counts` times, `[vocabulary]`.

    No model that ignores context has a lower cross-entropy on these tokens (Gibbs' inequality).
    """
    probability = counts[counts > 0] / counts.sum()
    return float(0.0 - (probability * np.log(probability)).sum())


class Bootstrap:
    """Column sums over documents, and over `RESAMPLES` draws of as many documents with replacement.

    Documents are added a block at a time. The number of a draw's documents in a block is binomial given those that are
    left, and they are uniform within it: together this is the multinomial draw over all documents. The random generator
    is fixed, so equal blocks give equal draws, and statistics of one object are paired. `documents` counts the
    documents with a value in each column.
    """

    def __init__(self, documents: int, columns: int) -> None:
        self.totals = np.zeros(columns)
        self.resampled = np.zeros((RESAMPLES, columns))
        self.documents = np.zeros(columns, dtype=np.int64)
        self._generator = np.random.Generator(np.random.Philox(0))
        self._documents_left = documents
        self._draws_left = np.full(RESAMPLES, documents)

    def add(self, sums: NDArray[np.float64]) -> None:
        """Add the sums `[documents, columns]` of the next documents."""
        size = len(sums)
        if self._documents_left == size:
            draws = self._draws_left
        else:
            draws = self._generator.binomial(self._draws_left, size / self._documents_left)
        self.totals += sums.sum(axis=0)
        self.documents += np.count_nonzero(sums, axis=0)
        step = max(WEIGHTS_AT_ONCE // size, 1)
        for begin in range(0, RESAMPLES, step):
            counts = draws[begin : begin + step]
            row = np.repeat(np.arange(len(counts)), counts)
            drawn = self._generator.integers(size, size=len(row)) + row * size
            weights = np.bincount(drawn, minlength=len(counts) * size).reshape(-1, size)
            self.resampled[begin : begin + step] += weights.astype(np.float64) @ sums
        self._documents_left, self._draws_left = self._documents_left - size, self._draws_left - draws

    def interval(self, estimator: Estimator, columns: slice = ALL, *, bounded: bool = True) -> Metric:
        """Value and percentile interval of a statistic of column sums (Efron and Tibshirani 1993, chapter 13).

        `estimator` maps sums `[..., columns]` to `[...]`; the first column counts what the others sum. There is no
        interval unless `bounded` and at least two documents take part. A number that overflows is None.
        """
        low, high = np.nan, np.nan
        with np.errstate(all="ignore"):
            value = estimator(self.totals[columns])
            if bounded and self.documents[columns][0] > 1:
                low, high = percentiles(estimator(self.resampled[:, columns]))
        return {"value": finite(value), "low": finite(low), "high": finite(high)}


def percentiles(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """The bounds of the middle 95 % of the draws, `[2]`. A draw without a scored token (0 / 0) is left out."""
    tail, draws = (1 - CONFIDENCE) / 2, draws[~np.isnan(draws)]
    # Interpolating between order statistics would turn an overflow to infinity into NaN.
    return np.quantile(draws, [tail, 1 - tail], method="nearest") if len(draws) else np.full(2, np.nan)


def bootstrap(sums: NDArray[np.float64], estimators: Mapping[str, Estimator]) -> Metrics:
    """Statistics of `sums` `[documents, columns]` by name, with intervals from resampling documents."""
    draws = Bootstrap(*sums.shape)
    draws.add(sums)
    return {name: draws.interval(estimator) for name, estimator in estimators.items()}


def finite(number: NDArray[np.float64] | float) -> float | None:
    """The number, or None for infinity and NaN, which JSON does not have."""
    return float(number) if np.isfinite(number) else None
