"""An iterator shared out to processes, its items in the order that one process would give them.

Each process sends through a pipe of its own and waits there until it is read: nothing lies in shared memory, and one
whose reader is gone, killed or not, ends. They are started afresh, not forked: a fork copies the locks of torch's and
the tokenizer's threads as they happen to be.
"""

import atexit
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any

from mlmkit.errors import UserError

# A terminal or a scheduler signals every process of a group; what follows is the trainer's to decide.
LEFT_TO_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def from_processes(items: Callable[..., Iterator[Any]], workers: int) -> Generator[Any, None, None]:
    """What `items()` would give; process w of n makes `items(index=w, every=n)`: items w, w + n, w + 2n and so on.

    `items` is pickled. An exception there is raised here. Raises `UserError` when a process is killed.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []

    def stop() -> None:
        for process in processes:
            process.kill()
        for process, pipe in zip(processes, pipes, strict=True):
            process.join()
            pipe.close()

    atexit.register(stop)  # before multiprocessing's own, which would wait for them
    try:
        for index in range(workers):
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(theirs, items, index, workers), daemon=True)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_TRAINER)  # inherited, till it ignores them
            process.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            processes.append(process)
            pipes.append(pipe)
        for process, pipe in cycle(zip(processes, pipes, strict=True)):
            try:
                item = pipe.recv()
            except (EOFError, OSError):
                process.join()
                raise UserError(
                    f"a process that builds batches was ended from outside (exit code {process.exitcode}): "
                    "if memory ran out, lower data.workers"
                ) from None
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item
    finally:
        stop()
        atexit.unregister(stop)


def _send(pipe: Connection, items: Callable[..., Iterator[Any]], index: int, every: int) -> None:
    for ignored in LEFT_TO_THE_TRAINER:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_TRAINER)
    with suppress(BrokenPipeError):  # the reader is gone
        for item in _with_end(items(index=index, every=every)):
            pipe.send(item)


def _with_end(items: Iterator[Any]) -> Iterator[Any]:
    """The items, then None, or what went wrong."""
    try:
        yield from items
        yield None
    except UserError as error:
        yield error
    except Exception:
        yield RuntimeError(traceback.format_exc())
