"""Make something happen at a chosen file operation: a kill, or all of a second process's work. Quick processes.

Also commands and ranks in forks of a process that has imported everything, where `python -m mlmkit` takes seconds.
"""

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "fcntl.flock"}
# Forks of a server that has imported everything once, also what training and exporting import only when they need it
# and what the files of tests import whose functions run in forks (seconds each), and started no thread.
PROCESSES = multiprocessing.get_context("forkserver")
MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "modernbert")]
LAZY = ["mlmkit.eval.plots", *MODELS, "mlmkit.export.export", "torch.onnx._internal.exporter._compat"]
LAZY += ["mlmkit.eval.report", "jinja2", "mlmkit.serve.server", "pytest", "hypothesis"]
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
    gc.freeze()  # what the server has imported is not searched for garbage
    with at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        work(*arguments, **options)


def command(client: socket.socket) -> None:
    """Be the `mlmkit` of a client that sends its folder, arguments and standard streams; answer with the exit code.

    With the arguments `-c CODE`, or `-` and the code on its standard input, be its `python`.
    """
    from mlmkit.cli import main

    gc.freeze()
    request, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (multiprocessing had closed it)
    folder, *arguments = json.loads(request)
    os.chdir(folder)
    code: object = 1
    try:
        if arguments[:1] in (["-"], ["-c"]):
            exec(arguments[1] if arguments[0] == "-c" else sys.stdin.read(), {"__name__": "__main__"})
            code = 0
        else:
            main(arguments)
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        sys.stdout.flush()
        client.send(bytes([code if isinstance(code, int) else 1]))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def be_rank(rank: int, world: int, port: int) -> None:
    """Set the variables that torchrun sets in each of its processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start_rank(
    output: Path,
    arguments: list[str],
    before: Callable[[], None] | None = None,
    ranks: tuple[int, int, int] = (0, 1, 0),
) -> BaseProcess:
    """Start `mlmkit` with these arguments, after `before`. Its output goes to `OUTPUT.out` and `OUTPUT.err`.

    `ranks` are its rank, their number and their port.
    """
    process = PROCESSES.Process(target=_be_command, args=(output, arguments, before, *ranks))
    process.start()
    return process


def run_two_ranks(output: Path, arguments: list[str], before: Callable[[], None] | None = None) -> str:
    """Run a command in two ranks; return all that they print."""
    port, paths = free_port(), [output.with_name(f"{output.name}-{rank}") for rank in range(2)]
    processes = [start_rank(path, arguments, before, (rank, 2, port)) for rank, path in enumerate(paths)]
    for process in processes:
        process.join(120)
    errors = [path.with_suffix(".err").read_text() for path in paths]
    assert [process.exitcode for process in processes] == [0, 0], errors
    return "".join(path.with_suffix(".out").read_text() for path in paths)


def _be_command(
    output: Path, arguments: list[str], before: Callable[[], None] | None, rank: int, world: int, port: int
) -> None:
    from mlmkit.cli import main

    gc.freeze()
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT, 0o600), number)
    if world > 1:
        be_rank(rank, world, port)
    if before:
        before()
    main(arguments)


def names(folder: Path) -> set[str]:
    """List a folder, hidden files included."""
    return {path.name for path in folder.iterdir()}
