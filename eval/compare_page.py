"""A comparison for people: lines for the terminal, and a page."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError, require
from mlmkit.eval.metrics import describe_unknown
from mlmkit.eval.report import number, p_value, render, signed, span

Row = dict[str, Any]
ROUNDING = 1e-6  # scores are float32


def print_lines(comparison: dict[str, Any]) -> Iterator[str]:
    """The comparison as a table of text."""
    first = comparison["first"]
    yield from _side("A", first)
    for other in comparison["comparisons"]:
        yield from _side("B", other)
        if other["variant"] != first["variant"]:
            yield f"note: A is scored as {first['variant']}, B as {other['variant']}"
        different, agreement = separate(other)
        if agreement:
            yield agreement
        if not different:
            continue
        n = "pairs" if "pairs" in other else "tokens / documents"
        yield f"{'metric':44} {'better':6} {'A':>12} {'B':>12} {'B - A':>11}   {'95 %':23} {'p':>7}   n: {n}"
        for name, row in different:
            values = f"{number(row['a']):>12} {number(row['b']):>12} {signed(row['difference']):>11}"
            tested = f"{span(row):23} {p_value(row['p_value']):>7}"
            yield f"{name:44} {row['better']:6} {values}   {tested}   {size(row)}"
        if other["tokens"]:
            yield "tokens that differ most (log P):"
        for token in other["tokens"]:
            place = f"document {token['document']}, token {token['offset']}"
            values = f"{token['log_prob_a']:9.3f} {token['log_prob_b']:9.3f} {token['difference']:+9.3f}"
            yield f"  {token['token']!r:24} {place:32} {values}"


def _side(letter: str, side: dict[str, Any]) -> Iterator[str]:
    yield f"{letter}: {side['folder']} ({side['model']}, {side['backend']})"
    if unknown := describe_unknown(side["unknown"]):
        yield f"note: in {letter}, {unknown}"


def rows(other: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    """Every difference with its name: overall, then by slice and by group of pairs, one metric each."""
    yield from other["metrics"].items()
    for metric, splits in other["slices"].items():
        name = "masked_cross_entropy" if metric == "masked" else "pseudo_perplexity"
        for split, slices in splits.items():
            yield from ((f"{name} {split} {label}", found[name]) for label, found in slices.items())
    for groups in other.get("pairs", {}).values():
        yield from ((f"pair_accuracy {name}", found["pair_accuracy"]) for name, found in groups.items())


def separate(other: dict[str, Any]) -> tuple[list[tuple[str, Row]], str]:
    """The rows in which A and B differ by more than rounding, and a line about the others, if there are any."""
    gaps = [_gap(row) for _, row in rows(other)]
    agreed = [gap for gap in gaps if gap <= ROUNDING]
    largest = f"to {max(agreed):.0e}" if any(agreed) else "exactly"
    line = f"A and B agree {largest} in {len(agreed)} of {len(gaps)} rows" if agreed else ""
    return [item for item, gap in zip(rows(other), gaps, strict=True) if gap > ROUNDING], line


def _gap(row: Row) -> float:
    """How far apart A and B are, at the far end of the interval too; relative to values above 1."""
    if row["difference"] is None:
        return math.inf
    widest = max(abs(row[name] or 0) for name in ("difference", "low", "high"))
    return widest / max(1.0, abs(row["a"]), abs(row["b"]))


def size(row: Row) -> str:
    """What a row is measured on: tokens (of A and of B, where they differ) and documents, or pairs."""
    if "pairs" in row:
        return f"{row['pairs']:,}"
    return " / ".join(f"{count:,}" for count in (*dict.fromkeys(row["tokens"]), row["documents"]))


def write_page(comparison: dict[str, Any], folder: Path) -> None:
    """`compare.html` in `folder`. Raises `UserError` where it cannot be written."""
    require("report", "jinja2", "matplotlib")
    from mlmkit.eval import plots

    parts = []
    for other in comparison["comparisons"]:
        different, agreement = separate(other)
        part = {"other": other, "different": different, "agreement": agreement, "figures": {}}
        for name in ("masked_cross_entropy", "pseudo_perplexity", "pair_accuracy"):
            own = [(label, row) for label, row in different if label.split()[0] == name]
            lines = [(f"{label[len(name) :] or 'all'} (n: {size(row)})".strip(), row) for label, row in own]
            if len(lines) > 1:
                title = name.replace("_", " ")
                axis = f"{title}, B − A ({lines[0][1]['better']} is better)"
                part["figures"][f"{title.capitalize()} by slice"] = plots.differences(lines, axis)
        parts.append(part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"comparison": comparison, "parts": parts, "size": size, "describe_unknown": describe_unknown}
        render("compare.html.jinja", folder / "compare.html", **content)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
