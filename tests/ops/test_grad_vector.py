"""Derivatives of embed, rms_norm and the hyper-connections: smooth forms, slopes, order of sums."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bittrue.ops.cpu import grad_vector as cpu
from bittrue.ops.cpu.library import load_kernels
from bittrue.ops.ref import grad_vector as ref
from bittrue.ops.ref import hyper, norm

EPS = {"eps": 1e-3, "norm_eps": 1e-3}
PRE = {"iters": 5, **EPS}
STEP = 1e-5


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hyper_inputs(tokens: int, m: int, dim: int, outputs: int) -> tuple[Tensor, ...]:
    """streams, fn, base, scale, norm."""
    scale = randn(1 if outputs == m else 3, seed=3).abs() + 0.5
    fn = randn(outputs, m * dim, seed=1) * (m * dim) ** -0.5
    return randn(tokens, m, dim, seed=0), fn, randn(outputs, seed=2), scale, randn(dim, seed=4)


def post_inputs(tokens: int, m: int, dim: int) -> tuple[Tensor, ...]:
    """y, streams, post, comb."""
    sizes = ((tokens, dim), (tokens, m, dim), (tokens, m), (tokens, m, m))
    return tuple(randn(*size, seed=i) for i, size in enumerate(sizes))


def each_function(tokens: int, m: int, dim: int) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Smooth form and inputs by name, of every function of real inputs alone."""
    ids = torch.tensor([2, 0, 2, -1, 5])
    return {
        "embed": (lambda table: ref.smooth_embed(table, ids, m), (randn(4, dim, seed=9),)),
        "rms_norm": (
            lambda x, w: ref.smooth_rms_norm(x, w, 1e-3),
            (randn(tokens, 2, dim, seed=0), randn(dim, seed=1)),
        ),
        "rms_norm without weight": (
            lambda x: ref.smooth_rms_norm(x, None, 1e-3),
            (randn(tokens, 2, dim, seed=0),),
        ),
        "hc_pre": (lambda *i: ref.smooth_hc_pre(*i, **PRE), hyper_inputs(tokens, m, dim, (2 + m) * m)),
        "hc_post": (ref.smooth_hc_post, post_inputs(tokens, m, dim)),
        "hc_head": (lambda *i: ref.smooth_hc_head(*i, **EPS), hyper_inputs(tokens, m, dim, m)),
    }


def each_backward(table: dict[str, Callable[..., Any]], m: int) -> dict[str, Callable[..., Any]]:
    """The backward op of each of ``each_function``: (d_outs, inputs) -> gradients of the inputs."""
    ids = torch.tensor([2, 0, 2, -1, 5])
    return {
        "embed": lambda d, i: (table["embed"](*d, ids, 4),),
        "rms_norm": lambda d, i: table["rms_norm"](*d, *i, 1e-3),
        "rms_norm without weight": lambda d, i: table["rms_norm"](*d, *i, None, 1e-3)[:1],
        "hc_pre": lambda d, i: table["hc_pre"](*d, *i, **PRE),
        "hc_post": lambda d, i: table["hc_post"](*d, *i),
        "hc_head": lambda d, i: table["hc_head"](*d, *i, **EPS),
    }


NAMES = list(each_function(1, 2, 3))


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def narrow(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


def forward(name: str, inputs: tuple[Tensor, ...], m: int) -> tuple[Tensor, ...]:
    """The reference op of the engine at float32 inputs, unknown ids zero instead of NaN."""
    if name == "embed":
        return (hyper.embed(torch.tensor([2, 0, 2, -1, 5]), *inputs, m, torch.float32).nan_to_num(nan=0.0),)
    if name.startswith("rms_norm"):
        return (norm.rms_norm(inputs[0], inputs[1] if len(inputs) > 1 else None, 1e-3),)
    if name == "hc_pre":
        return hyper.hc_pre(*inputs, **PRE)
    return (hyper.hc_head(*inputs, **EPS) if name == "hc_head" else hyper.hc_post(*inputs),)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [1, 3, 4])
def test_smooth_form_is_the_reference_op(name: str, m: int) -> None:
    function, inputs = each_function(5, m, 24)[name]
    inputs = narrow(inputs)
    for got, want in zip(as_tuple(function(*inputs)), forward(name, inputs, m), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("name", NAMES)
def test_smooth_form_passes_gradcheck(name: str) -> None:
    function, inputs = each_function(2, 3, 4)[name]
    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in inputs))


def assert_derivative(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], d_outs: tuple[Tensor, ...], got: Any
) -> None:
    """``got`` is what finite differences along one random direction of each input say, in float64."""
    for i, (x, d_x) in enumerate(zip(inputs, got, strict=True)):
        direction = randn(*x.shape, seed=20 + i)

        def loss(amount: float, i: int = i, x: Tensor = x, direction: Tensor = direction) -> Tensor:
            moved = (*inputs[:i], x + amount * direction, *inputs[i + 1 :])
            outs = as_tuple(function(*moved))
            return torch.stack([(d * out).sum() for d, out in zip(d_outs, outs, strict=True)]).sum()

        slope = (loss(STEP) - loss(-STEP)) / (2 * STEP)
        assert d_x.shape == x.shape
        torch.testing.assert_close((d_x * direction).sum(), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("m", [1, 4])
def test_reference_backward_meets_finite_differences(name: str, m: int) -> None:
    function, inputs = each_function(5, m, 6)[name]
    d_outs = tuple(randn(*out.shape, seed=10 + i) for i, out in enumerate(as_tuple(function(*inputs))))
    gradients = each_backward(ref.vector_gradients(), m)[name](d_outs, inputs)
    assert_derivative(function, inputs, d_outs, gradients)


def cpu_ops() -> dict[str, Callable[..., Any]]:
    return cpu.vector_gradients(load_kernels())


def test_rows_of_a_block_do_not_depend_on_other_tokens() -> None:
    hc_pre, shape = cpu_ops()["hc_pre"], (40, 4, 48)
    inputs = narrow(hyper_inputs(*shape, 24))
    d_outs = narrow((randn(40, 48, seed=5), randn(40, 4, seed=6), randn(40, 4, 4, seed=7)))
    together = hc_pre(*d_outs, *inputs, **PRE)[0]
    for t in (0, 17, 39):
        rows = [x[t : t + 1].contiguous() for x in (*d_outs, inputs[0])]
        assert torch.equal(hc_pre(*rows, *inputs[1:], **PRE)[0], together[t : t + 1])


def test_embed_adds_rows_of_one_id_in_token_order() -> None:
    big, small = torch.tensor(2.0**24), torch.tensor(1.0)
    rows = torch.stack([big, small, small, -big])[:, None, None].repeat(1, 1, 20)
    got = cpu_ops()["embed"](rows, torch.zeros(4, dtype=torch.int64), 3)
    # 2^24 + 1 is 2^24 in float32, twice: only an order that adds the ones first keeps them.
    assert torch.equal(got, torch.zeros(3, 20))
    got = cpu_ops()["embed"](rows[[1, 2, 0, 3]], torch.zeros(4, dtype=torch.int64), 3)
    assert torch.equal(got[0], torch.full((20,), 2.0))


@pytest.mark.parametrize("op", ["embed", "rms_norm", "hc_pre", "hc_post", "hc_head"])
def test_wrong_shapes_are_refused_by_name(op: str) -> None:
    table, ids = cpu_ops(), torch.zeros(5, dtype=torch.int64)
    pre = narrow(hyper_inputs(5, 4, 16, 24))
    head = narrow(hyper_inputs(5, 4, 16, 4))
    x, m, mm = torch.zeros(5, 16), torch.zeros(5, 4), torch.zeros(5, 4, 4)
    calls: dict[str, Callable[[], Any]] = {
        "embed": lambda: table["embed"](torch.zeros(4, 4, 16), ids, 3),
        "rms_norm": lambda: table["rms_norm"](x, torch.zeros(5, 17), None, 1e-6),
        "hc_pre": lambda: table["hc_pre"](x, mm, mm, *pre, **PRE),
        "hc_post": lambda: table["hc_post"](pre[0], x, pre[0], m, m),
        "hc_head": lambda: table["hc_head"](x, head[0], pre[1], *head[2:], **EPS),
    }
    with pytest.raises(ValueError, match=f"^{op} backward: "):
        calls[op]()


def test_double_precision_is_refused_by_the_kernels() -> None:
    y, streams, post, comb = post_inputs(5, 4, 16)
    with pytest.raises(ValueError, match="must be float32"):
        cpu_ops()["hc_post"](streams, y, streams, post, comb)
