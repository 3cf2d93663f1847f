"""Attention as exported graphs have it, for every architecture that uses transformers' attention interface."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from mlmkit.export.standard_forms import use_standard_forms
from mlmkit.model import PROBE_ERRORS, MaskedLM

EXPORTED_ATTENTION = "mlmkit_exported"
BOUND = 1e-4  # on logits: another order of sums, and no more


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

    The query is scaled, not the scores: only so does TensorRT recognise attention and fuse it, and a float16 score is
    smaller. The mask is a finite number that is added, so that a row which sees nothing (padding, outside a sliding
    window) stays a number without the guard against NaN that scaled_dot_product_attention is exported with.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    return torch.matmul(scores.softmax(dim=-1), value).transpose(1, 2), None


@contextmanager
def exported_attention(model: MaskedLM) -> Iterator[None]:
    """Within the block the model computes attention so, and in standard forms, if that gives its logits."""
    network, before = model.network, model.network.config._attn_implementation
    ids = torch.arange(1, 19).remainder(model.vocabulary_size).view(2, 9)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 4:] = 0
    inputs = {"positions": torch.tensor([0, 5, 8, 9, 12]), "input_ids": ids, "attention_mask": attention_mask}
    with ExitStack() as undo:
        try:
            with torch.no_grad():
                own = model.logits(**inputs)
                if before:
                    undo.callback(network.set_attn_implementation, before)
                network.set_attn_implementation(EXPORTED_ATTENTION)
                use_standard_forms(network, undo)
                works = torch.allclose(model.logits(**inputs), own, atol=BOUND, rtol=BOUND)
        except PROBE_ERRORS:
            works = False
        if not works:
            undo.close()
        yield


AttentionInterface.register(EXPORTED_ATTENTION, _attention)
AttentionMaskInterface.register(EXPORTED_ATTENTION, eager_mask)
