"""Reference of rms_norm, with the row-wise sum every reference here reduces with."""

import torch
from torch import Tensor
from torch.nn import functional as F


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last axis [..., D] f32 -> [...] f32, in an order that depends on D alone.

    The second half is added to the first until one value is left. ``Tensor.sum`` would split a long row over
    threads, and its bits would depend on their number.
    """
    width = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = F.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept: [..., D] f32 -> [..., 1] f32."""
    mean = row_sum(x * x) / x.shape[-1]
    return (1.0 / torch.sqrt(mean + eps))[..., None]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    values = x.float()
    values = values * inverse_rms(values, eps)
    if weight is not None:
        values = values * weight.float()
    return values.to(x.dtype)
