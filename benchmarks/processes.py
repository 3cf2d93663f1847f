"""Work in processes of their own: contestants that keep a state between calls, commands, and the memory of both."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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
        return self.call(_peak_mib) / 1024

    def kill(self) -> None:
        """End the process at once, with those that it has started if it leads a process group."""
        assert self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self.stop()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sys.stdout = sys.stderr  # libraries print, and standard output is for the report
    is_made, made = _attempt(make, *arguments)
    with contextlib.suppress(EOFError):  # the other end is closed: the work is done
        while True:
            function, more = pipe.recv()
            pipe.send(_attempt(function, made, *more) if is_made else (False, made))


def _attempt(function: Callable[..., Any], *arguments: object) -> tuple[bool, Any]:
    try:
        return True, function(*arguments)
    except Exception as error:
        return False, f"{type(error).__name__}: {last_line(str(error))}"


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
