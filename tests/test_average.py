"""`mlmkit average`: the mean of checkpoints that fit together, and one line for those that do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import refusal, run, run_json
from safetensors.torch import load_file, save_file
from training import small_architecture, weights, write_config
from transformers import AutoConfig, AutoModelForMaskedLM

from mlmkit.pretrained import load_pretrained
from mlmkit.train.checkpoints import saved_checkpoints
from mlmkit.train.loop import train


def changed(source: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def noise(seed: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in tensors.items():
            tensors[name] = (tensor + torch.randn(tensor.shape, generator=generator) * 0.1).to(dtype)

    return change


def configured(source: Path, copy: Path, **settings: object) -> Path:
    """A copy of a checkpoint with another configuration."""
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | settings))
    return copy


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file) -> Path:
    """A finished run with its last three checkpoints."""
    folder = tmp_path_factory.mktemp("average")
    config = write_config(folder, text_file, small_architecture(folder), "train.keep_checkpoints=3")
    train(config, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_the_mean_of_three_in_their_data_type(capsys, checkpoint, tmp_path, kind, dtype):
    folders = [changed(checkpoint(kind), tmp_path / name, noise(seed, dtype)) for seed, name in enumerate("abc")]
    made = run_json(capsys, "average", *folders, "--output", tmp_path / "mean", "--weights", "1,0.5,2.5")
    assert made == {
        "model": str(tmp_path / "mean"),
        "checkpoints": [str(folder) for folder in folders],
        "shares": [0.25, 0.125, 0.625],
    }
    tensors, mean = [weights(folder) for folder in folders], weights(tmp_path / "mean")
    assert mean.keys() == tensors[0].keys()  # a tied matrix is there once
    for name, value in mean.items():
        parts = [share * each[name].double() for share, each in zip(made["shares"], tensors, strict=True)]
        assert torch.equal(value, sum(parts, torch.zeros(())).to(dtype)), name
    _, tokenizer = load_pretrained(str(tmp_path / "mean"))
    assert tokenizer.fingerprint == load_pretrained(str(folders[0]))[1].fingerprint
    tied = AutoModelForMaskedLM.from_pretrained(tmp_path / "mean")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    configs = [
        AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""} for path in (folders[0], tmp_path / "mean")
    ]
    assert configs[0] == configs[1]
    assert not list(tmp_path.glob(".*"))


def test_the_mean_of_one_model_is_that_model(capsys, checkpoint, tmp_path):
    run_json(capsys, "average", *[checkpoint("bert")] * 3, "--output", tmp_path / "mean")
    one, mean = weights(checkpoint("bert")), weights(tmp_path / "mean")
    assert all(torch.equal(one[name], mean[name]) for name in one)


def test_a_run_and_its_checkpoints_are_averaged_and_can_be_evaluated(capsys, finished, tmp_path, text_file):
    """A run stands for its model; what is printed can be typed."""
    first = saved_checkpoints(finished)[0]
    code, out, err = run(capsys, "average", finished, first, "--output", tmp_path / "mean")
    assert code == 0, err
    assert out.splitlines() == [
        f"50.00%  {finished}",
        f"50.00%  {first}",
        f"model: {tmp_path}/mean",
        f"evaluate it: mlmkit eval {tmp_path}/mean --set TEXT --output RESULT",
    ]
    assert {path.name for path in (tmp_path / "mean").iterdir()} == {
        path.name for path in (finished / "model").iterdir()
    }
    result = run_json(capsys, "eval", tmp_path / "mean", "--set", text_file, "--metric", "masked")
    assert result["metrics"]["masked_cross_entropy"]["value"] > 0


def test_weights_in_several_files_and_buffers_of_integers(capsys, checkpoint, tmp_path):
    folders = [changed(checkpoint("bert"), tmp_path / name, noise(seed)) for seed, name in enumerate("ab")]
    for folder in folders:
        AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
        (folder / "model.safetensors").unlink()
        shutil.copytree(tmp_path / "parts", folder, dirs_exist_ok=True)
        [shard] = [path for path in folder.glob("*.safetensors") if "00001" in path.name]
        save_file(load_file(shard) | {"steps": torch.tensor([7])}, shard, metadata={"format": "pt"})
    run_json(capsys, "average", *folders, "--output", tmp_path / "mean")
    assert weights(tmp_path / "mean")["steps"].tolist() == [7]
    one, two, mean = (load_pretrained(str(path))[0].state_dict() for path in (*folders, tmp_path / "mean"))
    for name, value in mean.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-6, msg=name)


def test_what_does_not_fit_is_one_line_and_writes_nothing(capsys, checkpoint, artifact, tmp_path, tokenizer_folder):
    one = checkpoint("bert")
    other_tokenizer = Path(shutil.copytree(one, tmp_path / "tokenizer"))
    shutil.copytree(tokenizer_folder("bpe"), other_tokenizer, dirs_exist_ok=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    bias = "cls.predictions.bias"
    cases: dict[str, list[object]] = {
        "1 checkpoints, 1 weights: give two or more": [one],
        "Missing argument": [],
        "architectures is ['RobertaForMaskedLM'] in": [one, checkpoint("roberta")],
        "layer_norm_eps is 0.1 in": [one, configured(one, tmp_path / "eps", layer_norm_eps=0.1)],
        "tokenizer is ": [one, other_tokenizer],
        f"{bias} is None in": [one, changed(one, tmp_path / "less", lambda each: each.pop(bias))],
        f"{bias} is F16 [600] in": [
            one,
            changed(one, tmp_path / "half", lambda each: each.update({bias: each[bias].half()})),
        ],
        f"{bias} is F32 [599] in": [
            one,
            changed(one, tmp_path / "short", lambda each: each.update({bias: each[bias][1:].clone()})),
        ],
        "the integers steps differ": [
            changed(one, tmp_path / "seven", lambda each: each.update(steps=torch.tensor(7))),
            changed(one, tmp_path / "eight", lambda each: each.update(steps=torch.tensor(8))),
        ],
        "2 checkpoints, 3 weights": [one, one, "--weights", "1,2,3"],
        "the weights 1, -1 must be": [one, one, "--weights", "1,-1"],
        "the weights 0, 0 must be": [one, one, "--weights", "0,0"],
        "the weights 1, nan must be": [one, one, "--weights", "1,nan"],
        "write numbers separated by commas": [one, one, "--weights", "1;2"],
        "no such folder": [one, tmp_path / "none"],
        "is an artifact": [one, artifact("bert")],
    }
    before = sorted(tmp_path.rglob("*"))
    for message, arguments in cases.items():
        assert message in refusal(capsys, "average", *arguments, "--output", tmp_path / "out"), arguments
    for message, arguments in {
        "replace it with --overwrite": [],
        "has no config.json, so --overwrite leaves it alone": ["--overwrite"],
    }.items():
        assert message in refusal(capsys, "average", one, one, "--output", tmp_path / "text", *arguments)
    assert sorted(tmp_path.rglob("*")) == before
    assert run(capsys, "average", one, one, "--output", tmp_path / "eps", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "eps" / "config.json").read_text())["layer_norm_eps"] != 0.1
