"""`--trust-remote-code`: models that come with Python code and a pickle, and what runs without the option."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import PROOF, refusal, run, run_json
from remote_models import AUTO_MAP, write_model
from safetensors.torch import save_file

import mlmkit
from mlmkit.backends import load
from mlmkit.errors import UserError
from mlmkit.export.export import export
from mlmkit.pretrained import load_pretrained

TRUST = "--trust-remote-code"
KINDS = ("ltg", "neo")


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory) -> Any:
    """Where transformers keeps copies of the code, for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setenv("HF_MODULES_CACHE", folder)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def remote(tmp_path_factory, tokenizer_folder) -> dict[str, tuple[Path, Path, Any]]:
    """For each kind its checkpoint, the file that its code makes, and the network as its code built it."""
    base = tmp_path_factory.mktemp("remote")
    canary = base / "canary"
    return {
        kind: (base / kind, canary, write_model(kind, base / kind, tokenizer_folder("wordpiece"), canary))
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def exported(remote, tmp_path_factory, graph_cache) -> dict[str, Path]:
    """The artifacts of the checkpoints."""
    base = tmp_path_factory.mktemp("exported")
    for kind in KINDS:
        export(remote[kind][0], base / kind, text=PROOF, trust_remote_code=True)
    return {kind: base / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_as_its_code_built_it(remote, kind, caplog):
    """transformers 5 itself fails on the one and gives NaN for the other, whose rotary table is not in the file."""
    folder, _, network = remote[kind]
    model, _ = load_pretrained(str(folder), trust_remote_code=True)
    assert caplog.messages[0].startswith("--trust-remote-code: Python code of")
    ids = torch.randint(5, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = network(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model.network(input_ids=ids, attention_mask=mask).logits, expected)
        scores = model(ids, mask, torch.tensor([0, 5, 9]), torch.tensor([7, 8, 9]))
    chosen = expected.flatten(0, 1)[[0, 5, 9]].log_softmax(-1)[range(3), [7, 8, 9]]
    torch.testing.assert_close(scores.log_prob, chosen)
    assert model.max_length() == 64


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_runs_it_and_the_artifact_needs_no_code(capsys, remote, exported, text_file, tmp_path, kind):
    folder, canary, _ = remote[kind]
    few = tmp_path / "few.txt"
    few.write_text("".join(text_file.read_text().splitlines(keepends=True)[:6]))
    results = {}
    for model, trust in ((folder, [TRUST]), (exported[kind], [])):
        canary.unlink(missing_ok=True)
        scored = run_json(capsys, "score", model, few, *trust)
        filled = run_json(capsys, "fill", model, "The [MASK] of the language", *trust)
        metrics = ["--metric", "masked", "--metric", "pseudo"]
        measured = run_json(capsys, "eval", model, "--set", few, *metrics, *trust)
        results[model] = (
            [text["pseudo_log_likelihood"] for text in scored["texts"]],
            [candidate["score"] for candidate in filled["masks"][0]],
            [measured["metrics"][name]["value"] for name in ("masked_cross_entropy", "pseudo_perplexity")],
        )
        assert canary.exists() == (kind == "ltg" and bool(trust))
    for own, artifacts in zip(*results.values(), strict=True):
        np.testing.assert_allclose(own, artifacts, rtol=1e-4)


def test_an_artifact_contains_no_code(capsys, exported, remote):
    for kind, folder in exported.items():
        assert not list(folder.glob("*.py"))
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((folder / name).read_text())
        report = json.loads((folder / "mlmkit.json").read_text())["parity"]
        assert report["max_log_prob_difference"] < 1e-4, kind
    folder = exported["ltg"]
    assert "has no code: leave out --trust-remote-code" in refusal(capsys, "fill", folder, "a [MASK]", TRUST)
    assert "has no code: leave out --trust-remote-code" in refusal(
        capsys, "export", folder, "--triton", folder.parent / "triton", TRUST
    )
    assert "no effect with --every" in run(capsys, "eval", folder, "--every", "--set", "x", TRUST)[2]


def test_a_graph_of_logits_contains_no_code(capsys, remote, graph_cache, text_file, tmp_path):
    folder, _, network = remote["ltg"]
    layout = ("--layout", "transformers", "--text", text_file)
    graph = run_json(capsys, "export", folder, "--output", tmp_path / "layout", *layout, TRUST)
    assert not list((tmp_path / "layout").rglob("*.py"))
    ids = torch.tensor([[2, 10, 11, 3], [2, 12, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    (logits,) = ort.InferenceSession(graph["path"]).run(None, {name: ids.numpy() for name, ids in inputs.items()})
    with torch.no_grad():
        expected = network(**inputs).logits
    np.testing.assert_allclose(np.asarray(logits)[ids > 0], expected[ids > 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_without_the_option_nothing_of_it_runs(capsys, remote, text_file, tmp_path, weights):
    folder, canary, network = remote["ltg"]
    folder = Path(shutil.copytree(folder, tmp_path / "model"))
    if weights != "pytorch_model.bin":
        (folder / "pytorch_model.bin").unlink()
        state = network.state_dict()
        state.pop("classifier.3.weight")  # tied by hand, so a safetensors file has it once
        save_file(state, folder / weights)
    canary.unlink(missing_ok=True)
    for command in (
        ["score", folder, text_file],
        ["fill", folder, "a [MASK]"],
        ["eval", folder, "--set", text_file],
        ["export", folder, "--output", tmp_path / "artifact"],
    ):
        assert TRUST in refusal(capsys, *command)
    assert not canary.exists()
    with pytest.raises(UserError, match=TRUST):
        mlmkit.evaluate(folder, ["a"])
    assert mlmkit.evaluate(folder, ["The language."], metrics="pseudo", trust_remote_code=True).metrics
    assert mlmkit.pseudo_log_likelihood(folder, ["The language."], trust_remote_code=True)
    assert canary.exists()


class Evil:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["bert", "ltg"])
@pytest.mark.parametrize("protocol", ["zip", "plain"])
def test_an_object_in_the_pickle_is_refused(checkpoint, remote, tmp_path, kind, protocol):
    source = checkpoint("bert") if kind == "bert" else remote[kind][0]
    folder, trap = Path(shutil.copytree(source, tmp_path / "model")), tmp_path / "trap"
    (folder / "model.safetensors").unlink(missing_ok=True)
    content = {"embedding.weight": torch.zeros(900, 900), "evil": Evil(trap)}
    if protocol == "zip":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content | {"padding": b"0" * 4_000_000}))
    with pytest.raises(UserError, match="holds objects other than tensors"):
        load(folder, trust_remote_code=True)
    assert not trap.exists()


def test_a_bin_of_an_architecture_of_transformers(checkpoint, tmp_path):
    """Also in shards. The option is accepted for a checkpoint that needs nothing of it, so that scripts may give it."""
    folder = Path(shutil.copytree(checkpoint("bert"), tmp_path / "model"))
    expected = load(folder, trust_remote_code=True)
    state = load_pretrained(str(folder))[0].network.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert load(folder, trust_remote_code=True).info.fingerprint == expected.info.fingerprint
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    files = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: state[name].clone() for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert load(folder, trust_remote_code=True).info.fingerprint == expected.info.fingerprint
    index["weight_map"][names[0]] = "../pytorch_model-1.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not a bin file in the folder"):
        load(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"layers.0.mlp.1.bias": None}, "it lacks weights for layers.0.mlp.1.bias"),
        ({"relative": torch.zeros(3, 32)}, "do not have the shapes that config.json asks for: relative"),
        ({"relative": 5}, "holds objects other than tensors"),
    ],
)
def test_weights_that_do_not_fit_the_code_are_refused(remote, tmp_path, damage, message):
    folder, _, network = remote["ltg"]
    folder = Path(shutil.copytree(folder, tmp_path / "model"))
    state = {name: weight for name, weight in (network.state_dict() | damage).items() if weight is not None}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        load(folder, trust_remote_code=True)


def test_a_buffer_that_is_not_in_the_weights_is_named(remote, tmp_path, caplog):
    folder = Path(shutil.copytree(remote["ltg"][0], tmp_path / "model"))
    state = {name: value for name, value in remote["ltg"][2].state_dict().items() if "position_indices" not in name}
    torch.save(state, folder / "pytorch_model.bin")
    load(folder, trust_remote_code=True)
    assert "so the model's code computes them" in caplog.text and "position_indices" in caplog.text


def test_the_other_bounds_hold_for_code_too(remote, tmp_path):
    folder = Path(shutil.copytree(remote["neo"][0], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1 << 30}))
    with pytest.raises(UserError, match="its configuration asks for 1,073,741,824 weights"):
        load(folder, trust_remote_code=True)
    without = {"AutoConfig": AUTO_MAP["neo"]["AutoConfig"]}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": without}))
    with pytest.raises(UserError, match="is a neo model, for which transformers has no masked LM"):
        load(folder, trust_remote_code=True)


def test_the_option_never_asks_and_says_one_line(capsys, caplog, monkeypatch, remote):
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks"))
    assert run(capsys, "fill", remote["neo"][0], "The [MASK]", TRUST)[0] == 0
    assert len([message for message in caplog.messages if TRUST in message]) == 1
