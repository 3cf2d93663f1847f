"""The dynamic batcher: one engine call takes rows of many requests.

score() -> queue -> _wait_for_rows -> _take_rows -> engine, in its own thread -> answers of the requests

All state belongs to the event loop; only the engine runs in a thread, so there are no locks.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from mlmkit.backends import Backend, Batch, Scored, score_together
from mlmkit.serve.errors import ApiError, overloaded, shutting_down
from mlmkit.serve.limits import MAX_LOGITS
from mlmkit.serve.metrics import Metrics

log = logging.getLogger(__name__)

FREE_PADDING_TOKENS = 64  # a separate call for a row costs more than this much padding
RATE_WEIGHT = 0.2  # of the last call, in the moving average of the engine's rate


@dataclass(eq=False)
class _Request:
    """Rows that wait, longest first, each with its index in `results`; results of the others; tokens that wait."""

    rows: list[tuple[int, Batch]]
    results: list[Scored | None]
    answer: asyncio.Future[list[Scored]]
    arrival: float
    tokens: int


@dataclass
class Batcher:
    """Merges rows into calls of at most `batch_tokens` (rows x longest row). At most `queue_tokens` tokens wait.

    Every second call starts with the oldest request, so that none starves. The calls between start with the request
    that has the fewest tokens left, so that a burst of long texts, or one request of thousands of rows, does not hold
    up short ones. A call is then filled, in that order, with rows of similar length.
    """

    backend: Backend
    metrics: Metrics
    batch_tokens: int
    queue_tokens: int
    max_wait: float
    waiting: dict[_Request, None] = field(default_factory=dict)  # an ordered set, oldest first
    tokens: int = 0  # in the queue
    rate: float = 0.0  # tokens per second, moving average
    failure: Exception | None = None  # what the batcher died of

    def __post_init__(self) -> None:
        self.max_positions = max(MAX_LOGITS[self.backend.device] // self.backend.info.vocabulary_size, 1)
        self._engine = ThreadPoolExecutor(1, "engine")
        self._has_changed = asyncio.Event()
        self._is_shortest_next = self._is_closing = False
        self._last_requests, self._last_seconds = 0, 0.0  # of the last call
        self._task = asyncio.create_task(self._run())

    async def score(self, rows: Sequence[Batch]) -> list[Scored]:
        """The engine's scores of each row, `[1, seq]` each. If cancelled, the rows leave the queue.

        A row with more positions than a call may have goes through the engine several times, with a part of them each.
        Raises `ApiError` if the queue is full or closing, and whatever the engine raises.
        """
        parts = [split_positions(row, self.max_positions) for row in rows]
        rows = [part for row in parts for part in row]
        tokens = sum(row.input_ids.size for row in rows)
        if self._is_closing:
            raise shutting_down()
        self.check_size(tokens)
        if self.tokens + tokens > self.queue_tokens:
            raise overloaded("the queue is full", self.tokens / self.rate if self.rate else 1.0)
        if not rows:
            return []
        longest_first = sorted(enumerate(rows), key=lambda item: -item[1].input_ids.size)
        answer = asyncio.get_running_loop().create_future()
        request = _Request(longest_first, [None] * len(rows), answer, time.perf_counter(), tokens)
        self.waiting[request] = None
        self._add_tokens(tokens)
        self._has_changed.set()
        try:
            scored = iter(await answer)
        finally:
            del self.waiting[request]
            self._add_tokens(-request.tokens)
            request.rows, request.tokens = [], 0
        return [join_positions([next(scored) for _ in row]) for row in parts]

    def check_size(self, tokens: int) -> None:
        """Raise `ApiError` for a request of more tokens than the queue can ever hold."""
        if tokens > self.queue_tokens:
            message = f"this is {tokens} tokens of work for the model; the limit is {self.queue_tokens}: send less"
            raise ApiError(413, "too_much_work", message)

    @property
    def is_alive(self) -> bool:
        """Whether the batcher makes calls."""
        return not self._task.done()

    async def close(self, *, answer: bool = True) -> None:
        """Accept no more requests; answer those in the queue, or without `answer` refuse them."""
        self._is_closing = True
        if not answer:
            self._fail_all(shutting_down())
        while self.waiting and self.is_alive:
            await asyncio.sleep(0.01)
        self._task.cancel()
        self._engine.shutdown(wait=answer, cancel_futures=True)

    def _fail_all(self, error: Exception) -> None:
        for request in self.waiting:
            if not request.answer.done():
                request.answer.set_exception(error)

    async def _run(self) -> None:
        try:
            while True:
                await self._wait_for_rows()
                if taken := self._take_rows():  # none if their requests were cancelled meanwhile
                    await self._call(taken)
                del taken  # tens of megabytes, until the next call
        except Exception as error:  # a defect of ours: fail the requests that would wait forever
            log.critical("the batcher died", exc_info=error)
            self.failure, self._is_closing = error, True
            self._fail_all(error)

    async def _wait_for_rows(self) -> None:
        """Wait for a row, then for as many requests as the last call had.

        Clients that were answered together come back together; a single client never waits. The wait is at most
        `max_wait`, and at most as long as the last call took: a larger batch cannot save more than that.
        """
        while not any(request.rows for request in self.waiting):
            self._has_changed.clear()
            await self._has_changed.wait()
        deadline = time.perf_counter() + min(self.max_wait, self._last_seconds)
        while sum(bool(request.rows) for request in self.waiting) < self._last_requests:
            self._has_changed.clear()
            try:
                await asyncio.wait_for(self._has_changed.wait(), deadline - time.perf_counter())
            except TimeoutError:
                return

    def _take_rows(self) -> list[tuple[_Request, int, Batch]]:
        """Remove the rows of the next call from the queue; each comes with its request and its index there."""
        requests = [request for request in self.waiting if request.rows]
        if self._is_shortest_next:
            requests.sort(key=lambda request: request.tokens)
        self._is_shortest_next = not self._is_shortest_next
        taken: list[tuple[_Request, int, Batch]] = []
        call = _Call(self.backend, self.batch_tokens, self.max_positions)
        now = time.perf_counter()
        for request in requests:
            left = []
            for number, (index, row) in enumerate(request.rows):
                if call.is_full:  # thousands of rows may be left: no call looks at all of them
                    left += request.rows[number:]
                    break
                if call.add(row):
                    taken.append((request, index, row))
                    request.tokens -= row.input_ids.size
                else:
                    left.append((index, row))
            if len(left) < len(request.rows) == len(request.results):  # its first rows
                self.metrics.count_wait(now - request.arrival)
            request.rows = left
            if call.is_full:
                break
        self._last_requests = len({request for request, _, _ in taken})
        self._add_tokens(-sum(row.input_ids.size for _, _, row in taken))
        return taken

    async def _call(self, taken: list[tuple[_Request, int, Batch]]) -> None:
        loop, start = asyncio.get_running_loop(), time.perf_counter()
        rows, requests = [row for _, _, row in taken], {request for request, _, _ in taken}
        try:
            scored = await loop.run_in_executor(self._engine, score_together, self.backend, rows)
        except Exception as error:
            for request in requests:
                if not request.answer.done():
                    request.answer.set_exception(error)
            return
        seconds = self._last_seconds = time.perf_counter() - start
        for (request, index, _), scores in zip(taken, scored, strict=True):
            request.results[index] = scores
        for request in requests:
            done = [scores for scores in request.results if scores is not None]
            if len(done) == len(request.results) and not request.answer.done():
                request.answer.set_result(done)
        loop.call_soon(self._count_call, rows, seconds)  # after the requests have their answers

    def _count_call(self, rows: Sequence[Batch], seconds: float) -> None:
        padded = len(rows) * max(row.input_ids.shape[1] for row in rows)
        self.rate = padded / seconds * (RATE_WEIGHT if self.rate else 1) + self.rate * (1 - RATE_WEIGHT)
        self.metrics.count_call(len(rows), sum(row.input_ids.size for row in rows), padded, seconds)

    def _add_tokens(self, tokens: int) -> None:
        self.tokens += tokens
        self.metrics.queue_tokens.set(self.tokens)


@dataclass
class _Call:
    """The rows of one call so far: as many rows of similar length as the budgets allow, and at least one."""

    backend: Backend
    tokens_left: int  # a budget for rows x longest row
    positions_left: int
    rows: int = 0
    tokens: int = 0
    longest: int = 0
    is_full: bool = False

    def add(self, row: Batch) -> bool:
        """Add the row if it fits; return whether it did."""
        length = row.input_ids.shape[1]
        longest, tokens = max(self.longest, length), self.tokens + length
        padded = longest * (self.rows + 1)
        if self.rows:
            if padded > self.tokens_left or len(row.positions) > self.positions_left:
                return False
            if padded - tokens > max(tokens // 4, FREE_PADDING_TOKENS):
                return False
            if self.backend.info.sees_padding and length != self.longest:
                return False
        self.rows, self.tokens, self.longest = self.rows + 1, tokens, longest
        self.positions_left -= len(row.positions)
        # Dynamic quantization scales the whole batch: a row's scores would depend on the others, so it runs alone.
        self.is_full = padded + longest > self.tokens_left or self.backend.info.couples_batch
        return True


def split_rows(batch: Batch) -> Iterator[Batch]:
    """Each row of a batch, with its positions. Undoes `merge_rows` if positions ascend by row."""
    seq = batch.input_ids.shape[1]
    for number in range(len(batch.input_ids)):
        own = batch.positions // seq == number
        yield Batch(
            batch.input_ids[number : number + 1],
            batch.attention_mask[number : number + 1],
            batch.positions[own] - number * seq,
            batch.targets[own],
        )


def split_positions(row: Batch, most: int) -> list[Batch]:
    """The row several times, with at most `most` of its positions each."""
    starts = range(0, max(len(row.positions), 1), most)
    return [row._replace(positions=row.positions[i : i + most], targets=row.targets[i : i + most]) for i in starts]


def join_positions(parts: Sequence[Scored]) -> Scored:
    """Undo `split_positions`, for scores."""
    return parts[0] if len(parts) == 1 else Scored(*map(np.concatenate, zip(*parts, strict=True)))
