"""rms_norm: the formula, its eps, and rows that do not depend on each other."""

import pytest
import torch


@pytest.mark.parametrize("dim", [1, 7, 16, 17, 64, 100, 512, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_its_formula(ops, dim, dtype):
    generator = torch.Generator().manual_seed(dim)
    x = (torch.randn(5, dim, generator=generator) * 3).to(dtype)
    weight = torch.randn(dim, generator=generator)
    exact = x.double() * weight.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    got = ops.rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    wide = ops.rms_norm(x.float(), weight, 1e-6)
    assert torch.equal(got, wide.to(dtype))  # one rounding, at the end
    assert ((wide.double() - exact).abs() <= 4 * 2.0**-24 * exact.abs()).all()


def test_eps_stands_inside_the_root(ops):
    x = torch.full((1, 64), 1e-3)  # mean square 1e-6, so eps = 1e-6 halves it
    assert torch.allclose(ops.rms_norm(x, None, 1e-6), torch.full((1, 64), 0.5**0.5), rtol=1e-5)
    assert (ops.rms_norm(torch.zeros(2, 64), None, 1e-6) == 0).all()


def test_no_weight_is_a_weight_of_one(ops):
    x = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(ops.rms_norm(x, None, 1e-6), ops.rms_norm(x, torch.ones(64), 1e-6))


def test_a_bf16_weight_is_used_at_its_value(ops):
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(3, 72, generator=generator), torch.randn(72, generator=generator).bfloat16()
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight.float(), 1e-6))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 5, 64), (2, 2, 2, 16)])
def test_leading_axes_are_kept(ops, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    got = ops.rms_norm(x, torch.ones(shape[-1]), 1e-6)
    assert got.shape == x.shape
    assert torch.equal(got.flatten(0, -2), ops.rms_norm(x.flatten(0, -2), torch.ones(shape[-1]), 1e-6))


@pytest.mark.parametrize("dim", [40, 512, 1536])
def test_a_row_has_the_same_bits_alone_and_among_others(ops, dim):
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(17, dim, generator=generator), torch.randn(dim, generator=generator)
    together = ops.rms_norm(x, weight, 1e-6)
    alone = torch.cat([ops.rms_norm(row[None].clone(), weight, 1e-6) for row in x])
    assert torch.equal(together, alone)
