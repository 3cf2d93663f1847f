"""The optimisers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlmkit.errors import UserError
from mlmkit.model import MaskedLM
from mlmkit.train.config import OptimConfig
from mlmkit.train.step import encoder_layers


def build_optimizers(model: MaskedLM, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW or StableAdamW for everything that is trained; or Muon for the hidden matrices and AdamW for the rest.

    Weight decay is decoupled and leaves out vectors: biases and the scales of normalisations. Every group has an
    `initial_lr`, which the schedule scales. Muon's updates are scaled to the size of AdamW's (Liu et al.
    2025, "Muon is scalable for LLM training", equation 4), so one learning rate serves both. Call it after
    `fully_shard`, which replaces the parameters.

    Raises `UserError` when Muon is asked for and the model has no hidden matrix.
    """
    hidden = [parameter for parameter in hidden_matrices(model) if config.name == "muon" and parameter.requires_grad]
    by_muon = {id(parameter) for parameter in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in by_muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = []
    if config.name == "stable_adamw":
        from optimi import StableAdamW

        # Its Triton kernels sum in no fixed order, and their state differs from a CPU's, which could not resume it.
        options = {"max_lr": config.lr, "kahan_sum": False, "foreach": False, "triton": False}
        optimizers.append(StableAdamW(groups, config.lr, betas, eps=config.eps, **options))
        optimizers[0].register_step_post_hook(_fill_none)
    else:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True))
    if config.name == "muon":
        if not hidden:
            raise UserError(
                f"no layer of a {model.network.config.model_type} model has a matrix for Muon: set optim.name to adamw"
            )
        optimizers.append(Muon(hidden, config.lr, config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = config.lr
    return optimizers


def _fill_none(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Replace the None in StableAdamW's state, which float32 does not use and torch cannot save."""
    for state in optimizer.state.values():
        state["kahan_comp"] = state["eps_sq"]


def hidden_matrices(model: MaskedLM) -> list[Tensor]:
    """The weights of the linear maps inside the encoder's layers.

    Embeddings and the vocabulary head are left out, because their rows belong to single ids.
    """
    linear = [module for layer in encoder_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)]
    return list({id(module.weight): module.weight for module in linear}.values())


class Muon(torch.optim.Muon):
    """torch's Muon with its Newton-Schulz iteration in float32 on a CPU.

    torch runs it in bfloat16, which takes ten times as long as float32 on a CPU without bfloat16 units.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; returns what `closure` returns."""
        with _Float32OnCPU():
            return super().step(closure)


class _Float32OnCPU(TorchFunctionMode):
    """Makes `tensor.bfloat16()` copy a CPU tensor without converting it."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.bfloat16 and args[0].device.type == "cpu":
            return args[0].clone()
        return func(*args, **(kwargs or {}))
