"""Experts: slot order, rounding where the contract says, and tokens that never see each other."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bittrue.ops.cases_matrix import Moe, matrix_cases
from bittrue.ops.check import check_case
from bittrue.ops.contracts import ExpertBank, OpTable, Weight
from bittrue.ops.cpu.library import available_isas
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import bitwise_equal
from bittrue.ops.ref.experts import swiglu
from bittrue.ops.threads import set_threads

CPU = [select("cpu", isa=isa) for isa in available_isas()]
BEST = CPU[-1]
MIXED = Moe(5, 3, 96, 160, "fp4", ("fp8", 200))


def use_threads(threads: int) -> None:
    set_threads(BEST, threads)


def bank(moe: Moe, seed: int) -> ExpertBank:
    return moe.bank(torch.Generator().manual_seed(seed))


def choices(
    tokens: int, moe: Moe, seed: int, act: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, ids and weights of some tokens."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(moe.num_experts, generator=source)[: moe.slots] for _ in range(tokens)])
    x = torch.randn(tokens, moe.width, generator=source).to(act)
    return x, ids.int(), torch.rand(tokens, moe.slots, generator=source)


def alone(ops: OpTable, row: Tensor, matrices: tuple[Weight, ...], weight: Tensor, quantize: bool) -> Tensor:
    """One expert on one row [1, D], by itself: experts of a bank of one, which adds nothing to it."""
    w1, w3, w2 = matrices
    single = ExpertBank((w1,), (w3,), (w2,))
    ids = torch.zeros(1, 1, dtype=torch.int32)
    return ops.experts(row, ids, weight.view(1, 1), single, limit=2.0, quantize=quantize).float()


def test_every_case_holds_on_every_implementation() -> None:
    for case in matrix_cases():
        if case.op == "experts":
            for result in check_case(case, select("reference"), CPU, use_threads):
                assert result.is_ok, f"{result.case}, {result.impl}: {result.detail}"


@pytest.mark.parametrize("table", [select("reference"), *CPU])
@pytest.mark.parametrize(
    ("moe", "quantize"),
    [
        (Moe(5, 3, 96, 160, "f32"), False),
        (Moe(5, 3, 96, 160, "bf16", ("bf16", 160)), False),
        (MIXED, True),
    ],
)
def test_experts_are_their_parts_added_in_slot_order_then_the_shared_one(
    table, moe: Moe, quantize: bool
) -> None:
    act = torch.float32 if moe.form == "f32" else torch.bfloat16
    experts = bank(moe, seed=2)
    x, ids, weights = choices(7, moe, seed=1, act=act)
    got = table.experts(x, ids, weights, experts, limit=2.0, quantize=quantize)
    for t in range(7):
        row, want = x[t : t + 1], torch.zeros(1, 96)
        for slot in range(3):
            e = int(ids[t, slot])
            matrices = (experts.w1[e], experts.w3[e], experts.w2[e])
            want = want + alone(table, row, matrices, weights[t, slot], quantize)
        if experts.shared is not None:
            want = want + alone(table, row, experts.shared, torch.ones(()), quantize)
        assert bitwise_equal(got[t], want[0].to(act)) is None


@pytest.mark.parametrize("table", CPU)
@pytest.mark.parametrize("form", ["f32", "fp8"])
def test_an_expert_is_two_products_swiglu_and_a_product(table, form: str) -> None:
    """Bit for bit the linear of the same backend around the definition of SwiGLU, within its tolerance."""
    moe = Moe(1, 1, 96, 130, form)  # type: ignore[arg-type]
    act, quantize = (torch.float32, False) if form == "f32" else (torch.bfloat16, True)
    experts = bank(moe, seed=10)
    x, _, weight = choices(1, moe, seed=11, act=act)
    gate, up = (table.linear(x, w, quantize=quantize) for w in (experts.w1[0], experts.w3[0]))
    hidden = swiglu(gate, up, 2.0, weight[0])
    want = table.linear(hidden, experts.w2[0], quantize=quantize)
    got = alone(table, x, (experts.w1[0], experts.w3[0], experts.w2[0]), weight[0], quantize)
    assert torch.allclose(
        got, want.float(), rtol=0, atol=float(want.abs().max()) * (1e-6 if form == "f32" else 2**-6)
    )


def test_slot_order_decides_the_bits_of_the_sum() -> None:
    moe = Moe(4, 4, 64, 32, "f32")
    experts = bank(moe, seed=4)
    x, _, weights = choices(20, moe, seed=3, act=torch.float32)
    ids = torch.tensor([[0, 1, 2, 3]] * 20, dtype=torch.int32)
    call = {"limit": 10.0, "quantize": False}
    forward = BEST.experts(x, ids, weights, experts, **call)
    backward = BEST.experts(x, ids.flip(1).contiguous(), weights.flip(1).contiguous(), experts, **call)
    assert bitwise_equal(forward, backward) is not None
    assert torch.allclose(forward, backward, rtol=0, atol=1e-5)


def test_routing_weight_multiplies_before_the_quantisation_of_the_second_product() -> None:
    experts = bank(Moe(1, 1, 128, 128, "fp8"), seed=5)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(6)).bfloat16()
    ids, third = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 1 / 3)
    weighted = BEST.experts(x, ids, third, experts, limit=10.0, quantize=True)
    unweighted = BEST.experts(x, ids, torch.ones(1, 1), experts, limit=10.0, quantize=True)
    assert bitwise_equal(weighted, (unweighted.float() / 3).bfloat16()) is not None


def shared_only(gate: list[float], up: list[float]) -> ExpertBank:
    """One routed expert of zeros, and a shared one whose hidden values for x = (1, 0, ..) are made of
    ``gate`` and ``up`` and come out as they are."""
    size = len(gate)
    zero = Weight(torch.zeros(size, size), None, "f32")

    def column(values: list[float]) -> Weight:
        return Weight(torch.tensor(values).view(-1, 1) * torch.eye(size)[:1], None, "f32")

    return ExpertBank(
        (zero,), (zero,), (zero,), shared=(column(gate), column(up), Weight(torch.eye(size), None, "f32"))
    )


def run_shared(table, gate: list[float], up: list[float]) -> Tensor:
    x, ids = torch.eye(len(gate))[:1].contiguous(), torch.zeros(1, 1, dtype=torch.int32)
    return table.experts(x, ids, torch.ones(1, 1), shared_only(gate, up), limit=10.0, quantize=False)[0]


@pytest.mark.parametrize("table", [select("reference"), *CPU])
def test_swiglu_clamps_the_gate_above_only_and_up_on_both_sides(table) -> None:
    gate, up = [50.0, -50.0, 10.0, 1.0, 1.0], [1.0, 1.0, 1.0, 50.0, -50.0]
    got = run_shared(table, gate, up)
    clamped = torch.tensor(gate).clamp(max=10).double()
    want = clamped.sigmoid() * clamped * torch.tensor(up).clamp(-10, 10).double()
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("table", CPU)
def test_swiglu_keeps_nan(table) -> None:
    assert run_shared(table, [torch.nan] * 3, [1.0] * 3).isnan().all()
    assert run_shared(table, [1.0] * 3, [torch.nan] * 3).isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_tokens_of_one_expert_have_the_bits_of_a_token_alone(threads: int) -> None:
    experts = bank(replace(MIXED, hidden=48, slots=2), seed=7)
    x, _, weights = choices(170, replace(MIXED, slots=2), seed=8)  # more rows than one pass of a panel
    ids = torch.tensor([[1, 2]] * 170, dtype=torch.int32)
    use_threads(threads)
    full = BEST.experts(x, ids, weights, experts, limit=10.0, quantize=True)
    for t in (0, 5, 169):
        one = slice(t, t + 1)
        single = BEST.experts(x[one], ids[one], weights[one], experts, limit=10.0, quantize=True)
        assert bitwise_equal(single, full[one]) is None
    use_threads(2)


def test_shared_expert_does_not_quantise_for_a_plain_format() -> None:
    experts = bank(Moe(2, 1, 64, 32, "f32", ("bf16", 32)), seed=12)
    x, ids, weights = choices(3, Moe(2, 1, 64, 32, "f32"), seed=13)
    plain, quantized = (BEST.experts(x, ids, weights, experts, limit=10.0, quantize=q) for q in (False, True))
    assert bitwise_equal(plain, quantized) is None


@pytest.mark.parametrize("table", [select("reference"), *CPU])
def test_an_expert_that_does_not_exist_is_refused(table) -> None:
    experts = bank(Moe(3, 2, 64, 48, "f32", ("f32", 48)), seed=9)
    call = {"limit": 10.0, "quantize": False}
    for wrong in (3, -1, 2**31 - 1, -(2**31)):
        ids = torch.tensor([[0, wrong]], dtype=torch.int32)
        with pytest.raises(ValueError, match=rf"experts: ids must lie in 0..2, not {wrong}"):
            table.experts(torch.zeros(1, 64), ids, torch.ones(1, 2), experts, **call)
    good = torch.tensor([[0, 2]], dtype=torch.int32)
    assert not table.experts(torch.ones(1, 64), good, torch.ones(1, 2), experts, **call).isnan().any()


def test_in_a_captured_step_an_expert_that_does_not_exist_makes_its_own_token_nan() -> None:
    experts = bank(MIXED, seed=14)
    x, ids, weights = choices(4, MIXED, seed=15)
    call = {"limit": 10.0, "quantize": True}
    assert BEST.capture is not None
    captured = BEST.capture(lambda ops: ops.experts(x, ids, weights, experts, **call))
    want = BEST.experts(x, ids, weights, experts, **call)
    assert bitwise_equal(captured.replay(), want) is None
    ids[2, 1] = 5
    got = captured.replay()
    assert got[2].isnan().all()
    assert bitwise_equal(got[[0, 1, 3]], want[[0, 1, 3]]) is None


def test_a_bank_with_a_matrix_of_another_shape_is_refused_by_name() -> None:
    experts = bank(Moe(3, 2, 64, 48, "f32"), seed=16)
    narrow = Weight(torch.zeros(48, 60), None, "f32")
    x, ids, weights = choices(1, Moe(3, 2, 64, 48, "f32"), seed=17, act=torch.float32)
    with pytest.raises(ValueError, match=r"experts: w3\[2\] takes 60 features, but the input has 64"):
        wrong = ExpertBank(experts.w1, (*experts.w3[:2], narrow), experts.w2)
        BEST.experts(x, ids, weights, wrong, limit=10.0, quantize=False)
    with pytest.raises(ValueError, match=r"experts: w2 of the shared expert must have 64 rows, not 48"):
        shared = (experts.w1[0], experts.w3[0], Weight(torch.zeros(48, 48), None, "f32"))
        wrong = ExpertBank(experts.w1, experts.w3, experts.w2, shared=shared)
        BEST.experts(x, ids, weights, wrong, limit=10.0, quantize=False)
