"""Comparing evaluations of the same text and positions, with paired intervals."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlmkit.errors import UserError
from mlmkit.eval.measure import column_count, document_sums, each_slice
from mlmkit.eval.metrics import FAMILIES, HIGHER_IS_BETTER, PER_TEXT, UNKNOWN_LIMIT, WITHOUT_INTERVAL, describe_unknown
from mlmkit.eval.pair_metrics import ESTIMATORS, pair_columns, pair_groups
from mlmkit.eval.statistics import Bootstrap, Estimator, finite, percentiles
from mlmkit.eval.stored import Stored, load_result, read_blocks

# Metrics that mean the same whatever the tokens are.
TOKENIZER_FREE = ("pseudo_log_likelihood", *PER_TEXT)


def compare(folders: Sequence[Path], top: int = 20) -> dict[str, Any]:
    """Each evaluation against the first: differences (its value less the first's), intervals, p-values, tokens.

    Raises `UserError`, with the reason, for evaluations of different text, masks or metrics.
    """
    first, *others = [load_result(folder) for folder in folders]
    return {
        "first": _describe(first),
        "comparisons": [{**_describe(other), **_compare(first, other, top)} for other in others],
    }


def _describe(stored: Stored) -> dict[str, Any]:
    result = stored.result
    model, backend = result["model"], result["backend"]
    return {
        "folder": str(stored.folder),
        "model": model["path"],
        "architecture": model["architecture"],
        "precision": model["precision"],
        "backend": backend["name"],
        "set": result["corpus"]["source"]["set"] or result["corpus"]["source"]["location"],
        "variant": (result["pseudo"] or {}).get("variant"),
        "unknown": result["unknown"],
    }


def _compare(a: Stored, b: Stored, top: int) -> dict[str, Any]:
    one, two = a.result, b.result
    if one["corpus"]["fingerprint"] != two["corpus"]["fingerprint"]:
        raise UserError(
            f"{a.folder} and {b.folder} measure different texts (corpus fingerprints {one['corpus']['fingerprint']} "
            f"and {two['corpus']['fingerprint']}): evaluate both on the same"
        )
    common = [name for name in one["digests"] if name in two["digests"]]
    if not common:
        raise UserError(
            f"{a.folder} measures {' and '.join(one['digests'])}, {b.folder} {' and '.join(two['digests'])}: "
            "they share nothing to compare"
        )
    other_tokens, other_tokenizer = False, one["model"]["tokenizer"] != two["model"]["tokenizer"]
    seeds: dict[str, list[int | None]] = {}
    for name in common:
        metric, _, number = name.partition("-")
        seed = int(number) if number else None
        seeds.setdefault(metric, []).append(seed)
        is_same = one["digests"][name] == two["digests"][name]
        if is_same and other_tokenizer:  # a digest covers positions and masks, under which the tokens may still differ
            is_same = all(_is_same(*tables) for tables in _token_blocks(a, b, metric, seed))
        if is_same:
            continue
        if not (metric == "pseudo" and other_tokenizer and one["pseudo"]["sample"] == two["pseudo"]["sample"] == 1):
            why = "their tokenizers differ: compare --metric pseudo" if other_tokenizer else "use the same recipe"
            raise UserError(
                f"{a.folder} and {b.folder} scored different positions or tokens ({name} digests "
                f"{one['digests'][name]} and {two['digests'][name]}): {why}"
            )
        other_tokens = True
    found: dict[str, Any] = {"metrics": {}, "slices": {}, "tokens": []}
    unknown = max(one["unknown"], two["unknown"], key=lambda side: side["character_share"])
    if other_tokens and unknown["character_share"] > UNKNOWN_LIMIT:
        raise UserError(f"{a.folder}, {b.folder}: their tokenizers differ, and in one {describe_unknown(unknown)}")
    if "pairs" in one:
        found["metrics"], found["pairs"] = _compare_pairs(a, b)
        return found
    for metric, wanted in seeds.items():
        names = set(TOKENIZER_FREE if other_tokens else FAMILIES[metric].estimators)
        names -= set(PER_TEXT if unknown["character_share"] > UNKNOWN_LIMIT else ())
        _compare_scores(a, b, metric, wanted, names, found)
    if not other_tokens:
        found["tokens"] = _largest_differences(a, b, next(iter(seeds)), next(iter(seeds.values()))[0], top)
    return found


def _compare_scores(
    a: Stored, b: Stored, metric: str, seeds: list[int | None], names: set[str], found: dict[str, Any]
) -> None:
    """Add the differences of a metric's `names` to `found`, and those of its slices."""
    family, width = FAMILIES[metric], column_count(metric)
    draws = Bootstrap(a.result["corpus"]["documents"], 2 * width)
    sides = [[read_blocks(side.folder, metric, seed) for seed in seeds] for side in (a, b)]
    for left, right in zip(zip(*sides[0], strict=True), zip(*sides[1], strict=True), strict=True):
        sums = []
        for side, stretch in ((a, left), (b, right)):
            sums.append(np.sum([document_sums(metric, *tables, side.mask_id) for tables in stretch], axis=0))
        draws.add(np.concatenate(sums, axis=1))

    def difference(name: str, estimator: Estimator, columns: slice) -> dict[str, Any]:
        other = slice(columns.start + width, columns.stop + width)
        tokens = [int(draws.totals[side][0]) for side in (columns, other)]
        return {**paired_difference(name, estimator, draws, columns, other), "tokens": tokens}

    for name, estimator in family.estimators.items():
        if name in names:
            found["metrics"][name] = difference(name, estimator, slice(0, width))
    for split, label, columns in each_slice(metric):
        if draws.totals[columns][0] and names.issuperset(family.slice_estimators):
            rows = {name: difference(name, estimator, columns) for name, estimator in family.slice_estimators.items()}
            found["slices"].setdefault(metric, {}).setdefault(split, {})[label] = rows


def paired_difference(name: str, estimator: Estimator, draws: Bootstrap, one: slice, two: slice) -> dict[str, Any]:
    """B less A: the same documents are drawn for both, so what makes a document hard for either cancels.

    The p-value is twice the smaller share of draws on the other side of zero, counting the observed one (Davison and
    Hinkley 1997, section 4.2). A draw without a scored token has no difference, and counts for both sides.
    """
    with np.errstate(all="ignore"):
        values = [finite(estimator(draws.totals[side])) for side in (one, two)]
        changes = estimator(draws.resampled[:, two]) - estimator(draws.resampled[:, one])
    documents = int(min(draws.documents[one][0], draws.documents[two][0]))
    change, low, high, p_value = (None,) * 4
    if None not in values:
        change = values[1] - values[0]
        if documents > 1 and name not in WITHOUT_INTERVAL:
            low, high = map(finite, percentiles(changes))
            fewest = min(int((~(changes > 0)).sum()), int((~(changes < 0)).sum()))
            p_value = min(1.0, 2 * (fewest + 1) / (len(changes) + 1))
    better = "higher" if any(part in name for part in HIGHER_IS_BETTER) else "lower"
    found = {"better": better, "a": values[0], "b": values[1], "difference": change}
    return {**found, "low": low, "high": high, "p_value": p_value, "documents": documents}


def _compare_pairs(a: Stored, b: Stored) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pair accuracies, overall and by group, resampling pairs."""
    columns = np.concatenate([pair_columns(side.folder) for side in (a, b)], axis=1)
    width = columns.shape[1] // 2

    def differences(rows: NDArray[np.float64]) -> dict[str, Any]:
        draws = Bootstrap(len(rows), rows.shape[1])
        draws.add(rows)
        one, two = slice(0, width), slice(width, 2 * width)
        found = {name: paired_difference(name, estimator, draws, one, two) for name, estimator in ESTIMATORS.items()}
        return {name: {**row, "pairs": row.pop("documents")} for name, row in found.items()}

    groups: dict[str, Any] = {}
    for plural, names in pair_groups(a.folder).items():
        groups[plural] = {name: differences(columns[names == name]) for name in sorted(set(names.tolist()) - {""})}
    return differences(columns), groups


def _largest_differences(a: Stored, b: Stored, metric: str, seed: int | None, top: int) -> list[dict[str, Any]]:
    """The tokens whose log-probabilities differ most, the largest difference first."""
    largest: list[dict[str, Any]] = []
    for left, right in _token_blocks(a, b, metric, seed):
        change = right["log_prob"].to_numpy().astype(np.float64) - left["log_prob"].to_numpy()
        rows = np.argsort(-np.abs(change), kind="stable")[:top]
        sides = (table.take(rows).to_pylist() for table in (left, right))
        for one, two, difference in zip(*sides, change[rows].tolist(), strict=True):
            entry = {name: one[name] for name in ("document", "offset", "token")} | {"metric": metric}
            entry |= {f"{name}_a": one[name] for name in ("log_prob", "rank")}
            entry |= {f"{name}_b": two[name] for name in ("log_prob", "rank")}
            largest.append({**entry, "difference": difference})
        largest = sorted(largest, key=lambda entry: -abs(entry["difference"]))[:top]
    return largest


def _token_blocks(a: Stored, b: Stored, metric: str, seed: int | None) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Both results' rows of a pass, the same documents at a time."""
    blocks = (read_blocks(side.folder, metric, seed) for side in (a, b))
    return ((left, right) for (left, _), (right, _) in zip(*blocks, strict=True))


def _is_same(left: pa.Table, right: pa.Table) -> bool:
    """Whether both score the same tokens, in the same places and behind the same mask."""
    place = ["document", "offset", "token_id", "input_id"]
    return left.select(place).equals(right.select(place))
