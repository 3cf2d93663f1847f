"""`train.precision`: the type of matrix products and attention in training.

In bf16, the forward pass runs under bfloat16 autocast, and the backward pass in the types of the forward pass. Weights,
gradients, optimiser state and loss stay float32, and held-out texts are always evaluated in float32.
"""

import logging

import torch

from mlmkit.backends.torch import pick_device

log = logging.getLogger(__name__)

# What `torch.cpu.get_capabilities` calls the units: x86's two, and ARM's.
UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware, and torch was built with oneDNN, which does it."""
    if not torch.backends.mkldnn.is_available():
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in UNITS)


def resolve_precision(precision: str, device: str, begun_in: str = "") -> str:
    """`fp32` or `bf16` for a `train.precision` on `cpu` or `cuda`.

    `auto` keeps what an existing run has `begun_in`. Otherwise it is `bf16` on CUDA and on a CPU with bfloat16 units,
    else `fp32`. Warns of `bf16` on a CPU without them.
    """
    is_fast = device == "cuda" or has_bfloat16_units()
    if precision == "auto":
        precision = begun_in or ("bf16" if is_fast else "fp32")
    if precision == "bf16" and not is_fast:
        log.warning("train.precision is bf16, but this CPU has no bfloat16 units: fp32 is faster here")
    return precision


def unrecorded_precision(device: str) -> str:
    """What runs of earlier versions, which had no such setting, compute in on `auto`, `cpu` or `cuda`."""
    return "bf16" if pick_device(device) == "cuda" else "fp32"
