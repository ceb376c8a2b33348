"""The residual streams against loops in float64 written from the formulas."""

import math

import pytest
import torch

ARGS = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}


def inputs(tokens, m, dim, *, head=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = m if head else (2 + m) * m
    streams = torch.randn(tokens, m, dim, generator=generator).to(dtype)
    fn = torch.randn(outputs, m * dim, generator=generator) * (m * dim) ** -0.5
    base = torch.randn(outputs, generator=generator)
    scale = torch.rand(1 if head else 3, generator=generator) + 0.5
    return streams, fn, base, scale, torch.randn(dim, generator=generator)


def normalised(x, norm, eps):
    """[D] f64, rms_norm by its formula."""
    return norm.double() * x / (x.square().mean() + eps).sqrt()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mixes(streams, fn, norm_eps):
    """[M, D] -> list of fn . v / rms(v), v the streams one after the other."""
    v = [x for stream in streams.double().tolist() for x in stream]
    root = math.sqrt(sum(x * x for x in v) / len(v) + norm_eps)
    return [sum(w * x for w, x in zip(row, v, strict=True)) / root for row in fn.double().tolist()]


def normalised_columns(c, eps):
    m = len(c)
    sums = [sum(c[j][k] for j in range(m)) + eps for k in range(m)]
    return [[c[j][k] / sums[k] for k in range(m)] for j in range(m)]


def sinkhorn(c, iters, eps):
    softmax = [[math.exp(x) / sum(math.exp(y) for y in row) + eps for x in row] for row in c]
    c = normalised_columns(softmax, eps)
    for _ in range(iters - 1):
        c = normalised_columns([[x / (sum(row) + eps) for x in row] for row in c], eps)
    return c


def pre_by_hand(streams, fn, base, scale, norm, *, iters, eps, norm_eps):
    xs, posts, combs = [], [], []
    m, b, s = streams.shape[1], base.double().tolist(), scale.double().tolist()
    for token in streams:
        mix = mixes(token, fn, norm_eps)
        pre = [sigmoid(mix[j] * s[0] + b[j]) + eps for j in range(m)]
        posts.append([2 * sigmoid(mix[m + j] * s[1] + b[m + j]) for j in range(m)])
        flat = [mix[i] * s[2] + b[i] for i in range(2 * m, (2 + m) * m)]
        combs.append(sinkhorn([flat[j * m : (j + 1) * m] for j in range(m)], iters, eps))
        mixed = sum(pre[j] * token[j].double() for j in range(m))
        xs.append(normalised(mixed, norm, norm_eps))
    return torch.stack(xs), torch.tensor(posts).double(), torch.tensor(combs).double()


@pytest.mark.parametrize(("m", "dim"), [(4, 64), (4, 100), (2, 33), (3, 16), (4, 512)])
@pytest.mark.parametrize("changes", [{}, {"iters": 1}, {"iters": 3, "eps": 0.1}, {"norm_eps": 0.5}])
def test_hc_pre_is_its_formula(ops, m, dim, changes):
    """A large eps makes a misplaced one show."""
    args = ARGS | changes
    tensors = inputs(3, m, dim, seed=dim)
    for got, want in zip(ops.hc_pre(*tensors, **args), pre_by_hand(*tensors, **args), strict=True):
        assert torch.allclose(got.double(), want, rtol=2e-5, atol=2e-6)


def test_the_mixing_matrix_has_unit_columns_and_rows(ops):
    comb = ops.hc_pre(*inputs(17, 4, 64), **ARGS)[2]
    assert torch.allclose(comb.sum(1), torch.ones(17, 4), atol=1e-5)
    assert torch.allclose(comb.sum(2), torch.ones(17, 4), atol=1e-2)


def test_extreme_mixes_stay_finite(ops):
    streams, fn, base, scale, norm = inputs(3, 4, 64)
    for got in ops.hc_pre(streams, fn, base + torch.linspace(-300, 300, 24), scale, norm, **ARGS):
        assert torch.isfinite(got).all()


def test_comb_carries_row_streams_into_column_streams(ops):
    generator = torch.Generator().manual_seed(3)
    y, streams = torch.randn(2, 40, generator=generator), torch.randn(2, 4, 40, generator=generator)
    post, comb = torch.randn(2, 4, generator=generator), torch.randn(2, 4, 4, generator=generator)
    got = ops.hc_post(y, streams, post, comb)
    for t in range(2):
        for k in range(4):
            want = post[t, k].double() * y[t].double()
            for j in range(4):
                want = want + comb[t, j, k].double() * streams[t, j].double()
            assert torch.allclose(got[t, k].double(), want, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 100, 512])
@pytest.mark.parametrize("eps", [1e-6, 0.25])
def test_hc_head_is_its_formula(ops, dim, eps):
    streams, fn, base, scale, norm = inputs(3, 4, dim, head=True, seed=dim)
    got = ops.hc_head(streams, fn, base, scale, norm, eps=eps, norm_eps=1e-6)
    for t, token in enumerate(streams):
        mix = mixes(token, fn, 1e-6)
        factors = [sigmoid(mix[j] * scale.item() + base[j].item()) + eps for j in range(4)]
        want = normalised(sum(f * h.double() for f, h in zip(factors, token, strict=True)), norm, 1e-6)
        assert torch.allclose(got[t].double(), want, rtol=2e-5, atol=2e-6)


def test_bf16_streams_are_rounded_before_the_norm_and_after(ops):
    """The coefficients do not see the rounding; the mix by factors of one is exactly a stream."""
    streams, fn, base, scale, norm = inputs(5, 4, 72, dtype=torch.bfloat16)
    x, post, comb = ops.hc_pre(streams, fn, base, scale, norm, **ARGS)
    _, wide_post, wide_comb = ops.hc_pre(streams.float(), fn, base, scale, norm, **ARGS)
    far = torch.full((4,), -1e4)
    far[2] = 1e4  # sigmoids of 0 and 1
    alone = ops.hc_head(streams, fn[:4] * 0, far, scale[:1].clone(), norm, eps=0.0, norm_eps=1e-6)
    assert torch.equal(alone, ops.rms_norm(streams[:, 2].contiguous(), norm, 1e-6))
    assert torch.equal(post, wide_post) and torch.equal(comb, wide_comb)
    wide = ops.hc_post(x.float(), streams.float(), post, comb)
    assert torch.equal(ops.hc_post(x, streams, post, comb), wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 17, 75])
def test_a_token_has_the_same_bits_alone_and_among_others(ops, tokens, dtype):
    streams, fn, base, scale, norm = inputs(tokens, 4, 136, dtype=dtype)
    together = ops.hc_pre(streams, fn, base, scale, norm, **ARGS)
    after = ops.hc_post(together[0], streams, *together[1:])
    head_weights = (fn[:4].clone(), base[:4].clone(), scale[:1].clone(), norm)
    head = ops.hc_head(streams, *head_weights, eps=1e-6, norm_eps=1e-6)
    assert [t.shape for t in together] == [(tokens, 136), (tokens, 4), (tokens, 4, 4)]
    for t in range(tokens):
        one = streams[t : t + 1].clone()
        alone = ops.hc_pre(one, fn, base, scale, norm, **ARGS)
        assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, together, strict=True))
        assert torch.equal(ops.hc_post(alone[0], one, *alone[1:])[0], after[t])
        assert torch.equal(ops.hc_head(one, *head_weights, eps=1e-6, norm_eps=1e-6)[0], head[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_of_a_sub_layer_is_the_norm_of_the_mixed_streams(ops, dtype):
    """The same bits as the op rms_norm on the rounded mix: hc_pre with unit weights undone by its own rms."""
    streams, fn, base, scale, norm = inputs(9, 4, 80, dtype=dtype)
    ones = torch.ones(80)
    x = ops.hc_pre(streams, fn, base, scale, norm, **ARGS)[0]
    plain = ops.hc_pre(streams, fn, base, scale, ones, **ARGS)[0]
    limit = 2.0**-22 if dtype == torch.float32 else 2.0**-7
    assert torch.allclose(x.double(), plain.double() * norm.double(), rtol=limit, atol=0)
    assert torch.allclose(plain.double().square().mean(-1), torch.ones(9).double(), rtol=2.0**-5)


@pytest.mark.parametrize("act", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_stream_starts_as_the_row_of_the_token(ops, stored, act):
    table = torch.randn(30, 37).to(stored)
    ids = torch.tensor([29, 0, 7, 7])
    got = ops.embed(ids, table, 3, act)
    assert got.dtype == act and got.is_contiguous()
    assert torch.equal(got, table[ids].to(act)[:, None].expand(4, 3, 37))
    assert ops.embed(ids[:0], table, 3, act).shape == (0, 3, 37)


@pytest.mark.parametrize("unknown", [-1, 30, 2**40, -(2**63)])
def test_an_id_outside_the_table_shows_as_nan_and_touches_no_other_row(ops, unknown):
    table = torch.randn(30, 37)
    got = ops.embed(torch.tensor([4, unknown, 5]), table, 2, torch.float32)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], table[[4, 5]][:, None].expand(2, 2, 37))
