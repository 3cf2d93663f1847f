"""Compare evaluations of the same text and positions, with paired intervals.

two stored results → refuse what does not compare → differences of metrics, slices, items and single tokens
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mlmkit.errors import UserError
from mlmkit.eval.columns import as_numpy
from mlmkit.eval.correlation import Correlation, draw_statistics
from mlmkit.eval.examples import add_texts
from mlmkit.eval.item_metrics import ItemScores, item_groups, item_scores, measure_family, overall_statistics
from mlmkit.eval.metrics import (
    FAMILIES,
    PER_TEXT,
    UNKNOWN_LIMIT,
    WITHOUT_INTERVAL,
    MetricFamily,
    better,
    describe_unknown,
)
from mlmkit.eval.results_store import DOCUMENTS, StoredResult, load_result, read_blocks
from mlmkit.eval.statistics import Bootstrap, Estimator, finite, percentiles

TOKENIZER_FREE = frozenset({"pseudo_log_likelihood", *PER_TEXT})  # metrics that mean the same for any tokenizer
POSITION = ["document", "offset", "token_id", "input_id"]  # columns that identify a scored token and its mask
ROUNDING = 1e-6  # scores are float32


def compare(folders: Sequence[Path], top: int = 20, *, with_texts: bool = True) -> dict[str, Any]:
    """Compare each evaluation with the first one: differences (its value minus the first's), intervals, p-values.

    Returns `first` and `comparisons`: a description of each result, and for the others `metrics`, `slices`, `items`
    and the `top` tokens whose scores differ most; `with_texts` adds the text around each, which is read again. Raises
    `UserError`, with the reason, for evaluations of different text, masks or metrics.
    """
    first, *others = [load_result(folder) for folder in folders]
    return {
        "first": _describe(first),
        "comparisons": [{**_describe(other), **_compare(first, other, top, with_texts)} for other in others],
    }


def _describe(stored: StoredResult) -> dict[str, Any]:
    result = stored.result
    model, source = result["model"], result["corpus"]["source"]
    return {
        "folder": str(stored.folder),
        "model": model["path"],
        "architecture": model["architecture"],
        "precision": model["precision"],
        "backend": result["backend"]["name"],
        "set": source["set"] or source["location"],
        "variant": (result["pseudo"] or {}).get("variant"),
        "unknown": result["unknown"],
    }


def _compare(a: StoredResult, b: StoredResult, top: int, with_texts: bool) -> dict[str, Any]:
    one, two = a.result, b.result
    seeds: dict[str, list[int | None]] = {}
    for name in one["digests"]:
        if name in two["digests"]:
            metric, seed = pass_of(name)
            seeds.setdefault(metric, []).append(seed)
    same_tokens = check_comparable(a, b, seeds)
    is_lossy = max(side["unknown"]["character_share"] for side in (one, two)) > UNKNOWN_LIMIT
    if "items" in one:
        metrics, groups = _compare_items(a, b)
        items = {"metrics": one["items"]["metrics"], "groups": groups}
        return {"metrics": metrics, "slices": {}, "tokens": [], "items": items}
    metrics, slices = {}, {}
    for metric in seeds:
        names = set(FAMILIES[metric].estimators if same_tokens else TOKENIZER_FREE) - set(PER_TEXT if is_lossy else ())
        differences, slice_differences = _compare_scores(a, b, metric, seeds[metric], names)
        metrics |= differences
        slices |= {metric: slice_differences} if slice_differences else {}
    metric = next(iter(seeds))
    tokens = _largest_differences(a, b, metric, seeds[metric][0], top) if same_tokens else []
    return {
        "metrics": metrics,
        "slices": slices,
        "tokens": tokens,
        "no_context": add_texts(tokens, a) if tokens and with_texts else "",
    }


def pass_of(digest_name: str) -> tuple[str, int | None]:
    """The kind of score and the mask seed of a pass, from its name in `digests`."""
    metric, _, seed = digest_name.partition("-")
    return metric, int(seed) if seed else None


def check_comparable(a: StoredResult, b: StoredResult, seeds: Mapping[str, Sequence[int | None]]) -> bool:
    """Whether both scored the same tokens, in the passes of `seeds`: the mask seeds of each kind of score.

    False: their tokenizers differ, so only `TOKENIZER_FREE` metrics and those of items compare. Raises `UserError` for
    different text, masks or documents, if there is no pass, and if a tokenizer that differs loses text.
    """
    one, two = a.result, b.result
    if one["corpus"]["fingerprint"] != two["corpus"]["fingerprint"]:
        raise UserError(
            f"{a.folder} and {b.folder} measure different texts (corpus fingerprints {one['corpus']['fingerprint']} "
            f"and {two['corpus']['fingerprint']}): evaluate both on the same"
        )
    if not seeds:
        raise UserError(
            f"{a.folder} measures {' and '.join(one['digests'])}, {b.folder} {' and '.join(two['digests'])}: "
            "they share nothing to compare"
        )
    sizes, others = (_block_sizes(side) for side in (a, b))
    if sizes != others:  # draws over blocks of other sizes are not paired
        raise UserError(f"{a.folder} and {b.folder} read the text from different files: evaluate both on the same")
    checks = [_check_positions(a, b, metric, seed) for metric in seeds for seed in seeds[metric]]
    unknown = max(one["unknown"], two["unknown"], key=lambda side: side["character_share"])
    if not all(checks) and unknown["character_share"] > UNKNOWN_LIMIT:
        raise UserError(f"{a.folder}, {b.folder}: their tokenizers differ, and in one {describe_unknown(unknown)}")
    return all(checks)


def _block_sizes(stored: StoredResult) -> list[int]:
    metadata = pq.read_metadata(stored.folder / DOCUMENTS)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def _check_positions(a: StoredResult, b: StoredResult, metric: str, seed: int | None) -> bool:
    """Whether both scored the same tokens at the same positions in a pass.

    Other tokens are accepted only of complete pseudo-likelihoods with two tokenizers. Raises `UserError` otherwise.
    """
    one, two = a.result, b.result
    name = metric if seed is None else f"{metric}-{seed}"
    other_tokenizer = one["model"]["tokenizer"] != two["model"]["tokenizer"]
    is_same = one["digests"][name] == two["digests"][name]
    if is_same and other_tokenizer:  # a digest covers positions and masks, but not the masked tokens
        is_same = all(
            left.select(POSITION).equals(right.select(POSITION)) for left, right in _tokens(a, b, metric, seed)
        )
    if is_same:
        return True
    samples = {(result["pseudo"] or {}).get("sample") for result in (one, two)}
    if metric == "pseudo" and other_tokenizer and samples == {1.0}:
        return False
    why = "their tokenizers differ: compare --metric pseudo" if other_tokenizer else "use the same recipe"
    raise UserError(
        f"{a.folder} and {b.folder} scored different positions or tokens ({name} digests "
        f"{one['digests'][name]} and {two['digests'][name]}): {why}"
    )


def _compare_scores(
    a: StoredResult, b: StoredResult, metric: str, seeds: list[int | None], names: set[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Differences of the metrics in `names`, and those of the slices by slicing and label."""
    family = FAMILIES[metric]
    draws = Bootstrap(a.result["corpus"]["documents"], 2 * family.column_count)
    for sums in zip(*(_document_sums(side, metric, seeds, family) for side in (a, b)), strict=True):
        draws.add(np.concatenate(sums, axis=1))

    def differences(estimators: Mapping[str, Estimator], one: slice) -> dict[str, Any]:
        two = slice(one.start + family.column_count, one.stop + family.column_count)
        tokens = [int(draws.totals[side][0]) for side in (one, two)]
        return {
            name: {**paired_difference(name, estimator, draws, one, two), "tokens": tokens}
            for name, estimator in estimators.items()
            if name in names
        }

    slices: dict[str, Any] = {}
    for slicing, label, columns in family.slices():
        if draws.totals[columns][0] and names.issuperset(family.slice_estimators):
            slices.setdefault(slicing, {})[label] = differences(family.slice_estimators, columns)
    return differences(family.estimators, slice(0, family.column_count)), slices


def _document_sums(
    stored: StoredResult, metric: str, seeds: Sequence[int | None], family: MetricFamily
) -> Iterator[NDArray[np.float64]]:
    """The family's column sums of consecutive documents, `[documents, columns]` each, added over the mask seeds."""
    for blocks in zip(*(read_blocks(stored.folder, metric, seed) for seed in seeds), strict=True):
        mask_id = stored.result["model"]["mask_id"]
        yield np.sum([family.document_sums(*tables, mask_id) for tables in blocks], axis=0)


def paired_difference(name: str, estimator: Estimator, draws: Bootstrap, one: slice, two: slice) -> dict[str, Any]:
    """The value of columns `two` minus that of columns `one`, with a paired interval and a p-value.

    The same documents are drawn for both, so what makes a document hard for either cancels. The p-value is twice the
    smaller share of draws on the other side of zero, counting the observed one (Davison and Hinkley 1997, section
    4.2). A draw without a scored token has no difference, and counts for both sides.
    """
    with np.errstate(all="ignore"):
        sides = [np.append(estimator(draws.totals[side]), estimator(draws.resampled[:, side])) for side in (one, two)]
    return draws_difference(name, *sides, int(min(draws.documents[one][0], draws.documents[two][0])))


def draws_difference(name: str, one: NDArray[np.float64], two: NDArray[np.float64], documents: int) -> dict[str, Any]:
    """The difference of a metric's values, each `[1 + draws]`: on all documents, then on each draw."""
    values = [finite(side[0]) for side in (one, two)]
    with np.errstate(all="ignore"):
        changes = two[1:] - one[1:]
    difference = low = high = p_value = None
    if values[0] is not None and values[1] is not None:
        difference = values[1] - values[0]
        if documents > 1 and name not in WITHOUT_INTERVAL:
            low, high = map(finite, percentiles(changes))
            fewest = min(int((~(changes > 0)).sum()), int((~(changes < 0)).sum()))
            p_value = min(1.0, 2 * (fewest + 1) / (len(changes) + 1))
    return {
        "better": better(name),
        "a": values[0],
        "b": values[1],
        "difference": difference,
        "low": low,
        "high": high,
        "p_value": p_value,
        "documents": documents,
    }


def distance(row: Mapping[str, Any]) -> float:
    """How far A and B, or an end of their interval, are apart; relative to values above 1."""
    if row["difference"] is None:
        return math.inf
    widest = max(abs(row[name] or 0) for name in ("difference", "low", "high"))
    return widest / max(1.0, abs(row["a"]), abs(row["b"]))


def is_distinguishable(row: Mapping[str, Any]) -> bool:
    """Whether A and B differ by more than rounding, and the interval of their difference excludes 0."""
    return row["low"] is not None and not row["low"] <= 0 <= row["high"] and distance(row) > ROUNDING


def metric_draws(stored: StoredResult, metric: str) -> tuple[NDArray[np.float64], int]:
    """A metric's values `[1 + draws]`, on all documents (or items) and on each draw, and how many have data.

    The draws are the same for each model, so the differences of two are paired. Raises `KeyError` for a metric that
    only describes a result, such as the perplexity of one side of pairs.
    """
    result = stored.result
    if "items" in result:
        source = result["corpus"]["source"]
        scores = item_scores(stored.folder, source["normalisation"])
        for declared in (result["set"] or {}).get("correlation", ()):
            statistics = draw_statistics(stored.folder, scores, Correlation(**declared))
            if metric in statistics:
                return statistics[metric]
        overall = overall_statistics(stored.folder, measure_family(scores, source))
        columns, estimator = {name: (columns, own[name]) for columns, own in overall for name in own}[metric]
        draws = Bootstrap(*columns.shape)
        draws.add(columns)
    else:
        kind = next(kind for kind, family in FAMILIES.items() if metric in family.estimators)
        seeds = [seed for own, seed in map(pass_of, result["digests"]) if own == kind]
        family = replace(FAMILIES[kind], slicings=())
        draws, estimator = Bootstrap(result["corpus"]["documents"], family.column_count), family.estimators[metric]
        for sums in _document_sums(stored, kind, seeds, family):
            draws.add(sums)
    with np.errstate(all="ignore"):
        return np.append(estimator(draws.totals), estimator(draws.resampled)), int(draws.documents[0])


def _compare_items(a: StoredResult, b: StoredResult) -> tuple[dict[str, Any], dict[str, Any]]:
    """Differences of the metrics of items, overall and by group, and of correlations, from resampling items."""
    source = a.result["corpus"]["source"]
    scores = [item_scores(side.folder, source["normalisation"]) for side in (a, b)]
    families = [measure_family(each, source) for each in scores]

    def differences(
        one: NDArray[np.float64], two: NDArray[np.float64], estimators: Mapping[str, Estimator]
    ) -> dict[str, Any]:
        columns = np.concatenate([one, two], axis=1)
        draws, width = Bootstrap(*columns.shape), one.shape[1]
        draws.add(columns)
        sides = slice(0, width), slice(width, 2 * width)
        rows = {name: paired_difference(name, estimator, draws, *sides) for name, estimator in estimators.items()}
        return {name: {**row, "items": row.pop("documents")} for name, row in rows.items()}

    metrics: dict[str, Any] = {}
    overall = [overall_statistics(side.folder, family) for side, family in zip((a, b), families, strict=True)]
    for (one, estimators), (two, _) in zip(*overall, strict=True):
        metrics |= differences(one, two, estimators)
    groups: dict[str, Any] = {}
    for plural, names in item_groups(a.folder).items():
        groups[plural] = {
            name: differences(*(family.columns[names == name] for family in families), families[0].estimators)
            for name in sorted(set(names.tolist()) - {""})
        }
    return {**metrics, **_compare_correlations(a, b, scores)}, groups


def _compare_correlations(a: StoredResult, b: StoredResult, scores: list[ItemScores]) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    for declared in (a.result["set"] or {}).get("correlation", ()):
        correlation = Correlation(**declared)
        one, two = (draw_statistics(side.folder, own, correlation) for side, own in zip((a, b), scores, strict=True))
        for name, (values, items) in one.items():
            row = draws_difference(name, values, two[name][0], items)
            row |= {"better": "higher"} if name == correlation.name else {}  # a mean of gains
            differences[name] = {**row, "items": row.pop("documents")}
    return differences


def _largest_differences(
    a: StoredResult, b: StoredResult, metric: str, seed: int | None, top: int
) -> list[dict[str, Any]]:
    """The tokens whose log-probabilities differ most, the largest difference first."""
    largest: list[dict[str, Any]] = []
    for left, right in _tokens(a, b, metric, seed):
        change = as_numpy(right["log_prob"]).astype(np.float64) - as_numpy(left["log_prob"])
        rows = np.argsort(-np.abs(change), kind="stable")[:top]
        sides = (table.take(rows).to_pylist() for table in (left, right))
        for one, two, difference in zip(*sides, change[rows].tolist(), strict=True):
            entry = {name: one[name] for name in ("document", "offset", "token")} | {"metric": metric}
            for letter, side in (("a", one), ("b", two)):
                entry |= {f"log_prob_{letter}": side["log_prob"], f"rank_{letter}": side["rank"]}
            largest.append({**entry, "difference": difference})
        largest = sorted(largest, key=lambda entry: -abs(entry["difference"]))[:top]
    return largest


def _tokens(a: StoredResult, b: StoredResult, metric: str, seed: int | None) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Both results' token rows of a pass, the same documents at a time."""
    blocks = (read_blocks(side.folder, metric, seed) for side in (a, b))
    return ((left, right) for (left, _), (right, _) in zip(*blocks, strict=True))
