"""What every benchmark shares: options, tables and reports, alternating rounds, processes of their own.

A script declares its options and one function, `measure(options) -> Report`, and ends with `main(__doc__, measure,
...)`. It then runs alone (`python benchmarks/NAME.py`; `--quick` for a dry run, `--json FILE` for all figures) and in
`make bench` (suite.py). Other work on the machine distorts times. Every script counters it the same way: a warm-up,
contestants that take turns, medians, and ratios within a round.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")
PACKAGES = (
    *("torch", "transformers", "accelerate", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnx"),
    *("tokenizers", "numpy", "fastapi"),
)
ROOT = Path(__file__).resolve().parent.parent
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
        """The table in Markdown, its title above it."""
        title = [f"**{self.title}**", ""] if self.title else []
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([*title, *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


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
        """Tables and notes."""
        return "\n\n".join([*(table.markdown() for table in self.tables), *self.notes])


def write_block(page: Path, script: str, paragraphs: Sequence[str]) -> None:
    """Replace what is between the page's two markers of a script. Raises `SkippedError` if it has none."""
    before, after = split_page(page, script)
    page.write_text("\n".join([before, "", *(f"{text}\n" for text in paragraphs), after]), encoding="utf-8")


def split_page(page: Path, script: str) -> tuple[str, str]:
    """The page up to the marker before a script's block, and from the one behind it."""
    begin, end = (f"<!-- {script}: {word} -->" for word in ("begin", "end"))
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(f"{begin}\n")
    _, has_end, after = rest.partition(f"\n{end}")
    if not has_end:
        raise SkippedError(f"{page} has no lines {begin} and {end}")
    return before + begin, end + after


class SkippedError(Exception):
    """Says in one line why a benchmark cannot run here."""


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
    """Report progress on standard error."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def machine() -> dict[str, Any]:
    """The date, processor, cores, versions and kind of text of a run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
        "text": "MLMKIT_DATA" if os.environ.get("MLMKIT_DATA") else "Python's documentation",
    }


def processor() -> str:
    """The processor's name and its widest vector unit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    widest = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags), "")
    return f"{fields.get('model name', platform.machine())} {widest}".strip()


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
    """The seconds that a call takes."""
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


# ---------------------------------------------------------------- processes


class ContestantError(Exception):
    """Says in one line why a contestant failed."""


class Contestant:
    """A process that keeps what `make(*arguments)` returns and calls functions on it."""

    def __init__(self, make: Callable[..., Any], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: object, timeout: float | None = None) -> Any:
        """`function(made, *arguments)`, run in that process.

        Raises `ContestantError` if it or `make` fails, or takes more than `timeout` seconds; then the process is ended.
        """
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(timeout):
                self.kill()
                raise ContestantError(f"stopped: no answer within {timeout:.0f} s")
            worked, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ContestantError(f"its process ended with {self._process.exitcode}") from None
        if not worked:
            raise ContestantError(result)
        return result

    def peak_gib(self) -> float:
        """The peak resident memory of the process so far."""
        return self.call(_peak_mib) / 1024

    def kill(self) -> None:
        """End the process at once, with those that it has started if it leads a process group."""
        assert self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self.stop()

    def stop(self) -> None:
        """Let the process end."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sys.stdout = sys.stderr  # libraries print, and standard output is for the report
    made, failure = None, ""
    try:
        made = make(*arguments)
    except Exception as error:
        failure = f"{type(error).__name__}: {last_line(str(error))}"
    with contextlib.suppress(EOFError):  # the other end is closed: the work is done
        while True:
            function, more = pipe.recv()
            try:
                pipe.send((False, failure) if failure else (True, function(made, *more)))
            except Exception as error:
                pipe.send((False, f"{type(error).__name__}: {last_line(str(error))}"))


def _peak_mib(_: object) -> float:
    return memory_mib()


@contextlib.contextmanager
def contestants(makers: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Contestant]]:
    """Contestants by name, each from a function and its arguments; all of them are stopped in the end."""
    with contextlib.ExitStack() as stack:
        started = {name: Contestant(*maker) for name, maker in makers.items()}
        for contestant in started.values():
            stack.callback(contestant.stop)
        yield started


def calls(started: Mapping[str, Contestant], function: Callable[..., Any], *arguments: object) -> dict[str, Any]:
    """The same call of each contestant, for `alternate`."""
    return {name: partial(contestant.call, function, *arguments) for name, contestant in started.items()}


def isolated(function: Callable[..., Any], *arguments: object) -> Any:
    """`function(*arguments)`, run in a process that ends after it. Raises `ContestantError` if it fails."""
    with contestants({"": (function, *arguments)}) as started:
        return started[""].call(_itself)


def _itself(made: Any) -> Any:
    return made


def run_command(*arguments: object) -> str:
    """What a Python process prints. Raises `ContestantError` with the last line of its errors if it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ContestantError(last_line(done.stderr))
    return done.stdout


def last_line(text: str) -> str:
    """The last line that is not empty, where errors say what happened, at most 300 characters of it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")[:300]


def memory_mib(field: str = "VmHWM", process: int | str = "self") -> float:
    """A process's peak resident memory so far, or another field of its status, in MiB.

    Not from getrusage, which includes the parent's peak from before the exec.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024
