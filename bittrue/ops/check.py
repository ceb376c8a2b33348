"""Runs implementations over cases: against the reference, between instruction sets, and row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bittrue.ops.case import Call, Case, Outputs
from bittrue.ops.case_grad import GradCase
from bittrue.ops.contracts import OpTable
from bittrue.ops.gradients import GradTable
from bittrue.ops.numeric import Difference, first_difference

MANY_THREADS = 2


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One implementation on one case; ``op`` says when it is a gradient. ``error`` and ``allowed`` are where
    their quotient is largest."""

    op: str
    case: str
    impl: str
    error: float
    allowed: float
    is_ok: bool
    detail: str  # the first difference in words, empty when ok


def worst_error(outputs: Outputs, reference: Outputs, allowed: Outputs) -> tuple[float, float]:
    """(error, allowed) at the coordinate that comes closest to its limit, over all finite float values."""
    worst = (0.0, 0.0, -1.0)
    for out, ref, limit in zip(outputs, reference, allowed, strict=True):
        if not out.dtype.is_floating_point or out.shape != ref.shape or out.numel() == 0:
            continue
        error = (out.double() - ref.double()).abs().flatten()
        bound = limit.expand(ref.shape).flatten()
        share = torch.where(error == 0, 0.0, error / bound).nan_to_num(0.0)
        i = int(share.argmax())
        if float(share[i]) > worst[2]:
            worst = (float(error[i]), float(bound[i]), float(share[i]))
    return worst[:2]


def _first(differences: Sequence[Difference | None]) -> str:
    return next((str(d) for d in differences if d is not None), "")


def _other_bits_on_threads(again: Outputs, alone: Outputs) -> str:
    detail = _first([first_difference(a, o) for a, o in zip(again, alone, strict=True)])
    return detail and f"{MANY_THREADS} threads: {detail}"


def _check_table(
    table: OpTable, case: Case, call: Call, reference: Outputs, set_threads: Callable[[int], None], seed: int
) -> tuple[CheckResult, Outputs]:
    allowed = case.allowed(call, reference)
    set_threads(1)
    outputs = case.outputs(table, call)
    error, limit = worst_error(outputs, reference, allowed)
    detail = _first([first_difference(o, r, a) for o, r, a in zip(outputs, reference, allowed, strict=True)])
    set_threads(MANY_THREADS)
    if not detail:
        detail = _other_bits_on_threads(case.outputs(table, call), outputs)
    if not detail and case.invariance is not None:
        detail = _first([case.invariance(lambda c: case.outputs(table, c), call, seed)])
        detail = detail and f"depends on the other rows: {detail}"
    return CheckResult(case.op, case.name, table.name, error, limit, not detail, detail), outputs


def check_case(
    case: Case,
    reference: OpTable,
    tables: Sequence[OpTable],
    set_threads: Callable[[int], None],
    seed: int = 0,
) -> list[CheckResult]:
    """The reference and each table on one case: within tolerance of the reference, the same bits at 1 and 2
    threads and for rows alone, the same bits as the first table (one source, several instruction sets)."""
    call = case.make_inputs(seed)
    results = []
    base: Outputs | None = None
    truth = case.outputs(reference, call)
    for table in (reference, *tables):
        result, outputs = _check_table(table, case, call, truth, set_threads, seed)
        if table is not reference and base is None:
            base = outputs
        elif table is not reference and base is not None:
            result = _with_bits_of(base, tables[0].name, result, outputs)
        results.append(result)
    return results


def _with_bits_of(base: Outputs, name: str, result: CheckResult, outputs: Outputs) -> CheckResult:
    """``result``, failed if its outputs are not those of the implementation ``name`` to the bit."""
    detail = _first([first_difference(o, b) for o, b in zip(outputs, base, strict=True)])
    if not result.is_ok or not detail:
        return result
    return replace(result, is_ok=False, detail=f"bits differ from {name}: {detail}")


def check_gradient(
    case: GradCase,
    reference: GradTable,
    tables: Sequence[GradTable],
    set_threads: Callable[[int], None],
    seed: int = 0,
) -> list[CheckResult]:
    """Each table on one case of a backward op: within tolerance of the reference in float64, the same bits
    at 1 and 2 threads, the same bits as the first table."""
    call = case.make_inputs(seed)
    truth = case.reference(reference, call)
    allowed = case.allowed(truth)
    results = []
    base: Outputs | None = None
    for table in tables:
        set_threads(1)
        outputs = case.outputs(table, call)
        error, limit = worst_error(outputs, truth, allowed)
        compared = zip(outputs, truth, allowed, strict=True)
        detail = _first([first_difference(o.double(), t, a) for o, t, a in compared])
        set_threads(MANY_THREADS)
        detail = detail or _other_bits_on_threads(case.outputs(table, call), outputs)
        result = CheckResult(f"{case.op} (gradient)", case.name, table.name, error, limit, not detail, detail)
        if base is None:
            base = outputs
        results.append(_with_bits_of(base, tables[0].name, result, outputs))
    return results
