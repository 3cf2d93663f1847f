"""A comparison for people: lines for the terminal, and a page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError, require
from mlmkit.eval.report import number, render, signed


def print_lines(comparison: dict[str, Any]) -> Iterator[str]:
    """The comparison as a table of text."""
    first = comparison["first"]
    yield f"A: {first['folder']} ({first['model']}, {first['backend']})"
    for other in comparison["comparisons"]:
        yield f"B: {other['folder']} ({other['model']}, {other['backend']})"
        if other["variant"] != first["variant"]:
            yield f"note: A is scored as {first['variant']}, B as {other['variant']}"
        yield f"{'metric':44} {'A':>12} {'B':>12} {'B - A':>11}   {'95 %':23} {'p':>6}"
        for name, found in rows(other):
            yield _line(name, found)
        if other["tokens"]:
            yield "tokens that differ most (log P):"
        for token in other["tokens"]:
            place = f"document {token['document']}, token {token['offset']}"
            values = f"{token['log_prob_a']:9.3f} {token['log_prob_b']:9.3f} {token['difference']:+9.3f}"
            yield f"  {token['token']!r:24} {place:32} {values}"


def rows(other: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every difference with its name: overall, then by slice and by group of pairs, one metric each."""
    yield from other["metrics"].items()
    for metric, splits in other["slices"].items():
        name = "masked_cross_entropy" if metric == "masked" else "pseudo_perplexity"
        for split, slices in splits.items():
            yield from ((f"{name} {split} {label}", found[name]) for label, found in slices.items())
    for groups in other.get("pairs", {}).values():
        yield from ((f"pair_accuracy {name}", found["pair_accuracy"]) for name, found in groups.items())


def write_page(comparison: dict[str, Any], folder: Path) -> None:
    """`compare.html` in `folder`. Raises `UserError` where it cannot be written."""
    require("report", "jinja2", "matplotlib")
    from mlmkit.eval import figures

    drawn = []
    for other in comparison["comparisons"]:
        overall, groups = other["metrics"], list(rows(other))[len(other["metrics"]) :]
        drawn.append([])
        for name in ("masked_cross_entropy", "pseudo_perplexity", "pair_accuracy"):
            chosen = [(label.removeprefix(f"{name} "), found) for label, found in groups if label.startswith(name)]
            if name in overall and chosen:
                figure = figures.differences([("all", overall[name]), *chosen], f"{name.replace('_', ' ')}, B − A")
                drawn[-1].append((f"{name.replace('_', ' ').capitalize()} by slice", figure))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        render("compare.html.jinja", folder / "compare.html", comparison=comparison, figures=drawn)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None


def _line(name: str, found: dict[str, Any]) -> str:
    values = f"{number(found['a']):>12} {number(found['b']):>12} {signed(found['difference']):>11}"
    interval = f"[{signed(found['low'])}, {signed(found['high'])}]"
    return f"{name:44} {values}   {interval:23} {found['p_value']:6.3f}"
