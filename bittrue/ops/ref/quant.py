"""Reference of the quantisation ops: FP8 and FP4 simulation, Hadamard, packed rows.

A scale is a ue8m0 byte, found without a logarithm: amax = m * 2^k with m in [1/2, 1), and the largest
value of the format is M * 2^p likewise, so ceil(log2(amax / largest)) is k - p, plus one when m > M.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bittrue.config.formats import FP4_GROUP, KV_GROUP, RowFormat
from bittrue.ops.ref.norm import rms_norm
from bittrue.ops.ref.rope import rope

FP8_FLOOR = 1e-4
FP4_FLOOR = 6 * 2.0**-126
SCALE_BIAS = 127  # ue8m0: the byte b stands for 2^(b - 127)


def fp8_scales(groups: Tensor) -> Tensor:
    """[..., g] f32 -> [...] u8: ue8m0 of 2^ceil(log2(max(amax, 1e-4) / 448)), exactly. 448 = 0.875 * 2^9."""
    mantissa, exponent = torch.frexp(groups.abs().amax(-1).clamp(min=FP8_FLOOR))
    return (exponent - 9 + (mantissa > 0.875) + SCALE_BIAS).to(torch.uint8)


def fp4_scales(groups: Tensor) -> Tensor:
    """[..., g] f32 -> [...] u8: ue8m0 of 2^ceil(log2(max(amax, 6 * 2^-126) / 6)), exactly. 6 = 0.75 * 2^3."""
    mantissa, exponent = torch.frexp(groups.abs().amax(-1).clamp(min=FP4_FLOOR))
    return (exponent - 3 + (mantissa > 0.75) + SCALE_BIAS).to(torch.uint8)


def e2m1_codes(scaled: Tensor) -> Tensor:
    """Nearest E2M1 code, f32 -> u8: the sign in bit 3, codes 0..7 for 0, .5, 1, 1.5, 2, 3, 4, 6.

    A magnitude halfway between two codes goes to the even one, so odd codes are strict at both midpoints.
    """
    size = scaled.abs()
    above = [size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.0]
    code = torch.stack(above).sum(0, dtype=torch.uint8)
    return code | (torch.signbit(scaled).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """The value of E2M1 codes 0..15: u8 -> f32."""
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return torch.tensor(sizes + [-s for s in sizes])[codes.long()]


def _grouped(x: Tensor, group: int) -> Tensor:
    """[..., K] act -> [..., ceil(K / group), group] f32, zeros after a short last group."""
    return torch.unflatten(F.pad(x.float(), (0, -x.shape[-1] % group)), -1, (-1, group))


def _times_scale(groups: Tensor, scales: Tensor) -> Tensor:
    """(groups [..., n, g] f32, scales [..., n] ue8m0 bytes) -> [..., n, g] f32, exact."""
    return groups * scales.view(torch.float8_e8m0fnu).float()[..., None]


def _over_scale(groups: Tensor, scales: Tensor) -> Tensor:
    """Divides as _times_scale multiplies: the inverse of the scale of byte b is that of 254 - b."""
    return _times_scale(groups, 2 * SCALE_BIAS - scales)


def _e4m3(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, g] f32 -> (values [..., n, g] float8_e4m3fn, scales [..., n] u8), nearest even."""
    scales = fp8_scales(groups)
    return _over_scale(groups, scales).to(torch.float8_e4m3fn), scales


def _e2m1(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, g] f32 -> (codes [..., n, g] u8, scales [..., n] u8)."""
    scales = fp4_scales(groups)
    return e2m1_codes(_over_scale(groups, scales)), scales


def quant_fp8(x: Tensor, group: int) -> Tensor:
    values, scales = _e4m3(_grouped(x, group))
    return _times_scale(values.float(), scales).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def quant_fp4(x: Tensor, group: int) -> Tensor:
    codes, scales = _e2m1(_grouped(x, group))
    return _times_scale(e2m1_values(codes), scales).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    n = x.shape[-1]
    values = x.float()
    stride = 1
    while stride < n:
        pairs = torch.unflatten(values, -1, (-1, 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return (values * (1.0 / math.sqrt(n))).to(x.dtype)


def pack_rows(x: Tensor, fmt: RowFormat) -> Tensor:
    if fmt.kind in ("f32", "bf16"):
        return _as_bytes(x.to(_plain_dtype(fmt)))
    if fmt.kind == "fp8":
        num_quantised = fmt.dim - fmt.rope_dim
        values, scales = _e4m3(_grouped(x[..., :num_quantised], KV_GROUP))
        codes = _as_bytes(values.flatten(-2)[..., :num_quantised])
        rope = _as_bytes(x[..., num_quantised:].to(torch.bfloat16))
        row = torch.cat((codes, rope, scales), dim=-1)
        return F.pad(row, (0, fmt.bytes - row.shape[-1]))
    codes, scales = _e2m1(_grouped(x, FP4_GROUP))
    pairs = torch.unflatten(codes.flatten(-2)[..., : fmt.dim], -1, (-1, 2))
    return torch.cat((pairs[..., 0] | (pairs[..., 1] << 4), scales), dim=-1)


def kv_rows(kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float, fmt: RowFormat) -> Tensor:
    turned = rope(rms_norm(kv, norm, eps)[:, None], cos, sin, False)[:, 0]
    return pack_rows(turned.contiguous(), fmt)


def unpack_rows(rows: Tensor, fmt: RowFormat) -> Tensor:
    if fmt.kind in ("f32", "bf16"):
        return _from_bytes(rows, _plain_dtype(fmt)).float()
    if fmt.kind == "fp8":
        num_quantised, rope_bytes = fmt.dim - fmt.rope_dim, 2 * fmt.rope_dim
        scales = rows[..., num_quantised + rope_bytes :][..., : fmt.num_scales]
        codes = _from_bytes(rows[..., :num_quantised], torch.float8_e4m3fn)
        rope = _from_bytes(rows[..., num_quantised : num_quantised + rope_bytes], torch.bfloat16)
        return torch.cat((_rescaled(codes.float(), scales, KV_GROUP), rope.float()), dim=-1)
    codes, scales = rows[..., : fmt.dim // 2], rows[..., fmt.dim // 2 :]
    values = e2m1_values(torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2))
    return _rescaled(values, scales, FP4_GROUP)


def _plain_dtype(fmt: RowFormat) -> torch.dtype:
    return torch.float32 if fmt.kind == "f32" else torch.bfloat16


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _from_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, because a part of a row need not be aligned for ``dtype``."""
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)


def _rescaled(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """values [..., K] f32 times the scale of their group, scales [..., ceil(K / group)] u8."""
    return _times_scale(_grouped(values, group), scales).flatten(-2)[..., : values.shape[-1]]
