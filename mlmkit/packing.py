"""Packed attention: documents share a row without seeing each other or any padding, in any architecture that lets them.

An attention, `mlmkit_packed`, is registered with transformers, which passes `cu_seqlens` down to it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mlmkit.model import PROBE_ERRORS, MaskedLM, probe_inputs

log = logging.getLogger(__name__)

PACKED_ATTENTION = "mlmkit_packed"


@dataclass(frozen=True)
class Pack:
    """Documents laid end to end in one row. All int64 but `cu_seqlens`, int32.

    `input_ids` and `position_ids` `[1, total]`; `cu_seqlens` `[documents + 1]` is where each begins and the last ends.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    longest: int


def packed_inputs(pack: Pack) -> dict[str, Any]:
    """What `MaskedLM.logits` passes to transformers for a pack, once `enable_packing` has said yes."""
    return {
        "input_ids": pack.input_ids,
        "position_ids": pack.position_ids,
        "cu_seq_lens_q": pack.cu_seqlens,
        "cu_seq_lens_k": pack.cu_seqlens,
        "max_length_q": pack.longest,
        "max_length_k": pack.longest,
    }


def enable_packing(model: MaskedLM) -> bool:
    """Switch a model on the CPU to packed attention if its architecture takes it; say whether it did.

    Evidence instead of a list of names: two documents, packed, must give the logits that each gives alone. The second
    is long enough for a sliding window to show. The bound is tight, as random weights attend to little: DeBERTa, which
    ignores the request, was within 1e-3.
    """
    network, before = model.network, model.network.config._attn_implementation
    training = network.training
    lengths = (7, min(200, model.max_length()))
    network.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([model.logits(**probe_inputs(model, [length])) for length in lengths])
            network.set_attn_implementation(PACKED_ATTENTION)
            together = model.logits(**_packed_probe(model, lengths))
        works = network.config._attn_implementation == PACKED_ATTENTION
        works = works and torch.allclose(alone, together, atol=2e-5, rtol=1e-5)
    except PROBE_ERRORS as error:
        log.debug("packing probe failed: %s", error)
        works = False
    finally:
        network.train(training)
    if not works and before and network.config._attn_implementation == PACKED_ATTENTION:
        network.set_attn_implementation(before)
    return works


def _packed_probe(model: MaskedLM, lengths: Sequence[int]) -> dict[str, Any]:
    """The documents that `probe_inputs` makes, packed: each is the same as alone."""
    inputs = probe_inputs(model, lengths)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    ends = torch.cumsum(torch.tensor([0, *lengths]), 0).to(torch.int32)
    pack = Pack(inputs["input_ids"], position_ids + model.position_offset, ends, max(lengths))
    return {"positions": inputs["positions"], **packed_inputs(pack)}


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each document. `query`, `key`, `value` `[1, heads, total, width]` → `[1, total, heads, width]`.

    transformers counts a sliding window inclusively: a token sees `sliding_window - 1` neighbours on either side.
    There is no dropout here: the CUDA kernel has none, and both devices should train alike.
    """
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        reach = -1 if sliding_window is None else sliding_window - 1
        output: Tensor = varlen_attn(  # pyright: ignore[reportAssignmentType]  (a tuple only with return_aux)
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(reach, reach),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.unsqueeze(0), None

    # varlen_attn has no CPU kernel: the documents take rows of a padded view for this one operation.
    starts, lengths = cu_seq_lens_q[:-1, None], cu_seq_lens_q.diff()[:, None]
    column = torch.arange(max_length_q, device=query.device)
    is_token = column < lengths  # [documents, longest]
    place = torch.where(is_token, starts + column, 0)
    mask = is_token[:, None, None, :]
    if sliding_window is not None:
        mask = mask & ((column[:, None] - column).abs() < sliding_window)
    padded = F.scaled_dot_product_attention(
        *(states[place].transpose(1, 2) for states in (query, key, value)),
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return padded.transpose(1, 2)[is_token].unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """`cu_seqlens` says all that a mask would."""


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
