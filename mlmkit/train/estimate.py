"""What training costs: parameters, floating-point operations, memory; and what share of the GPU's rate was used.

Where an architecture matters it is run on a few tokens and watched, so there are no formulas for single ones.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mlmkit.model import MaskedLM, probe_inputs
from mlmkit.packing import PACKED_ATTENTION, Pack, packed_inputs
from mlmkit.train.config import OptimConfig

# Dense bfloat16 rate, TFLOP/s, by what torch.cuda.get_device_properties calls the GPU; the first that fits counts.
# NVIDIA's data sheets, half of the figure where they give it with sparsity. GeForce and RTX: the architecture white
# papers' rate with float32 accumulation.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "G?H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_flops(gpu: str) -> float:
    """Dense bfloat16 operations a second that the GPU of this name can do; 0 where it is not known."""
    return next((1e12 * rate for name, rate in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b(?! Laptop)", gpu)), 0.0)


# ---------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameters:
    """How many, by part. A head that shares the embeddings' matrix does not count it again."""

    embeddings: int
    encoder: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embeddings + self.encoder + self.head


def count_parameters(model: MaskedLM) -> Parameters:
    """Parameters of the embedding tables, of what else lies before the head, and of the head."""
    body = {id(parameter): parameter.numel() for parameter in model.network.base_model.parameters()}
    tables = {id(table.weight): table.weight.numel() for table in _tables(model)}
    embeddings = sum(tables.values())
    total = sum(parameter.numel() for parameter in model.network.parameters())
    return Parameters(embeddings, sum(body.values()) - embeddings, total - sum(body.values()))


def _tables(model: MaskedLM) -> list[nn.Embedding]:
    return [module for module in model.network.base_model.modules() if isinstance(module, nn.Embedding)]


# ---------------------------------------------------------------- floating-point operations


def flops_per_token(model: MaskedLM, lengths: NDArray[np.int64], mask_prob: float) -> float:
    """Operations a real token, forward and backward, for documents of `lengths` `[documents]` tokens.

    `6 M + 6 m H + 12 Σ_layers h s`: M is the weights of the encoder's matrices, each as often as it is used; H the
    head's, m the masked share; h the hidden size and s the tokens that a token attends to, itself included: its
    document, at most a sliding window's width. A multiply-add is two operations, and the backward pass takes two
    forward ones (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Nothing is counted twice for
    being computed again.

    The model must be on the CPU.
    """
    tokens = min(8, model.max_length())
    with_head, without = (_matrix_flops(model, tokens, masked) for masked in (tokens, 0))
    config = model.network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attended = sum(_attended(lengths, _window(config) if kind == "sliding_attention" else None) for kind in kinds)
    head = (with_head - without) / tokens
    return 3 * (without / tokens + mask_prob * head) + 12 * config.hidden_size * attended


def _matrix_flops(model: MaskedLM, tokens: int, masked: int) -> int:
    """Operations of one forward over `tokens`, but for attention's own products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(torch.arange(masked), **_row(model, tokens))
    counts = counter.get_flop_counts().get("Global", {})
    kinds = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    return sum(counts.get(kind, 0) for kind in kinds)


def _window(config: Any) -> int:
    """Its full width: ModernBERT names that `local_attention`, and transformers a half of it `sliding_window`."""
    return getattr(config, "local_attention", None) or 2 * config.sliding_window


def _attended(lengths: NDArray[np.int64], window: int | None) -> float:
    """How many tokens a token attends to, on average over tokens."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return float((lengths * seen).sum() / lengths.sum())


# ---------------------------------------------------------------- memory


def state_bytes(model: MaskedLM, optim: OptimConfig) -> int:
    """Bytes of what training keeps from step to step, in float32.

    With P parameters: weights 4 P, gradients 4 P, AdamW's moments 8 P; Muon keeps 4 for each of its own. What a forward
    pass keeps for the backward pass comes on top, and grows with `train.micro_batch_tokens`.
    """
    tables = {id(table.weight) for table in _tables(model)}
    hidden = sum(p.numel() for p in model.network.base_model.parameters() if p.ndim == 2 and id(p) not in tables)
    return 16 * count_parameters(model).total - (4 * hidden if optim.name == "muon" else 0)


def _row(model: MaskedLM, tokens: int) -> dict[str, Any]:
    """One document of arbitrary ids, as the model takes it, packed or not."""
    inputs = probe_inputs(model, [tokens])
    if model.network.config._attn_implementation == PACKED_ATTENTION:
        position_ids = torch.arange(tokens).unsqueeze(0) + model.position_offset
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        return packed_inputs(Pack(inputs["input_ids"], position_ids, ends, tokens))
    del inputs["positions"]
    return inputs
