"""Routing: ties by the smaller id, weights in the stated order, tokens that never see each other."""

import pytest
import torch

from bittrue.ops.cases_matrix import matrix_cases
from bittrue.ops.check import check_case
from bittrue.ops.cpu.library import available_isas
from bittrue.ops.dispatch import select
from bittrue.ops.threads import set_threads

REFERENCE = select("reference")
CPU = [select("cpu", isa=isa) for isa in available_isas()]
ALL = [REFERENCE, *CPU]


@pytest.mark.parametrize("op", ["route_topk", "route_hash"])
def test_every_case_holds_on_every_implementation(op: str) -> None:
    for case in matrix_cases():
        if case.op == op:
            for result in check_case(case, REFERENCE, CPU, lambda n: set_threads(CPU[-1], n)):
                assert result.is_ok, f"{result.case}, {result.impl}: {result.detail}"


@pytest.mark.parametrize("table", ALL)
def test_equal_scores_go_to_the_smaller_ids(table) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0], [0.0] * 6, [3.0, 0.0, 3.0, 0.0, 3.0, 9.0]])
    ids, weights = table.route_topk(logits, None, 3, 1.5)
    assert ids.tolist() == [[0, 1, 3], [0, 1, 2], [0, 2, 5]]
    assert torch.allclose(weights[1], torch.full((3,), 0.5), rtol=1e-6)
    assert weights[1, 0] == weights[1, 1] == weights[1, 2]


@pytest.mark.parametrize("table", ALL)
def test_bias_chooses_but_does_not_weigh(table) -> None:
    logits = torch.tensor([[0.5, -0.5, 2.0, 1.0]])
    bias = torch.tensor([0.0, 100.0, 0.0, -100.0])
    ids, weights = table.route_topk(logits, bias, 2, 2.5)
    assert ids.tolist() == [[1, 2]]
    scores = torch.nn.functional.softplus(logits.double()).sqrt()[0, [1, 2]]
    assert torch.allclose(weights[0].double(), scores / scores.sum() * 2.5, rtol=1e-6)


@pytest.mark.parametrize("table", ALL)
def test_all_experts_may_be_chosen(table) -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    ids, weights = table.route_topk(logits, None, 5, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert torch.allclose(weights.sum(1), torch.ones(2))


def test_many_tied_choices_equal_a_stable_sort() -> None:
    source = torch.Generator().manual_seed(2)
    logits = (torch.randn(300, 64, generator=source) * 2).round() / 2  # a dozen distinct values
    for bias in (None, torch.randn(64, generator=source).round() / 4):
        got, _ = CPU[-1].route_topk(logits, bias, 6, 1.0)
        want, _ = REFERENCE.route_topk(logits, bias, 6, 1.0)
        assert torch.equal(got, want)


@pytest.mark.parametrize("table", ALL)
def test_hash_routing_takes_the_table_and_its_order(table) -> None:
    lookup = torch.tensor([[3, 1], [0, 2]])
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 3)
    ids, weights = table.route_hash(logits, torch.tensor([1, 0, 1]), lookup, 1.5)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [[0, 2], [3, 1], [0, 2]]
    scores = torch.nn.functional.softplus(logits[0].double()).sqrt()
    assert torch.allclose(weights[1].double(), 1.5 * scores[[3, 1]] / (scores[3] + scores[1]), rtol=1e-6)


@pytest.mark.parametrize("table", ALL)
def test_extreme_logits_give_finite_scores(table) -> None:
    ids, weights = table.route_topk(torch.tensor([[1e30, -80.0, 80.0, 0.0]]), None, 2, 1.0)
    assert ids.tolist() == [[0, 2]]
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("table", ALL)
def test_experts_without_any_score_weigh_nothing(table) -> None:
    logits = torch.full((1, 8), -500.0)
    _, weights = table.route_topk(logits, None, 2, 1.5)
    assert weights.tolist() == [[0.0, 0.0]]
    lookup = torch.tensor([[3, 5]])
    _, weights = table.route_hash(logits, torch.tensor([0]), lookup, 1.5)
    assert weights.tolist() == [[0.0, 0.0]]


def test_wrong_arguments_are_refused_with_the_name_of_the_op() -> None:
    with pytest.raises(ValueError, match=r"route_topk: k must lie in 1..4, not 5"):
        CPU[-1].route_topk(torch.zeros(1, 4), None, 5, 1.0)


@pytest.mark.parametrize("table", ALL)
def test_what_no_table_can_route_shows_as_nan_and_leaves_the_others_alone(table) -> None:
    lookup = torch.tensor([[3, 1], [0, 4], [-1, 0], [2, 0]])
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ids, weights = table.route_hash(logits, torch.tensor([0, 1, 2, 3, 4, -(2**62)]), lookup, 1.5)
    assert ids.tolist() == [[3, 1], [0, 0], [0, 0], [2, 0], [0, 0], [0, 0]]
    assert weights.isnan().all(-1).tolist() == [False, True, True, False, True, True]
    assert not weights[[0, 3]].isnan().any()
