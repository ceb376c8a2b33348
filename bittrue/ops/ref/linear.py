"""Reference of the matrix products: dequantise the weight, then one row at a time in float32."""

import torch
from torch import Tensor

from bittrue.config.formats import ACT_GROUP
from bittrue.ops.contracts import Weight
from bittrue.ops.ref.quant import quant_fp8

FP8_BLOCK = 128  # rows and columns that share one scale
FP4_GROUP = 32  # columns that share one scale
E2M1_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_BIAS = 127  # ue8m0: the byte b stands for 2^(b - 127)


def scale_values(scale: Tensor) -> Tensor:
    """ue8m0 [...] -> f32 [...], exact: byte 0 is the subnormal 2^-127."""
    exponents = scale.view(torch.uint8).double() - SCALE_BIAS
    return torch.exp2(exponents).float()


def fp4_values(data: Tensor) -> Tensor:
    """Packed E2M1 [O, K/2] int8 -> f32 [O, K]; the low nibble comes first."""
    codes = data.view(torch.uint8)
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return torch.tensor(E2M1_SIZES + tuple(-s for s in E2M1_SIZES))[nibbles.long()]


def dequantize(weight: Weight) -> Tensor:
    """The matrix as f32 [O, K], exact."""
    num_rows, num_cols = weight.shape
    if weight.scale is None:
        return weight.data.float()
    scale = scale_values(weight.scale)
    if weight.format == "fp8":
        scale = scale.repeat_interleave(FP8_BLOCK, 0)[:num_rows].repeat_interleave(FP8_BLOCK, 1)
        return weight.data.float() * scale[:, :num_cols]
    return fp4_values(weight.data) * scale.repeat_interleave(FP4_GROUP, 1)[:, :num_cols]


def linear(
    x: Tensor, weight: Weight, *, quantize: bool = False, out_dtype: torch.dtype | None = None
) -> Tensor:
    if quantize and weight.format in ("fp8", "fp4"):
        x = quant_fp8(x, ACT_GROUP)
    matrix = dequantize(weight)
    out = torch.empty(x.shape[0], matrix.shape[0], dtype=out_dtype or x.dtype)
    for t in range(x.shape[0]):
        out[t] = (x[t].float() * matrix).sum(-1)
    return out


def linears(
    x: Tensor,
    weights: tuple[Weight, ...],
    *,
    quantize: tuple[bool, ...],
    out_dtypes: tuple[torch.dtype | None, ...],
) -> tuple[Tensor, ...]:
    parts = zip(weights, quantize, out_dtypes, strict=True)
    return tuple(linear(x, weight, quantize=q, out_dtype=out) for weight, q, out in parts)


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    num_tokens, num_groups, num_cols = x.shape
    matrix = dequantize(weight).view(num_groups, -1, num_cols)
    out = torch.empty(num_tokens, num_groups, matrix.shape[1], dtype=x.dtype)
    for t in range(num_tokens):
        for g in range(num_groups):
            out[t, g] = (x[t, g].float() * matrix[g]).sum(-1)
    return out
