"""Autograd functions of vectors, products, experts and hyper-connections: the derivatives of what they do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.slopes import (
    BACKENDS,
    SLOPES,
    Held,
    assert_act_passes_through,
    assert_is_composition,
    assert_smooth,
    close,
    differentiated,
    normal,
    offset,
    step_on,
    turn,
    walsh,
)
from support.training import random_documents, tiny_trainer
from torch import Tensor

from bittrue.config.formats import ACT_GROUP
from bittrue.ops.case import generator
from bittrue.ops.cases_matrix import WeightFormat, random_weight
from bittrue.ops.contracts import ExpertBank, OpTable, Weight
from bittrue.ops.gradients import BankValues
from bittrue.ops.ref.experts import experts as experts_op
from bittrue.ops.ref.grad_matrix import smooth_experts, smooth_grouped_linear, smooth_linear, smooth_route
from bittrue.ops.ref.grad_vector import (
    smooth_embed,
    smooth_hc_head,
    smooth_hc_post,
    smooth_hc_pre,
    smooth_rms_norm,
)
from bittrue.ops.ref.linear import dequantize
from bittrue.ops.ref.quant import quant_fp8
from bittrue.train.autograd import (
    Embed,
    ExpertCall,
    Experts,
    GroupedLinear,
    Hadamard,
    HcHead,
    HcPost,
    HcPre,
    HyperCall,
    Linears,
    Product,
    Quantize,
    RmsNorm,
    Rope,
    Route,
    RouteCall,
    Step,
    TokenLogprob,
    _balance,
)
from bittrue.train.differentiable import DifferentiableOps
from bittrue.train.loss import LossWeights

EPS = 1e-6
LIMIT = 1.0  # some gates and ups lie beyond
TOKENS = 7


def plain(matrix: Tensor) -> Weight:
    return Weight(matrix.detach().contiguous(), None, "f32")


# ---- vectors


def embed() -> Held:
    ids = torch.tensor([3, 0, 3, 1, 4, 3, 0])

    def run(step: Step, master: Tensor) -> Tensor:
        return Embed.apply(master, step, ids, master.detach(), 3)

    return Held(run, lambda table: smooth_embed(table, ids, 3), (normal(0, 5, 12),))


def rms_norm(*shape: int) -> Held:
    def run(step: Step, x: Tensor, master: Tensor | None = None) -> Tensor:
        return RmsNorm.apply(x, master, step, None if master is None else master.detach(), EPS)

    def smooth(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return smooth_rms_norm(x, weight, EPS)

    x, weight = normal(0, *shape, gain=3.0), normal(1, shape[-1])
    return Held(run, smooth, (x, weight) if len(shape) == 2 else (x,))


def rope(inverse: bool) -> Held:
    angles = normal(1, TOKENS, 4)
    cos, sin = angles.cos(), angles.sin()

    def run(step: Step, x: Tensor) -> Tensor:
        return Rope.apply(x, step, cos, sin, inverse)

    return Held(run, lambda x: turn(x, cos, sin, inverse=inverse), (normal(0, TOKENS, 2, 12),))


def hadamard() -> Held:
    return Held(lambda step, x: Hadamard.apply(x, step), walsh, (normal(0, TOKENS, 2, 16),))


def quantize(kind: str) -> Held:
    x = normal(0, TOKENS, 70)
    op = getattr(step_on("reference").ops, f"quant_{kind}")
    moved = offset(op(x, 32), x)
    return Held(lambda step, x: Quantize.apply(x, step, kind, 32), lambda x: x + moved.to(x.dtype), (x,))


def token_logprob() -> Held:
    ids = torch.tensor([4, 0, 9, 9, 1, 3, 0])

    def smooth(logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0]

    run = lambda step, logits: TokenLogprob.apply(logits, step, ids)  # noqa: E731
    return Held(run, smooth, (normal(0, TOKENS, 10, gain=4.0),))


# ---- hyper-connections


def hyper_inputs(outputs: int) -> tuple[Tensor, ...]:
    scale = torch.rand(1 if outputs == 4 else 3, generator=generator(3)) + 0.5
    fn = normal(1, outputs, 48, gain=48**-0.5)
    return normal(0, TOKENS, 4, 12), fn, normal(2, outputs), scale, normal(4, 12)


def hc_pre() -> Held:
    def run(step: Step, streams: Tensor, *masters: Tensor) -> tuple[Tensor, ...]:
        call = HyperCall(*(m.detach() for m in masters), EPS, EPS, 5)
        return HcPre.apply(streams, step, call, *masters)

    def smooth(*inputs: Tensor) -> tuple[Tensor, ...]:
        return smooth_hc_pre(*inputs, iters=5, eps=EPS, norm_eps=EPS)

    return Held(run, smooth, hyper_inputs(24))


def hc_post() -> Held:
    inputs = (normal(0, TOKENS, 12), normal(1, TOKENS, 4, 12), normal(2, TOKENS, 4), normal(3, TOKENS, 4, 4))
    return Held(lambda step, *inputs: HcPost.apply(*inputs, step), smooth_hc_post, inputs)


def hc_head() -> Held:
    def run(step: Step, streams: Tensor, *masters: Tensor) -> Tensor:
        call = HyperCall(*(m.detach() for m in masters), EPS, EPS)
        return HcHead.apply(streams, step, call, *masters)

    def smooth(*inputs: Tensor) -> Tensor:
        return smooth_hc_head(*inputs, eps=EPS, norm_eps=EPS)

    return Held(run, smooth, hyper_inputs(4))


# ---- products and experts


def linears(forms: tuple[WeightFormat, ...], quantized: tuple[bool, ...]) -> Held:
    """Products of one x by matrices of these formats, of which some read x quantised."""
    source = generator(5)
    weights = [random_weight(form, 9 + i, 140, source) for i, form in enumerate(forms)]
    values = [dequantize(weight) for weight in weights]
    x = normal(0, TOKENS, 140)
    moved = offset(quant_fp8(x, ACT_GROUP), x)
    reads = [q and w.format in ("fp8", "fp4") for q, w in zip(quantized, weights, strict=True)]

    def run(step: Step, x: Tensor, *masters: Tensor) -> tuple[Tensor, ...]:
        parts = zip(weights, values, quantized, strict=True)
        products = tuple(Product(weight, value, q, torch.float32) for weight, value, q in parts)
        return Linears.apply(x, step, products, *masters)

    def smooth(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        parts = zip(matrices, reads, strict=True)
        return tuple(smooth_linear(x + moved.to(x.dtype) if read else x, m) for m, read in parts)

    return Held(run, smooth, (x, *values))


def grouped_linear(form: WeightFormat) -> Held:
    weight = random_weight(form, 3 * 5, 32, generator(5))
    values = dequantize(weight)

    def run(step: Step, x: Tensor, master: Tensor) -> Tensor:
        return GroupedLinear.apply(x, master, step, weight, values)

    return Held(run, smooth_grouped_linear, (normal(0, TOKENS, 3, 32), values))


def stacked(weights: tuple[Weight, ...]) -> Tensor:
    return torch.stack([dequantize(weight) for weight in weights])


def experts(form: WeightFormat, shared_form: WeightFormat, *, is_quantized: bool) -> Held:
    source = generator(5)
    w1, w3 = (tuple(random_weight(form, 32, 64, source) for _ in range(4)) for _ in range(2))
    w2 = tuple(random_weight(form, 64, 32, source) for _ in range(4))
    s1, s3 = (random_weight(shared_form, 32, 64, source) for _ in range(2))
    bank = ExpertBank(w1, w3, w2, (s1, s3, random_weight(shared_form, 64, 32, source)))
    assert bank.shared is not None
    routed = [stacked(part) for part in (bank.w1, bank.w3, bank.w2)]
    shared = [dequantize(weight) for weight in bank.shared]
    x, weights = normal(0, TOKENS, 64), torch.rand(TOKENS, 2, generator=source)
    ids = torch.rand(TOKENS, 3, generator=source).argsort(1)[:, :2].int()  # nobody chooses the last expert
    values = BankValues(*routed, shared=tuple(shared))  # type: ignore[arg-type]
    read = offset(quant_fp8(x, ACT_GROUP), x) if is_quantized else torch.zeros_like(x).double()

    def run(step: Step, x: Tensor, weights: Tensor, *masters: Tensor) -> Tensor:
        call = ExpertCall(ids, bank, values, LIMIT, is_quantized)
        return Experts.apply(x, weights, step, call, *masters)

    def unmoved(x: Tensor, weights: Tensor, *parts: Tensor) -> Tensor:
        three = (parts[3], parts[4], parts[5])
        own = BankValues(parts[0], parts[1], parts[2], three)
        return smooth_experts(x + read.to(x.dtype), ids, weights, own, LIMIT)

    inputs = (x, weights, *routed, *shared)
    # The hidden values are quantised too: all that moves the result, and no slope.
    out = experts_op(x, ids, weights, bank, limit=LIMIT, quantize=is_quantized)
    moved = offset(out, unmoved(*(t.double() for t in inputs))) if is_quantized else torch.zeros(())

    def smooth(*inputs: Tensor) -> Tensor:
        return unmoved(*inputs) + moved.to(inputs[0].dtype)

    return Held(run, smooth, inputs)


def route(is_hashed: bool) -> Held:
    logits, bias = normal(0, TOKENS, 8, gain=3.0), normal(1, 8)
    tokens = torch.arange(TOKENS)
    table = torch.stack([torch.randperm(8, generator=generator(t))[:3] for t in range(TOKENS)])

    def chosen(ops: OpTable, logits: Tensor) -> tuple[Tensor, Tensor]:
        if is_hashed:
            return ops.route_hash(logits, tokens, table, 1.5)
        return ops.route_topk(logits, bias, 3, 1.5)

    def run(step: Step, logits: Tensor) -> Tensor:
        ids, weights = chosen(step.ops, logits.detach())
        offsets = torch.tensor([0, TOKENS], dtype=torch.int32)
        return Route.apply(logits, step, RouteCall(ids, weights, 1.5, offsets, False, 0))

    ids = chosen(step_on("reference").ops, logits)[0]
    return Held(run, lambda logits: smooth_route(logits, ids, 1.5), (logits,))


HELD: dict[str, Callable[[], Held]] = {
    "Embed": embed,
    "RmsNorm": lambda: rms_norm(TOKENS, 24),
    "RmsNorm of heads without a weight": lambda: rms_norm(TOKENS, 3, 24),
    "Rope": lambda: rope(False),
    "Rope inverse": lambda: rope(True),
    "Hadamard": hadamard,
    "HcPre": hc_pre,
    "HcPost": hc_post,
    "HcHead": hc_head,
    "Linears": lambda: linears(("f32", "bf16"), (False, True)),
    "Linears quantised": lambda: linears(("fp8", "f32", "fp4", "fp8"), (True, True, True, False)),
    "GroupedLinear": lambda: grouped_linear("f32"),
    "GroupedLinear of fp8": lambda: grouped_linear("fp8"),
    "Experts": lambda: experts("f32", "f32", is_quantized=False),
    "Experts of fp4, rows as they are": lambda: experts("fp4", "fp8", is_quantized=False),
}
# Those that bf16 does not reach, or that round by it.
MORE: dict[str, Callable[[], Held]] = {
    "Quantize fp8": lambda: quantize("fp8"),
    "Quantize fp4": lambda: quantize("fp4"),
    "Experts quantised": lambda: experts("fp4", "fp8", is_quantized=True),
    "Route": lambda: route(False),
    "Route by a table": lambda: route(True),
    "TokenLogprob": token_logprob,
}
ALL = {**HELD, **MORE}


@pytest.mark.parametrize("name", ALL)
def test_the_composition_has_the_slopes_autograd_takes(name: str) -> None:
    assert_smooth(ALL[name]())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_the_function_has_the_values_and_gradients_of_the_composition(name: str, backend: str) -> None:
    assert_is_composition(ALL[name](), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HELD)
def test_rounding_activations_passes_every_gradient_through(name: str, backend: str) -> None:
    assert_act_passes_through(HELD[name](), backend)


# ---- what a function must leave out


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_that_is_apart_gives_its_input_no_gradient(backend: str) -> None:
    step, matrices = step_on(backend), (normal(1, 5, 16), normal(2, 6, 16))

    def grads(*apart: bool) -> list[Tensor | None]:
        products = tuple(
            Product(plain(m), m, False, None, is_apart) for m, is_apart in zip(matrices, apart, strict=True)
        )
        inputs = (normal(0, TOKENS, 16), *matrices)
        return differentiated(lambda x, *masters: Linears.apply(x, step, products, *masters), inputs)[1]

    both, neither, second = grads(False, False), grads(True, True), grads(False, True)
    alone = step.grads.linear(normal(100, TOKENS, 5), normal(0, TOKENS, 16), matrices[0])[0]
    assert neither[0] is None
    assert second[0] is not None and torch.equal(second[0], alone)
    assert both[0] is not None and not torch.equal(both[0], alone)
    for masters in zip(both[1:], neither[1:], second[1:], strict=True):
        assert masters[0] is not None
        assert all(m is not None and torch.equal(m, masters[0]) for m in masters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_product_nobody_used_has_no_gradient(backend: str) -> None:
    step, matrices = step_on(backend), (normal(1, 5, 16), normal(2, 6, 16))
    products = tuple(Product(plain(m), m, False, None) for m in matrices)

    def first(x: Tensor, *masters: Tensor) -> Tensor:
        return Linears.apply(x, step, products, *masters)[0]

    _, (d_x, d_first, d_second) = differentiated(first, (normal(0, TOKENS, 16), *matrices))
    assert d_x is not None and d_first is not None and d_second is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_nobody_chose_has_gradient_zero(backend: str) -> None:
    _, grads = experts("fp4", "fp8", is_quantized=True).on(backend)
    for grad in grads[2:5]:
        assert grad is not None
        assert grad.abs().amax((1, 2)).gt(0).tolist() == [True, True, True, False]


# ---- the balance loss

LENGTHS = (3, 0, 9, 1)
OFFSETS = torch.tensor([0, 3, 3, 12, 13], dtype=torch.int32)


def balance_by_document(logits: Tensor, ids: Tensor) -> Tensor:
    """Sum over documents of their tokens times sum_e f_e P_e (spec 5.5), f counted, P differentiable."""
    total, num_experts = logits.new_zeros(()), logits.shape[1]
    for first, last in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True):
        if first == last:
            continue
        own = torch.nn.functional.softplus(logits[first:last]).sqrt()
        mean = (own / own.sum(1, keepdim=True)).mean(0)
        counts = torch.stack([(ids[first:last] == e).sum() for e in range(num_experts)])
        share = counts * num_experts / (ids.shape[1] * (last - first))
        total = total + (last - first) * (share * mean).sum()
    return total


def balance_inputs() -> tuple[Tensor, Tensor, Tensor]:
    logits = normal(0, sum(LENGTHS), 6, gain=2.0)
    return logits, *step_on("reference").ops.route_topk(logits, normal(1, 6), 2, 1.5)


def test_the_balance_loss_and_its_gradient_are_those_of_every_document() -> None:
    logits, ids, _ = balance_inputs()
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: balance_by_document(x, ids), (leaf,))
    loss, d_logits = _balance(logits, ids, OFFSETS)
    want = balance_by_document(leaf, ids)
    (d_want,) = torch.autograd.grad(want, leaf)
    assert loss == pytest.approx(want.detach().item(), rel=1e-6)
    close(d_logits, d_want, SLOPES)


def test_perfect_balance_is_one_a_token() -> None:
    ids = torch.arange(12).view(6, 2).remainder(6).int()
    loss, d_logits = _balance(torch.zeros(6, 6), ids, torch.tensor([0, 6], dtype=torch.int32))
    assert loss == pytest.approx(6.0, rel=1e-6)
    assert d_logits.abs().max() < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_balance_gradient_enters_a_learned_router_with_its_scale(backend: str) -> None:
    logits, ids, weights = balance_inputs()

    def run(scale: float, *, is_learned: bool = True) -> tuple[Tensor, Step]:
        step = step_on(backend, balance_scale=scale)
        call = RouteCall(ids, weights, 1.5, OFFSETS, is_learned, 77)
        (grad,) = differentiated(lambda x: Route.apply(x, step, call), (logits,))[1]
        assert grad is not None
        return grad, step

    def total(x: Tensor) -> Tensor:
        d_weights = normal(100, *weights.shape).double()
        return (smooth_route(x, ids, 1.5) * d_weights).sum() + 0.7 * balance_by_document(x, ids)

    leaf = logits.double().requires_grad_()
    (want,) = torch.autograd.grad(total(leaf), leaf)
    grad, step = run(0.7)
    close(grad, want, SLOPES)
    assert step.balance_loss == pytest.approx(balance_by_document(logits.double(), ids).item(), rel=1e-6)
    assert step.loads[77].tolist() == torch.bincount(ids.flatten().long(), minlength=6).tolist()
    unscaled, hashed = run(0.0)[0], run(0.7, is_learned=False)
    assert torch.equal(unscaled, hashed[0]) and not torch.equal(unscaled, grad)
    assert (hashed[1].balance_loss, hashed[1].loads) == (0.0, {})


# ---- every op has a derivative, or a reason to need none

NO_DERIVATIVE = {
    "rope_angles": "of positions alone",
    "pack_rows": "inside kv_rows, whose values go on beside the bytes",
    "unpack_rows": "of bytes: what made them keeps their values",
    "argmax": "a choice, taken of finished logits",
    "log_softmax": "inside TokenLogprob, which has the derivative of the one value that is read",
    "gumbel": "of seeds alone",
}


def test_every_op_has_a_derivative_or_a_reason_to_need_none() -> None:
    trainer, step = tiny_trainer("f32"), step_on("reference")
    table = DifferentiableOps(trainer.masters, step).table()
    replaced = {name for name in OpTable.op_names() if getattr(table, name) != getattr(step.ops, name)}
    assert replaced.isdisjoint(NO_DERIVATIVE)
    assert replaced | set(NO_DERIVATIVE) == set(OpTable.op_names())


def test_ops_without_a_derivative_see_nothing_that_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model's own lines: whatever it asks of the backend directly is a constant of the step."""
    table = DifferentiableOps.table
    asked: set[str] = set()

    def guarded(self: DifferentiableOps) -> OpTable:
        made = table(self)

        def guard(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                asked.add(name)
                tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
                assert not any(t.requires_grad for t in tensors), f"{name} loses a gradient"
                return getattr(made, name)(*args, **kwargs)

            return call

        return made.with_ops(**{name: guard(name) for name in NO_DERIVATIVE})

    monkeypatch.setattr(DifferentiableOps, "table", guarded)
    tiny_trainer("f32", draft="mtp").backward(random_documents((130,)), LossWeights())
    assert "rope_angles" in asked
