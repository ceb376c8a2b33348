"""Runs implementations over cases: against the reference, between instruction sets, and row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bittrue.ops.case import Call, Case, Outputs
from bittrue.ops.contracts import OpTable
from bittrue.ops.numeric import Difference, first_difference

MANY_THREADS = 2


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One implementation on one case. ``error`` and ``allowed`` are where their quotient is largest."""

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
        again = case.outputs(table, call)
        detail = _first([first_difference(a, o) for a, o in zip(again, outputs, strict=True)])
        detail = detail and f"{MANY_THREADS} threads: {detail}"
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
        elif table is not reference and base is not None and result.is_ok:
            detail = _first([first_difference(o, b) for o, b in zip(outputs, base, strict=True)])
            if detail:
                detail = f"bits differ from {tables[0].name}: {detail}"
                result = replace(result, is_ok=False, detail=detail)
        results.append(result)
    return results
