"""Every backward op of the CPU: the reference in float64, the same bits at every width and thread count."""

import pytest

from bittrue.ops.case_grad import GradCase
from bittrue.ops.cases_grad import gradient_cases
from bittrue.ops.check import check_gradient
from bittrue.ops.cpu.grad_impls import cpu_gradients
from bittrue.ops.cpu.library import available_isas, load_kernels
from bittrue.ops.gradients import GradTable
from bittrue.ops.ref.grad_table import reference_gradients

CASES = gradient_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.name}")
def test_cpu_derivative_is_the_reference_and_the_same_at_every_width_and_thread_count(case: GradCase) -> None:
    kernels = load_kernels()
    tables = [cpu_gradients(load_kernels(isa)) for isa in available_isas()]
    before = kernels.threads
    try:
        results = check_gradient(case, reference_gradients(), tables, kernels.set_threads)
    finally:
        kernels.set_threads(before)
    assert [f"{r.impl}: {r.detail}" for r in results if not r.is_ok] == []


def test_every_backward_op_has_a_case() -> None:
    assert {case.op for case in CASES} == set(GradTable.op_names())
