"""`mlmkit train` as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import ROOT, run
from training import CONFIG, log_lines

ARCHITECTURE = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}


@pytest.fixture
def config(tmp_path, text_file) -> Path:
    (tmp_path / "architecture.json").write_text(json.dumps(ARCHITECTURE))
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(text=str(text_file), architecture=str(tmp_path / "architecture.json")))
    return path


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
        (["--output", "x", "--set", "data.weights=[1.0, 2.0]"], "data.weights has 2 numbers for 1 texts"),
        (["--output", "x", "--set", "optim.name=lion"], "optim.name must be one of adamw, muon"),
        (["--output", "x", "--set", "masking.final_mask_prob=0.0"], "masking.final_mask_prob must be at least 0.001"),
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
    assert [line.split("|")[1].strip() for line in out.splitlines()[2:4]] == ["0.15", "0.5"]
    assert {"sweep.json", "sweep.md", "masking.mask_prob=0.15"} <= {
        path.name for path in (tmp_path / "sweep").iterdir()
    }
    code, again, _ = run(capsys, "train", config, "--output", tmp_path / "sweep", *arguments, "--json")
    assert code == 0
    assert len({row["mask_digest"] for row in json.loads(again)["runs"]}) == 1


def test_torchrun_trains_and_says_it_once(config, tmp_path, text_file):
    """Two processes started by torchrun, on a text from two sources."""
    second = tmp_path / "second.txt"
    second.write_text("Another text, a line of it.\n" * 20)
    settings = [
        "--set",
        f"data.train=['{text_file}', '{second}']",
        "--set",
        "data.weights=[1.0, 0.5]",
        "--set",
        "train.steps=4",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, "-m", "mlmkit", "train", str(config), "--output", str(tmp_path / "run"), *settings],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"model: {tmp_path / 'run' / 'model'}"]
    assert result.stderr.count("parameters, vocabulary") == 1
    assert log_lines(tmp_path / "run")[-1]["step"] == 4
    alone = subprocess.run(
        [sys.executable, "-m", "mlmkit", "train", str(config), "--output", str(tmp_path / "alone"), *settings],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert alone.returncode == 0, alone.stderr
    one, other = (log_lines(tmp_path / name)[-1] for name in ("run", "alone"))
    assert (one["tokens"], one["masked"]) == (other["tokens"], other["masked"])
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_the_ranks_say_a_mistake_of_the_configuration_once(config, tmp_path):
    program = tmp_path / "program.py"  # the first rank is the last to look, as on a busy machine
    program.write_text(
        "import os, sys, time\nfrom mlmkit.cli import main\n"
        "time.sleep(1 - int(os.environ['RANK']))\nmain(['train', *sys.argv[1:]])\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    arguments = [str(config), "--output", str(tmp_path / "run"), "--set", "masking.mask_prob=1e-300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode != 0
    assert "exitcode  : 2" in result.stderr
    assert [line for line in result.stderr.splitlines() if "mask_prob" in line] == [
        "mlmkit: masking.mask_prob must be at least 0.001 and below 1, not 1e-300"
    ]
    assert result.stdout == ""
