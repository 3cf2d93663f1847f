"""What every benchmark shares: options, processes, rounds in which contestants take turns, and the report.

A script declares its sizes and one function, `measure(options) -> Report`, and ends with `main(__doc__, measure, ...)`.
Then it runs alone (`python benchmarks/NAME.py`, with `--quick` for a dry run, `--json FILE` for all figures), and in
`make bench` (suite.py). What other work on the machine does to a time is met in one way everywhere: a warm-up,
alternation, medians, and ratios within a round.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")
PACKAGES = (
    *("torch", "transformers", "accelerate", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnx"),
    *("tokenizers", "numpy", "fastapi"),
)
ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Table:
    """Cells as they are shown."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """With its title above."""
        title = [f"**{self.title}**", ""] if self.title else []
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([*title, *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


@dataclass(frozen=True)
class Bars:
    """A plot: the values of each contestant's rounds, shown as their median and range."""

    title: str
    unit: str
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Report:
    """What a benchmark found. `headlines` are figures that other pages quote, `figures` all that was measured."""

    tables: Sequence[Table]
    notes: Sequence[str] = ()
    headlines: Mapping[str, float] = field(default_factory=dict)
    bars: Bars | None = None
    figures: Any = None

    def markdown(self) -> str:
        """Tables and notes."""
        return "\n\n".join([*(table.markdown() for table in self.tables), *self.notes])


class SkippedError(Exception):
    """Why a benchmark cannot run here, in one line."""


def main(description: str | None, measure: Callable[[argparse.Namespace], Report], **sizes: tuple[Any, Any]) -> None:
    """Run a script: `sizes` are its options, by name, each with its default and what `--quick` makes of it.

    Every script has `--threads`: so many cores are used. The report is printed as Markdown. Exit code 2 with one line
    where the benchmark cannot run here, 1 where a contestant fails.
    """
    sizes = {"threads": (2, 2)} | sizes
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, _) in sizes.items():
        is_list = isinstance(default, tuple)
        kind = type(default[0] if is_list else default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+" if is_list else None, metavar="N")
    parser.add_argument("--quick", action="store_true", help="a dry run of seconds, whose figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the report there, with all figures")
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
    """All of a report as JSON, with where and how it came about."""
    found = {"command": " ".join(sys.argv[1:]), "seconds": round(seconds, 1), **asdict(report)}
    path.write_text(json.dumps({**machine(), **found}, indent=1, default=str) + "\n", encoding="utf-8")


def use_cores(count: int) -> None:
    """Keep this process and those that it starts to so many cores, with libraries as quiet as they can be made."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ |= {"OMP_NUM_THREADS": str(count), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def say(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def machine() -> dict[str, Any]:
    """When, on what, and with which versions."""
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
    """Its name, and the widest vector unit that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    widest = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags), "")
    return f"{fields.get('model name', platform.machine())} {widest}".strip()


# ---------------------------------------------------------------- rounds and figures


def alternate(contestants: Mapping[str, Callable[[], T]], rounds: int, *, warm: bool = False) -> dict[str, list[T]]:
    """What each returns in `rounds` of turns; unless `warm`, after one turn of each that is not counted."""
    for contestant in () if warm else contestants.values():
        contestant()
    taken: dict[str, list[T]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            taken[name].append(contestant())
    return taken


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Theirs over ours in each round: of seconds, how many times as fast we are."""
    return [their / our for our, their in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median and the range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# ---------------------------------------------------------------- processes


class ContestantError(Exception):
    """Why a contestant cannot take part, in one line."""


class Contestant:
    """A process that holds what `make(*arguments)` returns, and calls functions on it."""

    def __init__(self, make: Callable[..., Any], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """`function(made, *arguments)`, there. Raises `ContestantError` when it, or `make`, fails."""
        try:
            self._pipe.send((function, arguments))
            worked, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ContestantError(f"its process ended with {self._process.exitcode}") from None
        if not worked:
            raise ContestantError(result)
        return result

    def stop(self) -> None:
        """Let the process end, and free its memory."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sys.stdout = sys.stderr  # libraries print, and the table is to stand alone
    made, failure = None, ""
    try:
        made = make(*arguments)
    except Exception as error:
        failure = f"{type(error).__name__}: {last_line(str(error))}"
    with contextlib.suppress(EOFError):  # the other end is gone: the work is done
        while True:
            function, more = pipe.recv()
            try:
                pipe.send((False, failure) if failure else (True, function(made, *more)))
            except Exception as error:
                pipe.send((False, f"{type(error).__name__}: {last_line(str(error))}"))


def isolated(function: Callable[..., Any], *arguments: object) -> Any:
    """`function(*arguments)`, in a process that goes away with its memory. Raises `ContestantError` when it fails."""
    contestant = Contestant(function, *arguments)
    try:
        return contestant.call(_itself)
    finally:
        contestant.stop()


def _itself(made: Any) -> Any:
    return made


def run_command(*arguments: object) -> str:
    """What a Python process prints. Raises `ContestantError` with its last line when it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ContestantError(last_line(done.stderr))
    return done.stdout


def last_line(text: str) -> str:
    """The last line that says something, which is where errors put what happened."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")[:300]


def memory_mib(field: str = "VmHWM", process: int | str = "self") -> float:
    """A process's peak resident memory so far, or another field of its status.

    Not getrusage's, which counts the parent's, from before the exec.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def peak_mib(_: object) -> float:
    """For `Contestant.call`."""
    return memory_mib()
