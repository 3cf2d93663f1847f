# ruff: noqa: F401, F811 (fixtures are imported)
"""`mlmkit export --trt`, from a checkpoint and from an artifact: on stand-ins, as in test_tensorrt_flow.py."""

import json

import numpy as np
import pytest
from tensorrt_fixtures import SMALL, assert_equal, folder, machine, random_batch

from mlmkit.artifact import PLAN, read_manifest
from mlmkit.backends import load
from mlmkit.cli import main

SIZES = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return exit.value.code, out, err


@pytest.mark.parametrize("source", ["checkpoint", "artifact", "artifact with plans"])
def test_plans_are_built_and_proven(machine, checkpoint, folder, tmp_path, text_file, capsys, source):
    given = checkpoint("bert") if source == "checkpoint" else folder
    if source == "artifact with plans":
        assert run(capsys, "export", folder, "--output", tmp_path / "before", "--trt", *SIZES)[0] == 0
        given = tmp_path / "before"
    command = ["export", given, "--output", tmp_path / "planned", "--text", text_file, "--trt", *SIZES, "--json"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    manifest = read_manifest(tmp_path / "planned")  # which checks every file
    assert {PLAN, "layers.json"} <= manifest.files.keys()
    assert manifest.tensorrt is not None
    assert manifest.tensorrt.profiles[-1].batch[2] == SMALL["max_batch"]
    parity = json.loads(out)["tensorrt_parity"]
    assert parity == manifest.tensorrt.parity
    assert parity["masked"] > 300
    assert 0 < parity["max_log_prob_difference"] <= parity["bounds"]["max_log_prob"] == 1e-4 or source != "checkpoint"
    engine = load(str(tmp_path / "planned"))
    assert engine.name == "tensorrt"
    batch = random_batch(5, 9, 7)
    assert_equal(engine.score(batch), load(str(folder), "onnx").score(batch))


def test_an_artifact_is_left_as_it_is(machine, folder, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run(capsys, "export", folder, "--output", tmp_path / "planned", "--trt", *SIZES)[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not read_manifest(tmp_path / "planned").drift_allowed


def test_a_plan_that_drifts_is_refused(machine, folder, tmp_path, capsys, monkeypatch):
    from mlmkit.export.parity import BOUNDS

    monkeypatch.setitem(BOUNDS, "fp32", BOUNDS["fp32"]._replace(max_log_prob=-1.0))
    code, _, err = run(capsys, "export", folder, "--output", tmp_path / "planned", "--trt", *SIZES)
    assert code == 1
    assert "parity does not hold" in err
    assert not (tmp_path / "planned").exists()
    command = ["export", folder, "--output", tmp_path / "planned", "--trt", *SIZES, "--allow-drift"]
    assert run(capsys, *command)[0] == 0
    assert read_manifest(tmp_path / "planned").drift_allowed
