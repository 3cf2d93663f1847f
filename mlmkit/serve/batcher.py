"""The dynamic batcher: rows of many requests in one call of the engine.

All of its state belongs to the event loop; only the engine's call runs in a thread, so nothing is locked.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from mlmkit.backends import Backend, Batch, Scored
from mlmkit.batching import pad
from mlmkit.serve.errors import ApiError, overloaded, shutting_down
from mlmkit.serve.limits import LARGEST_LOGITS
from mlmkit.serve.metrics import Metrics

log = logging.getLogger(__name__)

FREE_PADDING = 64  # tokens: a call of its own would cost a row more than that
MEMORY = 0.2  # the weight of the last call in the mean of the engine's rate


@dataclass(eq=False)
class _Work:
    """A request's rows that still wait, by descending length, and what came of the others."""

    rows: list[tuple[int, Batch]]
    results: list[Scored | None]
    answer: asyncio.Future[list[Scored]]
    arrived: float
    tokens: int  # of the rows
    is_counted: bool = False  # among the requests whose time in the queue is known


@dataclass
class Batcher:
    """Merges rows into calls of at most `batch_tokens` (rows x longest), waiting at most `max_wait` seconds for more.

    One call in two begins with the request that came first, so that none starves; the calls between begin with the one
    that has least left to do, so that a burst of long texts, or one request of thousands of rows, does not hold up
    short ones. A call is filled with rows of similar length in the same order.
    """

    backend: Backend
    metrics: Metrics
    batch_tokens: int
    queue_tokens: int
    max_wait: float
    waiting: dict[int, _Work] = field(default_factory=dict)  # in order of arrival
    tokens: int = 0  # of the rows that wait
    rate: float = 0.0  # tokens a second, of late

    def __post_init__(self) -> None:
        self._engine = ThreadPoolExecutor(1, "engine")
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._shortest_next = False
        self._last_requests, self._last_seconds = 0, 0.0  # of the last call
        self._closing = False
        self.most_positions = max(LARGEST_LOGITS[self.backend.device] // self.backend.info.vocabulary_size, 1)
        self._loop_task = asyncio.create_task(self._serve())
        self._loop_task.add_done_callback(self._died)

    async def score(self, rows: Sequence[Batch]) -> list[Scored]:
        """What the engine says of each row. Cancelled, the rows leave the queue.

        A row with more positions than one call may have is put in several times, each with some of them. Raises
        `ApiError` where the queue is full or closing, and what the engine raises.
        """
        parts = [cut(row, self.most_positions) for row in rows]
        rows = [part for row in parts for part in row]
        tokens = sum(row.input_ids.size for row in rows)
        if self._closing:
            raise shutting_down()
        self.check_size(tokens)
        if self.tokens + tokens > self.queue_tokens:
            raise overloaded("the queue is full", self.delay())
        if not rows:
            return []
        ordered = sorted(enumerate(rows), key=lambda item: -item[1].input_ids.size)
        answer = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        self.waiting[number] = _Work(ordered, [None] * len(rows), answer, time.perf_counter(), tokens)
        self._add_tokens(tokens)
        self._changed.set()
        try:
            scored = iter(await answer)
        finally:
            self._drop(number)
        return [join([next(scored) for _ in row]) for row in parts]

    def check_size(self, tokens: int) -> None:
        """Raise `ApiError` for what no queue of this size will ever hold."""
        if tokens > self.queue_tokens:
            message = f"this takes {tokens} tokens of the model, and the queue holds {self.queue_tokens}: send less"
            raise ApiError(413, "too_much_work", message)

    @property
    def is_alive(self) -> bool:
        """Whether calls are made."""
        return not self._loop_task.done()

    @property
    def failure(self) -> BaseException | None:
        """The error that it has died of."""
        task = self._loop_task
        return task.exception() if task.done() and not task.cancelled() else None

    def delay(self) -> float:
        """Seconds until the queue will have been worked off, at the rate of late."""
        return self.tokens / self.rate if self.rate else 1.0

    async def close(self, *, answer: bool = True) -> None:
        """Take nothing more. With `answer`, what waits is worked off first; without, it is refused."""
        self._closing = True
        if not answer:
            for work in self.waiting.values():
                if not work.answer.done():
                    work.answer.set_exception(shutting_down())
        while self.waiting and not self._loop_task.done():
            await asyncio.sleep(0.01)
        self._loop_task.cancel()
        self._engine.shutdown(wait=answer, cancel_futures=True)

    def _died(self, _: asyncio.Task[None]) -> None:
        """A defect of ours: nobody is to wait for what does not come, and the process is to be started again."""
        if (error := self.failure) is None:
            return
        log.critical("the batcher has died", exc_info=error)
        self._closing = True
        for work in self.waiting.values():
            if not work.answer.done():
                work.answer.set_exception(error)

    # ------------------------------------------------------------ one call after another

    async def _serve(self) -> None:
        while True:
            await self._gather()
            if taken := self._take():  # or they have left while they waited for company
                await self._call(taken)
            del taken  # tens of megabytes, until the next call

    async def _call(self, taken: list[tuple[_Work, int, Batch]]) -> None:
        loop, begun = asyncio.get_running_loop(), time.perf_counter()
        try:
            results = await loop.run_in_executor(self._engine, run, self.backend, [row for _, _, row in taken])
        except Exception as error:
            for work in {work for work, _, _ in taken}:
                if not work.answer.done():
                    work.answer.set_exception(error)
            return
        seconds = self._last_seconds = time.perf_counter() - begun
        for (work, place, _), result in zip(taken, results, strict=True):
            work.results[place] = result
        for work in {work for work, _, _ in taken}:
            done = [result for result in work.results if result is not None]
            if len(done) == len(work.results) and not work.answer.done():
                work.answer.set_result(done)
        loop.call_soon(self._count, [row for _, _, row in taken], seconds)  # behind those who have their answers

    def _count(self, rows: Sequence[Batch], seconds: float) -> None:
        padded = len(rows) * max(row.input_ids.shape[1] for row in rows)
        self.rate = padded / seconds * (MEMORY if self.rate else 1) + self.rate * (1 - MEMORY)
        self.metrics.saw_batch(len(rows), sum(row.input_ids.size for row in rows), padded, seconds)

    async def _gather(self) -> None:
        """Wait for work, and then for as many requests as the last call had.

        Clients that wait for their answers come back together; a single client waits for nobody. Nobody waits for
        longer than `max_wait`, nor than the last call took, as that would cost more than company can bring.
        """
        while not any(work.rows for work in self.waiting.values()):
            self._changed.clear()
            await self._changed.wait()
        until = time.perf_counter() + min(self.max_wait, self._last_seconds)
        while sum(bool(work.rows) for work in self.waiting.values()) < self._last_requests:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), until - time.perf_counter())
            except TimeoutError:
                return

    def _take(self) -> list[tuple[_Work, int, Batch]]:
        """The rows of the next call, taken from the queue, each with its place in its request."""
        works = [work for work in self.waiting.values() if work.rows]
        if self._shortest_next:
            works.sort(key=lambda work: work.tokens)
        self._shortest_next = not self._shortest_next
        taken: list[tuple[_Work, int, Batch]] = []
        room = _Room(self.backend, self.batch_tokens, self.most_positions)
        now = time.perf_counter()
        for work in works:
            left = []
            for number, (place, row) in enumerate(work.rows):
                if room.is_full:  # thousands may be left: they are not looked at in each call
                    left += work.rows[number:]
                    break
                if room.takes(row):
                    taken.append((work, place, row))
                    work.tokens -= row.input_ids.size
                else:
                    left.append((place, row))
            if len(left) < len(work.rows) and not work.is_counted:
                work.is_counted = True
                self.metrics.saw_wait(now - work.arrived)
            work.rows = left
            if room.is_full:
                break
        self._last_requests = len({work for work, _, _ in taken})
        self._add_tokens(-sum(row.input_ids.size for _, _, row in taken))
        return taken

    def _drop(self, number: int) -> None:
        work = self.waiting.pop(number)
        self._add_tokens(-work.tokens)
        work.rows, work.tokens = [], 0

    def _add_tokens(self, tokens: int) -> None:
        self.tokens += tokens
        self.metrics.queue_tokens.set(self.tokens)


@dataclass
class _Room:
    """What a call has room for: rows of similar length, as many as the budget allows, and at least one."""

    backend: Backend
    budget: int
    positions: int
    rows: int = 0
    real: int = 0
    longest: int = 0
    is_full: bool = False

    def takes(self, row: Batch) -> bool:
        """Whether the row goes in; if so, it is counted."""
        length = row.input_ids.shape[1]
        longest, real = max(self.longest, length), self.real + length
        padded = longest * (self.rows + 1)
        if self.rows:
            if padded > self.budget or len(row.positions) > self.positions:
                return False
            if padded - real > max(real // 4, FREE_PADDING):
                return False
            if self.backend.info.sees_padding and length != self.longest:
                return False
        self.rows, self.real, self.longest = self.rows + 1, real, longest
        self.positions -= len(row.positions)
        # Scales found while the model runs make a row's scores depend on its mates: it runs alone.
        self.is_full = padded + longest > self.budget or self.backend.info.couples_batch
        return True


def run(backend: Backend, rows: Sequence[Batch]) -> list[Scored]:
    """The rows, `[1, seq]` each, through the engine in one batch."""
    if len(rows) == 1:
        return [backend.score(rows[0])]
    ends = np.cumsum([len(row.positions) for row in rows])[:-1]
    scored = backend.score(merge(rows, backend.tokenizer.pad_id))
    return [Scored(*part) for part in zip(*(np.split(values, ends) for values in scored), strict=True)]


def cut(row: Batch, most: int) -> list[Batch]:
    """The row once for each `most` of its positions."""
    begins = range(0, max(len(row.positions), 1), most)
    return [row._replace(positions=row.positions[i : i + most], targets=row.targets[i : i + most]) for i in begins]


def join(parts: Sequence[Scored]) -> Scored:
    """The scores of all parts, in their order."""
    return parts[0] if len(parts) == 1 else Scored(*map(np.concatenate, zip(*parts, strict=True)))


def merge(rows: Sequence[Batch], pad_id: int) -> Batch:
    """One batch of rows `[1, seq]` of any lengths, padded on the right to the longest."""
    input_ids, _ = pad([row.input_ids[0] for row in rows], pad_id)
    attention_mask, _ = pad([row.attention_mask[0] for row in rows], 0)
    longest = input_ids.shape[1]
    return Batch(
        input_ids,
        attention_mask,
        np.concatenate([row.positions + number * longest for number, row in enumerate(rows)]),
        np.concatenate([row.targets for row in rows]),
    )


def split_rows(batch: Batch) -> Iterator[Batch]:
    """Each row of a batch as one, with its positions; the inverse of `merge` where positions ascend by row."""
    seq = batch.input_ids.shape[1]
    for number in range(len(batch.input_ids)):
        own = batch.positions // seq == number
        yield Batch(
            batch.input_ids[number : number + 1],
            batch.attention_mask[number : number + 1],
            batch.positions[own] - number * seq,
            batch.targets[own],
        )
