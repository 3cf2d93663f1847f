"""The optimisers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlmkit.errors import UserError
from mlmkit.model import MaskedLM, encoder_layers
from mlmkit.train.config import OptimConfig


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
        optimizers.append(StableAdamW(groups, config.lr, beta1=config.beta1, beta2=config.beta2, eps=config.eps))
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


def hidden_matrices(model: MaskedLM) -> list[Tensor]:
    """The weights of the linear maps inside the encoder's layers.

    Embeddings and the vocabulary head are left out, because their rows belong to single ids.
    """
    linear = [module for layer in encoder_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)]
    return list({id(module.weight): module.weight for module in linear}.values())


class StableAdamW(torch.optim.Optimizer):
    """StableAdamW (Wortsman et al. 2023, algorithm 2) by optimi, with the same state as torch's AdamW.

    optimi's own class keeps a None and a step counter shared by all parameters, which safetensors cannot hold.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, **settings: float) -> None:
        super().__init__(groups, {"lr": lr})
        self.settings = settings  # beta1, beta2, eps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step."""
        from optimi import stableadamw

        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, floor = self.state[p], torch.tensor(self.settings["eps"] ** 2, device=p.device)
                if not state:
                    state |= {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
                tensors = ([each] for each in (p, p.grad, state["exp_avg"], state["exp_avg_sq"], floor))
                # Its Triton kernels sum in no fixed order.
                options = {"weight_decay": group["weight_decay"], "foreach": False, "triton": False}
                stableadamw(*tensors, lr=group["lr"], step=state["step"], **options, **self.settings)


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
