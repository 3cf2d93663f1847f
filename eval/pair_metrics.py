"""Accuracies of minimal pairs, overall and by group, from the scores of their sentences."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.eval.statistics import Metrics, bootstrap, sum_by
from mlmkit.eval.stored import DOCUMENTS, read_blocks

COUNT, CORRECT, TIE, CORRECT_PER_TOKEN, TIE_PER_TOKEN = range(5)
ESTIMATORS = {
    "pair_accuracy": lambda totals: totals[..., CORRECT] / totals[..., COUNT],
    "pair_accuracy_per_token": lambda totals: totals[..., CORRECT_PER_TOKEN] / totals[..., COUNT],
}
GROUPS = {"phenomenon": "phenomena", "paradigm": "paradigms"}


def measure_pairs(folder: Path) -> tuple[Metrics, dict[str, Any]]:
    """Metrics, and the `pairs` part of the result: counts, ties, and the accuracies of each group.

    Only a strictly greater PLL is right. Sentences that the tokenizer reads alike tie, whatever the last bits say.
    """
    columns, labels = pair_columns(folder), pq.read_table(folder / DOCUMENTS, columns=list(GROUPS))
    metrics = bootstrap(columns, ESTIMATORS)
    described: dict[str, Any] = _counts(columns)
    for column, plural in GROUPS.items():
        names = np.array(labels[column].to_pylist()[::2])
        groups = {name: columns[names == name] for name in dict.fromkeys(names.tolist()) if name}
        if groups:
            described[plural] = {
                name: {**_counts(rows), **bootstrap(rows, ESTIMATORS)} for name, rows in sorted(groups.items())
            }
        if groups and column == "paradigm":
            metrics |= _macro(columns, names, list(groups))
    return metrics | _perplexities(folder), described


def pair_columns(folder: Path) -> NDArray[np.float64]:
    """For each pair 1, right, tied, and the latter two for mean log-probabilities a token, `[pairs, 5]`."""
    sums, counts, same = [], [], []
    for tokens, documents in read_blocks(folder, "pseudo", None):
        document = tokens["document"].to_numpy() - documents["document"][0].as_py()
        sums.append(sum_by(tokens["log_prob"].to_numpy(), document, len(documents)))
        counts.append(np.bincount(document, minlength=len(documents)))
        same.append(documents["same_ids"].to_numpy())
    total, count = np.concatenate(sums), np.concatenate(counts)
    is_same = np.concatenate(same)[::2]
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    columns = [np.ones(len(is_same))]
    for score in (total, mean):
        good, bad = score[::2], score[1::2]
        columns += [(good > bad) & ~is_same, (good == bad) | is_same]
    return np.stack(columns, axis=1).astype(np.float64)


def _counts(columns: NDArray[np.float64]) -> dict[str, int]:
    sums = columns.sum(axis=0).astype(int).tolist()
    return {"pairs": sums[COUNT], "ties": sums[TIE], "ties_per_token": sums[TIE_PER_TOKEN]}


def _macro(columns: NDArray[np.float64], names: NDArray[np.str_], groups: list[str]) -> Metrics:
    """The mean of the paradigms' accuracies, each counting alike."""
    membership = names[:, None] == np.array(groups)
    sums = np.concatenate([membership, membership * columns[:, [CORRECT]]], axis=1).astype(np.float64)

    def mean(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.nanmean(totals[..., len(groups) :] / totals[..., : len(groups)], axis=-1)

    return bootstrap(sums, {"pair_accuracy_macro": mean})


def _perplexities(folder: Path) -> Metrics:
    """Pseudo-perplexity of the better and of the worse sentences."""
    found: Metrics = {}
    for name, is_good in (("good", True), ("bad", False)):
        rows = []
        for tokens, documents in read_blocks(folder, "pseudo", None):
            document = tokens["document"].to_numpy() - documents["document"][0].as_py()
            wanted = documents["is_good"].to_numpy() == is_good
            log_prob = tokens["log_prob"].to_numpy()
            sums = [sum_by(values, document, len(documents)) for values in (np.ones(len(log_prob)), log_prob)]
            rows.append(np.stack(sums, axis=1)[wanted])
        found |= bootstrap(
            np.concatenate(rows),
            {f"pseudo_perplexity_{name}": lambda totals: np.exp(-totals[..., 1] / totals[..., 0])},
        )
    return found
