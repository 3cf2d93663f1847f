"""Cross-entropy over a vocabulary in slices, so that its logits are never all in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits per slice. With a vocabulary of 64 k that is 256 rows: smaller slices cost time, larger ones save none.
SLICE_BYTES = 64 << 20


def linear_cross_entropy_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The sum of `F.cross_entropy(F.linear(hidden, weight, bias), targets)`, float32, or float64 if the weights are.

    `hidden` `[rows, width]`, `weight` `[vocabulary, width]`, `bias` `[vocabulary]`, `targets` `[rows]` int64. Matrix
    products use autocast's dtype if it is on, everything else the result's. The forward pass adds up loss and gradients
    slice by slice; the backward pass only scales the gradients.
    """
    return _LinearCrossEntropySum.apply(hidden, weight, bias, targets, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, differentiable: bool
    ) -> Tensor:
        device = hidden.device.type
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        exact = torch.promote_types(weight.dtype, torch.float32)
        inputs = (hidden, weight, bias)
        grads = [
            torch.zeros_like(tensor, dtype=exact) if tensor is not None and needed and differentiable else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        rows = max(SLICE_BYTES // (len(weight) * exact.itemsize), 1)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        with torch.autocast(device, enabled=False):
            matrix, offset = weight.to(product), None if bias is None else bias.to(product)
            for begin in range(0, len(targets), rows):
                part = slice(begin, begin + rows)
                states, target = hidden[part].to(product), targets[part, None]
                log_probs = F.linear(states, matrix, offset).to(exact).log_softmax(-1)
                loss -= log_probs.gather(-1, target).sum()
                if differentiable:
                    _add_gradients(grads, part, states, matrix, log_probs, target)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # In place, because the gradients are large. Autograd detects the change and refuses a second backward.
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else grad.mul_(scale).to(dtype) for grad, dtype in grads), None, None


def _add_gradients(
    grads: list[Tensor | None], part: slice, states: Tensor, matrix: Tensor, log_probs: Tensor, target: Tensor
) -> None:
    """Add a slice's share to the gradients of `hidden`, `weight` and `bias`, unless None. Overwrites `log_probs`."""
    grad_hidden, grad_weight, grad_bias = grads
    errors = log_probs.exp_()
    errors.scatter_add_(-1, target, errors.new_full(target.shape, -1))
    if grad_bias is not None:
        grad_bias += errors.sum(0)
    products = errors.to(matrix.dtype)
    if grad_hidden is not None:
        grad_hidden[part] = products @ matrix
    if grad_weight is not None and grad_weight.dtype == matrix.dtype:
        grad_weight.addmm_(products.T, states)
    elif grad_weight is not None:  # summed over the slices in float32
        grad_weight += products.T @ states
