"""Times every case of every op on one OpTable."""

from collections.abc import Iterator, Sequence

from bittrue.bench.result import Measurement, measured
from bittrue.bench.timing import time_call
from bittrue.ops.case import Case
from bittrue.ops.contracts import OpTable


def bench_cases(table: OpTable, cases: Sequence[Case], *, seconds: float, seed: int) -> Iterator[Measurement]:
    """One measurement per case, in order. Cases that write in place include the copy of what they write."""
    for case in cases:
        inputs = case.make_inputs(seed)
        timings = time_call(lambda case=case, inputs=inputs: case.outputs(table, inputs), seconds=seconds)  # type: ignore[misc]
        yield measured(case.op, "s", timings, {"case": case.name}, num_bytes=case.bytes, flops=case.flops)
