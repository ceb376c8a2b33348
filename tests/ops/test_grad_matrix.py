"""Derivatives of products, experts, routing and pooling: the right function and its slope."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cache_steps import Part, compressor, f32_format, page_tables, read_entries, step
from torch import Tensor

from bittrue.ops.case import Call, generator
from bittrue.ops.cases_grad_matrix import Moe, documents, experts_case, matrix_gradient_cases
from bittrue.ops.contracts import ExpertBank, Weight
from bittrue.ops.cpu.cache import cache_ops
from bittrue.ops.cpu.grad_matrix import matrix_gradients as cpu_gradients
from bittrue.ops.cpu.library import available_isas, load_kernels
from bittrue.ops.cpu.vector import vector_ops
from bittrue.ops.gradients import BankValues
from bittrue.ops.numeric import first_difference
from bittrue.ops.ref import compress, experts, linear, router
from bittrue.ops.ref.grad_matrix import (
    matrix_gradients,
    pool,
    smooth_experts,
    smooth_grouped_linear,
    smooth_linear,
    smooth_route,
)

REFERENCE = matrix_gradients()
CPU = cpu_gradients(load_kernels())
CASES = matrix_gradient_cases()
F64 = torch.float64


def f64(*shape: int, seed: int, gain: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64) * gain


def close(got: Tensor, want: Tensor, relative: float) -> None:
    allowed = relative * (want.abs() + want.abs().amax())
    difference = first_difference(got.double(), want.double(), allowed.double())
    assert difference is None, str(difference)


def plain(matrix: Tensor) -> Weight:
    return Weight(matrix.contiguous(), None, "f32")


def stored(bank: BankValues) -> ExpertBank:
    """The values as the forward op takes them."""
    routed = [tuple(plain(m) for m in matrices) for matrices in (bank.w1, bank.w3, bank.w2)]
    shared = None if bank.shared is None else (*map(plain, bank.shared),)
    return ExpertBank(*routed, shared=shared)


# ---- the smooth forms are the forward ops


def test_the_smooth_products_are_the_forward_ops() -> None:
    x, matrix = torch.randn(5, 33, generator=generator(0)), torch.randn(12, 33, generator=generator(1))
    close(smooth_linear(x, matrix), linear.linear(x, plain(matrix)), 1e-6)
    x = torch.randn(5, 3, 33, generator=generator(2))
    close(smooth_grouped_linear(x, matrix), linear.grouped_linear(x, plain(matrix)), 1e-6)


@pytest.mark.parametrize("gain", [1.0, 5.0])
def test_the_smooth_experts_are_the_forward_op(gain: float) -> None:
    _, x, ids, weights, bank = experts_case(9, Moe(4, 2, 40, 24, 30), gain=gain).make_inputs(0).args
    smooth = smooth_experts(x, ids, weights, bank, 10.0)
    close(smooth, experts.experts(x, ids, weights, stored(bank), limit=10.0, quantize=False), 2e-6)


def test_the_smooth_route_is_the_forward_op_with_either_choice() -> None:
    logits = torch.randn(20, 12, generator=generator(0)) * 5
    logits[0] -= 70  # sqrt(softplus) far below, and the reference's e^x no subnormal number yet
    ids, weights = router.route_topk(logits, None, 3, 1.5)
    close(smooth_route(logits, ids, 1.5), weights, 1e-6)
    table = torch.stack([torch.randperm(12, generator=generator(s))[:3] for s in range(7)])
    tokens = torch.randint(0, 7, (20,), generator=generator(9))
    ids, weights = router.route_hash(logits, tokens, table, 2.5)
    close(smooth_route(logits, ids, 2.5), weights, 1e-6)


def written_entries(
    ops: dict[str, Callable[..., Any]], u: Tensor, gate: Tensor, lengths: Sequence[int], ratio: int
) -> tuple[Tensor, Any]:
    """What the compressor of ``ops`` writes for whole documents, [N, c] f32, and its weights; no rope."""
    c = u.shape[1] // 2 if ratio == 4 else u.shape[1]
    pages = torch.zeros(len(lengths) * 3, 32 if ratio == 4 else 1, 4 * c, dtype=torch.uint8)
    tables = page_tables(len(lengths), 3)
    batch = step([Part(q, 0, length) for q, length in enumerate(lengths)], tables)
    weights = replace(compressor(ratio, u.shape[1], c, 0, seed=3), inv_freq=torch.empty(0))
    if ratio == 4:
        state = torch.zeros(7, 8, 2, 2 * c)
        ops["csa_compress"](
            u, gate, weights, batch, state, pages, f32_format(c), act=torch.float32, hadamard=False
        )
    else:
        fold, pending = torch.zeros(7, 3, c), torch.zeros(7, 0, 2, c)
        ops["hca_compress"](u, gate, weights, batch, fold, pending, pages, f32_format(c), act=torch.float32)
    rows = [read_entries(pages, tables[q], n // ratio) for q, n in enumerate(lengths) if n >= ratio]
    return torch.cat(rows).view(torch.float32), weights


def pool_inputs(lengths: Sequence[int], ratio: int) -> tuple[Tensor, Tensor]:
    width = 48 if ratio == 4 else 24
    u, gate = (torch.randn(sum(lengths), width, generator=generator(s)) for s in (0, 1))
    return u, 3 * gate


@pytest.mark.parametrize(("ratio", "lengths"), [(4, (9, 3, 4, 23, 8)), (128, (260, 5, 128))])
def test_pooled_entries_are_what_the_compressor_norms_and_writes(
    ratio: int, lengths: tuple[int, ...]
) -> None:
    u, gate = pool_inputs(lengths, ratio)
    batch = documents(lengths)
    reference = {"csa_compress": compress.csa_compress, "hca_compress": compress.hca_compress}
    written, weights = written_entries(reference, u, gate, lengths, ratio)
    biased = gate + weights.ape[batch.positions.long() % ratio]
    pooled = pool(u.double(), biased.double(), batch, ratio)
    normed = pooled / (pooled.square().mean(1, keepdim=True) + weights.eps).sqrt() * weights.norm
    close(written, normed, 2e-6)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(("ratio", "lengths"), [(4, (9, 3, 4, 23, 8)), (128, (260, 5, 128))])
def test_pooled_entries_have_the_bits_of_the_engines(ratio: int, lengths: tuple[int, ...], isa: str) -> None:
    kernels = load_kernels(isa)
    u, gate = pool_inputs(lengths, ratio)
    batch = documents(lengths)
    written, weights = written_entries(cache_ops(kernels), u, gate, lengths, ratio)
    biased = gate + weights.ape[batch.positions.long() % ratio]
    pooled = cpu_gradients(kernels)["pool"](u, biased, batch, ratio)
    assert torch.equal(vector_ops(kernels)["rms_norm"](pooled, weights.norm, weights.eps), written)


# ---- the slopes, in float64


def bank64(moe: Moe, gain: float) -> BankValues:
    bank = moe.bank(generator(5), gain)
    shared = None if bank.shared is None else tuple(m.double() for m in bank.shared)
    return replace(bank, w1=bank.w1.double(), w3=bank.w3.double(), w2=bank.w2.double(), shared=shared)


IDS = torch.tensor([[0, 2], [1, 2], [0, 1], [2, 4]], dtype=torch.int32)
BANK = bank64(Moe(5, 2, 6, 3, 4), 2.0)  # expert 3 is nobody's
LIMIT = 1.0  # about a third of the gates and ups are beyond it


def experts_of(x: Tensor, weights: Tensor, *matrices: Tensor) -> Tensor:
    bank = BankValues(matrices[0], matrices[1], matrices[2], (matrices[3], matrices[4], matrices[5]))
    return smooth_experts(x, IDS, weights, bank, LIMIT)


EXPERT_INPUTS = (f64(4, 6, seed=1), f64(4, 2, seed=2), BANK.w1, BANK.w3, BANK.w2, *(BANK.shared or ()))
CSA, HCA = documents((9, 3, 0, 4)), documents((131, 5))
LOGITS = torch.cat((f64(3, 6, seed=1, gain=3), torch.full((1, 6), -39.9, dtype=F64) - f64(1, 6, seed=2)))
ROUTES = torch.tensor([[0, 5], [1, 2], [3, 4], [0, 1]], dtype=torch.int32)

# The smooth form, its inputs, and the arguments of the backward op from (d_out, inputs).
SLOPES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Callable[..., tuple[Any, ...]]]] = {
    "linear": (smooth_linear, (f64(3, 4, seed=1), f64(5, 4, seed=2)), lambda d, *x: (d, *x)),
    "grouped_linear": (
        smooth_grouped_linear,
        (f64(3, 2, 4, seed=1), f64(6, 4, seed=2)),
        lambda d, *x: (d, *x),
    ),
    "experts": (
        experts_of,
        EXPERT_INPUTS,
        lambda d, x, w, w1, w3, w2, *shared: (d, x, IDS, w, BankValues(w1, w3, w2, shared)),
    ),
    "route": (
        lambda logits: smooth_route(logits, ROUTES, 1.5),
        (LOGITS,),
        lambda d, logits: (d, logits, ROUTES, 1.5),
    ),
    "csa pool_backward": (
        lambda u, gate: pool(u, gate, CSA, 4),
        (f64(16, 4, seed=1), f64(16, 4, seed=2)),
        lambda d, u, gate: (d, u, gate, CSA, 4),
    ),
    "hca pool_backward": (
        lambda u, gate: pool(u, gate, HCA, 128),
        (f64(136, 1, seed=1), f64(136, 1, seed=2)),
        lambda d, u, gate: (d, u, gate, HCA, 128),
    ),
}


def flattened(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, BankValues):
        return [result.w1, result.w3, result.w2, *(result.shared or ())]
    return [tensor for part in result for tensor in flattened(part)]


@pytest.mark.parametrize("name", SLOPES)
def test_the_smooth_form_has_the_slope_autograd_takes(name: str) -> None:
    function, inputs, _ = SLOPES[name]
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", SLOPES)
def test_the_reference_backward_predicts_a_small_step(name: str) -> None:
    function, inputs, arguments = SLOPES[name]
    d_out = torch.randn_like(function(*inputs))
    kwargs = {"limit": LIMIT} if name == "experts" else {}
    gradients = flattened(REFERENCE[name.split()[-1]](*arguments(d_out, *inputs), **kwargs))
    assert [g.shape for g in gradients] == [x.shape for x in inputs]
    for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction = f64(*x.shape, seed=7 + i)
        ahead, behind = (function(*inputs[:i], x + s * 1e-6 * direction, *inputs[i + 1 :]) for s in (1, -1))
        slope = ((ahead - behind) * d_out).sum() / 2e-6
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6, abs=1e-8)


# ---- what the kernels must do at the edges


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.name}")
def test_every_instruction_set_gives_the_same_bits(case: Any) -> None:
    call = case.make_inputs(1)

    def outputs(isa: str) -> list[Tensor]:
        op = cpu_gradients(load_kernels(isa))[case.op]
        return flattened(op(*call.args, **call.kwargs))

    first, *others = [outputs(isa) for isa in available_isas()]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("ops", [REFERENCE, CPU], ids=["ref", "cpu"])
def test_a_clamp_passes_its_limit_and_nothing_beyond(ops: dict[str, Callable[..., Any]]) -> None:
    # With w1 = w3 = the identity, gate and up are x itself.
    x = torch.tensor([[2.0, 2.5, -2.0, -2.5, 1.0, torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))]])
    size = x.shape[1]
    bank = BankValues(*(torch.eye(size)[None] for _ in range(3)), shared=None)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    call = Call((torch.ones_like(x), x, ids, torch.ones(1, 1), bank), {"limit": 2.0})
    _, _, d_bank = ops["experts"](*call.args, **call.kwargs)
    # Row i of d_w1 is d_gate_i times x.
    moved_by_gate, moved_by_up = (d.abs().sum(2)[0] > 0 for d in (d_bank.w1, d_bank.w3))
    assert moved_by_gate.tolist() == [True, False, True, True, True, False]
    assert moved_by_up.tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("ops", [REFERENCE, CPU], ids=["ref", "cpu"])
def test_an_expert_nobody_chose_has_gradient_zero(ops: dict[str, Callable[..., Any]]) -> None:
    call = experts_case(9, Moe(6, 2, 20, 12, used=3)).make_inputs(0)
    _, _, d_bank = ops["experts"](*call.args, **call.kwargs)
    for gradient in (d_bank.w1, d_bank.w3, d_bank.w2):
        assert gradient.abs().amax((1, 2)).gt(0).tolist() == [True] * 3 + [False] * 3


def test_a_slot_named_twice_counts_twice() -> None:
    d_out, x, ids, weights, bank = experts_case(9, Moe(4, 2, 20, 12)).make_inputs(0).args
    twice = torch.cat((ids[:, :1], ids[:, :1]), 1).contiguous()
    d_x, d_weights, d_bank = CPU["experts"](d_out, x, twice, weights, bank, limit=10.0)
    want_x, want_weights, want_bank = REFERENCE["experts"](d_out, x, twice, weights, bank, limit=10.0)
    for got, want in zip(
        flattened((d_x, d_weights, d_bank)), flattened((want_x, want_weights, want_bank)), strict=True
    ):
        close(got, want, 2e-6)


@pytest.mark.parametrize("ops", [REFERENCE, CPU], ids=["ref", "cpu"])
@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_id_of_no_expert_is_refused(ops: dict[str, Callable[..., Any]], wrong: int) -> None:
    d_out, x, ids, weights, bank = experts_case(9, Moe(4, 2, 20, 12)).make_inputs(0).args
    ids[3, 1] = wrong
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.3"):
        ops["experts"](d_out, x, ids, weights, bank, limit=10.0)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_route_refuses_an_id_of_no_expert(wrong: int) -> None:
    ids = torch.tensor([[0, 1], [2, wrong]], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"ids must lie in 0\.\.3, not {wrong}"):
        CPU["route"](torch.ones(2, 2), torch.zeros(2, 4), ids, 1.5)


def test_the_slope_of_a_score_is_right_however_far_the_logits() -> None:
    logits = torch.tensor(
        [[-100.0, -100.0], [-80.0, -99.0], [100.0, -100.0], [-1000.0, 1000.0], [0.0, -21.0], [-19.9, -20.1]]
    )
    ids = torch.tensor([[0, 1]] * len(logits), dtype=torch.int32)
    d_weights = torch.tensor([[1.0, -2.0]] * len(logits))
    # By hand: below -30 sqrt(softplus(x)) is e^(x/2), and nothing is taken as the difference of equals.
    x, d = logits.double(), d_weights.double()
    near = torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)
    scores = torch.where(x < -30, torch.exp(x / 2), near.sqrt())
    slopes = torch.where(x < -30, scores / 2, torch.sigmoid(x) / (2 * scores))
    total = 1e-20 + scores.sum(1, keepdim=True)
    others = scores.flip(1) / total * (d - d.flip(1))
    truth = 1.5 / total * slopes * (others + 1e-20 / total * d)
    assert truth[0].abs().min() > 1e-4  # at -100 the scores are 2e-22, and their share of 1e-20 still moves

    for got, want in zip(CPU["route"](d_weights, logits, ids, 1.5), truth, strict=True):
        close(got, want, 2e-6)
    reference = REFERENCE["route"](d, x, ids, 1.5)
    # Autograd adds what cancels, to the last place of its terms.
    assert torch.allclose(reference, truth, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("ops", [REFERENCE, CPU], ids=["ref", "cpu"])
def test_a_document_that_starts_later_is_refused(ops: dict[str, Callable[..., Any]]) -> None:
    batch = documents((8, 8))
    batch.starts[1] = 4
    rows = torch.zeros(16, 8)
    with pytest.raises(ValueError, match="must start at position 0"):
        ops["pool"](rows, rows, batch, 4)
    with pytest.raises(ValueError, match="must start at position 0"):
        ops["pool_backward"](torch.zeros(4, 4), rows, rows, batch, 4)


def test_rows_that_are_not_the_documents_are_refused() -> None:
    batch = documents((8, 8))
    batch.offsets[2] = 400
    with pytest.raises(ValueError, match="the documents have 400 tokens, the rows are 16"):
        CPU["pool"](torch.zeros(16, 8), torch.zeros(16, 8), batch, 4)


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_gate_far_above_the_others_takes_all_without_overflow(ratio: int) -> None:
    u, gate = pool_inputs((256,), ratio)
    gate[::5] += 200
    gate[1::5] -= 200
    batch, pooled = documents((256,)), torch.ones(256 // ratio, 24)
    for got, want in zip(
        CPU["pool_backward"](pooled, u, gate, batch, ratio),
        REFERENCE["pool_backward"](pooled.double(), u.double(), gate.double(), batch, ratio),
        strict=True,
    ):
        close(got, want, 2e-6)


@pytest.mark.parametrize("ops", [REFERENCE, CPU], ids=["reference", "cpu"])
def test_linear_adds_its_gradient_to_another_or_leaves_it_out(ops: dict[str, Callable[..., Any]]) -> None:
    source = generator(3)
    d_out, x = torch.randn(300, 24, generator=source), torch.randn(300, 40, generator=source)
    matrix, before = torch.randn(24, 40, generator=source), torch.randn(300, 40, generator=source)
    d_x, d_matrix = ops["linear"](d_out, x, matrix)
    assert d_x is not None
    given = before.clone()
    added, same = ops["linear"](d_out, x, matrix, add_to=given)
    assert added is given and torch.equal(same, d_matrix)
    assert torch.allclose(given, before + d_x, atol=1e-5)
    none, same = ops["linear"](d_out, x, matrix, wants_x=False)
    assert none is None and torch.equal(same, d_matrix)
