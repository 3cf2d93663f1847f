"""Average the weights of checkpoints, as of the last checkpoints of one run.

The safetensors files of all checkpoints are read tensor by tensor, and their means are computed in float64. So memory
holds the result and one tensor of each checkpoint, never two models.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from mlmkit.errors import UserError, as_user_error
from mlmkit.files import locate_model, new_folder
from mlmkit.pretrained import (
    from_pretrained,
    load_config,
    load_pretrained,
    load_tokenizer,
    save_config,
    save_tokenizer,
    weight_files,
)

# Entries of a configuration that change no result. The data types of the tensors are compared instead of `dtype`, and
# `layer_types` instead of the distance between global layers.
INCIDENTAL = dict.fromkeys(
    ("_name_or_path", "transformers_version", "transformers_weights", "dtype", "global_attn_every_n_layers")
)


def average(
    checkpoints: Sequence[str], output: Path, weights: Sequence[float] = (), *, overwrite: bool = False
) -> list[float]:
    """Write the mean of the weights of checkpoints as a complete model folder; returns each one's share of it.

    A checkpoint is a folder, the folder of a finished run, or a hub name. `weights` has a number per checkpoint, to
    which its share is proportional; by default, shares are equal. A mean is rounded to the data type of its tensor;
    configuration and tokenizer are those of the first checkpoint. The folder is created atomically.

    Raises `UserError` for fewer than two checkpoints; for weights that are not one per checkpoint, negative or all
    zero; for checkpoints that differ in configuration, tokenizer, integers, or the names, shapes or data types of their
    tensors; and for an `output` that exists, unless it is a model and `overwrite` is given.
    """
    weights = weights or [1.0] * len(checkpoints)
    if len(checkpoints) < 2 or len(weights) != len(checkpoints):
        raise UserError(
            f"{len(checkpoints)} checkpoints, {len(weights)} weights: give two or more, and one weight each"
        )
    total = math.fsum(weights)
    if not (min(weights) >= 0 and 0 < total < math.inf):
        raise UserError(f"the weights {', '.join(f'{each:g}' for each in weights)} must be at least 0, and not all 0")
    shares = [each / total for each in weights]
    first, *others = paths = [locate_model(checkpoint) for checkpoint in checkpoints]
    with new_folder(output, replaces="config.json" if overwrite else "") as folder:
        load_pretrained(first)  # refuses an incomplete model
        description = _description(first)
        for other in others:
            _refuse_difference(description, _description(other), first, other)
        save_torch_state_dict(_means(paths, shares), folder)
        save_config(load_config(first), folder)
        save_tokenizer(from_pretrained(AutoTokenizer, first), folder)
    return shares


def _description(path: str) -> dict[str, Any]:
    return load_config(path).to_dict() | INCIDENTAL | {"tokenizer": load_tokenizer(path).fingerprint}


def _refuse_difference(one: dict[str, Any], two: dict[str, Any], first: str, other: str) -> None:
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            raise UserError(
                f"{key} is {two.get(key)} in {other}, but {one.get(key)} in {first}: they cannot be averaged"
            )


def _means(paths: Sequence[str], shares: Sequence[float]) -> dict[str, Tensor]:
    means: dict[str, Tensor] = {}
    with ExitStack() as stack:
        checkpoints: list[dict[str, Any]] = []  # the open file of each tensor
        for path in paths:
            with as_user_error(path):
                files = [stack.enter_context(safe_open(file, "pt")) for file in weight_files(path)]
            checkpoints.append({name: file for file in files for name in file.keys()})  # noqa: SIM118
            _refuse_difference(_kinds(checkpoints[0]), _kinds(checkpoints[-1]), paths[0], path)
        for name in checkpoints[0]:
            tensors = [files[name].get_tensor(name) for files in checkpoints]
            if tensors[0].is_floating_point():
                mean = torch.zeros_like(tensors[0], dtype=torch.float64)
                for tensor, share in zip(tensors, shares, strict=True):
                    mean += tensor.double() * share
                means[name] = mean.to(tensors[0].dtype)
            elif all(tensor.equal(tensors[0]) for tensor in tensors):
                means[name] = tensors[0]
            else:
                raise UserError(
                    f"the integers {name} differ between the checkpoints, which therefore cannot be averaged"
                )
    return means


def _kinds(files: dict[str, Any]) -> dict[str, str]:
    tensors = {name: file.get_slice(name) for name, file in files.items()}
    return {name: f"{tensor.get_dtype()} {tensor.get_shape()}" for name, tensor in tensors.items()}
