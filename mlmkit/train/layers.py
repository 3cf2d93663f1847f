"""The repeated layers of an encoder: found without code per architecture, and compiled."""

from collections.abc import Callable
from typing import Any

from torch import nn

from mlmkit.model import MaskedLM


def encoder_layers(model: MaskedLM) -> list[nn.Module]:
    """The members of the outermost lists of modules in the body of the network."""
    return [layer for stack in _stacks(model.network.base_model) for layer in stack]


def compile_layers(model: MaskedLM, *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile each layer of the encoder in place and say how many there are; nothing is compiled before it runs.

    Layers of the same code and attributes share one compilation, so ModernBERT takes two, with and without a sliding
    window. Embeddings, head and loss stay as they are: the number of masked positions changes with every batch. For
    shapes that do not change, so that nothing is compiled again, see `pad_pack`; for other shapes, evaluation for
    example, run under `torch.compiler.set_stance("force_eager")`. Before `fully_shard`, if both are wanted.
    """
    layers = encoder_layers(model)
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    if isinstance(module, nn.ModuleList):
        return [module]
    return [stack for child in module.children() for stack in _stacks(child)]
