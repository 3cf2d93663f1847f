# ruff: noqa: F401, F811 (fixtures are imported)
"""Which plans are loaded, and what picks TensorRT: on stand-ins, as in test_tensorrt_flow.py."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorrt_stub
from conftest import edit_record
from tensorrt_fixtures import add_plan, assert_equal, backend, folder, machine, plan, random_batch, rtx, rtx_plan

from mlmkit.artifact import hash_files, parse_manifest, read_manifest, write_manifest
from mlmkit.backends import load, tensorrt_obstacle
from mlmkit.errors import UserError


def change(folder: Path, **values: Any) -> None:
    """Change what the manifest says of the plans."""
    built = json.loads((folder / "mlmkit.json").read_text())["tensorrt"]
    edit_record(folder / "mlmkit.json", tensorrt=built | values)


def test_a_changed_plan_is_refused_before_it_is_loaded(machine, plan):
    folder = plan()
    here = backend(folder)
    content = (folder / "model.plan").read_bytes()
    (folder / "model.plan").write_bytes(content + b" ")
    with pytest.raises(UserError, match=r"model.plan is not the file that was built"):
        here.score(random_batch(1, 9, 1))
    with pytest.raises(UserError, match=r"model.plan is not the file that was exported"):
        backend(folder)


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"version": "11.4.1.1"}, "is of TensorRT 11.4.0.106 and this is 11.4.1.1: build the plan again"),
        ({"capability": (8, 9)}, "for compute capability 9.0 and this GPU has 8.9"),
        ({"driver": False}, "no CUDA driver"),
        ({"gpu": "Another GPU"}, ""),
    ],
)
def test_a_plan_runs_only_where_it_was_built_for(machine, plan, caplog, here, message):
    folder = plan()
    for name, value in here.items():
        setattr(machine, name, value)
    sys.modules["tensorrt"].__version__ = machine.version  # type: ignore[attr-defined]
    reason = tensorrt_obstacle(read_manifest(folder))
    if message:
        assert reason is not None and message in reason
        with pytest.raises(UserError, match=message):
            load(str(folder), backend="tensorrt")
        with pytest.raises(UserError, match=message):
            backend(folder)
        with caplog.at_level(logging.INFO):
            assert load(str(folder)).name == "onnx"
        assert message in caplog.text
    else:
        assert reason is None
        with caplog.at_level(logging.WARNING):
            assert load(str(folder), backend="tensorrt").score(random_batch(1, 9, 1)).log_prob.shape == (1,)
        assert ("was proven on Stand-in GPU and this is Another GPU" in caplog.text) == ("gpu" in here)


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 7), False), ((9, 0), False), ((12, 1), True)]
)
def test_a_plan_for_all_cards_runs_on_those_that_it_reaches(rtx, rtx_plan, capability, runs):
    rtx.capability = capability
    reason = tensorrt_obstacle(read_manifest(rtx_plan()))
    assert (reason is None) == runs
    assert runs or "is for compute capability 8.0, 8.6, 8.9, 12.0+ and this GPU has" in str(reason)


def test_a_plan_of_the_other_flavour_is_refused(machine, folder):
    assert "is of TensorRT for RTX and TensorRT is what is installed" in str(
        tensorrt_obstacle(read_manifest(add_plan(folder, "tensorrt_rtx")))
    )


def test_an_unproven_plan_runs_only_if_asked_for(rtx, rtx_plan, caplog):
    folder = rtx_plan(proven=False)
    with caplog.at_level(logging.INFO):
        assert load(str(folder)).name == "onnx"
    assert f"no GPU has run its TensorRT plan yet: mlmkit export {folder} --prove" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load(str(folder), backend="tensorrt").name == "tensorrt"
    assert "no GPU has run its TensorRT plan yet" in caplog.text


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
    assert "compiling them anew" in caplog.text
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLMKIT_CACHE", str(tmp_path / "file"))
    backend(folder).score(random_batch(1, 9, 1))
    assert "cannot keep the compiled kernels" in caplog.text


@pytest.mark.parametrize(
    ("validity", "message"),
    [
        (("INVALID", 5), r"cannot run model.plan here \(VERSION_MISMATCH, OLD_CUDA_DRIVER\): build"),
        (("INVALID", 0), r"cannot run model.plan here \(no reason given\)"),
        (("SUBOPTIMAL", 2), None),
    ],
)
def test_tensorrt_for_rtx_is_asked_whether_a_plan_is_valid(rtx, rtx_plan, caplog, validity, message):
    folder, rtx.validity = rtx_plan(), validity
    if message:
        with pytest.raises(UserError, match=message):
            backend(folder).score(random_batch(1, 9, 1))
    else:
        assert_equal(backend(folder).score(random_batch(1, 9, 1)), load(folder, "onnx").score(random_batch(1, 9, 1)))
        assert "not at its best: UNSUPPORTED_CC" in caplog.text


def test_the_best_backend_is_picked(machine, plan, folder):
    assert load(str(folder)).name == "onnx"
    with pytest.raises(UserError, match="has no TensorRT plan"):
        load(str(folder), backend="tensorrt")
    with pytest.raises(UserError, match="has no TensorRT plan"):
        backend(folder)
    plan()
    assert load(str(folder)).name == "tensorrt"
    assert load(str(folder), device="cuda").name == "tensorrt"
    assert load(str(folder), device="cpu").name == "onnx"
    assert load(str(folder), backend="onnx").name == "onnx"
    with pytest.raises(UserError, match="on CUDA only"):
        load(str(folder), backend="tensorrt", device="cpu")


def test_a_checkpoint_has_no_plan(checkpoint):
    with pytest.raises(UserError, match="export it first"):
        load(str(checkpoint("bert")), backend="tensorrt")


def test_without_tensorrt_the_reason_is_one_line(machine, plan, monkeypatch):
    folder = plan()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    tensorrt_stub.forget()
    with pytest.raises(UserError, match=r"cannot be imported .*: pip install 'mlmkit\[rtx\]' .* or 'mlmkit\[trt\]'"):
        load(str(folder), backend="tensorrt")
    assert load(str(folder)).name == "onnx"


@pytest.mark.parametrize(
    ("set_up", "message"),
    [
        (lambda machine, folder: setattr(machine, "starts", False), "TensorRT cannot start here"),
        (
            lambda machine, folder: setattr(machine, "load_error", "magic tag"),
            "cannot load model.plan: magic tag: build",
        ),
        (lambda machine, folder: setattr(machine, "host_tensor", "positions"), "tensor in host memory"),
        (lambda machine, folder: swap(folder), "has tensors input_ids, .*, log_prob, rank and is not the one"),
        (lambda machine, folder: one_profile(folder), "is not the one that was built"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(machine, plan, set_up, message):
    folder = plan()
    set_up(machine, folder)
    with pytest.raises(UserError, match=message):
        backend(folder).score(random_batch(1, 9, 1))


def test_a_plan_whose_manifest_has_fields_that_are_gone_is_loaded(plan):
    folder = plan()
    change(folder, version_compatible=False, hardware_compatible=False, weights_stripped=False)
    assert load(str(folder)).name == "tensorrt"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"profiles": []}, "tensorrt without model.plan, profiles or targets"),
        ({"targets": []}, "tensorrt without"),
        ({"targets": ["12.0+", "x"]}, "no compute capability 'x'"),
        ({"flavour": "other"}, "no flavour of TensorRT 'other'"),
        ({"parity": None}, "tensorrt.gpu and tensorrt.parity are not both there"),
    ],
)
def test_a_manifest_that_says_nonsense_of_its_plan_is_refused(plan, values, message):
    folder = plan()
    change(folder, **values)
    for backend_name in ("auto", "tensorrt"):
        with pytest.raises(UserError, match=message):
            load(str(folder), backend_name)


def swap(folder: Path) -> None:
    """A plan without the candidates."""
    header, _, graph = (folder / "model.plan").read_bytes().partition(b"\n")
    values = json.loads(header)
    values["outputs"] = values["outputs"][:2]
    (folder / "model.plan").write_bytes(json.dumps(values).encode() + b"\n" + graph)
    write_manifest(folder, replace(parse_manifest(folder), files=hash_files(folder)))


def one_profile(folder: Path) -> None:
    change(folder, profiles=json.loads((folder / "mlmkit.json").read_text())["tensorrt"]["profiles"][1:])


def test_a_manifest_that_promises_too_many_candidates_is_refused(plan):
    folder = plan()
    write_manifest(folder, replace(read_manifest(folder), top_k=200))
    with pytest.raises(UserError, match="gives 100 candidates, not 200"):
        backend(folder).score(random_batch(1, 9, 1))


def test_errors_of_tensorrt_are_said_once(machine):
    from mlmkit.backends.trt import LOGGER

    for severity, text in [
        ("ERROR", "no driver (cudaError 35: CUDA driver version is insufficient)"),
        ("ERROR", "the cause\nin two lines"),
        ("INTERNAL_ERROR", "what follows from it"),
    ]:
        tensorrt_stub.say(LOGGER, severity, text)
    assert LOGGER.reason() == "the cause in two lines"
    assert LOGGER.reason() == "TensorRT gives no reason"
    tensorrt_stub.say(LOGGER, "ERROR", "cudaError 35")
    assert LOGGER.reason() == "cudaError 35"
    tensorrt_stub.say(LOGGER, "ERROR", "Error Code 2: OutOfMemory (Requested size")
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
    from mlmkit.export.prove import prove
    from mlmkit.fill import fill
    folder = Path(sys.argv[1])
    backend = load(str(folder))
    assert backend.name == "tensorrt" and fill(backend, "O rato [MASK] a roupa.")
    assert prove(folder).tensorrt.parity["masked"] > 300
"""
    command = [sys.executable, "-c", code, str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
