"""What a terminal shows: lines, tables and JSON on standard output.

Progress bars on standard error are in `mlmkit.progress`.
"""

import json
import logging
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from shutil import get_terminal_size
from typing import Any

import click

# Control characters except the tab, line separators, overrides of the writing direction, half surrogates, invisible
# tags. Characters that scripts need stay: joiners (Persian, Hindi), direction marks, soft hyphens, spaces of any kind.
STEERING = re.compile(
    "[\0-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
UNLIMITED, GAP, NARROWEST_FOLD = 1 << 16, 2, 12  # columns


def printable(text: str) -> str:
    """Return the text with each character that could steer a terminal replaced by its escape."""
    return STEERING.sub(lambda match: ascii(match[0])[1:-1], text)


class MessageFormatter(logging.Formatter):
    """Escapes messages, which quote names and texts from anyone. Tracebacks (--verbose) keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


class MessageHandler(logging.StreamHandler):
    """Writes messages to what `sys.stderr` is then: a progress bar takes its place, and prints them above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def say(line: object) -> None:
    """Print a line for people, made `printable`."""
    click.echo(printable(str(line)))


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    click.echo(STEERING.sub(lambda match: json.dumps(match[0])[1:-1], json.dumps(value, ensure_ascii=False)))


def print_table(
    rows: Iterable[Sequence[object]],
    header: Sequence[str] = (),
    *,
    align: str = "",
    expendable: Sequence[str] = (),
    crop: bool = False,
) -> None:
    """Print rows in aligned columns, under a rule if there is a `header`.

    `align` has a letter per column, "l" or "r"; columns without one are left-aligned. Cells are made `printable`. Where
    a terminal is too narrow, the columns with the `expendable` titles are left out, the first of them first, and named
    in a line below; then the last column is folded, or with `crop` cut off. In a file or a pipe all is whole.
    """
    from rich.cells import cell_len  # `mlmkit --help` imports click alone

    cells = [[printable(str(cell)) for cell in row] for row in rows]
    columns = list(range(max(map(len, [header, *cells]))))
    if not columns:
        return
    table = [[*row, *[""] * (len(columns) - len(row))] for row in ([header] if header else []) + cells]
    widths = [max(cell_len(row[column]) for row in table) for column in columns]
    room = get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED

    def excess() -> int:
        return sum(widths[column] + GAP for column in columns) - GAP - room

    left_out = []
    for title in expendable:
        if excess() > 0:
            columns.remove(header.index(title))
            left_out.append(title)
    last = columns[-1]
    if excess() > 0 and align[last : last + 1] != "r":
        widths[last] = max(widths[last] - excess(), cell_len(header[last]) if header else 0, NARROWEST_FOLD)
    for number, row in enumerate(table):
        lines = _fold(row[last], widths[last], crop=crop)
        for line, text in enumerate(lines):
            texts = [text if column == last else "" if line else row[column] for column in columns]
            padded = (
                " " * space + text if align[column : column + 1] == "r" else text + " " * space
                for column, text in zip(columns, texts, strict=True)
                for space in [widths[column] - cell_len(text)]
            )
            click.echo((" " * GAP).join(padded).rstrip())
        if header and not number:
            click.echo("─" * (room + min(excess(), 0)))
    if left_out:
        click.echo(f"A wider terminal also shows: {', '.join(reversed(left_out))}.")


def _fold(text: str, width: int, *, crop: bool) -> list[str]:
    from rich.cells import cell_len, chop_cells, set_cell_size

    if cell_len(text) <= width:
        return [text]
    if crop:
        return [set_cell_size(text, width - 1).rstrip() + "…"]
    lines = textwrap.wrap(text, width)  # counts characters, of which some are two columns wide
    return [part for line in lines for part in chop_cells(line, width)] or [""]


def number(value: float | None) -> str:
    """A number with four decimals, none above 10,000; a dash for None."""
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.0f}"
