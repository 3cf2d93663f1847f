"""What every backend promises: threads do not disturb each other, nothing of the process or its user is changed."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import running
from test_export import random_batch

import mlmkit
from mlmkit.backends import load
from mlmkit.backends.torch import weights_fingerprint
from mlmkit.errors import UserError


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_threads_that_share_a_model_get_their_own_scores(name, checkpoint, artifact):
    model = load(str(checkpoint("bert") if name == "torch" else artifact("bert")))
    batches = [random_batch(3, 9, 5)._replace(positions=np.arange(5) + shift) for shift in range(20)]
    expected = [model.score(batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(model.score, batches * 10))
    for scored, wanted in zip(found, expected * 10, strict=True):
        for values, others in zip(scored, wanted, strict=True):
            np.testing.assert_allclose(values, others, atol=1e-5, rtol=0)


def test_a_model_leaves_the_setting_of_matrix_products_alone(checkpoint):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        seen = []
        model = load(str(checkpoint("bert")))
        model.model.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))  # pyright: ignore[reportAttributeAccessIssue]
        model.score(random_batch(1, 5, 2))
        assert (seen, torch.get_float32_matmul_precision()) == (["highest"], "medium")
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_fingerprint_covers_single_numbers():
    network = torch.nn.Linear(2, 2)
    network.register_buffer("scale", torch.tensor(1.0))
    before = weights_fingerprint(network)  # pyright: ignore[reportArgumentType]
    network.get_buffer("scale").fill_(2.0)
    assert weights_fingerprint(network) != before  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_an_artifact_that_is_replaced_while_it_is_loaded_is_never_mixed(name, artifact, tmp_path, monkeypatch):
    from test_artifact import external

    folder = Path(shutil.copytree(artifact("bert"), tmp_path / "artifact"))
    external(folder, "model.onnx.data")
    load(str(folder), device="cpu")
    import mlmkit.backends.onnx as backend

    real = backend.open_session

    def replace_first(*arguments):
        (tmp_path / name).write_bytes((folder / name).read_bytes() + b"\n")
        (tmp_path / name).replace(folder / name)
        return real(*arguments)

    monkeypatch.setattr(backend, "open_session", replace_first)
    with pytest.raises(UserError, match=f"{name} was replaced while the artifact was being loaded"):
        load(str(folder), device="cpu")
    monkeypatch.setattr(backend, "open_session", real)
    with pytest.raises(UserError, match="is not the file that was exported"):
        load(str(folder), device="cpu")


# ------------------------------------------------------------------ what a process runs and leaves behind


def environment(home: Path) -> dict[str, str]:
    """A user who has never run anything here."""
    kept = {name: os.environ[name] for name in ("PATH", "HF_HUB_OFFLINE") if name in os.environ}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(Path(mlmkit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


EVIL = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.mark.parametrize(
    ("command", "known"),
    [
        ("score MODEL", True),
        ("score MODEL", False),
        ("export MODEL --output OUT", False),
        ("train CONFIG --output OUT", False),
    ],
)
def test_no_code_of_a_model_is_run(command, known, checkpoint, text_file, tmp_path):
    """Not even where standard input says yes."""
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "model"))
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModelForMaskedLM": "evil.Model",
            "AutoTokenizer": ["evil.Slow", "evil.Fast"],
        }
        values |= {} if known else {"model_type": "evil", "tokenizer_class": "Evil"}
        (folder / name).write_text(json.dumps(values))
    (folder / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "ran")))
    config = tmp_path / "config.toml"
    config.write_text(f'[data]\ntrain = "{text_file}"\n[tokenizer]\npath = "{folder}"\n[train]\nsteps = 1\n')
    words = {"MODEL": folder, "OUT": tmp_path / "out", "CONFIG": config}
    done = subprocess.run(
        [sys.executable, "-m", "mlmkit", *(str(words.get(word, word)) for word in command.split())],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in done.stdout + done.stderr
    if not known:
        assert done.returncode == 2, done.stderr
        assert "mlmkit never runs a model's code" in done.stderr.splitlines()[-1]


def test_nothing_is_left_in_the_users_home(artifact, checkpoint, text_file, tmp_path):
    """ONNX Runtime would leave a device id and a queue of events for its maker there."""
    commands = [
        ["fill", artifact("bert"), "O rato [MASK] a roupa."],
        ["eval", artifact("bert"), "--set", text_file],
        ["export", checkpoint("bert"), "--output", tmp_path / "artifact", "--text", text_file],
    ]
    home = tmp_path / "home"
    home.mkdir()
    for command in commands:
        words = [sys.executable, "-m", "mlmkit", *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment(home))
        assert done.returncode == 0, done.stderr
    with running(artifact("bert"), environment=environment(home)) as server:
        assert server.ask("/fill-mask", {"inputs": "O rato [MASK] a roupa."}).status == 200
        assert server.stop() == 0
    left = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    assert left <= {(".cache", "mlmkit")}
