# ruff: noqa: F401, F811 (fixtures are imported)
"""Loading and running TensorRT plans, on stand-ins (tensorrt_stub.py): which plans are loaded, buffers, splits, errors.

It proves nothing about TensorRT or a GPU: test_tensorrt_api.py checks the names of the calls, test_tensorrt_build.py
builds real plans, and only test_tensorrt_real.py runs them.
"""

import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorrt_stub
from conftest import edit_record
from tensorrt_fixtures import SHAPES, SMALL, add_plan, assert_equal, backend, folder, machine, plan, rtx, rtx_plan
from test_export import random_batch

from mlmkit.artifact import hash_files, parse_manifest, read_manifest, write_manifest
from mlmkit.backends import load, tensorrt_obstacle
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.errors import CheckError, UserError


def change(folder: Path, **values: Any) -> None:
    """Change the manifest's description of the plan."""
    edit_record(folder / "mlmkit.json", tensorrt=described(folder) | values)


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mlmkit.json").read_text())["tensorrt"]


def change_profiles(folder: Path, axis: str, smallest: int) -> None:
    profiles = described(folder)["profiles"]
    change(folder, profiles=[profile | {axis: [smallest, *profile[axis][1:]]} for profile in profiles])


def drop_candidates(folder: Path) -> None:
    """Give the plan two outputs only."""
    header, _, graph = (folder / "model.plan").read_bytes().partition(b"\n")
    values = json.loads(header)
    values["outputs"] = values["outputs"][:2]
    (folder / "model.plan").write_bytes(json.dumps(values).encode() + b"\n" + graph)
    write_manifest(folder, replace(parse_manifest(folder), files=hash_files(folder)))


def drop_profile(folder: Path) -> None:
    change(folder, profiles=described(folder)["profiles"][1:])


DIRECT = (backend, lambda folder: load(str(folder), backend="tensorrt"))

# ------------------------------------------------------------------ running


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
    assert here.score(random_batch(5, 7, 0)).top_id.shape == (0, 100)
    assert not machine.called("execute")
    here.score(random_batch(17, 13, 300))
    runs = machine.called("execute")
    assert all(shapes["input_ids"][0] <= 4 and shapes["positions"][0] <= 16 for _, shapes in runs)
    assert sum(shapes["positions"][0] for _, shapes in runs) == 300
    assert len(runs) < 40


def test_a_batch_takes_the_first_profile_that_holds_it(machine, plan):
    here = backend(plan(max_batch=32, max_masked=4096))
    for shape in [(1, 9, 1), (4, 9, 64), (5, 9, 1), (4, 9, 65)]:
        here.score(random_batch(*shape))
    assert [profile for profile, _ in machine.called("execute")] == [0, 0, 1, 1]


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


def test_a_context_runs_one_thread_at_a_time(machine, plan):
    folder = plan()
    here, there = backend(folder), OnnxBackend(str(folder))
    batches = [random_batch(*shape) for shape in SHAPES * 3]
    with ThreadPoolExecutor(6) as pool:
        scored = list(pool.map(here.score, batches))
    for batch, values in zip(batches, scored, strict=True):
        assert_equal(values, there.score(batch))
    assert len(machine.streams) <= 2, "one context per profile"


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


@pytest.mark.parametrize(
    ("refuses", "error", "message"),
    [
        (
            "shape",
            CheckError,
            r"shape \(2, 9\) with 3 positions: TensorRT refused input_ids .*\(input_ids is out of the",
        ),
        ("address", CheckError, r"TensorRT refused the address of input_ids \(TensorRT gives no reason\)"),
        ("output shape", CheckError, "shape of log_prob does not follow"),
        ("execution", CheckError, "TensorRT refused to run it"),
        ("context", UserError, "no memory for another execution context"),
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


def test_a_gpu_without_memory(machine, plan):
    here = backend(plan())
    machine.memory = 100
    with pytest.raises(UserError, match="the GPU is out of memory"):
        here.score(random_batch(1, 9, 3))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input_ids", 600, "input_ids has a value outside 0 to 599"),
        ("input_ids", -1, "input_ids has"),
        ("targets", 600, "targets has"),
        ("positions", 18, "positions has a value outside 0 to 17"),
    ],
)
def test_an_index_out_of_range_never_reaches_the_gpu(machine, plan, name, value, message):
    batch = random_batch(2, 9, 3)
    wrong = getattr(batch, name).copy()
    wrong.flat[0] = value
    with pytest.raises(CheckError, match=message):
        backend(plan()).score(batch._replace(**{name: wrong}))
    assert not machine.called("execute")


# ------------------------------------------------------------------ which plans are loaded


def test_the_best_backend_is_picked(machine, plan, folder):
    assert load(str(folder)).name == "onnx"
    for make in DIRECT:
        with pytest.raises(UserError, match="has no TensorRT plan"):
            make(folder)
    plan()
    assert load(str(folder)).name == load(str(folder), device="cuda").name == "tensorrt"
    assert load(str(folder), device="cpu").name == load(str(folder), backend="onnx").name == "onnx"
    with pytest.raises(UserError, match="on CUDA only"):
        load(str(folder), backend="tensorrt", device="cpu")


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"version": "11.4.1.1"}, "is of TensorRT 11.4.0.106 and this is 11.4.1.1: build the plan again"),
        ({"capability": (8, 9)}, "for compute capability 9.0 and this GPU has 8.9"),
        ({"driver": False}, "no CUDA driver"),
    ],
)
def test_a_plan_runs_only_where_it_was_built_for(machine, plan, caplog, here, message):
    folder = plan()
    for name, value in here.items():
        setattr(machine, name, value)
    sys.modules["tensorrt"].__version__ = machine.version  # type: ignore[attr-defined]
    for make in DIRECT:
        with pytest.raises(UserError, match=message):
            make(folder)
    with caplog.at_level(logging.INFO):
        assert load(str(folder)).name == "onnx"
    assert message in caplog.text


def test_another_gpu_of_the_same_kind_gets_a_warning(machine, plan, caplog):
    folder = plan()
    machine.gpu = "Another GPU"
    with caplog.at_level(logging.WARNING):
        assert load(str(folder), backend="tensorrt").score(random_batch(1, 9, 1)).log_prob.shape == (1,)
    assert "was proven on Stand-in GPU and this is Another GPU" in caplog.text


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 7), False), ((9, 0), False), ((12, 1), True)]
)
def test_a_plan_for_all_cards_runs_on_those_that_it_reaches(rtx, rtx_plan, capability, runs):
    rtx.capability = capability
    reason = tensorrt_obstacle(read_manifest(rtx_plan()))
    assert (reason is None) == runs
    assert runs or "is for compute capability 8.0, 8.6, 8.9, 12.0+ and this GPU has" in str(reason)


def test_a_plan_of_the_other_flavour_is_refused(machine, folder):
    reason = tensorrt_obstacle(read_manifest(add_plan(folder, "tensorrt_rtx")))
    assert "is of TensorRT for RTX, but TensorRT is installed here" in str(reason)


def test_an_unproven_plan_runs_only_if_asked_for(rtx, rtx_plan, caplog):
    folder = rtx_plan(proven=False)
    with caplog.at_level(logging.INFO):
        assert load(str(folder)).name == "onnx"
    assert f"no GPU has run its TensorRT plan yet: mlmkit export {folder} --prove" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load(str(folder), backend="tensorrt").name == "tensorrt"
    assert "no GPU has run its TensorRT plan yet" in caplog.text


def test_a_changed_plan_is_refused_before_it_is_loaded(machine, plan):
    folder = plan()
    from mlmkit.backends.tensorrt.backend import load_engine
    from mlmkit.backends.tensorrt.bindings import create_runtime

    manifest = read_manifest(folder)
    (folder / "model.plan").write_bytes((folder / "model.plan").read_bytes() + b" ")
    with pytest.raises(UserError, match=r"model.plan is not the file that was built"):
        load_engine(create_runtime(), folder, manifest)
    with pytest.raises(UserError, match=r"model.plan is not the file that was exported"):
        backend(folder)


@pytest.mark.parametrize(
    ("set_up", "message"),
    [
        (lambda machine, folder: setattr(machine, "starts", False), "TensorRT cannot start here"),
        (lambda machine, folder: setattr(machine, "load_error", "magic tag"), "cannot load model.plan: magic tag: bui"),
        (lambda machine, folder: setattr(machine, "host_tensor", "positions"), "tensor in host memory"),
        (lambda machine, folder: drop_candidates(folder), "has tensors input_ids, .*, log_prob, rank and is not the"),
        (lambda machine, folder: drop_profile(folder), "is not the one that was built"),
        (lambda machine, folder: edit_record(folder / "mlmkit.json", top_k=200), "gives 100 candidates, not 200"),
        (lambda machine, folder: change_profiles(folder, "batch", 3), "does not take a batch of one token"),
        (lambda machine, folder: change_profiles(folder, "masked", 3), "does not take a batch of one token"),
        (lambda machine, folder: change(folder, profiles=[]), "tensorrt without model.plan, profiles or targets"),
        (lambda machine, folder: change(folder, targets=[]), "tensorrt without"),
        (lambda machine, folder: change(folder, targets=["12.0+", "x"]), "invalid compute capability 'x'"),
        (lambda machine, folder: change(folder, flavour="other"), "unknown flavour of TensorRT 'other'"),
        (lambda machine, folder: change(folder, parity=None), "only one of tensorrt.gpu and tensorrt.parity is null"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(machine, plan, set_up, message):
    folder = plan()
    set_up(machine, folder)
    with pytest.raises(UserError, match=message):
        backend(folder)


def test_a_plan_whose_manifest_has_fields_that_are_gone_is_loaded(plan):
    folder = plan()
    change(folder, version_compatible=False, hardware_compatible=False, weights_stripped=False)
    assert load(str(folder)).name == "tensorrt"


def test_without_tensorrt_the_reason_is_one_line(machine, plan, monkeypatch):
    folder = plan()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    tensorrt_stub.forget()
    with pytest.raises(UserError, match=r"cannot be imported .*: pip install '\.\[rtx\]' .* with trt"):
        load(str(folder), backend="tensorrt")
    assert load(str(folder)).name == "onnx"


# ------------------------------------------------------------------ TensorRT for RTX, and the log


def test_compiled_kernels_are_kept_for_each_gpu(rtx, rtx_plan, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLMKIT_CACHE", str(tmp_path / "cache"))
    folder = rtx_plan()
    for expected in (b"", b"Stand-in GPU."):
        backend(folder).score(random_batch(1, 9, 1))
        assert rtx.called("kernels")[-1] == expected
    (file,) = (tmp_path / "cache" / "tensorrt").iterdir()
    assert file.name == "kernels-11.4.0.106-Stand-in-GPU.cache"
    file.write_bytes(b"of another driver")
    with caplog.at_level(logging.INFO):
        backend(folder).score(random_batch(1, 9, 1))
    assert (rtx.called("kernels")[-1], file.read_bytes()) == (b"", b"Stand-in GPU.")
    assert "compiling them again" in caplog.text
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLMKIT_CACHE", str(tmp_path / "file"))
    backend(folder).score(random_batch(1, 9, 1))
    assert "cannot save the compiled kernels" in caplog.text


@pytest.mark.parametrize(
    ("flags", "reason"), [(5, r"\(VERSION_MISMATCH, OLD_CUDA_DRIVER\): build"), (0, r"\(no reason given\)")]
)
def test_tensorrt_for_rtx_is_asked_whether_a_plan_is_valid(rtx, rtx_plan, flags, reason):
    folder, rtx.validity = rtx_plan(), ("INVALID", flags)
    with pytest.raises(UserError, match=f"cannot run model.plan here {reason}"):
        backend(folder)


def test_a_plan_that_is_not_at_its_best_runs_with_a_warning(rtx, rtx_plan, caplog):
    folder, rtx.validity = rtx_plan(), ("SUBOPTIMAL", 2)
    assert_equal(backend(folder).score(random_batch(1, 9, 1)), OnnxBackend(str(folder)).score(random_batch(1, 9, 1)))
    assert "not at its best: UNSUPPORTED_CC" in caplog.text


def test_errors_of_tensorrt_are_said_once(machine):
    from mlmkit.backends.tensorrt.bindings import LOGGER, trt

    severity = trt.ILogger.Severity
    LOGGER.log(severity.ERROR, "no driver (cudaError 35: CUDA driver version is insufficient)")
    LOGGER.log(severity.ERROR, "the cause\nin two lines")
    LOGGER.log(severity.INTERNAL_ERROR, "what follows from it")
    assert LOGGER.reason() == "the cause in two lines"
    assert LOGGER.reason() == "TensorRT gives no reason"
    LOGGER.log(severity.ERROR, "cudaError 35")
    assert LOGGER.reason() == "cudaError 35"
    LOGGER.log(severity.ERROR, "Error Code 2: OutOfMemory (Requested size")
    assert LOGGER.reason().startswith("out of memory (Error Code 2")


def test_neither_torch_nor_transformers_is_needed(plan):
    folder = plan()
    code = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import pytest, tensorrt_stub
with pytest.MonkeyPatch.context() as patch:
    tensorrt_stub.install(patch)
    from mlmkit.backends import load
    from mlmkit.export.plans import prove_plan
    from mlmkit.fill import fill
    folder = Path(sys.argv[1])
    backend = load(str(folder))
    assert backend.name == "tensorrt" and fill(backend, "O rato [MASK] a roupa.")
    assert prove_plan(folder).tensorrt.parity["masked"] > 300
"""
    command = [sys.executable, "-c", code, str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
