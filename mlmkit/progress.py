"""Progress bars on standard error, one line each; they vanish at their end, and without a terminal there are none.

    step 100/150  loss 6.161  0:00:13 left  9,323 tokens/s  ━━━━━━━━━━━
    masked, seed 0  305/356 documents  0:00:01 left  ━━━━━━━━━━━━━━━━━━

The bar takes the room that is left. A narrow terminal drops it first, then the text from its end.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from math import ceil

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import Progress, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

NARROWEST_BAR = 8  # columns


@cache
def _console() -> Console:
    """One for all bars: it shows the bars of one block below those of another that surrounds it."""
    return Console(stderr=True)


def has_bars() -> bool:
    """Whether standard error can show a bar, or needs a line in the log from time to time."""
    return _console().is_interactive


class _Lines(Progress):
    """rich's display, with lines that fit the terminal in place of its table."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            if task.visible:
                yield _line(task, self.console.width)


def _line(task: Task, columns: int) -> RenderableType:
    left = "-:--:--" if task.time_remaining is None else str(timedelta(seconds=ceil(task.time_remaining)))
    first, second, *rest = task.fields["parts"] or (task.description, _counter(task))
    text = first
    for part in filter(None, (second, f"{left} left", *rest)):
        if cell_len(text) + 2 + cell_len(part) > columns:
            break
        text += f"  {part}"
    line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    cells: list[RenderableType] = [Text(text, no_wrap=True, overflow="ellipsis")]
    if (room := columns - cell_len(text) - 2) >= NARROWEST_BAR:
        cells.append(ProgressBar(total=task.total, completed=task.completed, width=room))
    line.add_row(*cells)
    return line


def _counter(task: Task) -> str:
    return f"{task.completed:,.0f}/{task.total:,.0f} {task.fields['unit']}"


@dataclass(frozen=True)
class Bar:
    """One bar."""

    _lines: Progress
    _task: TaskID

    def advance(self, count: float = 1) -> None:
        """Count so many more as done."""
        self._lines.advance(self._task, count)

    def show(self, completed: float, parts: Sequence[str] = ()) -> None:
        """Set how many are done, and the texts of the line, if not name and count: the time left follows the second."""
        self._lines.update(self._task, completed=completed, parts=parts)

    def remove(self) -> None:
        """Take the bar away."""
        self._lines.update(self._task, visible=False)


@dataclass(frozen=True)
class Bars:
    """The bars of a block, one below the other."""

    _lines: Progress

    def add(self, name: str, total: float, unit: str = "") -> Bar:
        """Add a bar that counts up to `total` units."""
        return Bar(self._lines, self._lines.add_task(name, total=total, unit=unit, parts=()))


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[Bars]:
    """Show the bars that are added in the block, while it runs."""
    # Standard output is left alone: it may be a pipe, and rich would print what goes there to standard error.
    with _Lines(console=_console(), transient=True, redirect_stdout=False, disable=not (shown and has_bars())) as lines:
        yield Bars(lines)


@contextmanager
def progress(name: str, total: float, unit: str = "") -> Iterator[Bar]:
    """Show one bar while the block runs."""
    with progress_bars() as bars:
        yield bars.add(name, total, unit)
