"""Several processes train one model: DDP, or FSDP2 where one device cannot hold weights and optimiser."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mlmkit.distributed import Ranks
from mlmkit.model import MaskedLM, probe_inputs
from mlmkit.train.layers import encoder_layers


class LossModule(nn.Module):
    """The loss as a module's forward, which is where DDP and FSDP hang their hooks."""

    def __init__(self, model: MaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, positions: Tensor, targets: Tensor, inputs: dict[str, Any]) -> Tensor:
        return self.model.loss_sum(positions, targets, **inputs)


def freeze_unused(model: MaskedLM) -> None:
    """Take the parameters that no gradient reaches out of training, such as a pooler's, found by a probe.

    They never change, but DDP would wait for them for ever, and an optimiser's state would lack them.
    """
    inputs = probe_inputs(model, [5])
    model.loss_sum(targets=inputs["input_ids"][0], **inputs).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def parallelise(model: MaskedLM, ranks: Ranks, kind: str) -> nn.Module:
    """The module to call for the loss: on one rank plain, on several `ddp` or `fsdp`, of a model on its device.

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


@contextmanager
def synchronised(module: nn.Module, last: bool) -> Iterator[None]:
    """Run a backward whose gradients go to the other ranks only if it is the `last` of an update's."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    yield


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a norm over all ranks of at most `max_norm`; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def whole_weights(model: MaskedLM) -> dict[str, Any] | None:
    """The network's weights gathered on the first rank's CPU; None where every rank holds them all."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    return get_model_state_dict(model.network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
