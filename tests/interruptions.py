"""Make something happen at a chosen file operation: a kill, or all of a second process's work."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "fcntl.flock"}
# Forks of a server that has imported everything once and started no thread.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mlmkit.train.loop", "mlmkit.eval.api", "mlmkit.backends.onnx"])

_watching: list[Callable[[], None]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in OPERATIONS:
        _watching[-1]()


@contextmanager
def at_operation(number: int, happening: Callable[[], None]) -> Iterator[list[int]]:
    """Call `happening` before file operation `number` (from 0); yield a list with the count of operations.

    Operations of `happening` itself are not counted.
    """
    if not _watching:
        sys.addaudithook(_audit)  # it cannot be removed again
        _watching.append(lambda: None)
    count = [0]

    def operation() -> None:
        count[0] += 1
        if count[0] == number + 1:
            _watching.append(lambda: None)
            try:
                happening()
            finally:
                _watching.pop()

    _watching.append(operation)
    try:
        yield count
    finally:
        _watching.pop()


def killed(number: int, work: Callable[..., object], *arguments: Any, **options: Any) -> bool:
    """Do `work` in a process that is killed at file operation `number`; return whether it got that far."""
    process = PROCESSES.Process(target=_work, args=(number, work, arguments, options))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def _work(number: int, work: Callable[..., object], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        work(*arguments, **options)


def names(folder: Path) -> set[str]:
    """List a folder, hidden files included."""
    return {path.name for path in folder.iterdir()}
