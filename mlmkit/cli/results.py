"""The commands for finished evaluations: compare, report."""

import os
from pathlib import Path
from typing import Any

import click

from mlmkit.cli.options import PATH, JsonOption, argument, command, option, option_class
from mlmkit.console import print_json, print_table, say
from mlmkit.errors import UserError, require

STDOUT = Path("-")  # --table without a file
TOP = 20  # differing tokens


@option_class
class CompareOptions(JsonOption):
    results: tuple[str, ...] = argument(
        "Folders that mlmkit eval --output wrote.",
        nargs=-1,
        required=True,
        metavar="RESULT_A RESULT_B [RESULT ...]",
    )
    table: tuple[Path, ...] = option(
        "--table",
        "Print a table of all models by all sets in Markdown, or write it to FILE (.md, .csv, .html). Repeatable. A "
        "RESULT may then be a folder that holds results.",
        type=PATH,
        multiple=True,
        is_flag=False,
        flag_value=str(STDOUT),
        metavar="[FILE]",
    )
    output: Path | None = option("--output", "Folder to write compare.html to.", type=PATH, metavar="OUTPUT")
    top: int | None = option(
        "--top", "How many differing tokens to show.", shown_default=TOP, type=click.IntRange(min=0), metavar="N"
    )


@command(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Compare results with the first, RESULT_A.

    \b
    For example:
      mlmkit compare result-a result-b --output comparison
      mlmkit compare results-a results-b results-c --table table.html

    Shows each metric's difference with its paired interval and p-value, overall and by slice, and the tokens where the
    two differ most. Refuses results on different text or with different masks.

    With --table, makes one table of all models by all sets instead, with intervals and ranks.
    """
    if options.table:
        _print_table(options)
        return
    from mlmkit.eval.compare import compare as run_comparison
    from mlmkit.eval.comparison_page import write_comparison

    if len(options.results) < 2:
        raise UserError("name at least two results to compare")
    with_texts = bool(options.output) or options.as_json  # the terminal shows none
    top = TOP if options.top is None else options.top
    comparison = run_comparison([Path(item) for item in options.results], top, with_texts=with_texts)
    if options.output:
        write_comparison(comparison, options.output)
    if options.as_json:
        print_json(comparison)
        return
    _print_comparison(comparison)
    if options.output:
        say(f"page: {options.output / 'compare.html'}")


def _print_table(options: CompareOptions) -> None:
    from mlmkit.eval.results_table import as_markdown, check_path, results_table, write_table

    if options.output:
        raise click.UsageError("--output is for the page of a comparison: name the table's file, --table FILE.html.")
    if options.top is not None:
        raise click.UsageError("--top has no effect with --table: leave it out.")
    paths = [path for path in options.table if path != STDOUT]
    for path in paths:
        check_path(path)
    table = results_table([Path(item) for item in options.results])
    for path in paths:
        write_table(table, path)
    if options.as_json:
        print_json({"table": table.rows()})
    elif STDOUT in options.table:
        click.echo(as_markdown(table), nl=False)
    for path in [] if options.as_json else paths:
        say(f"table: {path}")


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
    from mlmkit.eval.display import ARROWS, number, p_value, signed, span

    rows, metric = [], ""
    for name, row in named_rows:
        arrow = ARROWS[row["better"]] or " "
        if " " in name and not name.startswith(f"{metric} "):
            metric = name.split()[0]
            rows.append([f"{arrow} {metric} by part"])
        label = f"    {name.removeprefix(metric).lstrip()}" if " " in name else f"{arrow} {name}"
        decimals = _decimals(row["a"], row["b"])
        form = f"{{:.{decimals}f}}"
        sides = number(row["a"], form), number(row["b"], form), signed(row["difference"], form)
        interval = span(row, f"{{:+.{decimals}f}}" if decimals < 4 else "")
        rows.append([label, *sides, interval, measured_on(row), p_value(row["p_value"])])
    say("↓: lower is better, ↑: higher is better. B - A is negative where B is lower.")
    say(f"n: {'items' if 'items' in named_rows[0][1] else 'scored tokens / documents'}")
    print_table(
        rows, ["metric", "A", "B", "B - A", "95 %", "n", "p"], align="lrrrlrr", expendable=("p", "n", "A", "95 %")
    )


def _decimals(*values: float | None) -> int:
    """How many decimals give the largest of the values five digits, at most four."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return max(0, 4 - len(str(int(largest))) + 1)


@option_class
class ReportOptions:
    result: Path = argument("Folder that mlmkit eval --output wrote.", type=PATH)


@command(ReportOptions)
def report(options: ReportOptions) -> None:
    """Write RESULT/report.html again."""
    from mlmkit.eval.report import write_report
    from mlmkit.eval.results_store import load_result

    require("report", "jinja2", "matplotlib")
    stored = load_result(options.result)
    if not os.access(options.result, os.W_OK):
        raise UserError(f"{options.result} is read-only: copy it to a writable folder")
    write_report(stored)
    say(options.result / "report.html")
