"""`bittrue bench ops`: the time, GB/s and GFLOP/s of every op, as a table or as JSON."""

import dataclasses
import json as json_module
import sys
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bittrue.bench.ops import bench_cases, copy_bandwidth
from bittrue.bench.result import Result, setting
from bittrue.cli.ops import chosen_cases
from bittrue.ops.dispatch import select
from bittrue.ops.threads import set_threads


def ops(
    *,
    op: Annotated[str | None, Parameter(help="Only this op.")] = None,
    isa: Annotated[Literal["portable", "avx2", "avx512"] | None, Parameter(help="Default: the best.")] = None,
    threads: Annotated[int, Parameter(help="CPU threads.")] = 1,
    seconds: Annotated[float, Parameter(help="Least time spent on a case.")] = 0.05,
    json: Annotated[bool, Parameter(help="Print one JSON document instead of a table.")] = False,
) -> int:
    """Time every case of every op on the CPU backend, next to this machine's copy bandwidth."""
    table = select("cpu", isa=isa)
    set_threads(table, threads)
    story = Console(stderr=True)
    results = [copy_bandwidth(seconds=1.0)]
    cases = chosen_cases(op)
    measured = bench_cases(table, cases, seconds=seconds, seed=0)
    results += track(measured, "timing", total=len(cases), console=story, transient=True)
    where = setting(f"bittrue bench ops --isa {table.name.removeprefix('cpu:')} --threads {threads}")
    if json:
        document = {"setting": dataclasses.asdict(where), "results": [dataclasses.asdict(r) for r in results]}
        sys.stdout.write(json_module.dumps(document, indent=1) + "\n")
    else:
        place = f"{where.machine}, {where.cores} cores, commit {where.commit}, {where.date}"
        story.print(place, highlight=False)
        console = Console(width=None if Console().is_terminal else 160)
        console.print(result_table(results))
    return 0


def result_table(results: list[Result]) -> Table:
    """One line per case: median, spread, and the rates of the least bytes and operations it needs."""
    table = Table("op", "case", "median us", "10-90 % us", "GB/s", "GFLOP/s")
    for r in results:
        table.add_row(
            r.name,
            r.variant,
            f"{r.median_s * 1e6:.1f}",
            f"{r.low_s * 1e6:.1f}-{r.high_s * 1e6:.1f}",
            f"{r.gigabytes_per_s:.2f}" if r.bytes else "",
            f"{r.gigaflops_per_s:.2f}" if r.flops else "",
        )
    return table
