"""FNet and X-MOD with products alone: their own operators, DFT and NonZero of a mask, are none of TensorRT's."""

from contextlib import ExitStack
from functools import partial
from math import tau
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def use_standard_forms(network: PreTrainedModel, undo: ExitStack) -> None:
    """Let the two architectures' modules compute as below, until `undo` is closed."""
    for module in network.modules():
        if type(module).__name__ in FORMS:
            method, form = FORMS[type(module).__name__]
            setattr(module, method, partial(form, module, network.config))
            undo.callback(delattr, module, method)


def _fourier(_module: Any, _config: Any, states: Tensor) -> tuple[Tensor]:
    """The real part of the Fourier transform of `[batch, seq, width]` over seq and width."""
    (cosines, sines), (width_cosines, width_sines) = map(_waves, states.shape[1:])
    return (cosines @ (states @ width_cosines) - sines @ (states @ width_sines),)


def _waves(length: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(length)
    period = torch.full_like(places, length)
    angles = places.unsqueeze(1) * places % period / period * tau  # whole turns are taken off exactly, as integers
    return angles.cos(), angles.sin()


def _adapt(output: Any, config: Any, _languages: Tensor, states: Tensor) -> Tensor:
    """Every row by the adapter of the default language, as rows have no other."""
    normalise = output.adapter_layer_norm or (output.LayerNorm if output.adapter_reuse_layer_norm else nn.Identity())
    normalised = normalise(states)
    residual = normalised if output.ln_before_adapter else states
    return output.adapter_modules[config.default_language](normalised) + residual


# A module's class: the method, and what stands in for it.
FORMS = {"FNetBasicFourierTransform": ("forward", _fourier), "XmodOutput": ("lang_adapter", _adapt)}
