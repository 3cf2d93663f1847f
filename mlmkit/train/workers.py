"""Compute the items of an iterator in worker processes, in the order in which one process would give them.

This module imports no torch, so a worker needs 50 to 67 MiB. Why it is not torch's DataLoader: docs/decisions.md.
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

# A terminal or a scheduler signals every process of a group; only the training process acts on it.
IGNORED_BY_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def from_workers(items: Callable[..., Iterator[Any]], workers: int) -> Generator[Any, None, None]:
    """Yield what `items()` would; worker w of n computes `items(index=w, every=n)`, that is items w, w + n, w + 2n, ...

    `items` is pickled. Each worker blocks in its own pipe until it is read, so nothing lies in shared memory and a
    worker ends when its reader is gone. They are spawned, because a fork would copy locks held by torch's and the
    tokenizer's threads. Raises what a worker raises, and `UserError` when one is killed.
    """
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []

    def stop() -> None:
        for process in processes:
            process.kill()
        for process, pipe in zip(processes, pipes, strict=True):
            process.join()
            pipe.close()

    atexit.register(stop)  # runs before multiprocessing's own handler, which would wait for them
    try:
        for index in range(workers):
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(theirs, items, index, workers), daemon=True)
            # The worker inherits the blocked signals until `_send` ignores them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_BY_WORKERS)
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
                    f"a worker process was killed (exit code {process.exitcode}): if memory ran out, use fewer workers"
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
    for ignored in IGNORED_BY_WORKERS:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_BY_WORKERS)
    with suppress(BrokenPipeError):  # the reader is gone
        for item in _with_end(items(index=index, every=every)):
            pipe.send(item)


def _with_end(items: Iterator[Any]) -> Iterator[Any]:
    """The items, then None, or the error that ended them."""
    try:
        yield from items
        yield None
    except UserError as error:
        yield error
    except Exception:
        yield RuntimeError(traceback.format_exc())
