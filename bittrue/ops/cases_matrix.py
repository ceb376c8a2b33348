"""Cases of the matrix ops: linear, linears, grouped_linear, experts and the routers."""

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from bittrue.config.formats import ACT_GROUP, ceil_div
from bittrue.ops.case import Call, Case, Outputs, Tolerance, generator, rows_alone, take_args
from bittrue.ops.contracts import ExpertBank, Weight
from bittrue.ops.ref.experts import swiglu
from bittrue.ops.ref.linear import dequantize, linear
from bittrue.ops.ref.quant import quant_fp8

WeightFormat = Literal["f32", "bf16", "fp8", "fp4"]
FORMATS: Final[tuple[WeightFormat, ...]] = ("f32", "bf16", "fp8", "fp4")
F32_UNIT = 2.0**-24  # half a unit in the last place of 1, as a share of it
BF16_STEP = 2.0**-8  # two neighbouring bf16 values differ by at most this share
WEIGHT_BYTES = {"f32": 4.0, "bf16": 2.0, "fp8": 1.0 + 1 / 128**2, "fp4": 0.5 + 1 / 32}


def random_weight(form: WeightFormat, rows: int, cols: int, source: torch.Generator) -> Weight:
    """A matrix whose values are about cols^-1/2; fp8 and fp4 bytes are any finite code."""
    if form in ("f32", "bf16"):
        data = torch.randn(rows, cols, generator=source) * cols**-0.5
        return Weight(data if form == "f32" else data.bfloat16(), None, form)
    centre = 127 - int(math.log2(cols) / 2) - (7 if form == "fp8" else 2)
    shape = (ceil_div(rows, 128), ceil_div(cols, 128)) if form == "fp8" else (rows, ceil_div(cols, 32))
    scale = torch.randint(centre - 2, centre + 2, shape, generator=source, dtype=torch.uint8)
    width = cols if form == "fp8" else cols // 2
    codes = torch.randint(0, 256, (rows, width), generator=source, dtype=torch.uint8)
    if form == "fp4":
        return Weight(codes.view(torch.int8), scale.view(torch.float8_e8m0fnu), form)
    codes = torch.where((codes & 127) == 127, codes - 1, codes)  # no NaN
    return Weight(codes.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu), form)


def _activations(shape: tuple[int, ...], act: torch.dtype, source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source).to(act)


def _product_tolerance(terms: int, out: torch.dtype) -> Tolerance:
    return Tolerance(
        BF16_STEP if out == torch.bfloat16 else 2 * F32_UNIT,
        2 * (terms / 16 + 5) * F32_UNIT,
        "terms / 16 additions a lane, four in the tree, and the reference's own; then one rounding",
    )


def _product_magnitude(x: Tensor, weight: Weight, quantize: bool) -> Tensor:
    if quantize and weight.format in ("fp8", "fp4"):
        x = quant_fp8(x, ACT_GROUP)
    return x.double().abs() @ dequantize(weight).double().abs().t()


def _linear_magnitude(call: Call) -> Outputs:
    x, weight = call.args
    return (_product_magnitude(x, weight, call.kwargs["quantize"]),)


def _linears_magnitude(call: Call) -> Outputs:
    x, weights = call.args
    parts = zip(weights, call.kwargs["quantize"], strict=True)
    return tuple(_product_magnitude(x, weight, quantize) for weight, quantize in parts)


def _grouped_magnitude(call: Call) -> Outputs:
    x, weight = call.args
    matrix = dequantize(weight).double().abs().view(x.shape[1], -1, x.shape[2])
    return (torch.einsum("tgk,gok->tgo", x.double().abs(), matrix),)


def _name(act: torch.dtype) -> str:
    return "bf16" if act == torch.bfloat16 else "f32"


def linear_case(
    tokens: int,
    rows: int,
    cols: int,
    form: WeightFormat,
    act: torch.dtype,
    out: torch.dtype | None = None,
    *,
    quantize: bool = False,
) -> Case:
    """x [tokens, cols] act by a weight [rows, cols] of ``form`` into ``out`` (default act)."""

    def make(seed: int) -> Call:
        source = generator(seed)
        x = _activations((tokens, cols), act, source)
        kwargs = {"quantize": quantize, "out_dtype": out}
        return Call((x, random_weight(form, rows, cols, source)), kwargs)

    result = out or act
    return Case(
        op="linear",
        name=f"{tokens}x{cols} by {form} {rows}x{cols}, {_name(act)} to {_name(result)}"
        f"{', quantised' if quantize else ''}",
        make_inputs=make,
        tolerance=_product_tolerance(cols, result),
        magnitude=_linear_magnitude,
        invariance=rows_alone(take_args(0)),
        bytes=int(rows * cols * WEIGHT_BYTES[form]) + tokens * (cols * act.itemsize + rows * result.itemsize),
        flops=2 * tokens * rows * cols,
    )


def linears_case(tokens: int, cols: int, rows: dict[WeightFormat, int], act: torch.dtype) -> Case:
    """x [tokens, cols] act by one weight of each format: fp8 and fp4 on quantised rows, and fp4 on plain ones
    too; f32 and bf16 into f32."""
    forms: tuple[WeightFormat, ...] = (*rows, "fp4")
    sizes = (*rows.values(), 30)

    def make(seed: int) -> Call:
        source = generator(seed)
        x = _activations((tokens, cols), act, source)
        parts = zip(forms, sizes, strict=True)
        weights = tuple(random_weight(form, size, cols, source) for form, size in parts)
        quantize = (True,) * len(rows) + (False,)
        dtypes = tuple(torch.float32 if form in ("f32", "bf16") else None for form in forms)
        return Call((x, weights), {"quantize": quantize, "out_dtypes": dtypes})

    return Case(
        op="linears",
        name=f"{tokens}x{cols} by {', '.join(f'{form} {size}' for form, size in rows.items())}, {_name(act)}",
        make_inputs=make,
        tolerance=_product_tolerance(cols, act),
        magnitude=_linears_magnitude,
        invariance=rows_alone(take_args(0)),
        bytes=int(sum(size * cols * WEIGHT_BYTES[form] for form, size in zip(forms, sizes, strict=True))),
        flops=2 * tokens * sum(sizes) * cols,
    )


def grouped_case(
    tokens: int, groups: int, rows: int, cols: int, form: WeightFormat, act: torch.dtype
) -> Case:
    """x [tokens, groups, cols] act by a weight [groups * rows, cols]."""

    def make(seed: int) -> Call:
        source = generator(seed)
        x = _activations((tokens, groups, cols), act, source)
        return Call((x, random_weight(form, groups * rows, cols, source)))

    return Case(
        op="grouped_linear",
        name=f"{tokens}x{groups}x{cols} by {form} {groups * rows}x{cols}, {_name(act)}",
        make_inputs=make,
        tolerance=_product_tolerance(cols, act),
        magnitude=_grouped_magnitude,
        invariance=rows_alone(take_args(0)),
        bytes=int(groups * rows * cols * WEIGHT_BYTES[form]) + tokens * groups * (cols + rows) * act.itemsize,
        flops=2 * tokens * groups * rows * cols,
    )


def _experts_magnitude(call: Call) -> Outputs:
    x, ids, weights, bank = call.args
    limit = call.kwargs["limit"]
    out = torch.zeros(x.shape, dtype=torch.float64)

    def part(row: Tensor, w1: Weight, w3: Weight, w2: Weight, weight: Tensor) -> Tensor:
        hidden = swiglu(linear(row, w1), linear(row, w3), limit, weight)
        return hidden[0].double().abs() @ dequantize(w2).double().abs().t()

    for t in range(x.shape[0]):
        row = x[t : t + 1].float()
        for slot in range(ids.shape[1]):
            e = int(ids[t, slot])
            out[t] += part(row, bank.w1[e], bank.w3[e], bank.w2[e], weights[t, slot : slot + 1])
        if bank.shared is not None:
            w1, w3, w2 = bank.shared
            out[t] += part(row, w1, w3, w2, torch.ones(1))
    return (out,)


@dataclass(frozen=True, slots=True)
class Moe:
    """The sizes of a layer's experts: ``shared`` is the format and hidden size of the shared one."""

    num_experts: int
    slots: int
    width: int
    hidden: int
    form: WeightFormat
    shared: tuple[WeightFormat, int] | None = None

    def bank(self, source: torch.Generator) -> ExpertBank:
        def matrices(rows: int, cols: int) -> tuple[Weight, ...]:
            return tuple(random_weight(self.form, rows, cols, source) for _ in range(self.num_experts))

        routed = (
            matrices(self.hidden, self.width),
            matrices(self.hidden, self.width),
            matrices(self.width, self.hidden),
        )
        if self.shared is None:
            return ExpertBank(*routed)
        form, size = self.shared
        up = (random_weight(form, size, self.width, source), random_weight(form, size, self.width, source))
        return ExpertBank(*routed, shared=(*up, random_weight(form, self.width, size, source)))


def experts_case(tokens: int, moe: Moe, act: torch.dtype, *, quantize: bool) -> Case:
    """Every token in ``moe.slots`` different experts."""
    slots, width = moe.slots, moe.width

    def make(seed: int) -> Call:
        source = generator(seed)
        x = _activations((tokens, width), act, source)
        chosen = [torch.randperm(moe.num_experts, generator=source)[:slots] for _ in range(tokens)]
        ids = torch.stack(chosen).int() if chosen else torch.empty(0, slots, dtype=torch.int32)
        weights = torch.rand(tokens, slots, generator=source)
        return Call((x, ids, weights, moe.bank(source)), {"limit": 10.0, "quantize": quantize})

    if act == torch.float32 and not quantize:
        share, reason = 4 * (width + moe.hidden) / 16 * F32_UNIT, "products of f32 sums"
    elif not quantize:
        share, reason = 2 * BF16_STEP, "gate, up and hidden may each round to the neighbouring bf16 value"
    else:
        share, reason = 2.0**-5, "a hidden value on a rounding boundary may move by one E4M3 step, 2^-3 of it"
    used = min(moe.num_experts, tokens * slots)
    features = tokens * slots * moe.hidden
    weight_bytes = 3 * used * width * moe.hidden * WEIGHT_BYTES[moe.form]
    shared = ""
    if moe.shared is not None:
        form, size = moe.shared
        shared = f" and a shared {form} one of {size}"
        features += tokens * size
        weight_bytes += 3 * width * size * WEIGHT_BYTES[form]
    return Case(
        op="experts",
        name=f"{tokens}x{width}, {slots} of {moe.num_experts} {moe.form} experts of {moe.hidden}{shared}, "
        f"{_name(act)}{', quantised' if quantize else ''}",
        make_inputs=make,
        tolerance=Tolerance(
            BF16_STEP if act == torch.bfloat16 else 2 * F32_UNIT,
            share,
            reason + ", relative to the sum of |hidden w2|; then one rounding",
        ),
        magnitude=_experts_magnitude,
        invariance=rows_alone(take_args(0, 1, 2)),
        bytes=int(weight_bytes) + 2 * tokens * width * act.itemsize,
        flops=6 * features * width,
    )


ROUTE_TOLERANCE = Tolerance(
    24 * F32_UNIT, 1e-37, "exponential, logarithm, root, sum of k scores, quotient and product of f32"
)


def topk_case(tokens: int, num_experts: int, k: int, kind: str, *, biased: bool) -> Case:
    """kind: random logits, plateau (few distinct logits: the tie rule decides), far (to 1e4 and beyond)."""

    def make(seed: int) -> Call:
        source = generator(seed)
        logits = torch.randn(tokens, num_experts, generator=source)
        if kind == "plateau":
            logits = (logits * 1.5).round()
        if kind == "far":
            logits = logits.sign() * 10 ** (logits.abs() + 2)
        bias = (torch.randn(num_experts, generator=source) * 0.1) if biased else None
        if bias is not None and kind == "plateau":
            bias = bias.round()
        return Call((logits, bias, k, 1.5))

    return Case(
        op="route_topk",
        name=f"{tokens}x{num_experts}, {k} chosen, {kind} logits{', bias' if biased else ''}",
        make_inputs=make,
        tolerance=ROUTE_TOLERANCE,
        invariance=rows_alone(take_args(0)),
        bytes=4 * tokens * (num_experts + 2 * k),
        flops=20 * tokens * num_experts,
    )


def hash_case(tokens: int, num_experts: int, k: int) -> Case:
    def make(seed: int) -> Call:
        source = generator(seed)
        logits = torch.randn(tokens, num_experts, generator=source) * 3
        table = torch.stack([torch.randperm(num_experts, generator=source)[:k] for _ in range(50)])
        return Call((logits, torch.randint(0, 50, (tokens,), generator=source), table, 2.5))

    return Case(
        op="route_hash",
        name=f"{tokens}x{num_experts}, {k} looked up",
        make_inputs=make,
        tolerance=ROUTE_TOLERANCE,
        invariance=rows_alone(take_args(0, 1)),
        bytes=4 * tokens * (num_experts + 2 * k),
        flops=20 * tokens * num_experts,
    )


def matrix_cases() -> tuple[Case, ...]:
    """All cases of these ops: every format and dtype, tails of every kind, few rows and many."""
    f32, bf16 = torch.float32, torch.bfloat16
    products = [linear_case(9, 131, 320, form, act) for form in FORMATS for act in (f32, bf16)]
    products += [linear_case(3, 10, 42, form, f32) for form in FORMATS]  # tails of lanes, blocks and tiles
    products += [linear_case(5, 7, 1, "f32", f32), linear_case(2, 300, 1000, "bf16", bf16, f32)]
    products += [linear_case(6, 64, 256, "fp8", f32, bf16), linear_case(0, 8, 16, "f32", f32)]
    products += [
        linear_case(n, 70, 300, form, act, quantize=True)
        for n in (1, 20)
        for form in FORMATS
        for act in (f32, bf16)
    ]
    several = [
        linears_case(n, 300, {"fp8": 50, "fp4": 130, "bf16": 24, "f32": 9}, bf16) for n in (0, 1, 7, 19)
    ]
    several.append(linears_case(5, 96, {"bf16": 40, "fp8": 260}, f32))
    grouped = [grouped_case(7, 3, 50, 96, "f32", f32), grouped_case(7, 3, 50, 96, "fp8", bf16)]
    grouped += [grouped_case(2, 4, 20, 64, "fp4", f32)]
    banks = [
        experts_case(9, Moe(6, 3, 96, 40, "f32"), f32, quantize=False),
        experts_case(9, Moe(6, 3, 96, 40, "bf16", ("bf16", 40)), bf16, quantize=False),
        experts_case(8, Moe(5, 2, 160, 136, "fp8"), bf16, quantize=True),
        experts_case(12, Moe(4, 2, 160, 96, "fp4", ("fp8", 200)), bf16, quantize=True),
        experts_case(40, Moe(4, 2, 64, 272, "fp4", ("bf16", 48)), bf16, quantize=True),  # many rows an expert
        experts_case(4, Moe(4, 2, 64, 48, "fp4", ("f32", 30)), f32, quantize=True),
        experts_case(0, Moe(4, 2, 64, 48, "f32", ("f32", 48)), f32, quantize=False),
    ]
    routes = [
        topk_case(11, 40, 6, kind, biased=b) for kind in ("random", "plateau", "far") for b in (False, True)
    ]
    routes += [topk_case(70, 256, 6, "plateau", biased=True)]  # enough work for several threads
    routes += [topk_case(3, 5, 5, "random", biased=True), topk_case(4, 256, 6, "random", biased=True)]
    return (*products, *several, *grouped, *banks, *routes, hash_case(9, 40, 6), hash_case(0, 8, 2))
