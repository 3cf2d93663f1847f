"""The forms in which graphs are exported: attention that engines recognise and fuse, and operators that TensorRT has.

`exported_forms` switches a model to them. It works for every architecture that uses transformers' attention interface,
and checks that the logits stay the same.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import tau
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from mlmkit.model import PROBE_ERRORS, MaskedLM

EXPORTED_ATTENTION = "mlmkit_exported"
TOLERANCE = 1e-4  # on logits: allows another order of summation, nothing else


@contextmanager
def exported_forms(model: MaskedLM) -> Iterator[None]:
    """Let the model compute in the exported forms within the block, unless they change its logits."""
    network, before, skips_rows = model.network, model.network.config._attn_implementation, model.skips_rows
    ids = torch.arange(1, 19).remainder(model.vocabulary_size).view(2, 9)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 4:] = 0
    inputs = {"positions": torch.tensor([0, 5, 8, 9, 12]), "input_ids": ids, "attention_mask": attention_mask}
    with ExitStack() as undo, ExitStack() as always:
        always.callback(setattr, model, "skips_rows", skips_rows)
        model.skips_rows = False  # an engine would scatter rows: docs/decisions.md
        try:
            with torch.no_grad():
                expected = model.logits(**inputs)
                if before:
                    undo.callback(network.set_attn_implementation, before)
                network.set_attn_implementation(EXPORTED_ATTENTION)
                _use_standard_operators(network, undo)
                works = torch.allclose(model.logits(**inputs), expected, atol=TOLERANCE, rtol=TOLERANCE)
        except PROBE_ERRORS:
            works = False
        if not works:
            undo.close()
        yield


def _attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`query`, `key`, `value` `[batch, heads, seq, width]` → `[batch, seq, heads, width]`.

    Scales the query and not the scores: TensorRT fuses attention only in this form, and float16 scores are smaller. The
    mask is a finite number that is added, so a row that attends to nothing (padding, outside a sliding window) stays
    finite without the NaN guard that scaled_dot_product_attention is exported with.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    return torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2), None


class ComplexForms(TorchFunctionMode):
    """Views complex numbers where a model unsqueezes them: torch's exporter has that for real numbers only.

    NeoBERT turns its queries and keys with complex numbers.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the one function, and call the others."""
        if function in (torch.unsqueeze, Tensor.unsqueeze) and args[0].is_complex():
            shape, dim = list(args[0].shape), kwargs["dim"] if kwargs else args[1]
            shape.insert(dim % (len(shape) + 1), 1)
            return args[0].reshape(shape)
        return function(*args, **(kwargs or {}))


AttentionInterface.register(EXPORTED_ATTENTION, _attention)
AttentionMaskInterface.register(EXPORTED_ATTENTION, eager_mask)


def _use_standard_operators(network: PreTrainedModel, undo: ExitStack) -> None:
    """Replace the methods in `STANDARD_FORMS` until `undo` is closed."""
    for module in network.modules():
        if type(module).__name__ in STANDARD_FORMS:
            method, form = STANDARD_FORMS[type(module).__name__]
            setattr(module, method, partial(form, module, network.config))
            undo.callback(delattr, module, method)


def _fourier(_module: Any, _config: Any, states: Tensor) -> tuple[Tensor]:
    """The real part of the Fourier transform of `[batch, seq, width]` over seq and width."""
    (cosines, sines), (width_cosines, width_sines) = map(_waves, states.shape[1:])
    return (cosines @ (states @ width_cosines) - sines @ (states @ width_sines),)


def _waves(length: int) -> tuple[Tensor, Tensor]:
    indices = torch.arange(length)
    period = torch.full_like(indices, length)
    angles = indices.unsqueeze(1) * indices % period / period * tau  # the modulo removes whole turns exactly
    return angles.cos(), angles.sin()


def _adapt(output: Any, config: Any, _languages: Tensor, states: Tensor) -> Tensor:
    """Apply the adapter of the default language to every row; mlmkit has no language ids."""
    normalise = output.adapter_layer_norm or (output.LayerNorm if output.adapter_reuse_layer_norm else nn.Identity())
    normalised = normalise(states)
    residual = normalised if output.ln_before_adapter else states
    return output.adapter_modules[config.default_language](normalised) + residual


# Class of a module: its method, and the replacement. FNet's DFT and X-MOD's NonZero are not in TensorRT.
STANDARD_FORMS = {"FNetBasicFourierTransform": ("forward", _fourier), "XmodOutput": ("lang_adapter", _adapt)}
