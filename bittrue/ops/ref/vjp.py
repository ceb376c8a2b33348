"""The derivative of a plain function by autograd: how every reference backward is defined."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def vjp(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], d_outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients of sum(d_output * output) with respect to ``inputs``; zeros where nothing depends on
    one. ``function`` takes the inputs and returns a tensor or a tuple of tensors."""
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        result = function(*leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        total = sum((d * out).sum() for d, out in zip(d_outputs, outputs, strict=True))
        if not isinstance(total, Tensor) or not total.requires_grad:
            return tuple(torch.zeros_like(x) for x in inputs)
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
