"""Packed attention: documents share a row without padding and without attending to each other.

Registers an attention function, `mlmkit_packed`, with transformers, which passes `cu_seqlens` down to it.
`enable_packing` finds out whether an architecture supports it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mlmkit.model import PROBE_ERRORS, MaskedLM, probe_inputs, probing

log = logging.getLogger(__name__)

PACKED_ATTENTION = "mlmkit_packed"
USUAL_TABLE = 1024  # positions: larger tables are rare, and probing them is slow
# torch 2.11 takes keys with fewer heads than queries as they come, and has no `enable_gqa`.
HAS_ENABLE_GQA = torch.__version__ >= "2.12"


@dataclass(frozen=True)
class Pack:
    """Documents end to end in one row.

    `input_ids` and `position_ids` `[1, total]` int64; `cu_seqlens` `[documents + 1]` int32 is where each document
    begins, and where the last one ends; `longest` is the length of the longest document.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    longest: int


def packed_inputs(pack: Pack) -> dict[str, Any]:
    """Return the inputs of `MaskedLM.logits` for a pack. The model must have packing enabled (`enable_packing`)."""
    return {
        "input_ids": pack.input_ids,
        "position_ids": pack.position_ids,
        "cu_seq_lens_q": pack.cu_seqlens,
        "cu_seq_lens_k": pack.cu_seqlens,
        "max_length_q": pack.longest,
        "max_length_k": pack.longest,
    }


def pad_pack(pack: Pack, *, total: int, most: int, longest: int, pad_id: int) -> Pack:
    """Pad a pack to shapes that depend only on `total`, `most` and `longest`, so that `torch.compile` compiles once.

    The pack may have up to `most` documents, `longest` tokens per document and `total` tokens. The result has `total`
    tokens in `most + ceil(total / longest)` documents. Tokens after the real ones form documents of padding, because
    a kernel leaves tokens outside all documents undefined; any further documents are empty, which costs next to
    nothing. Raises `ValueError` for a larger pack.
    """
    tokens, documents = pack.input_ids.shape[1], len(pack.cu_seqlens) - 1
    if tokens > total or documents > most or pack.longest > longest:
        raise ValueError(
            f"a pack of {documents} documents, {tokens} tokens, longest {pack.longest}, does not fit into {most}, "
            f"{total}, {longest}"
        )
    starts = torch.arange(tokens, total, longest, dtype=torch.int32)
    ends = torch.full((most + -(-total // longest) - documents,), total, dtype=torch.int32)
    ends[: len(starts)] = (starts + longest).clamp(max=total)
    filler = torch.arange(total - tokens)
    return Pack(
        torch.cat([pack.input_ids, torch.full_like(filler, pad_id)[None]], dim=1),
        torch.cat([pack.position_ids, (pack.position_ids[0, 0] + filler % longest)[None]], dim=1),
        torch.cat([pack.cu_seqlens, ends]),
        longest,
    )


def enable_packing(model: MaskedLM) -> bool:
    """Switch a model on the CPU to packed attention if its architecture supports it; return whether it does.

    Tested rather than listed by name: two packed documents must give the logits that each gives alone. The second is
    long enough to show a sliding window. A third fills the row beyond the position table, if that has a usual size: a
    network may have a buffer of that length for another purpose. The tolerance is tight because random weights hardly
    attend: DeBERTa, which ignores the request, was within 1e-3.
    """
    network, before = model.network, model.network.config._attn_implementation
    lengths = (min(7, model.max_length()), min(200, model.max_length()))
    try:
        with probing(network):
            alone = torch.cat([model.logits(**probe_inputs(model, [length])) for length in lengths])
            network.set_attn_implementation(PACKED_ATTENTION)
            together = model.logits(**_packed_probe(model, lengths))
        works = network.config._attn_implementation == PACKED_ATTENTION
        works = works and torch.allclose(alone, together, atol=2e-5, rtol=1e-5)
    except PROBE_ERRORS as error:
        log.debug("packing probe failed: %s", error)
        works = False
    if not works and before and network.config._attn_implementation == PACKED_ATTENTION:
        network.set_attn_implementation(before)
    return works


def _packed_probe(model: MaskedLM, lengths: Sequence[int]) -> dict[str, Any]:
    """Pack the documents of `probe_inputs` and a third after them. Each has the ids that it has alone."""
    asked = sum(lengths)
    third = max(model.max_length() + 1 - asked, 1) if model.max_length() <= USUAL_TABLE else 1
    lengths = [*lengths, third]
    input_ids = probe_inputs(model, lengths)["input_ids"]
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    ends = torch.cumsum(torch.tensor([0, *lengths]), 0).to(torch.int32)
    pack = Pack(input_ids, position_ids + model.position_offset, ends, max(lengths))
    return {"positions": torch.arange(asked), **packed_inputs(pack)}


# ---------------------------------------------------------------- the attention


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each document. `query`, `key`, `value` `[1, heads, total, width]` → `[1, total, heads, width]`.

    transformers counts a sliding window inclusively: a token sees `sliding_window - 1` neighbours on either side.
    There is no dropout: the CUDA kernel has none, and both devices should train the same way. On the CPU, where the
    probe runs, raises `ValueError` for an attention with additional terms.
    """
    if query.is_cuda and value.dtype != torch.float32:  # varlen_attn takes half types only
        return _on_cuda(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    if query.is_cuda or torch.compiler.is_compiling():
        return _padded(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    if softcap is not None or s_aux is not None or (attention_mask is not None and attention_mask.any()):
        raise ValueError("this attention adds a bias, a cap or a sink")
    return _one_by_one(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # the import takes three seconds in torch 2.13

    reach = -1 if window is None else window - 1
    # Under autocast, rotary positions of some architectures leave query and key in float32 and the value in bfloat16.
    query, key, value = (states.to(value.dtype).squeeze(0).transpose(0, 1) for states in (query, key, value))
    groups: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if HAS_ENABLE_GQA else {}
    output: Tensor = varlen_attn(  # pyright: ignore[reportAssignmentType]  (a tuple only with return_aux)
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, reach),
        **groups,
    )
    return output.unsqueeze(0)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """Attend document by document, for the CPU, where varlen_attn has no kernel. Computes nothing for padding."""
    lengths = ends.diff().tolist()
    column = torch.arange(longest)
    near = None if window is None else (column[:, None] - column).abs() < window
    outputs = [
        F.scaled_dot_product_attention(
            *document,
            attn_mask=None if near is None or length <= window else near[:length, :length],
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for length, *document in zip(
            lengths, *(states.split(lengths, dim=2) for states in (query, key, value)), strict=True
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _padded(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """Attend with a row of `longest` per document: for float32 on CUDA, and for torch.compile on the CPU, where no
    shape may depend on lengths.
    """
    total, documents = query.shape[2], len(ends) - 1
    token, column = torch.arange(total, device=ends.device), torch.arange(longest, device=ends.device)
    is_token = column < ends.diff()[:, None]  # [documents, longest]
    source = torch.where(is_token, ends[:-1, None] + column, 0).flatten()
    document = torch.searchsorted(ends[1:], token, right=True)
    target = document * longest + token - ends[document]
    # A query without a key gives NaN in some kernels, so padding attends to the first token, or to itself.
    if window is None:
        mask = (is_token | (column == 0))[:, None, None, :]
    else:
        distance = (column[:, None] - column).abs()
        mask = ((distance < window) & is_token[:, None, :] | (distance == 0))[:, None]
    output = F.scaled_dot_product_attention(
        *(
            states.index_select(2, source).unflatten(2, (documents, longest)).squeeze(0).transpose(0, 1)
            for states in (query, key, value)
        ),
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, target).unsqueeze(0)


def _no_mask(*_: Any, **__: Any) -> None:
    """`cu_seqlens` replaces the mask."""


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
