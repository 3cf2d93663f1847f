"""From scores to metrics, with the definitions of `docs/evaluation.md`.

A metric is a function of column sums over documents, so that its value, its interval, its slices and the difference
between two models are all worked out from the same sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlmkit.eval.statistics import Estimator

Columns = NDArray[np.float64]

CALIBRATION_BINS = 15  # Guo et al. 2017
SIZES = ("scorable", "words", "characters", "bytes")  # columns of documents.parquet
# Figures per unit of text. They mean something only where the tokenizer can spell the text: an unknown token that is
# predicted right is still no spelling of it.
PER_TEXT = ("pseudo_perplexity_per_word", "pseudo_perplexity_per_character", "bits_per_byte")
UNKNOWN_LIMIT = 0.001  # of the characters; above it there are no figures per unit of text

# Biased upwards under resampling: 1,000 draws of a calibrated model's text lie above its own error (docs/decisions.md).
WITHOUT_INTERVAL = frozenset({"expected_calibration_error"})
HIGHER_IS_BETTER = ("accuracy", "rank", "likelihood")  # in a metric's name; of the others, lower


@dataclass(frozen=True)
class Family:
    """The metrics of one kind of score.

    `columns` maps token rows to values `[scored, width]`. `estimators` take sums of them over documents, followed by
    the sums of the documents' `SIZES`; those of slices take no sizes.
    """

    columns: Callable[[pa.Table], Columns]
    width: int
    estimators: dict[str, Estimator]
    slice_estimators: dict[str, Estimator]


def _ratio(column: int) -> Estimator:
    return lambda totals: totals[..., column] / totals[..., 0]


def _exp(estimator: Estimator, sign: float = 1.0) -> Estimator:
    def exponential(totals: Columns) -> Columns:
        with np.errstate(over="ignore"):  # infinity becomes null
            return np.exp(sign * estimator(totals))

    return exponential


def _masked_columns(tokens: pa.Table) -> Columns:
    """1, -log P, rank 0, rank below 5, reciprocal rank, and correctness less confidence in its confidence's bin."""
    rank, log_prob = tokens["rank"].to_numpy(), tokens["log_prob"].to_numpy().astype(np.float64)
    confidence = np.exp(tokens["top_log_prob"].to_numpy().astype(np.float64))
    values = np.zeros((len(rank), 5 + CALIBRATION_BINS))
    values[:, :5] = np.stack([np.ones(len(rank)), -log_prob, rank == 0, rank < 5, 1.0 / (1 + rank)], axis=1)
    values[np.arange(len(rank)), 5 + calibration_bin(confidence)] = (rank == 0) - confidence
    return values


def calibration_bin(confidence: Columns) -> NDArray[np.int64]:
    """Equal bins over (0, 1], each open below and closed above."""
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)


def _calibration_error(totals: Columns) -> Columns:
    return np.abs(totals[..., 5 : 5 + CALIBRATION_BINS]).sum(axis=-1) / totals[..., 0]


def _pseudo_columns(tokens: pa.Table) -> Columns:
    """1, log P and its square."""
    log_prob = tokens["log_prob"].to_numpy().astype(np.float64)
    return np.stack([np.ones(len(log_prob)), log_prob, log_prob**2], axis=1)


PSEUDO_WIDTH = 3


def _pll(totals: Columns) -> Columns:
    """The documents' scorable tokens times the mean: the sum itself where every token is scored."""
    return totals[..., 1] / totals[..., 0] * totals[..., PSEUDO_WIDTH]


def _pll_per(size: int) -> Estimator:
    return lambda totals: -_pll(totals) / totals[..., PSEUDO_WIDTH + size]


MASKED = Family(
    _masked_columns,
    5 + CALIBRATION_BINS,
    masked := {
        "masked_cross_entropy": _ratio(1),
        "masked_perplexity": _exp(_ratio(1)),
        "masked_accuracy": _ratio(2),
        "masked_top5_accuracy": _ratio(3),
        "mean_reciprocal_rank": _ratio(4),
        "expected_calibration_error": _calibration_error,
    },
    masked,
)
PSEUDO = Family(
    _pseudo_columns,
    PSEUDO_WIDTH,
    {
        "pseudo_log_likelihood": _pll,
        "pseudo_perplexity": _exp(_ratio(1), -1.0),
        "pseudo_perplexity_per_word": _exp(_pll_per(1)),
        "pseudo_perplexity_per_character": _exp(_pll_per(2)),
        "bits_per_byte": lambda totals: _pll_per(3)(totals) / math.log(2),
    },
    {"pseudo_perplexity": _exp(_ratio(1), -1.0)},
)
FAMILIES = {"masked": MASKED, "pseudo": PSEUDO}


def describe_unknown(unknown: dict[str, Any]) -> str:
    """The unknown tokens (`unknown` of a result) in words; empty where there are none."""
    if not unknown["characters"]:
        return ""
    counts = (f"{unknown[f'{unit}s']:,} {unit}s ({unknown[f'{unit}_share']:.2%})" for unit in ("token", "character"))
    verdict = f": too many (above {UNKNOWN_LIMIT:.1%}) for figures per unit of text, and to compare tokenizers"
    is_lossy = unknown["character_share"] > UNKNOWN_LIMIT
    return f"{' and '.join(counts)} are unknown to the tokenizer{verdict if is_lossy else ''}"


def sampling_errors(totals: Columns) -> dict[str, float]:
    """Standard errors of pseudo-likelihood metrics that come from scoring n of N tokens, drawn alike.

    SE(PLL) = N sqrt(1 - n / N) s / sqrt(n), s the sample's standard deviation (Cochran 1977, section 2.6); the others
    follow from it to first order.
    """
    n, total, squares, scorable, words, characters, size = totals[: PSEUDO_WIDTH + 4].tolist()
    if n < 2:
        return {}
    variance = max(squares - total**2 / n, 0.0) / (n - 1)
    error = scorable * math.sqrt(max(1 - n / scorable, 0.0) * variance / n)
    units = (1, scorable, words, characters, size * math.log(2))
    errors = {
        name: error / unit * (float(estimator(totals)) if "perplexity" in name else 1.0)
        for (name, estimator), unit in zip(PSEUDO.estimators.items(), units, strict=True)
        if unit
    }
    return {name: value for name, value in errors.items() if math.isfinite(value)}
