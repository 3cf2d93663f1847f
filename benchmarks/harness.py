"""What every benchmark shares: options, tables and reports, alternating rounds. processes.py has the contestants.

A script declares its options and one function, `measure(options) -> Report`, and ends with `main(__doc__, measure,
...)`. It then runs alone (`python benchmarks/NAME.py`; `--quick` for a dry run, `--json FILE` for all figures) and in
`make bench` (suite.py). Other work on the machine distorts times. Every script counters it the same way: a warm-up,
contestants that take turns, medians, and ratios within a round.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from processes import ROOT, ContestantError

T = TypeVar("T")
PACKAGES = (
    *("torch", "transformers", "accelerate", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnx"),
    *("tokenizers", "numpy", "fastapi"),
)
# Rows, inner size and columns of matrix products, as models have them, and two that are large enough to fill a GPU.
MATRICES = [(440, 768, 768), (440, 768, 3072), (440, 3072, 768), (2048, 768, 3072), (2048, 2048, 2048)]
LARGE_MATRICES = [(65536, 768, 3072), (8192, 8192, 8192)]


# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Table:
    """Cells are shown as they are; `table` builds a Table from records and formats their values."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        title = f"**{self.title}**\n\n" if self.title else ""
        return title + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table(title: str, records: Iterable[Mapping[str, object]]) -> Table:
    """A row per record. The columns are the keys of all records, the values are formatted by `cell`."""
    records = list(records)
    header = list(dict.fromkeys(chain(*records)))
    return Table(title, header, [[cell(record.get(column)) for column in header] for record in records])


def cell(value: object) -> str:
    """Floats with three significant digits, integers with thousands separators, lists as median (least to most)."""
    if isinstance(value, list):
        return f"{cell(median(value))} ({cell(min(value))} to {cell(max(value))})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Report:
    """The result of a benchmark. `headlines` are figures that other pages quote, `figures` everything measured."""

    tables: Sequence[Table]
    notes: Sequence[str] = ()
    headlines: Mapping[str, float] = field(default_factory=dict)
    figures: Any = None

    def markdown(self) -> str:
        return "\n\n".join([*(table.markdown() for table in self.tables), *self.notes])


def write_block(page: Path, script: str, paragraphs: Sequence[str]) -> None:
    """Replace what is between the page's two markers of a script. Raises `SkippedError` if it has none."""
    before, after = split_page(page, script)
    page.write_text("\n".join([before, *(f"{text}\n" for text in paragraphs), after]), encoding="utf-8")


def split_page(page: Path, script: str) -> tuple[str, str]:
    """The page up to the marker before a script's block, and from the one behind it."""
    begin, end = (re.escape(f"<!-- {script}: {word} -->") for word in ("begin", "end"))
    block = re.fullmatch(f"(.*{begin}\n).*\n({end}.*)", page.read_text(encoding="utf-8"), re.DOTALL)
    if not block:
        raise SkippedError(f"{page} has no lines <!-- {script}: begin --> and <!-- {script}: end -->")
    return block[1], block[2]


class SkippedError(Exception):
    """Says in one line why a benchmark cannot run here."""


def installed(name: str) -> Path:
    """The folder of packages that `make build/NAME/installed` installs. Raises `SkippedError` if it is not there."""
    folder = ROOT / "build" / name
    if not (folder / "installed").exists():
        raise SkippedError(f"build/{name} is not installed: make build/{name}/installed")
    return folder


def main(description: str | None, measure: Callable[[argparse.Namespace], Report], **sizes: tuple[Any, Any]) -> None:
    """Run a script and print its report as Markdown.

    `sizes` are its options by name, each with its default and its value under `--quick`. Every script has `--threads`,
    the number of cores to use. The exit code is 2, with one line, where the benchmark cannot run here, and 1 where a
    contestant fails.
    """
    sizes = {"threads": (2, 2)} | sizes
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, _) in sizes.items():
        is_list = isinstance(default, tuple)
        kind = type(default[0] if is_list else default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if is_list else None, metavar="N")
    parser.add_argument("--quick", action="store_true", help="a dry run of seconds; its figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report with all figures to FILE")
    options = parser.parse_args()
    for name, values in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.quick])
    use_cores(options.threads)
    began = time.perf_counter()
    try:
        report = measure(options)
    except (SkippedError, ContestantError) as error:
        say(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(2 if isinstance(error, SkippedError) else 1)
    print(report.markdown())  # noqa: T201
    if options.json:
        write(report, options.json, time.perf_counter() - began)


def write(report: Report, path: Path, seconds: float) -> None:
    """Write a report as JSON, with the machine and the command that produced it."""
    values = {"command": " ".join(sys.argv[1:]), "seconds": round(seconds, 1), **asdict(report)}
    path.write_text(json.dumps({**machine(), **values}, indent=1, default=str) + "\n", encoding="utf-8")


def use_cores(count: int) -> None:
    """Restrict this process and its children to `count` cores, and silence the libraries."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ |= {"OMP_NUM_THREADS": str(count), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def machine() -> dict[str, Any]:
    """The date, processor, cores, versions and kind of text of a run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions(*PACKAGES),
        "text": "MLMKIT_DATA" if os.environ.get("MLMKIT_DATA") else "Python's documentation",
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of those that are installed, Python's among them."""
    numbers = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            numbers[package] = version(package)
    return numbers


def processor() -> str:
    """The processor's name and its widest vector unit."""
    path = Path("/proc/cpuinfo")
    described = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*: (.*)", described, re.MULTILINE)
    widest = next((unit for unit in ("amx_tile", "avx512f", "avx2") if f" {unit} " in described), "")
    known = name[1] if name else platform.processor() or platform.machine()
    return f"{known} {widest}".strip()


# ---------------------------------------------------------------- rounds


def alternate(calls: Mapping[str, Callable[[], T]], rounds: int, *, warm: bool = False) -> dict[str, list[T]]:
    """The results of `rounds` in which the calls take turns. Unless `warm`, one turn of each goes before, uncounted."""
    for call in () if warm else calls.values():
        call()
    results: dict[str, list[T]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            results[name].append(call())
    return results


def timed(function: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Theirs over ours in each round. For seconds: how many times as fast we are."""
    return [their / our for our, their in zip(ours, theirs, strict=True)]


def matrix_rate(device: str, dtype: str = "float32") -> float:
    """The most operations per second at which torch multiplies matrices here."""
    import torch

    best, kind = 0.0, getattr(torch, dtype)
    for rows, inner, columns in MATRICES + LARGE_MATRICES * (device == "cuda"):
        left = torch.randn(rows, inner, device=device).to(kind)
        right = torch.randn(inner, columns, device=device).to(kind)
        end = time.perf_counter() + 0.5
        while (began := time.perf_counter()) < end:
            torch.mm(left, right)[-1, -1].item()  # waits for the device
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best
