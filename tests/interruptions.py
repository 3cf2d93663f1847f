"""Make something happen at a chosen file operation: a kill, or all of a second process's work. Quick processes."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "fcntl.flock"}
# Forks of a server that has imported everything once, also what training imports only when it needs it (seconds), and
# started no thread.
PROCESSES = multiprocessing.get_context("forkserver")
LAZY = ["mlmkit.eval.plots", "transformers.models.bert.modeling_bert", "mlmkit.export.onnx"]
PROCESSES.set_forkserver_preload(["mlmkit.train.loop", "mlmkit.eval.api", "mlmkit.backends.onnx", *LAZY])

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


def command(client: socket.socket) -> None:
    """Be the `mlmkit` of a client that sends its folder, arguments and standard streams; answer with the exit code."""
    from mlmkit.cli import main

    request, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (multiprocessing had closed it)
    folder, *arguments = json.loads(request)
    os.chdir(folder)
    code: object = 1
    try:
        main(arguments)
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        sys.stdout.flush()
        client.send(bytes([code if isinstance(code, int) else 1]))


def names(folder: Path) -> set[str]:
    """List a folder, hidden files included."""
    return {path.name for path in folder.iterdir()}
