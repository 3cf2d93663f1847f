"""Checkpoints: Hugging Face folders with the optimiser's state beside them, whole or absent, never half-written.

`RUN/checkpoints/step-00000500/` holds `config.json`, `model.safetensors` and the tokenizer's files, which any Hugging
Face tool loads, `optimizer.safetensors`, and `trainer.json`, the cursor.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from mlmkit.files import new_folder


def save_checkpoint(
    run: Path, step: int, network: PreTrainedModel, tokenizer_folder: Path, optimizers: list[Optimizer], keep: int
) -> None:
    """Write the checkpoint of `step`, then delete all but the newest `keep`."""
    with new_folder(run / "checkpoints" / f"step-{step:08d}", replaces="trainer.json") as folder:
        save_model(network, tokenizer_folder, folder)
        save_file(_flatten(optimizers), folder / "optimizer.safetensors")
        (folder / "trainer.json").write_text(json.dumps({"step": step}))
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def save_model(network: PreTrainedModel, tokenizer_folder: Path, folder: Path) -> None:
    """The part of a checkpoint that Hugging Face tools read."""
    network.save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in (run / "checkpoints").glob("step-*/trainer.json"))


def load_optimizers(folder: Path, optimizers: list[Optimizer]) -> int:
    """Restore the optimisers' state in place; returns the step to go on from."""
    stored = load_file(folder / "optimizer.safetensors")
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in stored.items():
        number, index, key = name.split(".")
        states[int(number)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "trainer.json").read_text())["step"]


def _flatten(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    return {
        f"{number}.{index}.{key}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
