"""The commands for finished evaluations: compare, report."""

import os
from pathlib import Path
from typing import Any

import click

from mlmkit.cli.options import PATH, JsonOption, argument, command, option, option_class
from mlmkit.console import print_json, print_table, say
from mlmkit.errors import UserError, require


@option_class
class CompareOptions(JsonOption):
    results: tuple[str, ...] = argument(nargs=-1, required=True, metavar="RESULT_A RESULT_B [RESULT ...]")
    output: Path | None = option("--output", "Folder to write compare.html to.", type=PATH)
    top: int = option("--top", "How many tokens to show.", default=20, type=click.IntRange(min=0))


@command(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Compare evaluations of the same text and masks, each with RESULT_A.

    Shows each metric's difference with its paired interval and p-value, overall and by slice, and the tokens where the
    two differ most. Refuses results on different text or with different masks.
    """
    from mlmkit.eval.compare import compare as run_comparison
    from mlmkit.eval.comparison_page import write_comparison

    if len(options.results) < 2:
        raise UserError("name at least two results to compare")
    comparison = run_comparison([Path(item) for item in options.results], options.top)
    if options.output:
        write_comparison(comparison, options.output)
    if options.as_json:
        print_json(comparison)
        return
    _print_comparison(comparison)
    if options.output:
        say(f"page: {options.output / 'compare.html'}")


def _print_comparison(comparison: dict[str, Any]) -> None:
    from mlmkit.eval.comparison_page import describe_side, differing_rows

    first = comparison["first"]
    for line in describe_side("A", first):
        say(line)
    for other in comparison["comparisons"]:
        for line in describe_side("B", other):
            say(line)
        if other["variant"] != first["variant"]:
            say(f"note: A is scored as {first['variant']}, B as {other['variant']}")
        different, agreement = differing_rows(other)
        if agreement:
            say(agreement)
        if not different:
            continue
        _print_differences(different)
        if other["tokens"]:
            say("tokens that differ most (log P):")
            tokens = []
            for token in other["tokens"]:
                where = f"document {token['document']}, token {token['offset']}"
                sides = (f"{token[name]:.3f}" for name in ("log_prob_a", "log_prob_b"))
                tokens.append([repr(token["token"]), where, *sides, f"{token['difference']:+.3f}"])
            print_table(tokens, ["token", "where", "A", "B", "B - A"], align="llrrr")


def _print_differences(named_rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Print rows with the name of a metric, or of a metric and a slice or group of items."""
    from mlmkit.eval.comparison_page import measured_on
    from mlmkit.eval.display import number, p_value, signed, span

    rows, metric = [], ""
    for name, row in named_rows:
        arrow = "↓" if row["better"] == "lower" else "↑"
        if " " in name and not name.startswith(f"{metric} "):
            metric = name.split()[0]
            rows.append([f"{arrow} {metric} by part"])
        label = f"    {name.removeprefix(metric).lstrip()}" if " " in name else f"{arrow} {name}"
        decimals = _decimals(row["a"], row["b"])
        sides = (number(row[side], f"{{:.{decimals}f}}") for side in ("a", "b"))
        change, interval = signed(row["difference"]), span(row)
        if decimals < 4:
            change = number(row["difference"], f"{{:+.{decimals}f}}")
            interval = span(row, f"{{:+.{decimals}f}}")
        rows.append([label, *sides, change, interval, measured_on(row), p_value(row["p_value"])])
    say("↓: lower is better, ↑: higher is better. B - A is negative where B is lower.")
    say(f"n: {'items' if 'items' in named_rows[0][1] else 'scored tokens / documents'}")
    print_table(rows, ["metric", "A", "B", "B - A", "95 %", "n", "p"], align="lrrrlrr", expendable=("p", "n", "95 %"))


def _decimals(*values: float | None) -> int:
    """How many decimals give the largest of the values five digits, at most four."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return max(0, 4 - len(str(int(largest))) + 1)


@click.command()
@click.argument("result", type=PATH)
def report(result: Path) -> None:
    """Write RESULT/report.html again, from the stored result."""
    from mlmkit.eval.report import write_report
    from mlmkit.eval.results_store import load_result

    require("report", "jinja2", "matplotlib")
    stored = load_result(result)
    if not os.access(result, os.W_OK):
        raise UserError(f"{result} is read-only: copy it to a writable folder")
    write_report(stored)
    say(result / "report.html")
