"""Correlations of a model's scores with human numbers: reading times, judgements, shares of answers.

scores and numbers of the items → Spearman, Pearson, and R² gained over a baseline → intervals over items
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.eval.item_data import NUMBER
from mlmkit.eval.item_metrics import ItemScores
from mlmkit.eval.result import Metrics
from mlmkit.eval.results_store import DOCUMENTS
from mlmkit.eval.statistics import RESAMPLES, finite, percentiles
from mlmkit.toml import Rule, one_of

SCORES = ("log_probability", "surprisal", "probability", "difference")

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """Human numbers in `columns`, to be compared with a score of each item.

    `score`: the right option's `log_probability` or `surprisal` (its negative), in nats and normalised as the set
    says; for pairs also the `difference` first minus second, or `probability`, softmax over the two. With `baseline`,
    other columns, the gain in R² of a linear model is measured too; `previous_score` adds the score of the word before
    to the baseline.
    """

    name: str
    columns: Annotated[tuple[str, ...], Rule(bool, "the columns of human numbers")]
    score: Annotated[str, one_of(*SCORES)] = "log_probability"
    baseline: tuple[str, ...] = ()
    previous_score: bool = False

    @property
    def numbers(self) -> tuple[str, ...]:
        """All columns that it needs."""
        return (*self.columns, *self.baseline)


def number_columns(correlations: Sequence[Correlation]) -> list[str]:
    """The columns of numbers that correlations need, each once."""
    return list(dict.fromkeys(column for each in correlations for column in each.numbers))


def measure_correlations(
    folder: Path, scores: ItemScores, correlations: Sequence[Correlation]
) -> tuple[Metrics, dict[str, Any]]:
    """Metrics with intervals from resampling items, and how many items each is measured on.

    The draws are the same for each metric and each model, so differences of two results are paired.
    """
    metrics: Metrics = {}
    items: dict[str, int] = {}
    for each in correlations:
        for name, (values, count) in draw_statistics(folder, scores, each).items():
            low, high = percentiles(values[1:]) if count > 2 else (np.nan, np.nan)
            metrics[name] = {"value": finite(values[0]), "low": finite(low), "high": finite(high)}
            items[name] = count
    return metrics, items


def draw_statistics(folder: Path, scores: ItemScores, correlation: Correlation) -> dict[str, tuple[Values, int]]:
    """By metric: its values `[1 + draws]`, on all items and on each draw, and the number of items with data."""
    score = _score(scores, correlation.score)
    baseline = [_numbers(folder, column) for column in correlation.baseline]
    if correlation.previous_score:
        baseline.append(_sign(correlation.score) * scores.score[:, 1])
    statistics: dict[str, tuple[Values, int]] = {}
    gains = []
    for column in correlation.columns:
        human = _numbers(folder, column)
        table = np.stack([score, human, *baseline], axis=1)
        table = table[~np.isnan(table).any(axis=1)]
        name = f"{correlation.name}_{column}"
        statistics[f"{name}_spearman"] = _over_draws(_spearman, table), len(table)
        statistics[f"{name}_pearson"] = _over_draws(_pearson, table), len(table)
        if baseline:
            gains.append(_over_draws(_r2_gain, table))
            statistics[f"{name}_r2_gain"] = gains[-1], len(table)
    if gains:
        statistics[correlation.name] = 100 * np.mean(gains, axis=0), len(score)
    return statistics


def _over_draws(statistic: Callable[[Values], float], table: Values) -> Values:
    with np.errstate(all="ignore"):
        return np.array([statistic(table[rows]) for rows in _draws(len(table))])


def _draws(items: int) -> Iterator[Any]:
    """The rows of all items, then those of each draw."""
    yield slice(None)
    generator = np.random.Generator(np.random.Philox(0))
    for _ in range(RESAMPLES if items else 0):
        yield generator.integers(items, size=items)


def _score(scores: ItemScores, kind: str) -> Values:
    first = scores.score[np.arange(len(scores)), scores.right]
    if kind in ("log_probability", "surprisal"):
        return _sign(kind) * first
    difference = first - scores.score[:, 1]
    return difference if kind == "difference" else 1.0 / (1.0 + np.exp(-difference))


def _sign(kind: str) -> float:
    return -1.0 if kind == "surprisal" else 1.0


def _numbers(folder: Path, column: str) -> Values:
    table = pq.read_table(folder / DOCUMENTS, columns=["option", NUMBER + column])
    return table[NUMBER + column].to_numpy()[table["option"].to_numpy() == 0]


def _pearson(table: Values) -> float:
    x, y = (table[:, column] - table[:, column].mean() for column in (0, 1))
    return float((x @ y) / np.sqrt((x @ x) * (y @ y)))


def _spearman(table: Values) -> float:
    """Pearson's correlation of the ranks, the mean of their ranks for equal values."""
    return _pearson(np.stack([_ranks(table[:, 0]), _ranks(table[:, 1])], axis=1))


def _ranks(values: Values) -> Values:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def _r2_gain(table: Values) -> float:
    """(R² − R²_baseline) / (1 − R²_baseline): the share of the variance left by the baseline that the score explains.

    Ordinary least squares. The baseline has its columns and the product of each two of them, the other model the score
    in addition (BabyLM's reading task). The gain is the squared partial correlation: that of what the baseline leaves
    of the score and of the human numbers (Frisch and Waugh 1933).
    """
    predictors = table[:, 2:]
    products = [predictors[:, a] * predictors[:, b] for a, b in combinations(range(predictors.shape[1]), 2)]
    design = np.column_stack([np.ones(len(table)), predictors, *products])
    norms = np.sqrt((design**2).sum(axis=0))
    design /= np.where(norms, norms, 1.0)  # products of large numbers would spoil the fit's precision
    coefficients, *_ = np.linalg.lstsq(design, table[:, :2])
    return _pearson(table[:, :2] - design @ coefficients) ** 2
