"""This process's place among those that `torchrun` started; alone, it is rank 0 of 1."""

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
TIME_TO_SPEAK = 5  # seconds
PATIENCE = timedelta(days=7)  # a rank may wait for another one's share of a long evaluation
BEAT_SECONDS, BEATS = 5.0, 12  # a rank that does not count for a minute is dead; one that works, or waits, counts
RESUME = "Start all ranks again with the same command: it resumes from what was saved last"
LEFT = 1 << 40  # more than any count: that rank needs no other any more
MEETING_BEATS = 120  # a rank may start ten minutes after another: imports, or a cluster's queue
_meetings = itertools.count()


def cores() -> int:
    """How many of the machine's cores this process may use: fewer than there are, in a container with a limit.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_LIMIT.read_text().split()
        return min(count, max(int(quota) // int(period), 1))
    except (OSError, ValueError):  # no such file, or a quota of "max"
        return count


def available_memory() -> float:
    """Bytes that this process may take, at most its container's limit; infinite where the system does not say."""
    found = [math.inf]
    for path, pattern, unit in ((MEMORY_LIMIT, r"\d+", 1), (Path("/proc/meminfo"), r"MemAvailable: +(\d+)", 1024)):
        with suppress(OSError):
            found += [unit * int(number) for number in re.findall(pattern, path.read_text())]
    return min(found)


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes; on this machine the process is `local` of `local_world`."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def join(self, backend: str = "gloo") -> None:
        """Meet the other ranks, if there are any and that has not been done."""
        if self.world > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                _pulses.append(_Pulse(self.rank, self.world))
                _pulses[-1].start()
                dist.init_process_group(backend, timeout=PATIENCE)

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
        """What `work` returns on the first rank, which alone does it while the others wait.

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
        """Leave the group; ranks that go on alone need not."""
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                while _pulses:
                    _pulses.pop().stop(is_done=sys.exc_info()[0] is None)
                dist.destroy_process_group()


class _Pulse(threading.Thread):
    """Counts in the store of a group, and ends this process once another rank does not: a collective waits for days.

    The first rank watches all, and the others the first, which also holds the store.
    """

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(daemon=True, name="pulse")
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
                with suppress(RuntimeError):  # the store has gone
                    store.add(str(self.rank), 1)
                    count = store.add(str(rank), 0)
                missed[rank] = missed[rank] + 1 if seen[rank] == count < LEFT else 0
                seen[rank] = count
                if missed[rank] == (BEATS if count else MEETING_BEATS):
                    self._give_up(rank)
        with suppress(RuntimeError):  # after an error others may wait for this one, and are to hear of it
            store.add(str(self.rank), LEFT if self.is_done else 0)

    def _give_up(self, rank: int) -> NoReturn:
        log.error("mlmkit: rank %d does not answer. %s", rank, RESUME)
        os._exit(1)  # the main thread waits in C++

    def stop(self, *, is_done: bool) -> None:
        """Count no more; a rank that `is_done` is no longer waited for."""
        self.is_done = is_done
        self.is_over.set()
        self.join(BEAT_SECONDS)  # it may wait for a store that has gone


_pulses: list[_Pulse] = []


@contextmanager
def said_once() -> Iterator[None]:
    """For mistakes that all processes of a machine make alike: the first raises the `UserError`.

    The others raise `EndedElsewhereError`. It is the first of each machine, as another may lack a file or a package.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(TIME_TO_SPEAK)  # torchrun ends all others when one has ended, and the first may be slower
        raise EndedElsewhereError from error


def ranks() -> Ranks:
    """From the environment that `torchrun` sets. Raises `UserError` when torch is missing."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    require("train", "torch")
    local = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    return Ranks(int(os.environ["RANK"]), world, *local)


def claim_gpu(place: Ranks) -> None:
    """Let this process see its own GPU alone, whatever then runs on it; to be called before CUDA is touched."""
    if place.local_world > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(place.local_world)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[place.local % len(names)]
