"""The checker itself: each kind of planted fault is found and named."""

import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bittrue.cli.ops import check, chosen_cases, chosen_gradients
from bittrue.errors import ConfigError
from bittrue.ops.case import Case
from bittrue.ops.cases_grad import gradient_cases
from bittrue.ops.cases_grad_matrix import linear_case as linear_gradient_case
from bittrue.ops.cases_matrix import linear_case
from bittrue.ops.check import CheckResult, check_case, check_gradient
from bittrue.ops.contracts import OpTable, Weight
from bittrue.ops.cpu.library import available_isas, load_kernels
from bittrue.ops.dispatch import select, select_gradients
from bittrue.ops.gradients import GradTable
from bittrue.ops.threads import set_threads

CASE = linear_case(9, 20, 64, "f32", torch.float32)
CPU = select("cpu")
GRADIENT_CASE = linear_gradient_case(9, 20, 64)
GRADIENTS = select_gradients(CPU)


def run(case: Case, *tables: OpTable) -> list[CheckResult]:
    return check_case(case, select("reference"), tables, load_kernels().set_threads)


def with_linear(name: str, function) -> OpTable:
    return dataclasses.replace(CPU.with_ops(linear=function), name=name)


def test_sound_implementations_pass_and_report_their_error() -> None:
    results = run(CASE, CPU, select("cpu", isa="portable"))
    assert [r.impl for r in results] == ["reference", CPU.name, "cpu:portable"]
    assert all(r.is_ok for r in results)
    assert 0 < results[1].error < results[1].allowed


def test_a_wrong_value_is_found() -> None:
    def wrong(x: Tensor, weight: Weight, **options) -> Tensor:
        out = CPU.linear(x, weight, **options)
        out[3, 4] += 1e-3
        return out

    result = run(CASE, with_linear("wrong", wrong))[1]
    assert not result.is_ok and "[3, 4]" in result.detail and result.error > result.allowed


def test_a_result_that_depends_on_the_batch_is_found() -> None:
    def batched(x: Tensor, weight: Weight, **options) -> Tensor:
        out = CPU.linear(x, weight, **options)
        return out if x.shape[0] < 9 else torch.nextafter(out, torch.tensor(torch.inf))

    result = run(CASE, with_linear("batched", batched))[1]
    assert not result.is_ok and "depends on the other rows" in result.detail


def test_a_result_that_depends_on_the_threads_is_found() -> None:
    kernels = load_kernels()

    def threaded(x: Tensor, weight: Weight, **options) -> Tensor:
        out = CPU.linear(x, weight, **options)
        return out if kernels.threads == 1 else torch.nextafter(out, torch.tensor(torch.inf))

    result = run(CASE, with_linear("threaded", threaded))[1]
    assert not result.is_ok and result.detail.startswith("2 threads")


def test_other_bits_between_instruction_sets_are_found() -> None:
    def other(x: Tensor, weight: Weight, **options) -> Tensor:
        return torch.nextafter(CPU.linear(x, weight, **options), torch.tensor(torch.inf))

    result = run(CASE, CPU, with_linear("other", other))[2]
    assert not result.is_ok and f"bits differ from {CPU.name}" in result.detail


# ---- gradients


def run_gradient(*tables: GradTable) -> list[CheckResult]:
    reference = select_gradients(select("reference"))
    return check_gradient(GRADIENT_CASE, reference, tables, load_kernels().set_threads)


def with_matrix_gradient(name: str, change) -> GradTable:
    """The CPU's, but the gradient of the matrix of ``linear`` is what ``change`` makes of it."""

    def linear(d_out: Tensor, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        d_x, d_matrix = GRADIENTS.linear(d_out, x, matrix)
        return d_x, change(d_matrix)

    return dataclasses.replace(GRADIENTS, name=name, linear=linear)


def one_up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.tensor(torch.inf))


def test_sound_gradients_pass_and_report_their_error() -> None:
    results = run_gradient(GRADIENTS, select_gradients(select("cpu", isa="portable")))
    assert [(r.op, r.impl) for r in results] == [
        ("linear (gradient)", CPU.name),
        ("linear (gradient)", "cpu:portable"),
    ]
    assert all(r.is_ok and not r.detail for r in results)
    assert 0 < results[0].error < results[0].allowed


def test_a_wrong_gradient_is_found() -> None:
    def moved(x: Tensor) -> Tensor:
        x[3, 4] += 1e-3
        return x

    (result,) = run_gradient(with_matrix_gradient("wrong", moved))
    assert not result.is_ok and "[3, 4]" in result.detail and result.error > result.allowed


def test_a_gradient_that_depends_on_the_threads_is_found() -> None:
    kernels = load_kernels()
    threaded = with_matrix_gradient("threaded", lambda x: x if kernels.threads == 1 else one_up(x))
    (result,) = run_gradient(threaded)
    assert not result.is_ok and result.detail.startswith("2 threads")


def test_other_bits_of_a_gradient_between_instruction_sets_are_found() -> None:
    result = run_gradient(GRADIENTS, with_matrix_gradient("other", one_up))[1]
    assert not result.is_ok and f"bits differ from {CPU.name}" in result.detail


# ---- the verb


@pytest.fixture
def same_threads_after() -> Iterator[None]:
    before = load_kernels().threads, torch.get_num_threads()
    yield
    set_threads(CPU, before[0])
    torch.set_num_threads(before[1])


@pytest.mark.usefixtures("same_threads_after")
def test_the_verb_checks_an_op_and_its_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(op="hc_post", json_output=True) == 0
    rows = json.loads(capsys.readouterr().out)
    found = {(row["op"], row["impl"]) for row in rows}
    cpu = {f"cpu:{isa}" for isa in available_isas()}
    assert {impl for op, impl in found if op == "hc_post"} == {"reference", *cpu}
    assert {impl for op, impl in found if op == "hc_post (gradient)"} == cpu
    assert {op for op, _ in found} == {"hc_post", "hc_post (gradient)"}


@pytest.mark.usefixtures("same_threads_after")
def test_the_table_of_the_verb_names_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(op="route_hash") == 0
    printed = capsys.readouterr().out
    assert "route_hash" in printed and "route (gradient)" in printed and "NO" not in printed


def test_an_op_brings_the_gradients_its_derivative_is_made_of() -> None:
    def named(op: str) -> set[str]:
        return {case.op for case in chosen_gradients(op)}

    assert named("attention") == {"attention"}
    assert named("route_topk") == {"route"}
    assert named("index_topk") == {"index_scores", "index_scores_backward"}
    assert named("csa_compress") == {"pool", "pool_backward", "rms_norm"}
    assert named("argmax") == set()
    assert set().union(*(named(op) for op in OpTable.op_names())) == set(GradTable.op_names())
    assert [c.name for c in chosen_gradients(None)] == [c.name for c in gradient_cases()]


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown op 'pool'"):
        chosen_cases("pool")
