"""rope: adjacent pairs of the last features, angles that stay right at a million, the inverse."""

import math

import pytest
import torch

INV_FREQ = (10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)).float()


def test_angles_are_right_at_a_million_positions(ops):
    positions = torch.tensor([0, 1, 127, 65_535, 999_999, 1_048_575], dtype=torch.int32)
    cos, sin = ops.rope_angles(positions, INV_FREQ)
    for t, position in enumerate(positions.tolist()):
        for k, frequency in enumerate(INV_FREQ):
            angle = float(torch.tensor(float(position)) * frequency)  # one f32 product
            assert abs(cos[t, k].item() - math.cos(angle)) <= 2.0**-25
            assert abs(sin[t, k].item() - math.sin(angle)) <= 2.0**-25


@pytest.mark.parametrize("largest", [2**20, 2**31 - 1])
def test_angles_are_the_rounded_float64_ones(ops, largest):
    """No position differs by a bit, the few beyond the range of the quick reduction included."""
    generator = torch.Generator().manual_seed(largest)
    positions = torch.randint(0, largest, (4000,), generator=generator, dtype=torch.int32)
    positions[:3] = torch.tensor([0, 1, largest - 1], dtype=torch.int32)
    cos, sin = ops.rope_angles(positions, INV_FREQ)
    angles = (positions.float()[:, None] * INV_FREQ).double()
    assert torch.equal(cos, angles.cos().float())
    assert torch.equal(sin, angles.sin().float())


@pytest.mark.parametrize("half", [1, 15, 16, 17, 40])
def test_an_angle_does_not_depend_on_how_many_there_are(ops, half):
    positions = torch.tensor([3, 1_000_003], dtype=torch.int32)
    frequencies = torch.logspace(0, -4, 40)
    cos, sin = ops.rope_angles(positions, frequencies)
    short = ops.rope_angles(positions, frequencies[:half].clone())
    assert torch.equal(short[0], cos[:, :half]) and torch.equal(short[1], sin[:, :half])


def test_no_positions_give_no_angles(ops):
    cos, sin = ops.rope_angles(torch.zeros(0, dtype=torch.int32), INV_FREQ)
    assert cos.shape == sin.shape == (0, 32)


@pytest.mark.parametrize(("head", "rotary"), [(512, 64), (64, 16), (128, 64), (16, 16), (70, 6)])
def test_adjacent_pairs_of_the_last_features_turn(ops, head, rotary):
    generator = torch.Generator().manual_seed(head)
    x = torch.randn(3, 2, head, generator=generator)
    cos, sin = ops.rope_angles(torch.tensor([0, 5, 90_001], dtype=torch.int32), INV_FREQ[: rotary // 2])
    got = ops.rope(x, cos, sin, False)
    assert torch.equal(got[..., :-rotary], x[..., :-rotary])
    assert torch.equal(got[0], x[0])  # position 0 does not turn
    turned = torch.view_as_complex(x[..., -rotary:].double().unflatten(-1, (-1, 2)))
    turned = turned * torch.complex(cos.double(), sin.double())[:, None]
    assert torch.allclose(got[..., -rotary:].double(), torch.view_as_real(turned).flatten(-2), atol=1e-6)


def test_the_inverse_is_the_conjugate(ops):
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(1))
    cos, sin = ops.rope_angles(torch.arange(4, dtype=torch.int32) * 1000, INV_FREQ[:8])
    assert torch.equal(ops.rope(x, cos, sin, True), ops.rope(x, cos, -sin, False))
    assert torch.allclose(ops.rope(ops.rope(x, cos, sin, False), cos, sin, True), x, atol=1e-6)


def test_bf16_is_rounded_once(ops):
    x = torch.randn(5, 2, 80, generator=torch.Generator().manual_seed(2)).bfloat16()
    cos, sin = ops.rope_angles(torch.arange(5, dtype=torch.int32), INV_FREQ)
    assert torch.equal(ops.rope(x, cos, sin, False), ops.rope(x.float(), cos, sin, False).bfloat16())


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_a_token_has_the_same_bits_alone_and_among_others(ops, tokens):
    x = torch.randn(tokens, 3, 96, generator=torch.Generator().manual_seed(3))
    cos, sin = ops.rope_angles(torch.arange(tokens, dtype=torch.int32) + 7, INV_FREQ)
    together = ops.rope(x, cos, sin, False)
    assert together.shape == x.shape
    for t in range(tokens):
        one_cos, one_sin = ops.rope_angles(torch.tensor([t + 7], dtype=torch.int32), INV_FREQ)
        assert torch.equal(together[t], ops.rope(x[t : t + 1].clone(), one_cos, one_sin, False)[0])
