"""The matrix product against its two bounds: torch's product for many rows, the memory for one row."""

from collections.abc import Iterator

import torch

from bittrue.bench.machine import copy_call, last_cache_bytes, read_call
from bittrue.bench.result import Label, Measurement, measured
from bittrue.bench.timing import Call, time_in_turn
from bittrue.ops.case import generator
from bittrue.ops.cases_matrix import FORMATS, WEIGHT_BYTES, WeightFormat, random_weight
from bittrue.ops.contracts import OpTable

MANY_ROWS = (64, 128, 512)
MANY_SHAPE = (2048, 2048)  # [O, K]: about the widths of a layer
COLD_SHAPE = (4096, 4096)
COLD_CACHES = 4  # the weights of one rotation are this many times the last cache, so none is left in it


def bench_many_rows(table: OpTable, *, seconds: float, seed: int) -> Iterator[Measurement]:
    """``linear`` and torch's float32 product of the same shape in turn: their times, and the share of
    torch's speed that ours reaches, round by round. bf16 weights also meet torch's own bf16 product."""
    for form in ("f32", "bf16"):
        for rows in MANY_ROWS:
            yield from _against_torch(table, form, rows, seconds=seconds, seed=seed)


def _against_torch(
    table: OpTable, form: WeightFormat, rows: int, *, seconds: float, seed: int
) -> Iterator[Measurement]:
    source = generator(seed)
    outputs, cols = MANY_SHAPE
    weight = random_weight(form, outputs, cols, source)
    x = torch.randn(rows, cols, generator=source)
    theirs = weight.data.float().t()
    calls: dict[str, Call] = {
        "linear": lambda: table.linear(x, weight),
        "torch f32": lambda: torch.mm(x, theirs),
    }
    if form == "bf16":
        x16, theirs16 = x.bfloat16(), weight.data.t()
        calls["torch bf16"] = lambda: torch.mm(x16, theirs16)
    timings = time_in_turn(calls, seconds=seconds, least=9)
    labels: dict[str, Label] = {
        "format": form,
        "rows": rows,
        "case": f"{rows}x{cols} by {form} {outputs}x{cols}",
    }
    flops = 2 * rows * outputs * cols
    yield measured("linear, many rows", "s", timings["linear"], labels, flops=flops)
    for name in list(calls)[1:]:
        yield measured(f"{name} product", "s", timings[name], labels, flops=flops)
        shares = [t / o for t, o in zip(timings[name], timings["linear"], strict=True)]
        yield measured("linear, share of torch", "ratio", shares, {"of": name, **labels})


def bench_one_row(table: OpTable, *, seconds: float, seed: int) -> Iterator[Measurement]:
    """``linear`` of one row over weights that no cache holds, in turn with a copy and a read of as many
    bytes: seconds of one rotation over all weights, and the share of the copy's and the read's speed."""
    for form in FORMATS:
        yield from _cold(table, form, seconds=seconds, seed=seed)


def _cold(table: OpTable, form: WeightFormat, *, seconds: float, seed: int) -> Iterator[Measurement]:
    source = generator(seed)
    outputs, cols = COLD_SHAPE
    weight_bytes = int(outputs * cols * WEIGHT_BYTES[form])
    count = max(2, -(-COLD_CACHES * last_cache_bytes() // weight_bytes))
    first = random_weight(form, outputs, cols, source)
    # The same values everywhere, at different addresses: making random ones takes longer than the benchmark.
    copies = (first.data.clone() for _ in range(count - 1))
    scales = (None if first.scale is None else first.scale.clone() for _ in range(count - 1))
    weights = [first, *(type(first)(data, scale, form) for data, scale in zip(copies, scales, strict=True))]
    # As the model calls it: bf16 activations but beside f32 weights, quantised beside quantised ones.
    x = torch.randn(1, cols, generator=source).to(torch.float32 if form == "f32" else torch.bfloat16)
    quantize = form in ("fp8", "fp4")

    def rotate() -> None:
        for weight in weights:
            table.linear(x, weight, quantize=quantize)

    num_bytes = count * weight_bytes
    calls: dict[str, Call] = {
        "linear": rotate,
        "copy": copy_call(num_bytes // 2),  # reads half of the bytes, writes the other half
        "read": read_call(num_bytes),
    }
    timings = time_in_turn(calls, seconds=seconds, least=9)
    labels: dict[str, Label] = {
        "format": form,
        "rows": 1,
        "case": f"1x{cols} by {form} {outputs}x{cols}, {count} weights in turn",
    }
    yield measured("linear, one row", "s", timings["linear"], labels, num_bytes=num_bytes)
    for bound in ("copy", "read"):
        shares = [t / o for t, o in zip(timings[bound], timings["linear"], strict=True)]
        yield measured("linear, share of bandwidth", "ratio", shares, {"of": bound, **labels})
