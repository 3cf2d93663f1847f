"""A comparison for people: `compare.html`, and the rows and lines that the terminal shows too."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError, require
from mlmkit.eval.compare import ROUNDING, distance, is_distinguishable
from mlmkit.eval.display import ARROWS, SLICE_COLUMNS, SLICINGS, headline, model_name, slice_name
from mlmkit.eval.item_metrics import GROUPS
from mlmkit.eval.metrics import describe_unknown
from mlmkit.eval.pages import render

Row = dict[str, Any]


def write_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Write `compare.html` into `folder`. Raises `UserError` without `mlmkit[report]`, or if it cannot be written."""
    require("report", "jinja2")
    first = comparison["first"]
    content = {
        "first": first,
        "title": Path(first["set"]).name,
        "sections": [_section(other) for other in comparison["comparisons"]],
        "arrows": ARROWS,
        "headline": headline,
        "model_name": model_name,
        "size": measured_on,
        "is_distinguishable": is_distinguishable,
        "describe_unknown": describe_unknown,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        render("compare.html.jinja", folder / "compare.html", **content)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def _section(other: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a comparison: the metrics that differ, one table per metric by part, the tokens."""
    tables: dict[str, list[tuple[str, list[tuple[str, Row]]]]] = {}
    for metric, part, rows in _parts(other):
        title, label = (SLICINGS[part][0], slice_name) if part in SLICINGS else (part, _group_name)
        kept = [(label(name), row) for name, row in rows if _differs(row)]
        tables.setdefault(metric, []).extend([(title, kept)] if kept else [])
    return {
        "other": other,
        "agreement": differing_rows(other)[1],
        "metrics": [(name, row) for name, row in other["metrics"].items() if _differs(row)],
        "tables": [
            (metric, groups, _axis([row for _, rows in groups for _, row in rows])) for metric, groups in tables.items()
        ],
    }


def _group_name(name: str) -> str:
    return name.replace("_", " ")


def _differs(row: Row) -> bool:
    return distance(row) > ROUNDING


def _axis(rows: Sequence[Row]) -> tuple[float, float]:
    """The ends of an axis for these differences: 0 and all intervals, cut at 1.5 times the largest difference."""
    limit = 1.5 * max((abs(row["difference"] or 0.0) for row in rows), default=0.0)
    lows, highs = ([row[end] or row["difference"] or 0.0 for row in rows] for end in ("low", "high"))
    return max(min([0.0, *lows]), -limit), min(max([0.0, *highs]), limit)


def describe_side(letter: str, side: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that say what a side of a comparison is."""
    yield f"{letter}: {side['folder']} ({side['model']}, {side['backend']})"
    if unknown := describe_unknown(side["unknown"]):
        yield f"note: in {letter}, {unknown}"


def _parts(other: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, Row]]]]:
    """Metric, kind of part (a slicing, or a group of items) and its rows by label."""
    for kind, slicings in other["slices"].items():
        metric = SLICE_COLUMNS[kind][0]
        for slicing, slices in slicings.items():
            yield metric, slicing, [(label, rows[metric]) for label, rows in slices.items()]
    if "items" in other:
        metric = other["items"]["metrics"][0]
        for kind, plural in GROUPS.items():
            yield metric, kind, [(name, rows[metric]) for name, rows in other["items"]["groups"][plural].items()]


def _named_rows(other: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    """Every difference with its name: overall, then one metric by slice and by group of items."""
    yield from other["metrics"].items()
    for metric, part, rows in _parts(other):
        prefix = f"{metric} {part}" if part in SLICINGS else metric
        yield from ((f"{prefix} {label}", row) for label, row in rows)


def differing_rows(other: dict[str, Any]) -> tuple[list[tuple[str, Row]], str]:
    """The rows where A and B differ by more than rounding, and a line about the others, "" if there are none."""
    gaps = [(distance(row), name, row) for name, row in _named_rows(other)]
    agreed = [gap for gap, _, _ in gaps if gap <= ROUNDING]
    largest = f"to {max(agreed):.0e}" if any(agreed) else "exactly"
    line = f"A and B agree {largest} in {len(agreed)} of {len(gaps)} rows" if agreed else ""
    return [(name, row) for gap, name, row in gaps if gap > ROUNDING], line


def measured_on(row: Row) -> str:
    """What a row is measured on: tokens (of A and of B, if they differ) and documents, or items."""
    if "items" in row:
        return f"{row['items']:,}"
    return " / ".join(f"{count:,}" for count in (*dict.fromkeys(row["tokens"]), row["documents"]))
