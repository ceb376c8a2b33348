"""Quantisation of weights: every byte value, every rounding boundary, and the exact step from FP4 to FP8."""

from fractions import Fraction

import pytest
import torch

from bittrue.errors import CheckpointError
from bittrue.model.quantize import (
    FP4_VALUES,
    dequantize,
    fp4_codes,
    fp4_to_fp8,
    fp4_values,
    quantize_fp4,
    quantize_fp8,
)
from bittrue.ops.contracts import Weight


def e4m3(byte: int) -> float:
    """The value of an E4M3 byte from its definition: 4 exponent bits, bias 7, 3 mantissa bits."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if byte & 128 else size


def scales(*exponents: list[int]) -> torch.Tensor:
    return (torch.tensor(exponents) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def test_fp8_dequantises_every_byte_at_every_scale_exactly() -> None:
    every = [b for b in range(256) if b & 127 != 127]
    data = torch.tensor([every], dtype=torch.uint8).view(torch.float8_e4m3fn)
    for exponent in (-127, -40, 0, 17, 119):
        got = dequantize(Weight(data, scales([exponent, exponent]), "fp8"))
        assert got[0].tolist() == [e4m3(b) * 2.0**exponent for b in every]


def test_fp4_dequantises_every_byte_low_nibble_first() -> None:
    data = torch.arange(256).to(torch.uint8).view(torch.int8).view(16, 16)
    exponents = [[e - 8] for e in range(16)]
    got = dequantize(Weight(data, scales(*exponents), "fp4"))
    signed = (*FP4_VALUES, *(-v for v in FP4_VALUES))
    for byte in range(256):
        row, col = divmod(byte, 16)
        scale = 2.0 ** (row - 8)
        assert got[row, 2 * col].item() == signed[byte & 15] * scale
        assert got[row, 2 * col + 1].item() == signed[byte >> 4] * scale


def test_a_scale_covers_its_own_block_only() -> None:
    data = torch.full((130, 260), 1.0).to(torch.float8_e4m3fn)
    got = dequantize(Weight(data, scales([0, 1, 2], [3, 4, 5]), "fp8"))
    assert got[127, 127] == 1 and got[127, 128] == 2 and got[0, 256] == 4
    assert got[128, 0] == 8 and got[129, 255] == 16 and got[129, 259] == 32


def test_fp4_rounds_to_nearest_with_ties_to_even() -> None:
    steps = torch.arange(-600, 601) / 100  # 0.01 apart: holds no tie but .25, .75, 1.25, 1.75, 2.5, 3.5, 5
    got = fp4_values(fp4_codes(steps).view(torch.int8)).view(-1, 2)[:, 0]
    for x, y in zip(steps.tolist(), got.tolist(), strict=True):
        exact = Fraction(round(abs(x) * 100), 100)
        best = min(
            range(8),
            key=lambda code: (abs(Fraction(FP4_VALUES[code]) - exact), code % 2),  # noqa: B023
        )
        assert abs(y) == FP4_VALUES[best], x
        assert y == 0 or (y < 0) == (x < 0)


@pytest.mark.parametrize(
    ("amax", "exponent"),
    [(448.0, 0), (448.00003, 1), (449.0, 1), (224.0, -1), (1.0, -8), (1e-4, -22), (1e-9, -22), (0.0, -22)],
)
def test_the_fp8_scale_is_rounded_up_and_has_a_floor(amax: float, exponent: int) -> None:
    values = torch.zeros(2, 2)
    values[1, 0] = -amax
    weight = quantize_fp8(values)
    assert weight.scale is not None
    assert weight.scale.view(torch.uint8).tolist() == [[exponent + 127]]


@pytest.mark.parametrize(
    ("amax", "exponent"), [(6.0, 0), (6.0000005, 1), (3.0, -1), (1.0, -2), (0.0, -126), (1e-40, -126)]
)
def test_the_fp4_scale_is_rounded_up_and_has_a_floor(amax: float, exponent: int) -> None:
    values = torch.zeros(1, 64)
    values[0, 40] = amax
    weight = quantize_fp4(values)
    assert weight.scale is not None
    assert weight.scale.view(torch.uint8).tolist() == [[1, exponent + 127]]


def test_fp8_values_never_clip_and_err_by_at_most_half_a_step() -> None:
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 3
    weight = quantize_fp8(values)
    error = (dequantize(weight) - values).abs()
    assert weight.scale is not None
    step = weight.scale.float().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert bool((error <= torch.maximum(values.abs() / 16, step * 2**-10)).all())
    assert weight.data.float().abs().max() <= 448


@pytest.mark.parametrize("quantize", [quantize_fp8, quantize_fp4])
def test_what_is_representable_survives_quantisation(quantize) -> None:  # type: ignore[no-untyped-def]
    values = torch.randn(160, 192, generator=torch.Generator().manual_seed(1))
    once = dequantize(quantize(values))
    assert torch.equal(dequantize(quantize(once)), once)


def test_fp4_becomes_fp8_without_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    # Rows of very different size: sub-scales up to 2^12 apart inside one block.
    spread = torch.exp2(torch.randint(-12, 1, (150, 1), generator=generator).float())
    packed = quantize_fp4(torch.randn(150, 224, generator=generator) * spread)
    wide = fp4_to_fp8(packed, "w")
    assert wide.data.shape == (150, 224)
    assert wide.scale is not None and wide.scale.shape == (2, 2)
    assert torch.equal(dequantize(wide), dequantize(packed))
    assert packed.scale is not None
    top = packed.scale.view(torch.uint8)[:128, :4].max().item()
    assert wide.scale.view(torch.uint8)[0, 0].item() == top - 6


def test_fp4_with_sub_scales_too_far_apart_is_refused_by_name() -> None:
    data = torch.full((1, 32), 0x11, dtype=torch.int8)  # 0.5 everywhere
    fp4_to_fp8(Weight(data, scales([0, 14]), "fp4"), "w")
    with pytest.raises(CheckpointError, match=r"experts\.3\.w1.*32 of 64") as caught:
        fp4_to_fp8(Weight(data, scales([0, 15]), "fp4"), "layers.0.ffn.experts.3.w1.weight")
    assert caught.value.tensor == "layers.0.ffn.experts.3.w1.weight"
