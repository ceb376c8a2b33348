"""Quantisation of weight matrices to the published FP8 and FP4 formats, and back (spec 2.9 and 2.10)."""

import torch
from torch import Tensor

from bittrue.config.formats import FP4_GROUP, ceil_div
from bittrue.errors import CheckpointError
from bittrue.model.inventory import WEIGHT_BLOCK
from bittrue.ops.contracts import Weight

FP8_MAX = 448.0
FP8_FLOOR = 1e-4
FP4_MAX = 6.0
FP4_FLOOR = 6.0 * 2.0**-126
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Between code i and i + 1; a tie goes to the even code, so the comparison alternates between > and >=.
_FP4_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def quantize_fp8(values: Tensor) -> Weight:
    """[O, K] f32 or bf16 -> FP8 with one scale per 128 x 128 block: 2^ceil(log2(max(amax, 1e-4) / 448))."""
    blocks = _blocks(values.float())
    exponents = _ceil_log2(blocks.abs().amax(dim=(1, 3)).clamp(min=FP8_FLOOR) / FP8_MAX)
    scaled = torch.ldexp(blocks, -exponents[:, None, :, None])
    data = _unblocks(scaled, values.shape).to(torch.float8_e4m3fn)
    return Weight(data, _scale_bytes(exponents), "fp8")


def quantize_fp4(values: Tensor) -> Weight:
    """[O, K] f32 or bf16 -> packed FP4, one scale per row and 32 columns, ties to even. K divides by 32."""
    rows, cols = values.shape
    assert cols % FP4_GROUP == 0, "the config refuses such sizes"
    groups = values.float().view(rows, -1, FP4_GROUP)
    exponents = _ceil_log2(groups.abs().amax(dim=2).clamp(min=FP4_FLOOR) / FP4_MAX)
    scaled = torch.ldexp(groups, -exponents[:, :, None]).view(rows, cols)
    codes = fp4_codes(scaled)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return Weight(packed.view(torch.int8), _scale_bytes(exponents), "fp4")


def fp4_codes(scaled: Tensor) -> Tensor:
    """Nearest E2M1 code of every value (|value| <= 6), ties to even: f32 -> uint8 0..15, bit 3 the sign."""
    magnitude = scaled.abs()
    code = torch.signbit(scaled).to(torch.uint8) << 3
    for i, tie in enumerate(_FP4_TIES):
        code += magnitude > tie if i % 2 == 0 else magnitude >= tie
    return code


def fp4_values(data: Tensor) -> Tensor:
    """Packed codes [..., K / 2] int8 -> unscaled values [..., K] f32."""
    table = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], dtype=torch.float32)
    codes = data.view(torch.uint8)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1)
    return table[pairs.int()].flatten(-2)


def dequantize(weight: Weight) -> Tensor:
    """The exact value of every element, [O, K] f32."""
    if weight.scale is None:
        return weight.data.float()
    exponents = weight.scale.view(torch.uint8).int() - 127
    if weight.format == "fp4":
        values = fp4_values(weight.data)
        spread = exponents.repeat_interleave(FP4_GROUP, dim=1)[:, : values.shape[1]]
    else:
        values = weight.data.float()
        spread = exponents.repeat_interleave(WEIGHT_BLOCK, dim=0)[: values.shape[0]]
        spread = spread.repeat_interleave(WEIGHT_BLOCK, dim=1)[:, : values.shape[1]]
    return torch.ldexp(values, spread)


def fp4_to_fp8(weight: Weight, name: str) -> Weight:
    """The same values in FP8: block scale = largest sub-scale / 2^6. CheckpointError where inexact."""
    assert weight.format == "fp4" and weight.scale is not None
    rows, cols = weight.shape
    exponents = weight.scale.view(torch.uint8).int() - 127
    per_block = WEIGHT_BLOCK // FP4_GROUP
    pad = (0, -exponents.shape[1] % per_block, 0, -rows % WEIGHT_BLOCK)
    padded = torch.nn.functional.pad(exponents, pad, value=-127)
    blocks = padded.view(ceil_div(rows, WEIGHT_BLOCK), WEIGHT_BLOCK, -1, per_block)
    block_exponents = (blocks.amax(dim=(1, 3)) - 6).clamp(min=-127)
    values = dequantize(weight)
    scaled = torch.ldexp(_blocks(values), -block_exponents[:, None, :, None])
    data = _unblocks(scaled, values.shape).to(torch.float8_e4m3fn)
    out = Weight(data, _scale_bytes(block_exponents), "fp8")
    if not torch.equal(dequantize(out), values):
        wrong = int((dequantize(out) != values).sum())
        raise CheckpointError(
            f"{name}: {wrong} of {rows * cols} FP4 values have no exact FP8 form, because the scales inside "
            "a 128x128 block differ by more than 2^14; keep this checkpoint in FP4",
            tensor=name,
        )
    return out


def _blocks(values: Tensor) -> Tensor:
    """[O, K] -> [blocks, 128, blocks, 128], zero-padded."""
    rows, cols = values.shape
    padded = torch.nn.functional.pad(values, (0, -cols % WEIGHT_BLOCK, 0, -rows % WEIGHT_BLOCK))
    return padded.view(ceil_div(rows, WEIGHT_BLOCK), WEIGHT_BLOCK, ceil_div(cols, WEIGHT_BLOCK), WEIGHT_BLOCK)


def _unblocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    rows, cols = shape
    flat = blocks.reshape(blocks.shape[0] * WEIGHT_BLOCK, blocks.shape[2] * WEIGHT_BLOCK)
    return flat[:rows, :cols].contiguous()


def _ceil_log2(values: Tensor) -> Tensor:
    """ceil(log2(x)) of positive float32 values, exactly, as int32."""
    mantissa, exponent = torch.frexp(values)  # x = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return torch.where(mantissa > 0.5, exponent, exponent - 1)


def _scale_bytes(exponents: Tensor) -> Tensor:
    return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
