"""Metrics of items: how often a model prefers the right option, and how probable a cloze target is.

tokens.parquet + documents.parquet → `item_scores` → `ItemScores` → column sums → values and intervals over items
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.eval.result import Metrics
from mlmkit.eval.results_store import DOCUMENTS, read_blocks
from mlmkit.eval.statistics import Estimator, bootstrap, sum_by

GROUPS = {"phenomenon": "phenomena", "paradigm": "paradigms"}
COUNT, UNSCORED, RIGHT, TIE, RIGHT_PER_TOKEN, TIE_PER_TOKEN = range(6)  # columns of `accuracy_columns`


def _ratio(column: int) -> Estimator:
    return lambda totals: totals[..., column] / totals[..., COUNT]


def _scored_ratio(column: int) -> Estimator:
    return lambda totals: totals[..., column] / (totals[..., COUNT] - totals[..., UNSCORED])


@dataclass(frozen=True)
class ItemScores:
    """The scores of items, NaN where an option does not exist or has no scored token; `[items, options]` each.

    `tokens` counts the scored ones, `log_probability` is their sum, `score` the same after normalisation, `per_token`
    its mean, `is_exact` says whether each is the most probable token, and `is_same` whether the option, not itself the
    right one, has its token ids. By item, `[items]`: `right` is the index of the right option, `sizes` counts them.
    """

    tokens: NDArray[np.float64]
    log_probability: NDArray[np.float64]
    score: NDArray[np.float64]
    per_token: NDArray[np.float64]
    is_exact: NDArray[np.bool_]
    is_same: NDArray[np.bool_]
    right: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.right)


def item_scores(folder: Path, normalisation: str) -> ItemScores:
    """The scores of the items of a finished evaluation."""
    columns, tables = [], []
    for tokens, documents in read_blocks(folder, "pseudo", None):
        document = tokens["document"].to_numpy() - documents["document"][0].as_py()
        values = (tokens["log_prob"].to_numpy(), tokens["rank"].to_numpy() == 0)
        columns.append([sum_by(each, document, len(documents)) for each in (np.ones(len(document)), *values)])
        tables.append(documents.select(["item", "option", "is_right", "same_ids", "scored_characters"]))
    count, total, exact = np.concatenate(columns, axis=1)
    item, option, is_right, same_ids, characters = (
        np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names
    )
    total = np.where(count > 0, total, np.nan)
    per_token = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    normalised = {"none": total, "tokens": per_token, "characters": total / np.maximum(characters, 1)}
    shape = (int(item[-1]) + 1, int(option.max()) + 1)

    def matrix(values: NDArray, missing: float = np.nan) -> NDArray:
        filled = np.full(shape, missing, dtype=values.dtype)
        filled[item, option] = values
        return filled

    return ItemScores(
        tokens=matrix(count, 0.0),
        log_probability=matrix(total),
        score=matrix(normalised[normalisation]),
        per_token=matrix(per_token),
        is_exact=matrix((exact == count) & (count > 0), False),
        is_same=matrix(same_ids, False),
        right=option[is_right],
        sizes=np.bincount(item),
    )


def item_groups(folder: Path) -> dict[str, NDArray[np.str_]]:
    """The names of each item's phenomenon and paradigm, `[items]` each; "" for none."""
    labels = pq.read_table(folder / DOCUMENTS, columns=["option", *GROUPS])
    labels = labels.filter(np.equal(labels["option"].to_numpy(), 0))
    return {plural: np.array(labels[column].to_pylist()) for column, plural in GROUPS.items()}


# ---------------------------------------------------------------- columns and their estimators, by task


def accuracy_columns(scores: ItemScores) -> NDArray[np.float64]:
    """For each item `[items, 6]`: 1, unscored, right, tied, and the latter two by mean log-probability per token.

    An item is right only if the right option has the strictly greatest score. Options with the same ids always tie,
    even if their scores differ in the last bits. An item with an option without a scored token is neither right nor
    tied.
    """
    rows, options = np.arange(len(scores)), np.arange(scores.score.shape[1])
    exists = options < scores.sizes[:, None]
    is_scored = (~np.isnan(scores.score) | ~exists).all(axis=1)
    columns = [np.ones(len(scores)), ~is_scored]
    for values in (scores.score, scores.per_token):
        best = values[rows, scores.right]
        values = np.where(scores.is_same, best[:, None], values)
        others = np.where(exists & (options != scores.right[:, None]), values, -np.inf).max(axis=1)
        columns += [is_scored & (best > others), is_scored & (best == others)]
    return np.stack(columns, axis=1).astype(np.float64)


def cloze_columns(scores: ItemScores) -> NDArray[np.float64]:
    """For each cloze item `[items, 5]`: 1, unscored, log-probability, probability, all tokens most probable."""
    value = scores.score[:, 0]
    is_scored = ~np.isnan(value)
    value = np.where(is_scored, value, 0.0)
    probability = np.exp(np.where(is_scored, scores.log_probability[:, 0], -np.inf))
    columns = [np.ones(len(scores)), ~is_scored, value, probability, scores.is_exact[:, 0]]
    return np.stack(columns, axis=1).astype(np.float64)


CLOZE_ESTIMATORS: dict[str, Estimator] = {
    "cloze_log_probability": _scored_ratio(2),
    "cloze_probability": _scored_ratio(3),
    "cloze_accuracy": _scored_ratio(4),
}


@dataclass(frozen=True)
class Family:
    """How the items of a task are measured: columns `[items, width]` and their estimators; the first is the main one.

    `macro` names the mean over paradigms of the main metric.
    """

    columns: NDArray[np.float64]
    estimators: Mapping[str, Estimator]
    macro: str


def measure_family(scores: ItemScores, source: Mapping[str, Any]) -> Family:
    """The columns and estimators of a set; `source` is that of its result."""
    task, sides = source["task"], source["sides"]
    if task == "cloze":
        return Family(cloze_columns(scores), CLOZE_ESTIMATORS, "")
    names = {"choices": "choice_accuracy", "pairs": "first_preferred" if "first" in sides else "pair_accuracy"}
    estimators = {names[task]: _ratio(RIGHT)}
    if task == "pairs":
        estimators[f"{names[task]}_per_token"] = _ratio(RIGHT_PER_TOKEN)
    return Family(accuracy_columns(scores), estimators, f"{names[task]}_macro")


# ---------------------------------------------------------------- values and intervals


def measure_items(folder: Path, scores: ItemScores, source: Mapping[str, Any]) -> tuple[Metrics, dict[str, Any]]:
    """Metrics, and `items` of the result: counts, ties, chance level, and the metrics of each group, with intervals."""
    family = measure_family(scores, source)
    metrics: Metrics = {}
    for columns, estimators in overall_statistics(folder, family):
        metrics |= bootstrap(columns, estimators)
    described: dict[str, Any] = {"task": source["task"], "metrics": list(family.estimators), **_counts(family)}
    if source["task"] != "cloze":
        described["chance"] = float((1.0 / scores.sizes).mean())
    for plural, names in item_groups(folder).items():
        groups = {name: family.columns[names == name] for name in dict.fromkeys(names.tolist()) if name}
        if groups:
            described[plural] = {
                name: {**_counts(family, rows), **bootstrap(rows, family.estimators)}
                for name, rows in sorted(groups.items())
            }
    for index, side in enumerate(source["sides"]):
        sums = np.stack([scores.tokens[:, index], np.nan_to_num(scores.log_probability[:, index])], axis=1)
        perplexity = {f"pseudo_perplexity_{side}": lambda totals: np.exp(-totals[..., 1] / totals[..., 0])}
        metrics |= bootstrap(sums, perplexity)
    return metrics, described


def _counts(family: Family, rows: NDArray[np.float64] | None = None) -> dict[str, int]:
    sums = (family.columns if rows is None else rows).sum(axis=0).astype(int).tolist()
    names = {"items": COUNT, "unscored": UNSCORED}
    if family.macro:
        names |= {"ties": TIE}
    if len(family.estimators) == 2:
        names |= {"ties_per_token": TIE_PER_TOKEN}
    return {name: sums[column] for name, column in names.items()}


def overall_statistics(folder: Path, family: Family) -> list[tuple[NDArray[np.float64], Mapping[str, Estimator]]]:
    """Columns `[items, ...]` with the metrics of all items that are estimated from them.

    They are the family's, and the mean of the paradigms' accuracies, all weighted equally.
    """
    paradigms = item_groups(folder)["paradigms"]
    groups = [name for name in dict.fromkeys(paradigms.tolist()) if name]
    if not (groups and family.macro):
        return [(family.columns, family.estimators)]
    membership = (paradigms[:, None] == np.array(groups)).astype(np.float64)
    sums = np.concatenate([family.columns[:, [COUNT]], membership, membership * family.columns[:, [RIGHT]]], axis=1)
    end = len(groups) + 1
    macro: Estimator = lambda totals: np.nanmean(totals[..., end:] / totals[..., 1:end], axis=-1)  # noqa: E731
    return [(family.columns, family.estimators), (sums, {family.macro: macro})]
