"""Accuracies of minimal pairs, overall and by group, from the scores of their sentences."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.eval.statistics import Metrics, bootstrap, sum_by
from mlmkit.eval.stored import DOCUMENTS, read_blocks

COUNT, UNSCORED, CORRECT, TIE, CORRECT_PER_TOKEN, TIE_PER_TOKEN = range(6)
ESTIMATORS = {
    "pair_accuracy": lambda totals: totals[..., CORRECT] / totals[..., COUNT],
    "pair_accuracy_per_token": lambda totals: totals[..., CORRECT_PER_TOKEN] / totals[..., COUNT],
}
GROUPS = {"phenomenon": "phenomena", "paradigm": "paradigms"}


def measure_pairs(folder: Path) -> tuple[Metrics, dict[str, Any]]:
    """Metrics, and the `pairs` part of the result: counts, ties, and the accuracies of each group.

    Only a strictly greater PLL is right. Sentences that the tokenizer reads alike tie, whatever the last bits say. A
    sentence without a scored token has no PLL, so its pair is neither right nor a tie.
    """
    scores = _sentence_scores(folder)
    columns = _columns(scores)
    metrics = bootstrap(columns, ESTIMATORS)
    described: dict[str, Any] = _counts(columns)
    for plural, names in pair_groups(folder).items():
        groups = {name: columns[names == name] for name in dict.fromkeys(names.tolist()) if name}
        if groups:
            described[plural] = {
                name: {**_counts(rows), **bootstrap(rows, ESTIMATORS)} for name, rows in sorted(groups.items())
            }
        if groups and plural == "paradigms":
            metrics |= _macro(columns, names, list(groups))
    return metrics | _perplexities(scores), described


def pair_columns(folder: Path) -> NDArray[np.float64]:
    """For each pair 1, unscored, right, tied, and the latter two for mean log-probabilities a token, `[pairs, 6]`."""
    return _columns(_sentence_scores(folder))


def pair_groups(folder: Path) -> dict[str, NDArray[np.str_]]:
    """The name of each pair's phenomenon and paradigm, `[pairs]`, "" for none."""
    labels = pq.read_table(folder / DOCUMENTS, columns=list(GROUPS))
    return {plural: np.array(labels[column].to_pylist()[::2]) for column, plural in GROUPS.items()}


def _sentence_scores(folder: Path) -> NDArray[np.float64]:
    """Of each sentence its scored tokens, PLL, and whether its pair's two are read alike, `[2 * pairs, 3]`."""
    scores = []
    for tokens, documents in read_blocks(folder, "pseudo", None):
        document = tokens["document"].to_numpy() - documents["document"][0].as_py()
        log_prob, same = tokens["log_prob"].to_numpy(), documents["same_ids"].to_numpy()
        sums = [sum_by(values, document, len(documents)) for values in (np.ones(len(log_prob)), log_prob)]
        scores.append(np.stack([*sums, same], axis=1))
    return np.concatenate(scores)


def _columns(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    count, total = scores[:, 0], scores[:, 1]
    is_same = scores[::2, 2] == 1
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    is_scored = (count[::2] > 0) & (count[1::2] > 0)
    columns = [np.ones(len(is_same)), ~is_scored]
    for score in (total, mean):
        good, bad = score[::2], score[1::2]
        columns += [is_scored & (good > bad) & ~is_same, is_scored & ((good == bad) | is_same)]
    return np.stack(columns, axis=1).astype(np.float64)


def _counts(columns: NDArray[np.float64]) -> dict[str, int]:
    sums = columns.sum(axis=0).astype(int).tolist()
    names = {"pairs": COUNT, "ties": TIE, "ties_per_token": TIE_PER_TOKEN, "unscored": UNSCORED}
    return {name: sums[column] for name, column in names.items()}


def _macro(columns: NDArray[np.float64], names: NDArray[np.str_], groups: list[str]) -> Metrics:
    """The mean of the paradigms' accuracies, each counting alike."""
    membership = names[:, None] == np.array(groups)
    sums = np.concatenate([columns[:, [COUNT]], membership, membership * columns[:, [CORRECT]]], axis=1)
    end = len(groups) + 1
    estimators = {"pair_accuracy_macro": lambda totals: np.nanmean(totals[..., end:] / totals[..., 1:end], axis=-1)}
    return bootstrap(sums.astype(np.float64), estimators)


def _perplexities(scores: NDArray[np.float64]) -> Metrics:
    """Pseudo-perplexity of the better and of the worse sentences."""
    found: Metrics = {}
    for name, sentences in (("good", scores[::2]), ("bad", scores[1::2])):
        estimators = {f"pseudo_perplexity_{name}": lambda totals: np.exp(-totals[..., 1] / totals[..., 0])}
        found |= bootstrap(sentences, estimators)
    return found
