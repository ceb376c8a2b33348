"""Every backward op: the reference's against float64 finite differences, the CPU's against the reference."""

import pytest
import torch

from bittrue.ops.case_grad import GradCase
from bittrue.ops.cases_grad import gradient_cases
from bittrue.ops.cpu.grad_impls import cpu_gradients
from bittrue.ops.cpu.library import available_isas, load_kernels
from bittrue.ops.gradients import GradTable
from bittrue.ops.numeric import first_difference
from bittrue.ops.ref.grad_table import reference_gradients

CASES = gradient_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.name}")
def test_cpu_derivative_is_the_reference_and_the_same_at_every_width_and_thread_count(case: GradCase) -> None:
    call = case.make_inputs(0)
    truth = case.reference(reference_gradients(), call)
    allowed = case.allowed(truth)
    isas = available_isas()
    for isa in (isas[0], isas[-1]):
        kernels = load_kernels(isa)
        table = cpu_gradients(kernels)
        before = kernels.threads
        try:
            kernels.set_threads(1)
            alone = case.outputs(table, call)
            kernels.set_threads(2)
            shared = case.outputs(table, call)
        finally:
            kernels.set_threads(before)
        for got, want, limit in zip(alone, truth, allowed, strict=True):
            difference = first_difference(got.double(), want, limit)
            assert difference is None, f"{isa}: {difference}"
        for one, two in zip(alone, shared, strict=True):
            assert torch.equal(one, two), f"{isa}: 2 threads give other bits than 1"


def test_every_backward_op_has_a_case() -> None:
    assert {case.op for case in CASES} == set(GradTable.op_names())
