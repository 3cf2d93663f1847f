"""One optimiser step: forward and backward over micro-batches, on one process or several (DDP, or FSDP2).

DDP keeps a copy of the model on every rank. FSDP shards weights, gradients and optimiser state, for models that do not
fit on one device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from mlmkit.distributed import Ranks
from mlmkit.errors import UserError
from mlmkit.model import PROBE_ERRORS, MaskedLM, encoder_layers, probe_inputs
from mlmkit.train.data import MicroBatch

# ---------------------------------------------------------------- preparing a model


class LossModule(nn.Module):
    """The summed loss as a module's forward, which is where DDP and FSDP attach their hooks."""

    def __init__(self, model: MaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, positions: Tensor, targets: Tensor, inputs: dict[str, Any]) -> Tensor:
        return self.model.loss_sum(positions, targets, **inputs)


def freeze_unused(model: MaskedLM) -> None:
    """Freeze parameters that get no gradient (an unused pooler, say), found with one probe backward.

    DDP would wait for their gradients forever, and the saved optimiser state would lack them.
    """
    inputs = probe_inputs(model, [5])
    model.loss_sum(targets=inputs["input_ids"][0], **inputs).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def checkpoint_layers(model: MaskedLM) -> None:
    """Let each encoder layer keep only its inputs for the backward pass, which computes the rest again.

    The second forward restores the random generator's state, so loss and gradients are bit-identical, with dropout too;
    in compiled layers the gradients round differently. Call it before `enable_packing` and `compile_layers`. Raises
    `UserError` if a layer gives other results the second time, as those of BART, MVP and XLM: they add to a cache.
    """
    layers = encoder_layers(model)
    # A last layer that leaves out rows is not recomputed: the backward pass begins with it, so that would save nothing,
    # and the second forward would not know the rows. ALBERT's only layer, which runs many times, leaves out none.
    for layer in layers[:-1] if model.skips_rows else layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        freeze_unused(model)  # its probe
    except PROBE_ERRORS as error:
        kind = model.network.config.model_type
        raise UserError(f"train.checkpoint_activations does not work with a {kind} model: leave it out") from error


def compile_layers(model: MaskedLM, *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile each encoder layer in place, when it first runs; returns the number of layers.

    Layers with the same code and attributes share one compilation: ModernBERT needs one with and one without a sliding
    window. Embeddings, head and loss are not compiled, because the number of masked positions changes with every batch.
    `pad_pack` gives fixed shapes; run other shapes, such as an evaluation, under
    `torch.compiler.set_stance("force_eager")`. Call it before `parallelise`.
    """
    model.compute_all_rows()  # the number of rows would change with every batch, and hooks make a layer another graph
    layers = encoder_layers(model)
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


def parallelise(model: MaskedLM, ranks: Ranks, kind: str) -> nn.Module:
    """The module that computes the loss of a model on its device: plain on one rank, otherwise `ddp` or `fsdp`.

    Both average the gradients over the ranks.
    """
    loss = LossModule(model)
    if ranks.world == 1:
        return loss
    if kind == "ddp":
        device_ids = [model.device.index] if model.device.type == "cuda" else None
        return DistributedDataParallel(loss, device_ids=device_ids)
    for layer in encoder_layers(model):
        fully_shard(layer)
    fully_shard(loss)
    return loss


# ---------------------------------------------------------------- the step


def backward(
    module: nn.Module,
    batch: list[MicroBatch],
    seeds: Sequence[int],
    *,
    scale: float,
    device: torch.device,
    precision: str,
) -> float:
    """Accumulate the gradient of `scale` times the summed loss of this rank's micro-batches; returns that value.

    `scale` divides by the masked tokens of *all* ranks, so the gradient does not depend on how the global batch is cut
    into micro-batches and ranks. `seeds` holds the dropout seed of each micro-batch; `precision` is `fp32` or `bf16`.
    """
    total = torch.zeros((), device=device)
    for index, (micro, seed) in enumerate(zip(batch, seeds, strict=True)):
        torch.manual_seed(seed)
        micro = micro.to(device)
        with _synchronised(module, last=index == len(batch) - 1):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = module(micro.positions, micro.targets, micro.inputs) * scale
            loss.backward()
        total += loss.detach()
    return total.item()


@contextmanager
def _synchronised(module: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients between ranks only in the `last` backward of a step."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    yield


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients so that their norm over all ranks is at most `max_norm`; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def update(optimizers: Sequence[Optimizer], factor: float) -> None:
    """One step of each optimiser, at `factor` times its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()


def full_weights(model: MaskedLM) -> dict[str, Any] | None:
    """The network's sharded weights gathered on the first rank's CPU; None if every rank holds them all."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    return get_model_state_dict(model.network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
