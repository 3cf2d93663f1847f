"""`train.precision`: how "auto" is resolved, that a run keeps it, and that bf16 learns what fp32 learns."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_record, refusal
from test_packing import FAMILIES, gradients, model_and_documents, packed
from training import Ranks, losses, same_weights, small_architecture, weights, write_config

from mlmkit.errors import UserError
from mlmkit.files import CHECKSUM, RUN
from mlmkit.packing import enable_packing
from mlmkit.train.checkpoints import CURSOR, branch_config, saved_checkpoints
from mlmkit.train.config import Config
from mlmkit.train.config_file import load_config
from mlmkit.train.cost import dry_run, figures
from mlmkit.train.loop import train
from mlmkit.train.precision import has_bfloat16_units, resolve_precision

AUTO, BF16 = "train.precision=auto", "train.precision=bf16"


@pytest.fixture
def cpu(monkeypatch):
    """Let torch report these capabilities of the CPU; without any, this one has no bfloat16 units."""

    def report(**capabilities: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    report()
    return report


def configuration(folder: Path, text_file: Path, *settings: str) -> Config:
    short = ("train.steps=4", "train.save_every=2", "train.log_every=1")
    return write_config(folder, text_file, small_architecture(folder), *short, *settings)


def interrupted(config: Config, run: Path) -> Path:
    """Train, and take away what came after the first checkpoint; returns the model of the whole run."""
    model = train(config, run).rename(run.with_name("expected"))
    shutil.rmtree(saved_checkpoints(run)[-1])
    return model


def recorded(run: Path) -> set[str]:
    """The precisions in all records of a run."""
    configs = [json.loads((saved / CURSOR).read_text())["config"] for saved in saved_checkpoints(run)]
    tables = [*json.loads((run / RUN).read_text())["phases"], *configs]
    return {table["train"]["precision"] for table in tables}


# ------------------------------------------------------------------ what auto is


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_tile": True, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_the_units_are_found(cpu, monkeypatch, capabilities, expected):
    cpu(**capabilities)
    assert has_bfloat16_units() == expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_bfloat16_units()


@pytest.mark.parametrize(
    ("setting", "device", "has_units", "begun_in", "expected", "warns"),
    [
        ("auto", "cpu", False, "", "fp32", False),
        ("auto", "cpu", True, "", "bf16", False),
        ("auto", "cuda", False, "", "bf16", False),
        ("auto", "cpu", True, "fp32", "fp32", False),
        ("auto", "cpu", False, "bf16", "bf16", True),
        ("bf16", "cpu", False, "", "bf16", True),
        ("fp32", "cuda", False, "bf16", "fp32", False),
    ],
)
def test_auto_is_resolved(cpu, caplog, setting, device, has_units, begun_in, expected, warns):
    cpu(avx512_bf16=has_units)
    assert resolve_precision(setting, device, begun_in) == expected
    assert ("this CPU has no bfloat16 units" in caplog.text) == warns


def test_a_wrong_value_is_one_line(tmp_path, text_file, capsys):
    configuration(tmp_path, text_file)
    arguments = ["train", tmp_path / "config.toml", "--output", tmp_path / "run", "--set", "train.precision=fp16"]
    assert "train.precision must be one of auto, fp32, bf16, not 'fp16'" in refusal(capsys, *arguments)


def test_it_belongs_to_the_whole_run(tmp_path, text_file):
    path = tmp_path / "config.toml"
    configuration(tmp_path, text_file)
    content = path.read_text().replace("steps = 12\n", "")
    path.write_text(f'{content}[[phase]]\nname = "a"\ntrain = {{ steps = 2, precision = "bf16" }}\n')
    with pytest.raises(UserError, match=r"phase a: train\.precision belongs to the whole run: set it above the phases"):
        load_config(path)


# ------------------------------------------------------------------ a run keeps it


def test_a_run_is_shown_and_resumes_in_what_auto_was(tmp_path, text_file, cpu, caplog):
    """Begun where the CPU has the units, resumed where it has none."""
    caplog.set_level("INFO", "mlmkit")
    cpu(avx512_bf16=True)
    config, run = configuration(tmp_path, text_file, AUTO), tmp_path / "run"
    expected = interrupted(config, run)
    assert "tokens; cpu, bf16" in caplog.text and "units" not in caplog.text
    assert recorded(run) == {"bf16"}
    cpu()
    with pytest.raises(UserError, match=r"begun with another train\.precision \('bf16', now 'fp32'\)"):
        train(configuration(tmp_path, text_file), run)
    assert same_weights(train(config, run), expected)
    assert "this CPU has no bfloat16 units" in caplog.text
    assert recorded(run) == {"bf16"}
    assert train(configuration(tmp_path, text_file, BF16), run) == run / "model"  # the same, stated


def test_a_run_of_an_earlier_version_resumes_in_fp32_on_a_cpu(tmp_path, text_file, cpu):
    """And so do its branches."""
    run = tmp_path / "run"
    expected = interrupted(configuration(tmp_path, text_file), run)
    for path in (run / RUN, *(saved / CURSOR for saved in saved_checkpoints(run))):
        values = json.loads(path.read_text())
        del values[CHECKSUM]
        for table in values.get("phases") or [values["config"]]:
            del table["train"]["precision"]
        edit_record(path, **values)
    cpu(avx512_bf16=True)
    (tmp_path / "branch.toml").write_text("[train]\nsteps = 2\n")
    branch = load_config(tmp_path / "branch.toml", (), branch_config(run, saved_checkpoints(run)[0]))
    assert branch.train.precision == "fp32"
    assert same_weights(train(configuration(tmp_path, text_file, AUTO), run), expected)


def test_a_branch_keeps_it(tmp_path, text_file, cpu):
    cpu(avx512_bf16=True)
    run, path = tmp_path / "run", tmp_path / "branch.toml"
    train(configuration(tmp_path, text_file, AUTO), run)
    cpu()
    start = saved_checkpoints(run)[0]
    for line in ("", 'precision = "auto"\n'):
        path.write_text(f"[train]\nsteps = 2\n{line}")
        assert load_config(path, (), branch_config(run, start)).train.precision == "bf16"
    path.write_text('[train]\nsteps = 2\nprecision = "fp32"\n')
    with pytest.raises(UserError, match=r"train\.precision cannot change in a branch: it is 'bf16' in the checkpoint"):
        load_config(path, (), branch_config(run, start))


def test_a_dry_run_says_it(tmp_path, text_file, cpu):
    cpu(avx512_bf16=True)
    report = dry_run(configuration(tmp_path, text_file, AUTO))[""]
    assert report.precision == "bf16"
    assert "in all on one cpu, bf16 (first" in figures(report)["time"]


# ------------------------------------------------------------------ what bf16 computes


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_gradients_in_bfloat16(name):
    """EuroBERT's rotary positions leave queries and keys in float32, the values in bfloat16."""
    model, documents = model_and_documents(name)
    assert enable_packing(model)
    inputs = packed(model, documents)
    expected = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    error = sum(float((found[key] - grad).square().sum()) for key, grad in expected.items())
    size = sum(float(grad.square().sum()) for grad in expected.values())
    assert 0 < error < 0.03**2 * size


def test_the_loss_follows_that_of_float32(tmp_path, text_file):
    """Over 60 steps by at most 0.004 nats where this was written; another seed differs by up to 0.6."""
    runs: dict[str, Any] = {}
    for name, settings in {"fp32": (), "bf16": (BF16,), "seed": ("train.seed=1",)}.items():
        config = configuration(tmp_path, text_file, "train.steps=60", "train.save_every=60", *settings)
        assert {tensor.dtype for tensor in weights(train(config, tmp_path / name)).values()} == {torch.float32}
        runs[name] = losses(tmp_path / name)
    rounding, seeds = (
        max(abs(one - other) for one, other in zip(runs["fp32"], runs[name], strict=True)) for name in ("bf16", "seed")
    )
    assert 0 < rounding < 0.02 < seeds / 5


def test_two_ranks_compute_the_same(tmp_path, text_file):
    """The first step's loss but for the order of sums; then rounding moves the weights by as much as bfloat16 does."""
    for name, world in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
        config = configuration(tmp_path, text_file, BF16, f"train.parallel={name}")
        ranks = Ranks(config, tmp_path / f"{name}-{world}", world)
        assert ranks.wait() == [0] * world, ranks.messages()
    alone = losses(tmp_path / "ddp-1")
    for shared in (losses(tmp_path / "ddp-2"), losses(tmp_path / "fsdp-2")):
        assert shared[0] == pytest.approx(alone[0], abs=2e-5)
        assert shared == pytest.approx(alone, abs=0.01)
