"""The checker itself: each kind of planted fault is found and named."""

import dataclasses

import torch
from torch import Tensor

from bittrue.ops.case import Case
from bittrue.ops.cases_matrix import linear_case
from bittrue.ops.check import CheckResult, check_case
from bittrue.ops.contracts import OpTable, Weight
from bittrue.ops.cpu.library import load_kernels
from bittrue.ops.dispatch import select

CASE = linear_case(9, 20, 64, "f32", torch.float32)
CPU = select("cpu")


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
