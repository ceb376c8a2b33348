"""Experts: slot order, rounding where the contract says, and tokens that never see each other."""

import pytest
import torch

from bittrue.ops.cases_matrix import matrix_cases, random_weight
from bittrue.ops.check import check_case
from bittrue.ops.contracts import ExpertBank
from bittrue.ops.cpu.library import available_isas
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import bitwise_equal
from bittrue.ops.threads import set_threads

CPU = [select("cpu", isa=isa) for isa in available_isas()]
BEST = CPU[-1]


def use_threads(threads: int) -> None:
    set_threads(BEST, threads)


def bank(num_experts: int, width: int, hidden: int, form: str, seed: int) -> ExpertBank:
    source = torch.Generator().manual_seed(seed)

    def matrices(rows: int, cols: int):
        return tuple(random_weight(form, rows, cols, source) for _ in range(num_experts))

    return ExpertBank(matrices(hidden, width), matrices(hidden, width), matrices(width, hidden))


@pytest.mark.parametrize("op", ["swiglu", "experts"])
def test_every_case_holds_on_every_implementation(op: str) -> None:
    for case in matrix_cases():
        if case.op == op:
            for result in check_case(case, select("reference"), CPU, use_threads):
                assert result.is_ok, f"{result.case}, {result.impl}: {result.detail}"


@pytest.mark.parametrize("table", CPU)
@pytest.mark.parametrize(("form", "quantize"), [("f32", False), ("bf16", False), ("fp4", True)])
def test_experts_are_their_parts_added_in_slot_order(table, form: str, quantize: bool) -> None:
    """Bit for bit the single ops of the same backend, one token and one expert at a time."""
    act = torch.float32 if form == "f32" else torch.bfloat16
    source = torch.Generator().manual_seed(1)
    experts = bank(5, 96, 160, form, seed=2)
    x = torch.randn(7, 96, generator=source).to(act)
    ids = torch.stack([torch.randperm(5, generator=source)[:3] for _ in range(7)]).int()
    weights = torch.rand(7, 3, generator=source)
    got = table.experts(x, ids, weights, experts, limit=2.0, quantize=quantize)
    for t in range(7):
        row = table.quant_fp8(x[t : t + 1], 128) if quantize else x[t : t + 1]
        want = torch.zeros(96)
        for slot in range(3):
            e = int(ids[t, slot])
            gate, up = table.linear(row, experts.w1[e]), table.linear(row, experts.w3[e])
            hidden = table.swiglu(gate, up, 2.0, weights[t, slot : slot + 1])
            hidden = table.quant_fp8(hidden, 128) if quantize else hidden
            want = want + table.linear(hidden, experts.w2[e])[0].float()
        assert bitwise_equal(got[t], want) is None


def test_slot_order_decides_the_bits_of_the_sum() -> None:
    source = torch.Generator().manual_seed(3)
    experts = bank(4, 64, 32, "f32", seed=4)
    x, ids = torch.randn(20, 64, generator=source), torch.tensor([[0, 1, 2, 3]] * 20, dtype=torch.int32)
    weights = torch.rand(20, 4, generator=source)
    call = {"limit": 10.0, "quantize": False}
    forward = BEST.experts(x, ids, weights, experts, **call)
    backward = BEST.experts(x, ids.flip(1).contiguous(), weights.flip(1).contiguous(), experts, **call)
    assert bitwise_equal(forward, backward) is not None
    assert torch.allclose(forward, backward, rtol=0, atol=1e-5)


def test_routing_weight_multiplies_before_the_quantisation_of_the_second_product() -> None:
    experts = bank(1, 128, 128, "fp8", seed=5)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(6)).bfloat16()
    ids, third = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 1 / 3)
    weighted = BEST.experts(x, ids, third, experts, limit=10.0, quantize=True)
    unweighted = BEST.experts(x, ids, torch.ones(1, 1), experts, limit=10.0, quantize=True)
    assert bitwise_equal(weighted, (unweighted / 3).bfloat16().float()) is not None


@pytest.mark.parametrize("table", [select("reference"), *CPU])
def test_swiglu_clamps_the_gate_above_only_and_up_on_both_sides(table) -> None:
    gate = torch.tensor([[50.0, -50.0, 10.0, 1.0, 1.0]])
    up = torch.tensor([[1.0, 1.0, 1.0, 50.0, -50.0]])
    got = table.swiglu(gate, up, 10.0, None)[0]
    silu = gate[0].clamp(max=10).double().sigmoid() * gate[0].clamp(max=10).double()
    assert torch.allclose(got.double(), silu * up[0].clamp(-10, 10).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("table", CPU)
def test_swiglu_keeps_nan(table) -> None:
    nan, one = torch.full((1, 3), torch.nan), torch.ones(1, 3)
    assert table.swiglu(nan, one, 10.0, None).isnan().all()
    assert table.swiglu(one, nan, 10.0, None).isnan().all()


def test_many_tokens_of_one_expert_have_the_bits_of_a_token_alone() -> None:
    experts = bank(3, 64, 48, "fp4", seed=7)
    source = torch.Generator().manual_seed(8)
    x = torch.randn(70, 64, generator=source).bfloat16()
    ids = torch.tensor([[1, 2]] * 70, dtype=torch.int32)
    weights = torch.rand(70, 2, generator=source)
    use_threads(2)
    full = BEST.experts(x, ids, weights, experts, limit=10.0, quantize=True)
    for t in (0, 5, 69):
        one = slice(t, t + 1)
        alone = BEST.experts(x[one], ids[one], weights[one], experts, limit=10.0, quantize=True)
        assert bitwise_equal(alone, full[one]) is None


def test_an_expert_that_does_not_exist_is_refused() -> None:
    experts = bank(3, 64, 48, "f32", seed=9)
    for wrong in (3, -1):
        ids = torch.tensor([[0, wrong]], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"experts: ids must lie in 0..2"):
            BEST.experts(torch.zeros(1, 64), ids, torch.ones(1, 2), experts, limit=10.0, quantize=False)
