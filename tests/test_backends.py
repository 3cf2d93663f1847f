"""What every backend promises: threads do not disturb each other, nothing of the process or its user is changed."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import paragraphs, process
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


def test_a_model_uses_full_float32_and_leaves_the_settings_of_the_process_alone(checkpoint):
    def settings() -> tuple[str, str]:
        cudnn: Any = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.conv.fp32_precision

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        seen = []
        model = load(str(checkpoint("bert")))
        model.model.register_forward_hook(lambda *_: seen.append(settings()))  # pyright: ignore[reportAttributeAccessIssue]
        model.score(random_batch(1, 5, 2))
        assert (seen, settings()) == ([("highest", "ieee")], ("medium", "tf32"))
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


def test_nothing_is_left_in_the_users_home(artifact, checkpoint, tmp_path, monkeypatch):
    """ONNX Runtime would leave a device id and a queue of events for its maker there."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(paragraphs()[:20]))
    commands = [
        ["fill", artifact("bert"), "O rato [MASK] a roupa."],
        ["eval", artifact("bert"), "--set", text],
        ["export", checkpoint("bert"), "--output", tmp_path / "artifact", "--text", text],
    ]
    home = tmp_path / "home"
    home.mkdir()
    for name in os.environ.keys() - {"PATH", "HF_HUB_OFFLINE"}:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(Path(mlmkit.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for command in commands:
        done = process(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    with running(artifact("bert")) as server:
        assert server.ask("/fill-mask", {"inputs": "O rato [MASK] a roupa."}).status == 200
        assert server.stop() == 0
    left = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    assert left <= {(".cache", "mlmkit")}
