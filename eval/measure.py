"""Metrics, slices and the spread between mask seeds, from `tokens.parquet` and `documents.parquet` alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlmkit.eval.metrics import FAMILIES, SIZES, WITHOUT_INTERVAL, sampling_errors
from mlmkit.eval.slices import SPLITS
from mlmkit.eval.statistics import ALL, Bootstrap, Estimator, Metrics, finite, sum_by
from mlmkit.eval.stored import read_blocks

Columns = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """`metrics` `{name: {value, low, high}}`, `slices` `{split: {label: {tokens, documents, name: {...}}}}`.

    `by_seed` has the values of each mask seed.
    """

    metrics: Metrics
    slices: dict[str, dict[str, dict[str, Any]]]
    by_seed: dict[str, dict[str, float | None]]


def measure(folder: Path, metric: str, seeds: Sequence[int | None], documents: int, mask_id: int) -> Measured:
    """Measure one kind of score, over the union of its mask seeds.

    `seeds` holds None alone for pseudo-likelihood; `documents` counts those of the corpus.
    """
    family = FAMILIES[metric]
    draws = Bootstrap(documents, column_count(metric))
    by_seed = np.zeros((len(seeds), column_count(metric)))
    readers = [read_blocks(folder, metric, seed) for seed in seeds]
    for stretch in zip(*readers, strict=True):
        sums = [document_sums(metric, tokens, sizes, mask_id) for tokens, sizes in stretch]
        by_seed += [part.sum(axis=0) for part in sums]
        pooled = np.sum(sums, axis=0)
        pooled[:, sized(metric)] /= len(seeds)  # the documents count once, however often they were masked
        draws.add(pooled)

    def intervals(estimators: dict[str, Estimator], columns: slice = ALL) -> Metrics:
        return {
            name: draws.interval(estimator, columns, bounded=name not in WITHOUT_INTERVAL)
            for name, estimator in estimators.items()
        }

    metrics = intervals(family.estimators)
    if metric == "pseudo":
        for name, error in sampling_errors(draws.totals).items():
            metrics[name]["standard_error"] = error
    slices: dict[str, dict[str, dict[str, Any]]] = {}
    for split, label, columns in each_slice(metric):
        if tokens := int(draws.totals[columns][0]):
            counts = {"tokens": tokens, "documents": int(draws.documents[columns][0])}
            slices.setdefault(split, {})[label] = {**counts, **intervals(family.slice_estimators, columns)}
    with np.errstate(all="ignore"):
        values = {
            str(seed): {name: finite(estimator(totals)) for name, estimator in family.estimators.items()}
            for seed, totals in zip(seeds, by_seed, strict=True)
        }
    return Measured(metrics, slices, values)


def spread(by_seed: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Mean, sample standard deviation and range of each metric between mask seeds."""
    found = {}
    for name in next(iter(by_seed.values())):
        values = np.array([values[name] for values in by_seed.values()], dtype=np.float64)
        found[name] = {
            "mean": finite(values.mean()),
            "standard_deviation": finite(values.std(ddof=1)),
            "lowest": finite(values.min()),
            "highest": finite(values.max()),
        }
    return found


# ---------------------------------------------------------------- columns: overall, document sizes, then each slice


def document_sums(metric: str, tokens: pa.Table, documents: pa.Table, mask_id: int) -> Columns:
    """Sums over a stretch of documents, `[documents, column_count]`: overall, sizes, then one group a slice."""
    family, size = FAMILIES[metric], len(documents)
    values = family.columns(tokens)
    document = tokens["document"].to_numpy() - documents["document"][0].as_py()
    overall = np.stack([sum_by(column, document, size) for column in values.T], axis=1)
    sizes = np.stack([documents[name].to_numpy() for name in SIZES], axis=1)
    groups = [overall, sizes]
    for split in _splits(metric):
        labels = len(split.labels)
        group = document * labels + split.codes(tokens, mask_id)
        sums = [sum_by(column, group, size * labels).reshape(size, labels) for column in values.T]
        groups.append(np.stack(sums, axis=2).reshape(size, labels * family.width))
    return np.concatenate(groups, axis=1).astype(np.float64)


def column_count(metric: str) -> int:
    """Width of `document_sums`."""
    return sized(metric).stop + FAMILIES[metric].width * sum(len(split.labels) for split in _splits(metric))


def sized(metric: str) -> slice:
    """The columns of `document_sums` that hold the documents' sizes."""
    return slice(FAMILIES[metric].width, FAMILIES[metric].width + len(SIZES))


def each_slice(metric: str) -> Iterator[tuple[str, str, slice]]:
    """Split, label, and the slice's columns of `document_sums`."""
    width, begin = FAMILIES[metric].width, sized(metric).stop
    for split in _splits(metric):
        for label in split.labels:
            yield split.name, label, slice(begin, begin + width)
            begin += width


def _splits(metric: str):
    """Pseudo-likelihood masks every token that it scores, so there is no treatment to split by."""
    return [split for split in SPLITS if metric == "masked" or split.name != "treatment"]
