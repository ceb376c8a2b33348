"""Times every case of every op on one OpTable, next to the memory bandwidth of the machine."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bittrue.bench.result import Result, percentile
from bittrue.ops.case import Case
from bittrue.ops.contracts import OpTable

COPY_BYTES = 1 << 28  # far beyond every cache


def time_call(call: Callable[[], object], *, seconds: float) -> list[float]:
    """Timings in seconds, ascending: at least five, more while they fit in ``seconds``. One warm-up is
    dropped."""
    call()
    timings: list[float] = []
    end = time.perf_counter() + seconds
    while len(timings) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        timings.append(time.perf_counter() - start)
    return sorted(timings)


def summarise(name: str, variant: str, timings: list[float], *, num_bytes: int, flops: int) -> Result:
    """The Result of ascending timings."""
    return Result(
        name=name,
        variant=variant,
        median_s=percentile(timings, 0.5),
        low_s=percentile(timings, 0.1),
        high_s=percentile(timings, 0.9),
        repeats=len(timings),
        bytes=num_bytes,
        flops=flops,
    )


def copy_bandwidth(*, seconds: float) -> Result:
    """What the machine reads plus writes when it only copies."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    timings = time_call(lambda: target.copy_(source), seconds=seconds)
    return summarise("copy", f"{COPY_BYTES >> 20} MiB", timings, num_bytes=2 * COPY_BYTES, flops=0)


def bench_cases(table: OpTable, cases: Sequence[Case], *, seconds: float, seed: int) -> Iterator[Result]:
    """One Result per case, in order. Cases that write in place include the copy of what they write."""
    for case in cases:
        inputs = case.make_inputs(seed)
        timings = time_call(lambda case=case, inputs=inputs: case.outputs(table, inputs), seconds=seconds)  # type: ignore[misc]
        yield summarise(case.op, case.name, timings, num_bytes=case.bytes, flops=case.flops)
