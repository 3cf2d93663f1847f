# ruff: noqa: F401, F811 (fixtures are imported)
"""The control flow of running TensorRT plans, on stand-ins (tensorrt_stub.py).

This proves buffers, splits, order, pooling and every error's message. It proves nothing about TensorRT or a GPU: what
the calls are named is checked in test_tensorrt_api.py, and only test_tensorrt_real.py runs them. Plans are built for
real in test_tensorrt_build.py.
"""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tensorrt_fixtures import SHAPES, SMALL, assert_equal, backend, folder, machine, plan, random_batch

from mlmkit.artifact import hash_files, parse_manifest, read_manifest, write_manifest
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.errors import CheckError, UserError


@pytest.mark.parametrize("indices", ["INT64", "INT32"])
@pytest.mark.parametrize("sizes", [SMALL, {"max_batch": 64, "max_masked": 4096}, {"max_batch": 1, "max_masked": 1}])
def test_results_are_those_of_onnx(machine, plan, indices, sizes):
    machine.indices = indices
    folder = plan(**sizes)
    here, there = backend(folder), OnnxBackend(str(folder))
    assert (here.name, here.device, here.info) == ("tensorrt", "cuda", there.info)
    for shape in SHAPES:
        batch = random_batch(*shape)
        assert_equal(here.score(batch), there.score(batch))


def test_batches_are_split_to_the_profile(machine, plan):
    here = backend(plan())
    here.score(random_batch(17, 13, 300))
    runs = machine.called("execute")
    assert all(shapes["input_ids"][0] <= 4 and shapes["positions"][0] <= 16 for _, shapes in runs)
    assert sum(shapes["positions"][0] for _, shapes in runs) == 300
    assert len(runs) < 40


def test_nothing_runs_without_positions(machine, plan):
    here = backend(plan())
    assert here.score(random_batch(5, 7, 0)).top_id.shape == (0, 100)
    assert here._loaded is None, "nothing was even loaded"


def test_a_small_batch_takes_the_first_profile_and_a_large_one_the_last(machine, plan):
    here = backend(plan(max_batch=32, max_masked=4096))
    for shape in [(1, 9, 1), (4, 9, 64), (5, 9, 1), (4, 9, 65)]:
        here.score(random_batch(*shape))
    assert [profile for profile, _ in machine.called("execute")] == [0, 0, 1, 1]


@pytest.mark.parametrize("axis", ["batch", "seq", "masked"])
def test_a_plan_for_no_single_token_is_refused(machine, plan, axis):
    folder = plan()
    manifest = parse_manifest(folder)
    assert manifest.tensorrt is not None
    profiles = [replace(profile, **{axis: (3, *getattr(profile, axis)[1:])}) for profile in manifest.tensorrt.profiles]
    write_manifest(folder, replace(manifest, tensorrt=replace(manifest.tensorrt, profiles=profiles)))
    with pytest.raises(UserError, match="takes no batch of one token"):
        backend(folder)


def test_memory_is_kept_and_grown(machine, plan):
    here = backend(plan())
    here.score(random_batch(1, 8, 2))
    first = set(machine.allocations)
    here.score(random_batch(1, 8, 2))
    here.score(random_batch(1, 7, 1))
    assert set(machine.allocations) == first
    here.score(random_batch(4, 64, 2))
    assert len(set(machine.allocations) - first) == 2, "the inputs' arena, on both sides"
    assert len(machine.allocations) == len(first)


def test_one_lane_runs_one_thread_at_a_time(machine, plan):
    folder = plan()
    here, there = backend(folder), OnnxBackend(str(folder))
    batches = [random_batch(*shape) for shape in SHAPES * 3]
    expected = [there.score(batch) for batch in batches]
    found: list[Any] = [None] * len(batches)

    def work(first: int) -> None:
        for index in range(first, len(batches), 6):
            found[index] = here.score(batches[index])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)
    assert len(machine.streams) <= 2, "a context for each profile"


@pytest.mark.parametrize(
    ("refuses", "error", "message"),
    [
        (
            "shape",
            CheckError,
            r"shape \(2, 9\) with 3 positions: input_ids was refused .*\(input_ids is out of the prof",
        ),
        ("address", CheckError, r"address of input_ids was refused \(TensorRT gives no reason\)"),
        ("output shape", CheckError, "shape of log_prob is not settled"),
        ("execution", CheckError, "the execution was refused"),
        ("context", UserError, "no room for another execution context"),
    ],
)
def test_a_run_that_fails_says_why_and_the_next_may_work(machine, plan, refuses, error, message):
    folder = plan()
    here, batch = backend(folder), random_batch(2, 9, 3)
    machine.refuses = refuses
    with pytest.raises(error, match=message) as caught:
        here.score(batch)
    assert "\n" not in str(caught.value)
    machine.refuses = ""
    assert_equal(here.score(batch), OnnxBackend(str(folder)).score(batch))


def test_a_gpu_without_room(machine, plan):
    here = backend(plan())
    machine.memory = 100
    with pytest.raises(UserError, match="the GPU is out of memory"):
        here.score(random_batch(1, 9, 3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_ids": 600}, "input_ids has a value outside 0 to 599"),
        ({"input_ids": -1}, "input_ids has"),
        ({"targets": 600}, "targets has"),
        ({"positions": 18}, "positions has a value outside 0 to 17"),
    ],
)
def test_an_index_out_of_range_never_reaches_the_gpu(machine, plan, values, message):
    ((name, value),) = values.items()
    batch = random_batch(2, 9, 3)
    wrong = getattr(batch, name).copy()
    wrong.flat[0] = value
    with pytest.raises(CheckError, match=message):
        backend(plan()).score(batch._replace(**{name: wrong}))
    assert not machine.called("execute")


def test_long_rows_run_one_by_one(machine, plan):
    folder = plan(max_seq=20)
    here, there = backend(folder), OnnxBackend(str(folder))
    assert here.info.max_length == 64, "no measurement may depend on what a plan was tuned for"
    for shape in [(5, 20, 30), (5, 21, 30), (1, 64, 40), (3, 64, 1)]:
        batch = random_batch(*shape)
        assert_equal(here.score(batch), there.score(batch))
    assert {shapes["input_ids"] for profile, shapes in machine.called("execute") if profile == 2} == {(1, 21), (1, 64)}
    with pytest.raises(CheckError, match="takes 64 tokens and this batch has rows of 65"):
        here.score(random_batch(1, 65, 1))
