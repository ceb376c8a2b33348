"""Holds an autograd function against a plain composition of smooth functions: its values and its slopes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bittrue.ops.case import generator
from bittrue.ops.dispatch import select, select_gradients
from bittrue.ops.numeric import first_difference
from bittrue.train.autograd import Step

BACKENDS = ("reference", "cpu")
F32 = torch.float32
# Shares of the largest value: both sides are sums of at most some hundred products in f32.
VALUES, SLOPES = 3e-6, 1e-5


def step_on(backend: str, act: torch.dtype = F32, **scales: float) -> Step:
    ops = select(backend)
    return Step(ops, select_gradients(ops), act, **scales)


def normal(seed: int, *shape: int, gain: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * gain


def close(got: Tensor, want: Tensor, relative: float) -> None:
    want = want.double()
    allowed = relative * (want.abs() + (want.abs().amax() if want.numel() else 0.0))
    difference = first_difference(got.double(), want, allowed)
    assert difference is None, str(difference)


@dataclass(frozen=True, slots=True)
class Held:
    """``run(step, *inputs)`` applies the function; ``smooth(*inputs)`` is the composition, in any float
    dtype. All inputs are differentiable. Where the function reads rounded values, ``smooth`` adds the
    rounding's offset as a constant: it is then evaluated at what is really read, with the slope of a sum."""

    run: Callable[..., Any]
    smooth: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    act: torch.dtype = F32

    def on(self, backend: str, act: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """Outputs and gradients of the function on one backend."""
        step = step_on(backend, act or self.act)
        return differentiated(lambda *inputs: self.run(step, *inputs), self.inputs)

    def truth(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Outputs and gradients of the composition in float64."""
        return differentiated(self.smooth, tuple(x.double() for x in self.inputs))


def differentiated(
    function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and the gradients of the sum of each with seeded factors."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    outs = as_tuple(function(*leaves))
    d_outs = [normal(100 + i, *out.shape).to(out.dtype) for i, out in enumerate(outs)]
    torch.autograd.backward(outs, d_outs)
    return [out.detach() for out in outs], [leaf.grad for leaf in leaves]


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_smooth(held: Held) -> None:
    """Autograd's slopes of the composition are those of finite differences."""
    leaves = tuple(x.double().requires_grad_() for x in held.inputs)
    assert torch.autograd.gradcheck(held.smooth, leaves, fast_mode=True)


def assert_is_composition(held: Held, backend: str) -> None:
    """The function has the values and the gradients of the composition."""
    (outs, grads), (want_outs, want_grads) = held.on(backend), held.truth()
    for out, want in zip(outs, want_outs, strict=True):
        assert out.dtype == F32
        close(out, want, VALUES if held.act == F32 else 2.0**-8)
    for grad, want in zip(grads, want_grads, strict=True):
        assert grad is not None and want is not None
        assert grad.dtype == F32
        close(grad, want, SLOPES)


def assert_act_passes_through(held: Held, backend: str) -> None:
    """Rounding activations to bf16 changes values and no bit of a gradient."""
    exact = Held(held.run, held.smooth, tuple(x.bfloat16().float() for x in held.inputs))
    (outs, grads), (f32_outs, f32_grads) = exact.on(backend, torch.bfloat16), exact.on(backend)
    for out, f32_out in zip(outs, f32_outs, strict=True):
        close(out, f32_out, 2.0**-6)
    for grad, f32_grad in zip(grads, f32_grads, strict=True):
        assert grad is not None and f32_grad is not None
        assert torch.equal(grad, f32_grad)


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rope by complex numbers: x [T, N, c], cos and sin [T, R/2], the last R features turned."""
    kept = x.shape[-1] - 2 * cos.shape[-1]
    pairs = torch.view_as_complex(x[..., kept:].unflatten(-1, (-1, 2)).contiguous())
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned = pairs * torch.complex(cos, -sin if inverse else sin)[:, None, :]
    return torch.cat((x[..., :kept], torch.view_as_real(turned).flatten(-2)), -1)


def walsh(x: Tensor) -> Tensor:
    """The normalised Hadamard transform as a matrix."""
    matrix = x.new_ones(1, 1)
    while matrix.shape[0] < x.shape[-1]:
        matrix = torch.kron(x.new_tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return x @ matrix / x.shape[-1] ** 0.5


def offset(read: Tensor, plain: Tensor) -> Tensor:
    """What rounding added, as a constant in float64."""
    return (read.double() - plain.double()).detach()
