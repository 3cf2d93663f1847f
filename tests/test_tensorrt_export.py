# ruff: noqa: F401, F811 (fixtures are imported)
"""`mlmkit export --trt` with TensorRT for RTX itself, and `--prove` on stand-ins, as in test_tensorrt_runtime.py."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import edit_record, run
from tensorrt_fixtures import SMALL, add_plan, assert_equal, folder, machine, plan, rtx, rtx_plan
from test_export import random_batch

from mlmkit.artifact import PLAN, read_manifest
from mlmkit.backends import load
from mlmkit.export.parity import BOUNDS

SIZES = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def installed() -> None:
    pytest.importorskip("tensorrt_rtx", reason="no wheels for this machine", exc_type=ImportError)


# ------------------------------------------------------------------ building


@pytest.mark.parametrize("source", ["checkpoint", "artifact"])
def test_a_plan_is_built_without_a_gpu(installed, checkpoint, folder, tmp_path, text_file, capsys, source):
    given, planned = checkpoint("bert") if source == "checkpoint" else folder, tmp_path / "planned"
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    code, out, err = run(capsys, "export", given, "--output", planned, "--text", text_file, "--trt", *SIZES)
    assert code == 0, err
    built_line, unproven_line = out.splitlines()[-2:]
    assert built_line.startswith("plan: TensorRT for RTX 1.")
    assert "for GPUs of compute capability 8.0, 8.6, 8.9, 12.0 and later; " in built_line
    assert unproven_line.startswith(f"unproven until a GPU has run it: mlmkit export {planned} --prove")
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before
    manifest = read_manifest(planned)  # which checks every file
    assert {PLAN, "layers.json"} <= manifest.files.keys()
    assert manifest.tensorrt is not None and manifest.tensorrt.parity is None and not manifest.drift_allowed
    assert manifest.tensorrt.profiles[-1].batch[2] == SMALL["max_batch"]
    assert load(planned).name == "onnx"
    code, out, _ = run(capsys, "inspect", planned)
    assert code == 0
    assert all(said in out for said in ("unproven: no GPU has run it", "scratch memory", "fused attention"))
    if source == "checkpoint":
        return
    # again, from the artifact that has a plan
    code, out, _ = run(capsys, "export", planned, "--output", tmp_path / "again", "--trt", *SIZES, "--json")
    assert (code, json.loads(out)["tensorrt"]["parity"]) == (0, None)
    assert read_manifest(tmp_path / "again").files.keys() == manifest.files.keys()


def test_an_int8_plan_computes_in_float16_too_and_is_held_to_the_bounds(
    installed, lowered, tmp_path, text_file, capsys, monkeypatch
):
    command = ["export", lowered("bert", "int8"), "--text", text_file, "--trt", *SIZES, "--output"]
    code, _, err = run(capsys, *command, tmp_path / "planned")
    assert code == 0, err
    manifest = read_manifest(tmp_path / "planned")
    assert manifest.tensorrt is not None and not manifest.drift_allowed
    for counts in manifest.tensorrt.layers.values():
        assert counts["int8"] > 1 and counts["fp16"] > counts["fp32"]
    monkeypatch.setitem(BOUNDS, "int8", BOUNDS["int8"]._replace(mean_log_prob=0.0))
    code, _, err = run(capsys, *command, tmp_path / "drifting")
    assert (code, "parity does not hold" in err, (tmp_path / "drifting").exists()) == (1, True, False)
    assert run(capsys, *command, tmp_path / "drifting", "--allow-drift")[0] == 0
    assert read_manifest(tmp_path / "drifting").drift_allowed


def test_triton_gets_no_plan_that_it_cannot_load(folder, tmp_path, capsys, caplog):
    add_plan(folder, "tensorrt_rtx")
    assert run(capsys, "export", folder, "--triton", tmp_path / "repository")[0] == 0
    assert "Triton cannot load a plan of TensorRT for RTX" in caplog.text
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["artifact"]


# ------------------------------------------------------------------ proving


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_a_plan_is_proven_where_it_runs(request, folder, text_file, capsys, flavour):
    request.getfixturevalue("machine" if flavour == "tensorrt" else "rtx")
    add_plan(folder, flavour, proven=False)
    before = read_manifest(folder)
    assert load(folder).name == "onnx"
    code, out, err = run(capsys, "export", folder, "--prove", "--text", text_file, "--json")
    assert code == 0, err
    manifest = read_manifest(folder)
    parity = json.loads(out)["tensorrt"]["parity"]
    assert manifest.tensorrt is not None and before.tensorrt is not None and parity["masked"] > 300
    assert manifest == replace(before, tensorrt=replace(before.tensorrt, gpu="Stand-in GPU", parity=parity))
    engine, batch = load(folder), random_batch(5, 9, 7)
    assert engine.name == "tensorrt"
    assert_equal(engine.score(batch), load(folder, "onnx").score(batch))
    code, out, _ = run(capsys, "export", folder, "--prove", "--text", text_file)
    assert (code, out.splitlines()[-1].startswith("proven on Stand-in GPU: over ")) == (0, True)
    code, out, _ = run(capsys, "inspect", folder)
    assert (code, "Stand-in GPU" in out) == (0, True)


def test_a_plan_that_drifts_stays_unproven(rtx, rtx_plan, capsys, monkeypatch):
    folder, bounds = rtx_plan(proven=False), BOUNDS["fp32"]
    before = (folder / "mlmkit.json").read_bytes()
    monkeypatch.setitem(BOUNDS, "fp32", bounds._replace(max_log_prob=-1.0))
    code, _, err = run(capsys, "export", folder, "--prove")
    assert (code, "parity does not hold" in err) == (1, True)
    assert (folder / "mlmkit.json").read_bytes() == before
    assert run(capsys, "export", folder, "--prove", "--allow-drift")[0] == 0
    assert read_manifest(folder).drift_allowed
    monkeypatch.setitem(BOUNDS, "fp32", bounds)
    assert run(capsys, "export", folder, "--prove")[0] == 0
    assert not read_manifest(folder).drift_allowed, "the plan was proven again"


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prove"], "has no TensorRT plan"),
        (["--prove", "--output", "x"], "--prove can be combined with --text, --allow-drift and --json only"),
        (["--prove", "--trt"], "--prove can be combined with"),
        (["--target", "sm75", "--output", "x"], "or name the checkpoint"),
        (["--trt", "--target", "sm90", "--output", "x"], "unknown target 'sm90': choose sm75, sm121"),
        (["--trt"], "name the artifact folder to write"),
    ],
)
def test_options_that_do_not_fit(rtx, folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "export", folder, *options)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("overflowing", [None, 3, [1], [{}]])
def test_an_int8_artifact_that_does_not_say_what_overflows_is_refused(
    installed, lowered, tmp_path, capsys, overflowing
):
    folder = Path(shutil.copytree(lowered("bert", "int8"), tmp_path / "int8"))
    edit_record(folder / "mlmkit.json", calibration={"overflowing": overflowing} if overflowing else {})
    code, _, err = run(capsys, "export", folder, "--output", tmp_path / "planned", "--trt", *SIZES)
    assert (code, "mlmkit.json does not say what overflows float16" in err) == (2, True)


def test_a_proof_needs_cuda_python(installed, folder, monkeypatch, capsys):
    add_plan(folder, "tensorrt_rtx", proven=False)
    monkeypatch.setitem(sys.modules, "cuda", None)
    code, _, err = run(capsys, "export", folder, "--prove")
    assert (code, "cuda-python cannot be imported" in err, len(err.splitlines())) == (2, True, 1)


def test_a_parity_report_that_cannot_be_read_is_said(rtx, rtx_plan, capsys):
    folder = rtx_plan(proven=False)
    edit_record(folder / "mlmkit.json", parity={"masked": "many"})
    assert run(capsys, "export", folder, "--prove")[0] == 0
    assert read_manifest(folder).drift_allowed, "the graph's parity is not known"


def test_a_checkpoint_has_nothing_to_prove(checkpoint, capsys):
    code, _, err = run(capsys, "export", checkpoint("bert"), "--prove")
    assert (code, "is not an artifact: --prove runs an artifact's plan" in err) == (2, True)


@pytest.mark.parametrize("option", ["--trt", "--prove"])
def test_without_tensorrt_the_hint_says_what_to_install(folder, tmp_path, monkeypatch, capsys, option):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    more = ["--output", tmp_path / "x"] if option == "--trt" else []
    code, _, err = run(capsys, "export", folder, option, *more)
    assert (code, "this needs TensorRT: pip install '.[rtx]'" in err) == (2, True)
