"""What only a GPU can show, on tiny models: pytest -m gpu

CUDA is compared with the CPU, or two ways of computing on CUDA with each other, within bounds that stand beside them.
No GPU has run these tests yet. Their bodies ran on a CPU, with torch 2.11 or 2.13.
"""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from conftest import PROOF, paragraphs, run, run_json
from serving import running
from test_export import random_batch
from test_packing import assert_same_gradients, gradients, model_and_documents, packed, padded
from test_train_resume import kill_when, last_step
from torch._dynamo.utils import counters
from training import Ranks, log_lines, losses, same_weights, small_architecture, write_config

from benchmarks.architectures import SIZES
from mlmkit import packing
from mlmkit.backends import load
from mlmkit.backends.onnx import why_no_cuda
from mlmkit.errors import UserError
from mlmkit.eval.results_store import load_result
from mlmkit.export.export import export
from mlmkit.export.parity import BOUNDS
from mlmkit.packing import enable_packing
from mlmkit.train.config import Config
from mlmkit.train.cost import peak_flops
from mlmkit.train.loop import train

pytestmark = pytest.mark.gpu

# bfloat16 against float32, of the largest logit and of the largest gradient. On a CPU 0.015 and 0.020; if a window is
# one off 0.15 and 0.09; if the first two documents see each other at least 0.16 and 0.07.
MODEL = 0.05
LOSS = 0.03  # nats per masked token, mean of ten steps or of one: more than ten times the 0.002 of a CPU
LEARNING = (
    *("train.steps=80", "train.log_every=10", "optim.lr=1e-2", "optim.warmup_steps=5"),
    *("train.global_batch_tokens=2048", "train.micro_batch_tokens=1024"),
)
TEXT = "The [MASK] of a function is executed when the function is called."


@pytest.fixture(scope="module", autouse=True)
def device() -> str:
    """`cuda`, or the tests are skipped."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return "cuda"


def configure(folder: Path, text_file: Path, device: str, *settings: str, **architecture: object) -> Config:
    """A tiny BERT, in bfloat16 on CUDA and in float32 on the CPU."""
    given = (f"train.device={device}", f"train.precision={'bf16' if device == 'cuda' else 'fp32'}")
    folder.mkdir(exist_ok=True)
    return write_config(folder, text_file, small_architecture(folder, **architecture), *given, *settings)


# ---------------------------------------------------------------- packed attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", [4, 2])
def test_packed_attention_and_its_gradients(device, heads, window, dtype):
    """With grouped queries, empty documents, and documents longer than the window; against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 1, 14, 14, 40, 40, 40], dtype=torch.int32)
    states = [torch.randn(1, count, 40, 16, generator=generator).to(dtype) for count in (4, heads, heads)]
    weights = torch.randn(1, 40, 4, 16, generator=generator).to(dtype)
    query, key, value = exact = [each.double().requires_grad_() for each in states]
    expected = packing._one_by_one(query, key, value, ends, 30, 0.3, window)
    query, key, value = here = [each.to(device).requires_grad_() for each in states]
    shape = {"cu_seq_lens_q": ends.to(device), "max_length_q": 30, "scaling": 0.3, "sliding_window": window}
    found, _ = packing._packed_attention(torch.nn.Identity(), query, key, value, None, **shape)
    for output in (found, expected):
        (output * weights.to(output)).sum().backward()
    bound = 0.05 if dtype == torch.bfloat16 else 1e-4  # values are up to 4; a window that is one off moves them by 1
    pairs: Any = [(found, expected), *((one.grad, two.grad) for one, two in zip(here, exact, strict=True))]
    for one, two in pairs:
        torch.testing.assert_close(one.detach().cpu().double(), two.detach(), atol=bound, rtol=0)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "eurobert"])
def test_a_packed_model_in_bfloat16_equals_the_padded_one_in_float32(device, name, monkeypatch):
    """A window of 8 in ModernBERT, documents of up to 64 tokens, grouped queries in EuroBERT."""
    monkeypatch.setitem(SIZES, "num_key_value_heads", 1)
    model, documents = model_and_documents(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.ndim > 1 else 1)  # random weights hardly attend
        expected = model.logits(**padded(documents))
    expected_gradients = gradients(model, padded(documents))
    here = copy.deepcopy(model)
    assert enable_packing(here)
    here.to(device)
    inputs = {key: each.to(device) if torch.is_tensor(each) else each for key, each in packed(here, documents).items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        with torch.no_grad():
            found = here.logits(**inputs).float().cpu()
        found_gradients = {key: each.cpu() for key, each in gradients(here, inputs).items()}
    largest = float(expected.abs().max())
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=MODEL * largest, rtol=0)
    assert_same_gradients(found_gradients, expected_gradients, MODEL)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(device, tmp_path_factory, text_file) -> Path:
    """A run of 80 steps; the other tests use its model."""
    folder = tmp_path_factory.mktemp("trained")
    train(configure(folder, text_file, device, *LEARNING), folder / "run")
    return folder / "run"


def test_the_loss_curve_is_that_of_float32_on_the_cpu(device, trained, tmp_path, text_file):
    """The same weights at first, and the same masks."""
    train(configure(tmp_path, text_file, "cpu", *LEARNING), tmp_path / "run")
    found, expected = losses(trained), losses(tmp_path / "run")
    assert expected[0] - expected[-1] > 5 * LOSS, "it learns more than the bound: 0.29"
    np.testing.assert_allclose(found, expected, atol=LOSS, rtol=0)
    if device == "cuda":
        shown = ["mfu" in line for line in log_lines(trained)]
        assert shown == [peak_flops(torch.cuda.get_device_name()) > 0] * 8


@pytest.mark.parametrize("name", ["muon", "stable_adamw"])
def test_the_other_optimisers_train_as_on_the_cpu(device, name, tmp_path, text_file):
    if name == "stable_adamw":
        pytest.importorskip("optimi")
    settings = (f"optim.name={name}", "train.steps=20", "train.log_every=10")
    for where in ("here", "cpu"):
        folder = tmp_path / where
        train(configure(folder, text_file, device if where == "here" else "cpu", *settings), folder / "run")
    np.testing.assert_allclose(losses(tmp_path / "here/run"), losses(tmp_path / "cpu/run"), atol=LOSS, rtol=0)


def test_compiled_layers_train_as_eager_ones_and_compile_once(device, tmp_path, text_file):
    """Two layers that share one compilation, on eight packs of different documents."""
    torch._dynamo.reset()
    counters.clear()
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        settings = ("train.steps=8", "train.log_every=1", f"train.compile={compiled}")
        train(configure(folder, text_file, device, *settings), folder / "run")
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    np.testing.assert_allclose(losses(tmp_path / "true/run"), losses(tmp_path / "false/run"), atol=LOSS, rtol=0)


def test_killed_and_resumed_it_ends_with_the_same_weights(device, tmp_path, text_file):
    """To the bit, with dropout, under torch's deterministic algorithms. Otherwise FlashAttention's backward pass adds
    in an order that changes, and even two runs that nobody kills agree only within rounding.
    """
    settings = ("train.steps=60", "train.save_every=5", "train.log_every=4")
    config = configure(tmp_path, text_file, device, *settings, hidden_dropout_prob=0.2)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    complete(config, straight)
    kill_when(lambda: last_step(killed) >= 8, Ranks(config, killed, deterministic=True))
    assert last_step(killed) < 56, "it was killed too late"
    for saves_memory in (False, True):
        resumed = Path(shutil.copytree(killed, tmp_path / f"resumed-{saves_memory}"))
        complete(replace(config, train=replace(config.train, checkpoint_activations=saves_memory)), resumed)
        assert same_weights(resumed / "model", straight / "model")
        timings = dict.fromkeys(("tokens_per_second", "mfu"), 0)
        assert [line | timings for line in log_lines(resumed)] == [line | timings for line in log_lines(straight)]


def complete(config: Config, run: Path) -> None:
    ranks = Ranks(config, run, deterministic=True)
    assert ranks.wait() == [0], ranks.messages()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_train_as_one_cpu(device, kind, tmp_path, text_file):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    ranks = Ranks(configure(tmp_path, text_file, device, f"train.parallel={kind}"), tmp_path / "run", 2)
    assert ranks.wait() == [0, 0], ranks.messages()
    (tmp_path / "cpu").mkdir()
    train(configure(tmp_path / "cpu", text_file, "cpu"), tmp_path / "cpu/run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "cpu/run"), atol=LOSS, rtol=0)


def test_the_dry_run_times_a_step(device, tmp_path, text_file, capsys):
    configure(tmp_path, text_file, device)
    report = run_json(capsys, "train", tmp_path / "config.toml", "--set", f"train.device={device}", "--dry-run")
    assert report["device"] == device
    assert report["step_seconds"] > 0


# ---------------------------------------------------------------- scores in float32


def test_an_evaluation_equals_that_on_the_cpu(device, trained, tmp_path, capsys):
    """The same masks, and every log-probability within the bound of a float32 export."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(paragraphs()[:40]), encoding="utf-8")
    for name, where in (("here", device), ("cpu", "cpu")):
        command = ["eval", trained / "model", "--set", text, "--metric", "masked", "--metric", "pseudo"]
        code, _, err = run(capsys, *command, "--device", where, "--output", tmp_path / name)
        assert code == 0, err
    found, expected = (load_result(tmp_path / name) for name in ("here", "cpu"))
    assert found.result["backend"] == expected.result["backend"] | {"device": device}
    assert found.result["mask_digest"] == expected.result["mask_digest"]
    comparison = run_json(capsys, "compare", tmp_path / "cpu", tmp_path / "here")["comparisons"][0]
    assert {"masked_cross_entropy", "pseudo_perplexity"} <= comparison["metrics"].keys()
    assert abs(comparison["metrics"]["masked_cross_entropy"]["difference"]) <= BOUNDS["fp32"].cross_entropy
    assert max(abs(token["difference"]) for token in comparison["tokens"]) <= BOUNDS["fp32"].max_log_prob


def test_convolutions_use_full_float32(device, checkpoint):
    """TF32 has 10 bits of mantissa, and cuDNN uses it for convolutions unless it is told not to."""
    assert_same_scores(load(checkpoint("convbert"), device=device), load(checkpoint("convbert"), device="cpu"))


def test_onnxruntime_scores_as_on_the_cpu(device, trained, tmp_path):
    if device == "cuda" and (reason := why_no_cuda()):
        pytest.skip(reason)
    export(str(trained / "model"), tmp_path / "artifact", text=PROOF)
    try:
        here = load(tmp_path / "artifact", "onnx", device)
    except UserError as error:  # its CUDA or cuDNN is missing or another version
        pytest.skip(str(error))
    assert_same_scores(here, load(tmp_path / "artifact", "onnx", "cpu"))


def assert_same_scores(here: Any, there: Any) -> None:
    """Also for a single token, and without a masked one."""
    for shape in ((1, 1, 1), (1, 48, 5), (17, 13, 300), (5, 7, 0)):
        batch = random_batch(*shape)
        found, expected = here.score(batch), there.score(batch)
        assert found.top_id.shape == expected.top_id.shape
        largest = np.abs(expected.top_log_prob).max(initial=0.0)
        bound = BOUNDS["fp32"].max_log_prob + BOUNDS["fp32"].relative_log_prob * float(largest)
        for name in ("log_prob", "top_log_prob"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=bound, rtol=0)


# ---------------------------------------------------------------- use


def test_masks_are_filled_as_on_the_cpu(device, trained, capsys):
    found, expected = (
        run_json(capsys, "fill", trained / "model", TEXT, "--device", name)["masks"][0] for name in (device, "cpu")
    )
    assert [each["token"] for each in found] == [each["token"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-4)


def test_a_server_fills_masks(device, trained, capsys):
    pytest.importorskip("fastapi")
    with running(trained / "model", "--device", device) as server:
        answer = server.ask("/fill-mask", {"inputs": TEXT})
    assert answer.status == 200
    expected = run_json(capsys, "fill", trained / "model", TEXT, "--device", "cpu")["masks"][0]
    assert [each["token"] for each in answer.json] == [each["token"] for each in expected]
