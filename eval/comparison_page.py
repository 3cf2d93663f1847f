"""A comparison for people: `compare.html`, and the rows and lines that the terminal shows too."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError, require
from mlmkit.eval.compare import ROUNDING, distance
from mlmkit.eval.display import SLICE_METRICS
from mlmkit.eval.metrics import describe_unknown
from mlmkit.eval.pages import render

Row = dict[str, Any]


def write_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Write `compare.html` into `folder`. Raises `UserError` without `mlmkit[report]`, or if it cannot be written."""
    require("report", "jinja2", "matplotlib")
    from mlmkit.eval import plots

    sections = []
    for other in comparison["comparisons"]:
        different, agreement = differing_rows(other)
        figures = {}
        for name in ("masked_cross_entropy", "pseudo_perplexity", *other.get("items", {}).get("metrics", ())[:1]):
            own = [(label, row) for label, row in different if label.split()[0] == name]
            rows = [(f"{label[len(name) :] or 'all'} (n: {measured_on(row)})".strip(), row) for label, row in own]
            if len(rows) > 1:
                title = name.replace("_", " ")
                axis = f"{title}, B − A ({rows[0][1]['better']} is better)"
                figures[f"{title.capitalize()} by slice"] = plots.differences(rows, axis)
        sections.append({"other": other, "different": different, "agreement": agreement, "figures": figures})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "comparison": comparison,
            "sections": sections,
            "size": measured_on,
            "describe_unknown": describe_unknown,
        }
        render("compare.html.jinja", folder / "compare.html", **content)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def describe_side(letter: str, side: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines that say what a side of a comparison is."""
    yield f"{letter}: {side['folder']} ({side['model']}, {side['backend']})"
    if unknown := describe_unknown(side["unknown"]):
        yield f"note: in {letter}, {unknown}"


def _named_rows(other: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    """Every difference with its name: overall, then one metric by slice and by group of items."""
    yield from other["metrics"].items()
    for metric, slicings in other["slices"].items():
        name, _ = SLICE_METRICS[metric]
        for slicing, slices in slicings.items():
            yield from ((f"{name} {slicing} {label}", row[name]) for label, row in slices.items())
    for groups in other.get("items", {}).get("groups", {}).values():
        for name, rows in groups.items():
            metric = next(iter(rows))
            yield f"{metric} {name}", rows[metric]


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
