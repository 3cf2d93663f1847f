"""`mlmkit inspect` shows what an artifact is, and every way in which it is no longer that."""

import json
import re
from dataclasses import asdict, replace

import pytest
from conftest import refusal, run, run_json

from mlmkit.artifact import Profile, TensorRT, hash_files, read_manifest, write_manifest
from mlmkit.files import read_record
from mlmkit.inspection import inspect

PLANS = TensorRT(
    flavour="tensorrt",
    version="11.4.0",
    targets=["9.0"],
    profiles=[Profile("latency", (1, 1, 4), (1, 64, 512), (1, 8, 64))],
    layers={"latency": {"fp16": 30, "fp32": 12}},
    fused_attention={"latency": 12},
    scratch_mib={"latency": 1601.25},
    gpu="NVIDIA H100",
    parity={"bound": 1e-4},
)


def test_a_sound_artifact_is_shown(capsys, artifact):
    code, out, err = run(capsys, "inspect", artifact("bert"))
    assert (code, err) == (0, "")
    lines = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    assert "bert, vocabulary 600" in lines["architecture"]
    assert "fp32, ONNX opset 20" in lines["precision"]
    assert "e-0" in lines["max log-probability difference"]
    assert lines["model.onnx"].endswith(" ok")
    assert lines["onnx on cpu"].endswith(" yes")
    assert "the artifact has no TensorRT plan" in lines["tensorrt on cuda"]
    assert lines["problems"].endswith(" none")


def test_as_json_it_is_one_object(capsys, artifact):
    found = run_json(capsys, "inspect", artifact("roberta"))
    assert (found["sound"], found["problems"], found["tokens"]) == (True, [], 600)
    assert found["manifest"] == read_record(artifact("roberta") / "mlmkit.json", "")
    assert set(found["files"].values()) == {"ok"}
    assert found["graph"]["inputs"]["positions"] == {"type": "int64", "shape": [None]}
    assert found["graph"]["outputs"]["top_id"]["shape"] == [None, 100]
    assert found["engines"][0] == {"backend": "onnx", "device": "cpu", "reason": "", "runs": True}


def test_every_damage_is_shown_at_once(capsys, copy):
    (copy / "config.json").unlink()
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes() + b"\n")
    (copy / "tokenizer_config.json").rename(copy / "elsewhere")
    (copy / "tokenizer_config.json").symlink_to("elsewhere")
    code, out, err = run(capsys, "inspect", copy, "--json")
    found = json.loads(out)
    assert (code, len(err.splitlines()), "is damaged (3 problems)" in err) == (1, 1, True)
    assert found["files"] == {
        "config.json": "missing",
        "model.onnx": "ok",
        "tokenizer.json": "changed",
        "tokenizer_config.json": "not a plain file",
        "elsewhere": "not listed",
    }
    assert not any(engine["runs"] for engine in found["engines"])
    code, out, _ = run(capsys, "inspect", copy)
    assert (code, "config.json is missing" in out) == (1, True)


def test_a_graph_and_a_tokenizer_that_do_not_fit_are_shown(capsys, copy):
    write_manifest(copy, replace(read_manifest(copy), top_k=50, vocabulary_size=599))
    code, out, _ = run(capsys, "inspect", copy, "--json")
    problems = json.loads(out)["problems"]
    assert (code, len(problems)) == (1, 2)
    assert "gives 100 candidates, its manifest says 50" in problems[0]
    assert "the tokenizer has ids up to 599" in problems[1]
    (copy / "model.onnx").write_bytes(b"junk")
    code, out, _ = run(capsys, "inspect", copy, "--json")
    assert (code, json.loads(out)["graph"]) == (1, None)


@pytest.mark.parametrize("content", [None, "", "{}", '{"format": 1}'])
def test_what_is_no_artifact_is_no_artifact(capsys, tmp_path, content):
    if content is not None:
        (tmp_path / "mlmkit.json").write_text(content)
    for arguments in (["inspect", tmp_path], ["inspect", tmp_path, "--json"], ["inspect", tmp_path / "none"]):
        refusal(capsys, *arguments)


@pytest.mark.parametrize(
    "name", ["\x1b[31m\x9b2J", "\u202egnp.exe", "new\nline", b"\xff\xfe".decode(errors="surrogateescape")]
)
def test_a_name_cannot_steer_the_terminal(capsys, copy, name):
    (copy / name).touch()
    for arguments in (["inspect", copy], ["inspect", copy, "--json"]):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert all(line.isprintable() for line in out.splitlines())
        assert "not listed" in out
    moved = copy.rename(copy.with_name(name))
    (moved / "config.json").unlink()
    code, _, err = run(capsys, "inspect", moved)
    assert (code, err.strip().isprintable()) == (1, True)


def test_plans_are_shown_with_what_keeps_them_from_running(capsys, copy):
    (copy / "model.plan").write_bytes(b"machine code")
    write_manifest(copy, replace(read_manifest(copy), tensorrt=PLANS, files=hash_files(copy)))
    code, out, _ = run(capsys, "inspect", copy)
    assert code == 0
    assert "TensorRT 11.4.0\n" in out and "9.0\n" in out and "NVIDIA H100" in out
    lines = dict(re.split("  +", f"{line.strip()}  ")[:2] for line in out.splitlines())
    assert lines["layers"] == "30 fp16, 12 fp32"
    assert (lines["fused attention"], lines["scratch memory"]) == ("12", "1,601 MiB")
    assert "batch 1 / 1 / 4, seq 1 / 64 / 512, masked 1 / 8 / 64" in out
    assert run_json(capsys, "inspect", copy)["manifest"]["tensorrt"] == json.loads(json.dumps(asdict(PLANS)))


def test_bf16_is_not_for_the_cpu(copy):
    write_manifest(copy, replace(read_manifest(copy), precision="bf16"))
    assert "no bf16 on the CPU" in inspect(copy).engines[0].reason
