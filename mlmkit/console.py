"""What a terminal shows: lines, tables and JSON on standard output, progress bars on standard error.

rich is imported inside the functions: it takes 50 to 90 ms, and `mlmkit --help` and `mlmkit fill` do without.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress

# Control characters except the tab, line separators, overrides of the writing direction, half surrogates, invisible
# tags. Characters that scripts need stay: joiners (Persian, Hindi), direction marks, soft hyphens, spaces of any kind.
STEERING = re.compile(
    "[\0-\x08\n-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
UNLIMITED = 1 << 16  # columns


def printable(text: str) -> str:
    """Return the text with each character that could steer a terminal replaced by its escape."""
    return STEERING.sub(lambda match: ascii(match[0])[1:-1], text)


def say(line: object) -> None:
    """Print a line for people, made `printable`."""
    click.echo(printable(str(line)))


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    click.echo(STEERING.sub(lambda match: json.dumps(match[0])[1:-1], json.dumps(value, ensure_ascii=False)))


def print_table(rows: Iterable[Sequence[object]], header: Sequence[str] = (), *, align: str = "") -> None:
    """Print rows in aligned columns, under a rule if there is a `header`.

    `align` has a letter per column, "l" or "r"; columns without one are left-aligned. Cells are made `printable`. Long
    cells are folded to the width of a terminal, and left whole where the output goes to a file or a pipe.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[Text(printable(str(cell))) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD if header else None, show_header=bool(header), show_edge=False, pad_edge=False)
    for index in range(max(map(len, [header, *cells]))):
        title = header[index] if index < len(header) else ""
        table.add_column(title, justify="right" if align[index : index + 1] == "r" else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=UNLIMITED)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        click.echo(line.rstrip())


def progress(*, shown: bool = True) -> "Progress":
    """Return a bar with count, description and time left, which vanishes when standard error is not a terminal.

    The bar itself takes what room is left: none of the rest is cut off at 80 columns.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    return Progress(
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        BarColumn(bar_width=None),
        console=console,
        expand=True,
        transient=True,
        disable=not (shown and console.is_terminal),
    )


def number(value: float | None) -> str:
    """A number with four decimals; a dash for None."""
    return "-" if value is None else f"{value:.4f}"
