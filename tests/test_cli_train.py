"""`mlmkit train` as a user types it."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import run
from interruptions import free_port, start_rank
from training import log_lines, small_architecture, write_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path, text_file) -> Path:
    write_config(tmp_path, text_file, small_architecture(tmp_path))
    return tmp_path / "config.toml"


def test_a_dry_run_shows_the_run_and_leaves_nothing(config, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, out, _ = run(capsys, "train", config, "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["steps"], found["micro_batches"], found["micro_batch_tokens"]) == (12, 2, 256)
    assert found["parameters"] > (600 + 48 + 2) * 32
    assert 0.9 < found["fill"] <= 1
    code, out, _ = run(capsys, "train", config, "--dry-run")
    assert code == 0
    assert "12 steps" in out and "[MASK→" in out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output is missing"),
        (["--dry-run", "--sweep", "optim.lr=1,2"], "leave out --sweep"),
        (["--output", "x", "--sweep", "optim.lr=1e-3,1e-2"], "name it with data.held_out"),
        (["--output", "x", "--set", "data.held_out=none.txt"], "none.txt: no such file"),
        (["--output", "x", "--set", "optim.name=lion"], "optim.name must be one of adamw, muon, stable_adamw"),
    ],
)
def test_mistakes_are_one_line(config, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "train", config, *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_a_sweep_ends_in_a_table(config, capsys, tmp_path, text_file):
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("".join(text_file.read_text().splitlines(keepends=True)[::30]))
    arguments = ["--set", f"data.held_out={held_out}", "--sweep", "masking.mask_prob=0.15,0.5"]
    code, out, _ = run(capsys, "train", config, "--output", tmp_path / "sweep", *arguments)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["0.15", "0.5"]
    assert {"sweep.json", "sweep.md", "masking.mask_prob=0.15"} <= {
        path.name for path in (tmp_path / "sweep").iterdir()
    }
    code, again, _ = run(capsys, "train", config, "--output", tmp_path / "sweep", *arguments, "--json")
    assert code == 0
    assert len({row["mask_digest"] for row in json.loads(again)["runs"]}) == 1


def test_torchrun_trains_and_says_it_once(config, capsys, tmp_path, text_file):
    """On a text from two sources, as one process alone trains on them."""
    second = tmp_path / "second.txt"
    second.write_text("Another text, a line of it.\n" * 20)
    texts = (f"data.train=['{text_file}', '{second}']", "data.weights=[1.0, 0.5]")
    settings = [word for setting in (*texts, "train.steps=4") for word in ("--set", setting)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mlmkit"]
    command = [*launcher, "train", str(config), "--output", str(tmp_path / "run"), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("model: ")] == [
        f"model: {tmp_path / 'run' / 'model'}"
    ]
    assert result.stdout.count("next:") == 1
    assert result.stderr.count("parameters, vocabulary") == 1
    code, _, err = run(capsys, "train", config, "--output", tmp_path / "alone", *settings)
    assert code == 0, err
    one, other = (log_lines(tmp_path / name)[-1] for name in ("run", "alone"))
    assert (one["step"], one["tokens"], one["masked"]) == (4, other["tokens"], other["masked"])
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_the_ranks_say_a_mistake_of_the_configuration_once(config, tmp_path):
    """Also where the first rank is the last to look, as on a busy machine."""
    arguments = ["train", str(config), "--output", str(tmp_path / "run"), "--set", "masking.mask_prob=1e-300"]
    port, logs = free_port(), [tmp_path / f"rank-{rank}" for rank in range(2)]
    ranks = [
        start_rank(path, arguments, partial(time.sleep, 1 - rank), (rank, 2, port)) for rank, path in enumerate(logs)
    ]
    for each in ranks:
        each.join(120)
    assert 0 not in (codes := [each.exitcode for each in ranks]) and 2 in codes
    printed, said = ("".join(path.with_suffix(kind).read_text() for path in logs) for kind in (".out", ".err"))
    assert [line for line in said.splitlines() if "mask_prob" in line] == [
        "mlmkit: masking.mask_prob must be at least 0.001 and below 1, not 1e-300"
    ]
    assert printed == ""
