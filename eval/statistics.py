"""Bootstrap intervals over documents, in memory that does not grow with their number."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK = 1 << 22
ALL = slice(None)

Estimator = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Interval = dict[str, float | None]
Metrics = dict[str, Interval]


def sum_by(values: NDArray, group: NDArray[np.int64], groups: int) -> NDArray[np.float64]:
    """Float64 sums of values by group, `[groups]`; tokens in document order fix the order of adding."""
    return np.bincount(group, weights=values.astype(np.float64), minlength=groups).astype(np.float64)


class Bootstrap:
    """Column sums of documents, and of `RESAMPLES` draws of as many documents with replacement.

    Fed a stretch of documents at a time: each draw's share in a stretch is binomial given what is left, and uniform
    within it, which together is the multinomial draw over all. The generator is fixed, so the same stretches give the
    same draws; statistics of one object are paired. `documents` counts those with a value in a column, `[columns]`.
    """

    def __init__(self, documents: int, columns: int) -> None:
        self.totals = np.zeros(columns)
        self.resampled = np.zeros((RESAMPLES, columns))
        self.documents = np.zeros(columns, dtype=np.int64)
        self._generator = np.random.Generator(np.random.Philox(0))
        self._documents_left = documents
        self._draws_left = np.full(RESAMPLES, documents)

    def add(self, sums: NDArray[np.float64]) -> None:
        """`sums` `[documents, columns]` of the next documents."""
        size = len(sums)
        if self._documents_left == size:
            draws = self._draws_left
        else:
            draws = self._generator.binomial(self._draws_left, size / self._documents_left)
        self.totals += sums.sum(axis=0)
        self.documents += np.count_nonzero(sums, axis=0)
        for begin in range(0, len(draws), max(CHUNK // size, 1)):
            part = slice(begin, begin + max(CHUNK // size, 1))
            row = np.repeat(np.arange(len(draws[part])), draws[part])
            drawn = self._generator.integers(size, size=len(row)) + row * size
            weights = np.bincount(drawn, minlength=len(draws[part]) * size).reshape(-1, size)
            self.resampled[part] += weights.astype(np.float64) @ sums
        self._documents_left, self._draws_left = self._documents_left - size, self._draws_left - draws

    def interval(self, estimator: Estimator, columns: slice = ALL, *, bounded: bool = True) -> Interval:
        """Value and percentile interval of a statistic of column sums (Efron and Tibshirani 1993, chapter 13).

        `estimator` maps sums of `columns`, `[..., columns]`, to `[...]`; the first column counts what the others sum.
        No interval if fewer than two documents have a part in it, or if not `bounded`. None where a number overflows
        float64 or does not exist.
        """
        low, high = np.nan, np.nan
        with np.errstate(all="ignore"):
            value = estimator(self.totals[columns])
            if bounded and self.documents[columns][0] > 1:
                low, high = percentiles(estimator(self.resampled[:, columns]))
        return {key: finite(number) for key, number in (("value", value), ("low", low), ("high", high))}


def percentiles(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """The bounds of the draws' middle 95 %, `[2]`. A draw without a scored token (0 / 0) is left out."""
    tail, draws = (1 - CONFIDENCE) / 2, draws[~np.isnan(draws)]
    # Order statistics instead of interpolation keep an overflow to infinity from becoming NaN.
    return np.quantile(draws, [tail, 1 - tail], method="nearest") if len(draws) else np.full(2, np.nan)


def bootstrap(sums: NDArray[np.float64], estimators: dict[str, Estimator]) -> Metrics:
    """`{name: {value, low, high}}` of statistics of `sums` `[documents, columns]`, resampling documents."""
    draws = Bootstrap(len(sums), sums.shape[1])
    draws.add(sums)
    return {name: draws.interval(estimator) for name, estimator in estimators.items()}


def finite(number: NDArray[np.float64] | float) -> float | None:
    """JSON has no infinity."""
    return float(number) if np.isfinite(number) else None
