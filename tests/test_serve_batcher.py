"""The batcher: every row gets its own scores, whatever rows share its call, and no request starves."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmkit.backends import Backend, Batch, Scored, load, merge_rows
from mlmkit.serve.batcher import Batcher, _Call, split_rows
from mlmkit.serve.errors import ApiError
from mlmkit.serve.metrics import Metrics


@pytest.fixture(scope="module")
def backend(artifact: Callable[[str], Path]) -> Backend:
    return load(str(artifact("bert")))


def row(length: int, *positions: int, seed: int = 0) -> Batch:
    ids = np.random.default_rng(seed).integers(5, 600, (1, length))
    masks = np.array(positions or [length // 2], dtype=np.int64)
    return Batch(ids, np.ones_like(ids), masks, np.arange(5, 5 + len(masks)))


@st.composite
def rows(draw: st.DrawFn) -> list[Batch]:
    lengths = draw(st.lists(st.integers(1, 64), min_size=1, max_size=12))
    return [
        row(length, *draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4)), seed=seed)
        for seed, length in enumerate(lengths)
    ]


@given(rows())
@settings(deadline=None, max_examples=30)
def test_split_undoes_merge_rows(given_rows):
    merged = merge_rows(given_rows, pad_id=0)
    for one, again in zip(given_rows, split_rows(merged), strict=True):
        length = one.input_ids.shape[1]
        np.testing.assert_array_equal(again.input_ids[:, :length], one.input_ids)
        assert again.attention_mask.sum() == length
        np.testing.assert_array_equal(again.positions, one.positions)
        np.testing.assert_array_equal(again.targets, one.targets)


def serving(backend: Any, use: Callable[[Batcher], Awaitable[Any]], max_positions: int = 500, **options: Any) -> Any:
    """The result of `use`, called with a running batcher."""

    async def main() -> Any:
        settings = {"batch_tokens": 128, "queue_tokens": 1 << 16, "max_wait": 0.0} | options
        batcher = Batcher(backend, Metrics(), **settings)
        batcher.max_positions = max_positions
        try:
            return await use(batcher)
        finally:
            await batcher.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


@given(st.lists(rows(), min_size=1, max_size=6), st.integers(1, 400), st.sampled_from([1, 2, 3, 500]))
@settings(deadline=None, max_examples=25)
def test_every_row_gets_the_scores_that_it_gets_alone(backend, requests, batch_tokens, max_positions):
    async def use(batcher: Batcher) -> Any:
        return await asyncio.gather(*(batcher.score(request) for request in requests))

    recorder = Recorder(backend)
    recorder.leave.release(1000)
    answers = serving(recorder, use, max_positions, batch_tokens=batch_tokens)
    assert max(len(call.positions) for call in recorder.calls) <= max_positions
    for request, answer in zip(requests, answers, strict=True):
        for one, scored in zip(request, answer, strict=True):
            expected = backend.score(one)
            np.testing.assert_allclose(scored.log_prob, expected.log_prob, atol=2e-5)
            np.testing.assert_allclose(scored.top_log_prob, expected.top_log_prob, atol=2e-5)
            assert scored.top_id.shape == expected.top_id.shape


class Recorder:
    """A real backend that records its calls, and waits for `leave` before each."""

    def __init__(self, backend: Backend, *, sees_padding: bool = False, precision: str = "fp32") -> None:
        self.name, self.device, self.tokenizer = backend.name, backend.device, backend.tokenizer
        self.manifest = backend.manifest
        self.info = replace(backend.info, sees_padding=sees_padding, precision=precision)
        self._backend, self.calls, self.leave = backend, list[Batch](), threading.Semaphore(0)

    def score(self, batch: Batch) -> Scored:
        assert self.leave.acquire(timeout=30)
        self.calls.append(batch)
        return self._backend.score(batch)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [call.input_ids.shape for call in self.calls]


def with_batcher(**options: Any) -> Callable[[Callable[[Batcher, "Recorder"], Awaitable[None]]], Callable[..., None]]:
    """Run an asynchronous test with a batcher and the recorder of its calls."""

    def decorate(test: Callable[[Batcher, "Recorder"], Awaitable[None]]) -> Callable[..., None]:
        def run(backend: Backend) -> None:
            recorder = Recorder(backend)
            serving(recorder, lambda batcher: test(batcher, recorder), **options)

        return run

    return decorate


async def begin(batcher: Batcher, *requests: list[Batch]) -> list[asyncio.Task[Any]]:
    """Queue the requests, one after the other."""
    tasks = []
    for request in requests:
        tasks.append(asyncio.create_task(batcher.score(request)))
        await asyncio.sleep(0.01)
    return tasks


@with_batcher()
async def test_many_masks_of_many_requests_share_one_call(batcher: Batcher, recorder: Recorder) -> None:
    tasks = await begin(batcher, [row(8)], *[[row(8, 1, 2, 3)] for _ in range(6)])
    recorder.leave.release(2)
    await asyncio.gather(*tasks)
    assert recorder.shapes == [(1, 8), (6, 8)]
    assert len(recorder.calls[1].positions) == 18


@with_batcher()
async def test_long_and_short_texts_do_not_starve_each_other(batcher: Batcher, recorder: Recorder) -> None:
    done: list[str] = []
    long = await begin(batcher, *[[row(64)] for _ in range(20)])
    short = await begin(batcher, *[[row(8)] for _ in range(40)])
    for kind, tasks in (("long", long), ("short", short)):
        for task in tasks:
            task.add_done_callback(lambda _, kind=kind: done.append(kind))
    recorder.leave.release(100)
    await asyncio.gather(*long, *short)
    # Two long ones or sixteen short ones fill a call, and calls alternate while both wait.
    assert "short" in done[:4]
    last_short = len(done) - 1 - done[::-1].index("short")
    assert 3 <= done[:last_short].count("long") <= 8
    assert done.count("long") == 20


@with_batcher()
async def test_a_request_of_many_rows_does_not_delay_the_others(batcher: Batcher, recorder: Recorder) -> None:
    order: list[str] = []
    (large,) = await begin(batcher, [row(16, seed=seed) for seed in range(200)])
    small = await begin(batcher, [row(16)], [row(16)])
    large.add_done_callback(lambda _: order.append("large"))
    small[1].add_done_callback(lambda _: order.append("small"))
    recorder.leave.release(3)
    await asyncio.gather(*small)
    recorder.leave.release(200)
    await large
    assert order == ["small", "large"]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=30), st.integers(1, 300), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=25)
def test_calls_keep_to_the_budget_and_to_the_models_limits(backend, lengths, budget, sees_padding, couples):
    recorder = Recorder(backend, sees_padding=sees_padding, precision="int8-dynamic" if couples else "fp32")
    recorder.leave.release(1000)

    async def use(batcher: Batcher) -> None:
        await asyncio.gather(*(batcher.score([row(length)]) for length in lengths))

    serving(recorder, use, batch_tokens=budget)
    assert sum(len(call.input_ids) for call in recorder.calls) == len(lengths)
    for call in recorder.calls:
        assert len(call.input_ids) == 1 or call.input_ids.size <= budget
        if couples:
            assert len(call.input_ids) == 1
        if sees_padding:
            assert call.attention_mask.all()


@with_batcher()
async def test_a_cancelled_request_leaves_the_queue(batcher: Batcher, recorder: Recorder) -> None:
    first, gone, last = await begin(batcher, [row(8)], [row(40), row(41)], [row(9)])
    assert batcher.tokens == 90
    gone.cancel()
    await asyncio.sleep(0.01)
    assert batcher.tokens == 9
    recorder.leave.release(2)
    await asyncio.gather(first, last)
    assert not batcher.waiting
    assert batcher.tokens == 0
    assert recorder.shapes == [(1, 8), (1, 9)]


@with_batcher(queue_tokens=100)
async def test_a_full_queue_and_too_much_work_are_refused(batcher: Batcher, recorder: Recorder) -> None:
    tasks = await begin(batcher, [row(8)], [row(60)])
    with pytest.raises(ApiError) as full:
        await batcher.score([row(50)])
    assert (full.value.status, full.value.error_type) == (429, "overloaded")
    assert int(full.value.headers["Retry-After"]) >= 1
    with pytest.raises(ApiError) as large:
        await batcher.score([row(60), row(60)])
    assert (large.value.status, large.value.error_type) == (413, "too_much_work")
    recorder.leave.release(2)
    await asyncio.gather(*tasks)
    assert await batcher.score([]) == []


def test_an_engine_error_reaches_only_the_requests_of_that_call(backend):
    class Failing(Recorder):
        def score(self, batch: Batch) -> Scored:
            if batch.input_ids.shape[1] == 30:
                raise RuntimeError("no")
            return super().score(batch)

    recorder = Failing(backend)
    recorder.leave.release(10)

    async def use(batcher: Batcher) -> Any:
        return await asyncio.gather(*(batcher.score([row(n)]) for n in (8, 30, 9)), return_exceptions=True)

    first, failed, last = serving(recorder, use, batch_tokens=1)
    assert isinstance(failed, RuntimeError)
    assert len(first) == len(last) == 1


@with_batcher()
async def test_close_answers_the_requests_in_the_queue(batcher: Batcher, recorder: Recorder) -> None:
    tasks = await begin(batcher, [row(8)], [row(9)])
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0.01)
    with pytest.raises(ApiError, match="shutting down"):
        await batcher.score([row(8)])
    recorder.leave.release(2)
    await asyncio.gather(*tasks, closing)


@with_batcher()
async def test_close_can_refuse_the_requests_in_the_queue(batcher: Batcher, recorder: Recorder) -> None:
    tasks = await begin(batcher, [row(8)], [row(9)])
    closing = asyncio.create_task(batcher.close(answer=False))
    for task in tasks:
        with pytest.raises(ApiError, match="shutting down"):
            await task
    recorder.leave.release(2)
    await closing


@with_batcher(max_wait=5.0)
async def test_clients_that_come_back_together_are_waited_for(batcher: Batcher, recorder: Recorder) -> None:
    async def client(batcher: Batcher) -> None:
        for _ in range(3):
            await batcher.score([row(8)])
            await asyncio.sleep(0.05)

    clients = [asyncio.create_task(client(batcher)) for _ in range(4)]
    for _ in range(10):
        await asyncio.sleep(0.5)  # each call takes this long, which bounds the wait
        recorder.leave.release()
        if all(task.done() for task in clients):
            break
    await asyncio.gather(*clients)
    assert recorder.shapes[-2:] == [(4, 8), (4, 8)]


@with_batcher(max_wait=5.0)
async def test_a_request_cancelled_while_its_call_waits_for_more_leaves_nothing(
    batcher: Batcher, recorder: Recorder
) -> None:
    first, *pair = await begin(batcher, [row(8)], [row(8)], [row(8)])
    await asyncio.sleep(0.3)  # the next call waits this long for two requests
    recorder.leave.release(100)
    await asyncio.gather(first, *pair)
    batcher._last_seconds = 0.3  # as if the call of two had been slow
    (alone,) = await begin(batcher, [row(8)])
    alone.cancel()
    await asyncio.sleep(0.4)
    assert len(await batcher.score([row(9)])) == 1
    assert recorder.shapes == [(1, 8), (2, 8), (1, 9)]


@with_batcher(max_wait=1000.0)
async def test_no_request_waits_longer_than_a_call_takes(batcher: Batcher, recorder: Recorder) -> None:
    recorder.leave.release(100)
    await asyncio.gather(*(batcher.score([row(8)]) for _ in range(4)))
    await batcher.score([row(8)])
    assert sum(shape[0] for shape in recorder.shapes) == 5


def test_a_call_looks_at_no_more_rows_than_it_has_room_for(backend, monkeypatch):
    """Each call once looked at all rows of a request of thousands, on the event loop."""
    looks, add = [], _Call.add
    monkeypatch.setattr(_Call, "add", lambda call, row: looks.append(row) or add(call, row))

    async def use(batcher: Batcher) -> None:
        await batcher.score([row(3)] * 500)

    serving(backend, use)  # 128 tokens are not a multiple of 3
    assert len(looks) == 500
