"""This process among those that `torchrun` started; alone, it is rank 0 of 1. Also the CPUs and memory it may use."""

import atexit
import itertools
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

from mlmkit.errors import EndedElsewhereError, UserError, require

T = TypeVar("T")

log = logging.getLogger(__name__)

CPU_LIMIT, MEMORY_LIMIT = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/memory.max")
SECONDS_TO_REPORT = 5  # head start of the rank that reports an error
COLLECTIVE_TIMEOUT = timedelta(days=7)  # a rank may wait for another's share of a long evaluation
# A rank whose heartbeat stops for BEATS intervals (a minute) is dead; one that works or waits keeps its heartbeat.
BEAT_SECONDS, BEATS = 5.0, 12
MEETING_BEATS = 120  # a rank may start ten minutes after another: imports, or a cluster's queue
LEFT = 1 << 40  # above any heartbeat count: the rank has finished and needs no other
RESUME = "Start all ranks again with the same command: it resumes from what was saved last"
_meetings = itertools.count()


def cores() -> int:
    """The number of CPU cores that this process may use, which a container may limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_LIMIT.read_text().split()
        return min(count, max(int(quota) // int(period), 1))
    except (OSError, ValueError):  # no such file, or a quota of "max"
        return count


def available_memory() -> float:
    """Bytes that this process may allocate, at most its container's limit; infinite if the system does not say."""
    limits = [math.inf]
    for path, pattern, unit in ((MEMORY_LIMIT, r"\d+", 1), (Path("/proc/meminfo"), r"MemAvailable: +(\d+)", 1024)):
        with suppress(OSError):
            limits += [unit * int(number) for number in re.findall(pattern, path.read_text())]
    return min(limits)


# ---------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes, and `local` of `local_world` on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs and writes for all."""
        return self.rank == 0

    def join(self, backend: str = "gloo") -> None:
        """Join the process group, if there are other ranks and this one has not joined yet."""
        if self.world > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                _heartbeats.append(_Heartbeat(self.rank, self.world))
                _heartbeats[-1].start()
                dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            import torch.distributed as dist

            self.join()
            dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64; the same on all of them."""
        if self.world == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def from_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank only, while the others wait; returns its result on every rank.

        Raises what it raises there, and `EndedElsewhereError` on the others.
        """
        if self.world == 1:
            return work()
        import torch.distributed as dist

        self.join()
        failure: BaseException | None = None
        outcome: list = [None, False]
        if self.is_first:
            try:
                outcome = [work(), True]
            except BaseException as error:
                failure = error
        dist.broadcast_object_list(outcome)
        if failure:
            raise failure
        if not outcome[1]:
            raise EndedElsewhereError
        return outcome[0]

    def close(self) -> None:
        """Leave the process group."""
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                while _heartbeats:
                    _heartbeats.pop().stop(is_done=sys.exc_info()[0] is None)
                dist.destroy_process_group()


def ranks() -> Ranks:
    """This process's rank from the environment that `torchrun` sets. Raises `UserError` when torch is missing."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    require("train", "torch")
    local = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    return Ranks(int(os.environ["RANK"]), world, *local)


def claim_gpu(own: Ranks) -> None:
    """Make only this rank's own GPU visible to the process. Call it before CUDA is used."""
    if own.local_world > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(own.local_world)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[own.local % len(names)]


@contextmanager
def said_once() -> Iterator[None]:
    """Report a `UserError` that every process of a machine raises only once, from the first process.

    The others raise `EndedElsewhereError`. Each machine reports its own, because it may lack a file or a package.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(SECONDS_TO_REPORT)  # torchrun ends all processes with the first that exits
        raise EndedElsewhereError from error


# ---------------------------------------------------------------- heartbeats


class _Heartbeat(threading.Thread):
    """Counts in the group's store, and ends this process when another rank stops counting.

    Without it, a rank would wait for a dead one until `COLLECTIVE_TIMEOUT`. The first rank, which holds the store,
    watches all others, and they watch the first.
    """

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.rank, self.watched = rank, range(1, world) if rank == 0 else range(1)
        self.meeting = f"mlmkit {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {next(_meetings)}"
        self.is_over, self.is_done = threading.Event(), False
        atexit.register(self.is_over.set)

    def run(self) -> None:
        from torch._C._distributed_c10d import PrefixStore, TCPStore

        address, wait = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), MEETING_BEATS * BEAT_SECONDS
        try:
            store = PrefixStore(self.meeting, TCPStore(*address, is_master=False, timeout=timedelta(seconds=wait)))
        except RuntimeError:
            self._give_up(0)
        seen, missed = dict.fromkeys(self.watched, 0), dict.fromkeys(self.watched, 0)
        while not self.is_over.wait(BEAT_SECONDS):
            for rank in self.watched:
                count = seen[rank]
                with suppress(RuntimeError):  # the store is gone
                    store.add(str(self.rank), 1)
                    count = store.add(str(rank), 0)
                missed[rank] = missed[rank] + 1 if seen[rank] == count < LEFT else 0
                seen[rank] = count
                if missed[rank] == (BEATS if count else MEETING_BEATS):
                    self._give_up(rank)
        with suppress(RuntimeError):  # after an error this rank does not leave, so that the others notice its death
            store.add(str(self.rank), LEFT if self.is_done else 0)

    def _give_up(self, rank: int) -> NoReturn:
        log.error("mlmkit: rank %d does not answer. %s", rank, RESUME)
        os._exit(1)  # the main thread is blocked in C++

    def stop(self, *, is_done: bool) -> None:
        """Stop counting; the other ranks no longer wait for a rank that `is_done`."""
        self.is_done = is_done
        self.is_over.set()
        self.join(BEAT_SECONDS)  # it may be waiting for a store that is gone


_heartbeats: list[_Heartbeat] = []
