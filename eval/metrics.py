"""Metrics from stored token scores; docs/evaluation.md defines them.

    token rows → column sums per document, overall and per slice → totals and bootstrap draws → values, intervals

A metric is a function of column sums over documents. So its value, its interval, its slices and the difference between
two models all come from the same sums.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlmkit.eval.columns import as_numpy
from mlmkit.eval.result import Metrics, SliceGroups, Unknown
from mlmkit.eval.results_store import read_blocks
from mlmkit.eval.statistics import Bootstrap, Estimator, finite, sum_by

Columns = NDArray[np.float64]

CALIBRATION_BINS = 15  # Guo et al. 2017
SIZES = ("scorable", "words", "characters", "bytes")  # columns of documents.parquet
# Figures per unit of text make sense only if the tokenizer can spell the text: predicting an unknown token correctly
# does not spell the word that it stands for.
PER_TEXT = ("pseudo_perplexity_per_word", "pseudo_perplexity_per_character", "bits_per_byte")
UNKNOWN_LIMIT = 0.001  # of the characters; above it there are no figures per unit of text
# Biased upwards under resampling: 1,000 draws of a calibrated model's text lie above its own error (docs/decisions.md).
WITHOUT_INTERVAL = frozenset({"expected_calibration_error"})
# Parts of metrics' names.
HIGHER_IS_BETTER = ("accuracy", "rank", "likelihood", "probability", "gain")
LOWER_IS_BETTER = ("entropy", "perplexity", "error", "bits")

# ---------------------------------------------------------------- slices: groups of scored tokens


@dataclass(frozen=True)
class Slicing:
    """A way to divide the scored tokens. `codes` maps token rows and the mask id to indices into `labels`."""

    name: str
    labels: tuple[str, ...]
    codes: Callable[[pa.Table, int], NDArray[np.int64]]


def _treatment(tokens: pa.Table, mask_id: int) -> NDArray[np.int64]:
    """What the model saw: a random token that happens to be the original counts as kept."""
    shown, original = as_numpy(tokens["input_id"]), as_numpy(tokens["token_id"])
    return np.select([shown == mask_id, shown != original], [0, 1], 2)


def _bands(name: str, column: str, labels: Sequence[str]) -> Slicing:
    """Slices by ranges of a column's values; a label begins with the range's lowest value."""
    edges = [int(label.rstrip("+").partition("-")[0]) for label in labels[1:]]
    return Slicing(name, tuple(labels), lambda tokens, _: np.searchsorted(edges, as_numpy(tokens[column]), "right"))


POSITIONS = ("0-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512+")
FREQUENCIES = ("1", "2-9", "10-99", "100-999", "1000-9999", "10000+")
PIECES = ("whole-word", "first-piece", "later-piece")
TREATMENT = Slicing("treatment", ("masked", "random", "kept"), _treatment)
SLICINGS = (  # pseudo-likelihood masks every token that it scores, so it has no treatments
    _bands("frequency", "frequency", FREQUENCIES),
    Slicing("piece", PIECES, lambda tokens, _: as_numpy(tokens["piece"]).astype(np.int64)),
    _bands("position", "offset", POSITIONS),
    _bands("length", "length", POSITIONS),
)

# ---------------------------------------------------------------- column sums


@dataclass(frozen=True)
class MetricFamily:
    """The metrics of one kind of score, `masked` or `pseudo`.

    `token_columns` maps token rows to values `[scored, width]`, the first of which is 1. `estimators` take sums of them
    over documents followed by the sums of the documents' `SIZES`; `slice_estimators` take the former only.
    """

    token_columns: Callable[[pa.Table], Columns]
    width: int
    estimators: Mapping[str, Estimator]
    slice_estimators: Mapping[str, Estimator]
    slicings: tuple[Slicing, ...]

    @property
    def sizes(self) -> slice:
        """The columns of `document_sums` with the documents' sizes; those before are overall, those after of slices."""
        return slice(self.width, self.width + len(SIZES))

    @property
    def column_count(self) -> int:
        """The number of columns of `document_sums`."""
        return self.sizes.stop + self.width * sum(len(slicing.labels) for slicing in self.slicings)

    def slices(self) -> Iterator[tuple[str, str, slice]]:
        """Each slice: its slicing, its label, and its columns of `document_sums`."""
        labels = [(slicing.name, label) for slicing in self.slicings for label in slicing.labels]
        for begin, (name, label) in zip(range(self.sizes.stop, self.column_count, self.width), labels, strict=True):
            yield name, label, slice(begin, begin + self.width)

    def document_sums(self, tokens: pa.Table, documents: pa.Table, mask_id: int) -> Columns:
        """Column sums of consecutive documents, `[documents, column_count]`: overall, sizes, each slice."""
        values, size = self.token_columns(tokens), len(documents)
        document = as_numpy(tokens["document"]) - documents["document"][0].as_py()

        def sums(group: NDArray[np.int64], labels: int) -> Columns:
            columns = [sum_by(column, group, size * labels).reshape(size, labels) for column in values.T]
            return np.stack(columns, axis=2).reshape(size, labels * self.width)

        groups = [sums(document, 1), np.stack([as_numpy(documents[name]) for name in SIZES], axis=1)]
        for slicing in self.slicings:
            count = len(slicing.labels)
            groups.append(sums(document * count + slicing.codes(tokens, mask_id), count))
        return np.concatenate(groups, axis=1).astype(np.float64)


def _ratio(column: int) -> Estimator:
    return lambda totals: totals[..., column] / totals[..., 0]


def _exp(estimator: Estimator, sign: float = 1.0) -> Estimator:
    def exponential(totals: Columns) -> Columns:
        with np.errstate(over="ignore"):  # infinity becomes null
            return np.exp(sign * estimator(totals))

    return exponential


def _masked_columns(tokens: pa.Table) -> Columns:
    """1, −log P, rank 0, rank below 5, reciprocal rank; by bin of confidence: correctness minus confidence."""
    rank, log_prob = as_numpy(tokens["rank"]), as_numpy(tokens["log_prob"]).astype(np.float64)
    confidence = np.exp(as_numpy(tokens["top_log_prob"]).astype(np.float64))
    values = np.zeros((len(rank), 5 + CALIBRATION_BINS))
    values[:, :5] = np.stack([np.ones(len(rank)), -log_prob, rank == 0, rank < 5, 1.0 / (1 + rank)], axis=1)
    values[np.arange(len(rank)), 5 + calibration_bin(confidence)] = (rank == 0) - confidence
    return values


def calibration_bin(confidence: Columns) -> NDArray[np.int64]:
    """The bin of each confidence: equal bins over (0, 1], each open below and closed above."""
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)


def _calibration_error(totals: Columns) -> Columns:
    return np.abs(totals[..., 5 : 5 + CALIBRATION_BINS]).sum(axis=-1) / totals[..., 0]


def _pseudo_columns(tokens: pa.Table) -> Columns:
    """1, log P and its square."""
    log_prob = as_numpy(tokens["log_prob"]).astype(np.float64)
    return np.stack([np.ones(len(log_prob)), log_prob, log_prob**2], axis=1)


PSEUDO_WIDTH = 3


def _pll(totals: Columns) -> Columns:
    """The mean times the number of scorable tokens, which is the sum itself if every token is scored."""
    return totals[..., 1] / totals[..., 0] * totals[..., PSEUDO_WIDTH]


def _loss_per(size: int) -> Estimator:
    return lambda totals: -_pll(totals) / totals[..., PSEUDO_WIDTH + size]


MASKED_ESTIMATORS: Mapping[str, Estimator] = {
    "masked_cross_entropy": _ratio(1),
    "masked_perplexity": _exp(_ratio(1)),
    "masked_accuracy": _ratio(2),
    "masked_top5_accuracy": _ratio(3),
    "mean_reciprocal_rank": _ratio(4),
    "expected_calibration_error": _calibration_error,
}
PSEUDO_ESTIMATORS: Mapping[str, Estimator] = {
    "pseudo_log_likelihood": _pll,
    "pseudo_perplexity": _exp(_ratio(1), -1.0),
    "pseudo_perplexity_per_word": _exp(_loss_per(1)),
    "pseudo_perplexity_per_character": _exp(_loss_per(2)),
    "bits_per_byte": lambda totals: _loss_per(3)(totals) / math.log(2),
}
PERPLEXITY = {"pseudo_perplexity": PSEUDO_ESTIMATORS["pseudo_perplexity"]}
FAMILIES = {
    "masked": MetricFamily(
        _masked_columns, 5 + CALIBRATION_BINS, MASKED_ESTIMATORS, MASKED_ESTIMATORS, (TREATMENT, *SLICINGS)
    ),
    "pseudo": MetricFamily(_pseudo_columns, PSEUDO_WIDTH, PSEUDO_ESTIMATORS, PERPLEXITY, SLICINGS),
}

# ---------------------------------------------------------------- values and intervals


class Measured(NamedTuple):
    """Metrics with intervals, the slices' values, and the values of each mask seed."""

    metrics: Metrics
    slices: SliceGroups
    by_seed: dict[str, dict[str, float | None]]


def measure(folder: Path, metric: str, seeds: Sequence[int | None], documents: int, mask_id: int) -> Measured:
    """Measure one kind of score, `masked` or `pseudo`, over the union of its mask seeds.

    `seeds` is `[None]` for pseudo-likelihood; `documents` is the number of documents in the corpus.
    """
    family = FAMILIES[metric]
    draws, totals = Bootstrap(documents, family.sizes.stop), np.zeros(family.column_count)
    documents_with = np.zeros(family.column_count, dtype=np.int64)
    by_seed = np.zeros((len(seeds), family.column_count))
    for stretch in zip(*(read_blocks(folder, metric, seed) for seed in seeds), strict=True):
        sums = [family.document_sums(*tables, mask_id) for tables in stretch]
        by_seed += [part.sum(axis=0) for part in sums]
        pooled = np.sum(sums, axis=0)
        pooled[:, family.sizes] /= len(seeds)  # the documents count once, however often they were masked
        draws.add(pooled[:, : family.sizes.stop])
        totals += pooled.sum(axis=0)
        documents_with += np.count_nonzero(pooled, axis=0)
    metrics = {
        name: draws.interval(estimator, bounded=name not in WITHOUT_INTERVAL)
        for name, estimator in family.estimators.items()
    }
    if metric == "pseudo":
        for name, error in _sampling_errors(draws.totals).items():
            metrics[name]["standard_error"] = error
    slices: SliceGroups = {}
    with np.errstate(all="ignore"):
        for slicing, label, columns in family.slices():
            if tokens := int(totals[columns][0]):
                values = {name: estimator(totals[columns]) for name, estimator in family.slice_estimators.items()}
                slices.setdefault(slicing, {})[label] = {
                    "tokens": tokens,
                    "documents": int(documents_with[columns][0]),
                    **{name: {"value": finite(value)} for name, value in values.items()},
                }
        seed_values = {
            str(seed): {name: finite(estimator(sums)) for name, estimator in family.estimators.items()}
            for seed, sums in zip(seeds, by_seed, strict=True)
        }
    return Measured(metrics, slices, seed_values)


def seed_spread(by_seed: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean, sample standard deviation and range of each metric over the mask seeds."""
    spread = {}
    for name in next(iter(by_seed.values())):
        values = np.array([values[name] for values in by_seed.values()], dtype=np.float64)
        numbers = {"mean": values.mean(), "standard_deviation": values.std(ddof=1)}
        numbers |= {"lowest": values.min(), "highest": values.max()}
        spread[name] = {statistic: finite(number) for statistic, number in numbers.items()}
    return spread


def _sampling_errors(totals: Columns) -> dict[str, float]:
    """Standard errors of pseudo-likelihood metrics from scoring n of N tokens, all equally likely to be drawn.

    SE(PLL) = N sqrt(1 - n / N) s / sqrt(n) with s the sample's standard deviation (Cochran 1977, section 2.6). The
    others follow from it to first order. Empty if every token was scored, because then there is no such error.
    """
    n, total, squares, scorable, words, characters, size = totals[: PSEUDO_WIDTH + len(SIZES)].tolist()
    if n < 2 or n == scorable:
        return {}
    variance = max(squares - total**2 / n, 0.0) / (n - 1)
    error = scorable * math.sqrt((1 - n / scorable) * variance / n)
    units = (1, scorable, words, characters, size * math.log(2))
    errors = {
        name: error / unit * (float(estimator(totals)) if "perplexity" in name else 1.0)
        for (name, estimator), unit in zip(PSEUDO_ESTIMATORS.items(), units, strict=True)
        if unit
    }
    return {name: value for name, value in errors.items() if math.isfinite(value)}


def better(name: str) -> str:
    """Which values of a metric are better: `higher`, `lower`, or `neither`, as of a correlation or a preference."""
    if any(part in name for part in HIGHER_IS_BETTER):
        return "higher"
    return "lower" if any(part in name for part in LOWER_IS_BETTER) else "neither"


def describe_unknown(unknown: Unknown | Mapping[str, Any]) -> str:
    """A result's `unknown` in words; empty if no character is unknown."""
    if not unknown["characters"]:
        return ""
    counts = (f"{unknown[f'{unit}s']:,} {unit}s ({unknown[f'{unit}_share']:.2%})" for unit in ("token", "character"))
    verdict = f": too many (above {UNKNOWN_LIMIT:.1%}) for figures per unit of text, and to compare tokenizers"
    is_lossy = unknown["character_share"] > UNKNOWN_LIMIT
    return f"{' and '.join(counts)} are unknown to the tokenizer{verdict if is_lossy else ''}"
