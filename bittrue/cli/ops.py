"""`bittrue ops check`: every implementation of every op against its reference, as a table or as JSON."""

import dataclasses
import json

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bittrue.errors import ConfigError
from bittrue.ops.case import Case
from bittrue.ops.case_grad import GradCase
from bittrue.ops.cases import all_cases
from bittrue.ops.cases_grad import gradient_cases
from bittrue.ops.check import CheckResult, check_case, check_gradient
from bittrue.ops.contracts import OpTable
from bittrue.ops.cpu.library import available_isas
from bittrue.ops.dispatch import select, select_gradients
from bittrue.ops.gradients import GradTable
from bittrue.ops.threads import set_threads

# The backward ops an op's derivative is made of, where they are not its own name.
_DERIVATIVES = {
    "kv_rows": ("rms_norm",),
    "linears": ("linear",),
    "route_topk": ("route",),
    "route_hash": ("route",),
    "csa_compress": ("pool", "pool_backward", "rms_norm"),
    "hca_compress": ("pool", "pool_backward", "rms_norm"),
    "index_topk": ("index_scores", "index_scores_backward"),
}


def chosen_cases(op: str | None) -> tuple[Case, ...]:
    """The cases of ``op``, or all of them. Raises ConfigError for an op that does not exist."""
    if op is not None and op not in OpTable.op_names():
        raise ConfigError(f"unknown op {op!r}: choose one of {', '.join(OpTable.op_names())}", field="op")
    return tuple(case for case in all_cases() if op is None or case.op == op)


def chosen_gradients(op: str | None) -> tuple[GradCase, ...]:
    """The cases of the backward ops that the derivative of ``op`` is made of, or all of them."""
    names = GradTable.op_names() if op is None else _DERIVATIVES.get(op, (op,))
    return tuple(case for case in gradient_cases() if case.op in names)


def run_checks(
    cases: tuple[Case, ...], gradients: tuple[GradCase, ...], seed: int, stderr: Console
) -> list[CheckResult]:
    """Every implementation this machine can run over the cases, with a progress bar on stderr."""
    reference = select("reference")
    tables = [select("cpu", isa=isa) for isa in available_isas()]

    def use_threads(threads: int) -> None:
        set_threads(tables[-1], threads)

    results: list[CheckResult] = []
    for case in track(cases, "checking", console=stderr, transient=True):
        results += check_case(case, reference, tables, use_threads, seed)
    truth, backward = select_gradients(reference), [select_gradients(table) for table in tables]
    for slope in track(gradients, "checking gradients", console=stderr, transient=True):
        results += check_gradient(slope, truth, backward, use_threads, seed)
    return results


def print_table(results: list[CheckResult], console: Console) -> None:
    """One line per implementation and case; a failure is followed by its first difference."""
    table = Table("op", "case", "impl", "worst error", "allowed", "ok")
    for r in results:
        table.add_row(r.op, r.case, r.impl, f"{r.error:.2e}", f"{r.allowed:.2e}", "yes" if r.is_ok else "NO")
        if r.detail:
            table.add_row("", r.detail, "", "", "", "")
    console.print(table)
    failed = sum(not r.is_ok for r in results)
    console.print(f"{len(results) - failed} of {len(results)} checks passed")


def check(*, op: str | None = None, seed: int = 0, json_output: bool = False) -> int:
    """Run every implementation of the ops and of their gradients over all cases against the reference.

    Each is compared with the reference within the case's tolerance (a gradient with the reference in
    float64), with itself at 1 and 2 threads and, for an op, rows alone, and with the other instruction sets,
    bit for bit. Exit code 0 when all pass, else 1.

    Parameters
    ----------
    op
        Only this op, with the gradients its derivative is made of.
    seed
        Seed of the inputs.
    json_output
        Print one JSON document instead of the table.
    """
    results = run_checks(chosen_cases(op), chosen_gradients(op), seed, Console(stderr=True))
    if json_output:
        print(json.dumps([dataclasses.asdict(r) for r in results], indent=1))
    else:
        width = None if Console().is_terminal else 200
        print_table(results, Console(width=width))
    return 0 if all(r.is_ok for r in results) else 1
