"""Number formats of the published checkpoint, decoded and rounded from their definitions in plain torch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # FP8 weights: one scale per 128 x 128 block
FP4_GROUP = 32  # FP4 weights: one scale per 32 inputs
FP8_MAX = 448.0
FP8_FLOOR = 1e-4
FP4_MAX = 6.0
FP4_FLOOR = 6 * 2.0**-126
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [O, K] with its exact values, and whether the checkpoint stores it in FP8 or FP4."""

    values: Tensor
    is_quantised: bool


def load_matrix(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Matrix:
    """The matrix ``name``.weight with its scale applied where there is one."""
    weight = tensors[f"{name}.weight"]
    if weight.dtype == torch.float8_e4m3fn:
        return Matrix(dequant_fp8(weight, tensors[f"{name}.scale"]).to(dtype), True)
    if weight.dtype == torch.int8:
        return Matrix(dequant_fp4(weight, tensors[f"{name}.scale"]).to(dtype), True)
    return Matrix(weight.to(torch.float32).to(dtype), False)


def e4m3_table() -> Tensor:
    """Value of every E4M3 byte, float64: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f, 0xff NaN."""
    code = torch.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7).double()
    normal = torch.ldexp(1 + mantissa / 8, exponent - 7)
    subnormal = torch.ldexp(mantissa / 8, torch.full_like(code, -6))
    value = torch.where(exponent > 0, normal, subnormal)
    value = torch.where(code & 127 == 127, torch.nan, value)
    return torch.where(code >= 128, -value, value)


def e8m0_table() -> Tensor:
    """Value of every E8M0 byte, float64: 2^(byte - 127); 0xff is NaN."""
    table = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127)
    table[255] = torch.nan
    return table


def dequant_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """[O, K] E4M3 and [ceil(O/128), ceil(K/128)] E8M0 -> [O, K] float64, exact."""
    rows, cols = weight.shape
    values = e4m3_table()[weight.view(torch.uint8).long()]
    blocks = e8m0_table()[scale.view(torch.uint8).long()]
    return values * blocks.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]


def dequant_fp4(weight: Tensor, scale: Tensor) -> Tensor:
    """[O, K/2] packed E2M1 (low nibble first) and [O, ceil(K/32)] E8M0 -> [O, K] float64, exact."""
    table = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float64)
    code = weight.view(torch.uint8).long()
    values = torch.stack((table[code & 15], table[code >> 4]), dim=-1).flatten(1)
    groups = e8m0_table()[scale.view(torch.uint8).long()]
    return values * groups.repeat_interleave(FP4_GROUP, 1)[:, : values.shape[1]]


def scale_exponent(amax: Tensor, largest: float) -> Tensor:
    """ceil(log2(amax / largest)), exact: float64 division cannot round a float32 onto a power of two."""
    mantissa, exponent = torch.frexp(amax.double() / largest)
    return torch.where(mantissa == 0.5, exponent - 1, exponent)


def group_scales(x: Tensor, group: int, largest: float, floor: float) -> Tensor:
    """Power-of-two scale of every element's group along the last axis (the last may be short), like x."""
    size = x.shape[-1]
    padded = torch.nn.functional.pad(x.abs(), (0, -size % group))
    amax = padded.unflatten(-1, (-1, group)).amax(-1).to(torch.float32).clamp(min=floor)
    scale = torch.ldexp(torch.ones_like(amax, dtype=torch.float64), scale_exponent(amax, largest))
    return scale.repeat_interleave(group, -1)[..., :size].to(x.dtype)


def quant_fp8(x: Tensor, group: int) -> Tensor:
    """Quantise-dequantise to E4M3 with a power-of-two scale rounded up, so that nothing clips."""
    scale = group_scales(x, group, FP8_MAX, FP8_FLOOR)
    return (x / scale).to(torch.float32).to(torch.float8_e4m3fn).to(x.dtype) * scale


def quant_fp4(x: Tensor, group: int) -> Tensor:
    """Quantise-dequantise to E2M1 with a power-of-two scale rounded up."""
    scale = group_scales(x, group, FP4_MAX, FP4_FLOOR)
    return round_e2m1(x / scale) * scale


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest of +-{0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even code (torch.round is half to even)."""
    size = x.abs().clamp(max=FP4_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.copysign(torch.round(size / step) * step, x)


def hadamard(x: Tensor) -> Tensor:
    """Normalised Walsh-Hadamard transform of the last axis in natural order, unrounded."""
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"a Hadamard transform needs a power of two, not {size}")
    stride = 1
    while stride < size:
        pairs = x.unflatten(-1, (-1, 2, stride))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        stride *= 2
    return x * size**-0.5
