"""Cases of the derivatives of matrix products, experts, routing and pooling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bittrue.ops.case import Call, generator
from bittrue.ops.case_grad import GradCase
from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, PAGE_TOKENS, Batch
from bittrue.ops.gradients import BankValues

LIMIT: Final = 10.0
PRODUCT_REASON = (
    "chains of at most 256 products in f32 and the sum of the chains, errors of which are of either sign"
)


def documents(lengths: Sequence[int]) -> Batch:
    """Whole documents of these lengths, packed one after the other, each at position 0."""
    num_pages = max((-(-length // PAGE_TOKENS) for length in lengths), default=0)
    num = len(lengths)

    def i32(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return Batch(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=i32([p for length in lengths for p in range(length)]),
        seq_ids=i32([s for s, length in enumerate(lengths) for _ in range(length)]),
        offsets=i32([sum(lengths[:s]) for s in range(num + 1)]),
        starts=i32([0] * num),
        folds=i32([0] * num),
        slots=i32(range(num)),
        kept=i32([0] * num),
        page_table=torch.arange(num * num_pages, dtype=torch.int32).view(num, num_pages),
    )


def linear_case(tokens: int, outputs: int, inputs: int) -> GradCase:
    def make(seed: int) -> Call:
        source = generator(seed)
        d_out, x = (torch.randn(tokens, n, generator=source) for n in (outputs, inputs))
        return Call((d_out, x, torch.randn(outputs, inputs, generator=source) * inputs**-0.5))

    return GradCase(
        op="linear",
        name=f"{tokens}x{inputs} by {outputs}x{inputs}",
        make_inputs=make,
        relative=1e-6,
        reason=PRODUCT_REASON,
        bytes=4 * (tokens * (outputs + 2 * inputs) + 2 * outputs * inputs),
        flops=4 * tokens * outputs * inputs,
    )


def grouped_case(tokens: int, groups: int, outputs: int, inputs: int) -> GradCase:
    def make(seed: int) -> Call:
        source = generator(seed)
        d_out, x = (torch.randn(tokens, groups, n, generator=source) for n in (outputs, inputs))
        return Call((d_out, x, torch.randn(groups * outputs, inputs, generator=source) * inputs**-0.5))

    return GradCase(
        op="grouped_linear",
        name=f"{tokens}x{groups}x{inputs} by {groups * outputs}x{inputs}",
        make_inputs=make,
        relative=1e-6,
        reason=PRODUCT_REASON,
        bytes=4 * groups * (tokens * (outputs + 2 * inputs) + 2 * outputs * inputs),
        flops=4 * tokens * groups * outputs * inputs,
    )


@dataclass(frozen=True, slots=True)
class Moe:
    """The sizes of a layer's experts; ``used``: tokens choose among the first so many of them."""

    num_experts: int
    slots: int
    width: int
    hidden: int
    shared_hidden: int = 0
    used: int | None = None

    def bank(self, source: torch.Generator, gain: float) -> BankValues:
        def matrix(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source) * (gain / math.sqrt(shape[-1]))

        e, hidden, size, width = self.num_experts, self.hidden, self.shared_hidden, self.width
        routed = (matrix(e, hidden, width), matrix(e, hidden, width), matrix(e, width, hidden))
        if size == 0:
            return BankValues(*routed, shared=None)
        return BankValues(*routed, shared=(matrix(size, width), matrix(size, width), matrix(width, size)))


def experts_case(tokens: int, moe: Moe, *, gain: float = 1.0) -> GradCase:
    """Every token in ``moe.slots`` different experts. ``gain``: of the matrices; at 5 many clamps hold."""
    used = moe.used or moe.num_experts

    def make(seed: int) -> Call:
        source = generator(seed)
        d_out, x = (torch.randn(tokens, moe.width, generator=source) for _ in range(2))
        chosen = torch.rand(tokens, used, generator=source).argsort(1)[:, : moe.slots]
        weights = torch.rand(tokens, moe.slots, generator=source)
        bank = moe.bank(source, gain)
        return Call((d_out, x, chosen.sort(1).values.int(), weights, bank), {"limit": LIMIT})

    features = tokens * (moe.slots * moe.hidden + moe.shared_hidden)
    matrices = 3 * moe.width * (min(used, tokens * moe.slots) * moe.hidden + moe.shared_hidden)
    shared = f" and a shared one of {moe.shared_hidden}" if moe.shared_hidden else ""
    return GradCase(
        op="experts",
        name=f"{tokens}x{moe.width}, {moe.slots} of {moe.num_experts} experts of {moe.hidden}{shared}"
        + (f", {used} used" if moe.used else "")
        + (", clamped" if gain > 1 else ""),
        make_inputs=make,
        relative=2e-6,
        reason="three products in a row, each a sum in f32, and the slope of SiLU between",
        bytes=4 * (3 * tokens * moe.width + 2 * matrices),
        flops=16 * features * moe.width,
    )


def route_case(tokens: int, num_experts: int, k: int, spread: float) -> GradCase:
    """``spread``: of the logits; at 50 they reach from -100 to 100 and beyond."""

    def make(seed: int) -> Call:
        source = generator(seed)
        logits = torch.randn(tokens, num_experts, generator=source) * spread
        ids = torch.rand(tokens, num_experts, generator=source).argsort(1)[:, :k].sort(1).values.int()
        return Call((torch.randn(tokens, k, generator=source), logits, ids, 1.5))

    return GradCase(
        op="route",
        name=f"{tokens}x{num_experts}, {k} chosen, logits of {spread:g}",
        make_inputs=make,
        relative=1e-6,
        reason="exponential, logarithm, root and quotients of f32, and a sum of k terms of either sign",
        bytes=4 * tokens * (num_experts + 3 * k),
        flops=40 * tokens * k,
    )


def pool_cases(lengths: Sequence[int], channels: int, ratio: int) -> list[GradCase]:
    """The pooling of documents of these lengths, and its backward."""
    tokens, width = sum(lengths), channels * 2 if ratio == CSA_RATIO else channels
    entries = sum(length // ratio for length in lengths)

    def rows(seed: int) -> tuple[Tensor, Tensor, Batch, int]:
        source = generator(seed)
        u, gate = (torch.randn(tokens, width, generator=source) * size for size in (1, 3))
        return u, gate, documents(lengths), ratio

    def backward(seed: int) -> Call:
        return Call((torch.randn(entries, channels, generator=generator(seed + 1)), *rows(seed)))

    name = f"{len(lengths)} documents of {min(lengths, default=0)} to {max(lengths, default=0)} tokens, "
    name += f"{channels} channels, ratio {ratio}"
    reason = "exponentials of differences of gates, a sum over the slots in f32, and its quotient"
    return [
        GradCase(
            op="pool",
            name=name,
            make_inputs=lambda seed: Call(rows(seed)),
            relative=1e-6,
            reason=reason,
            bytes=4 * (2 * tokens * width + entries * channels),
            flops=25 * tokens * width,
        ),
        GradCase(
            op="pool_backward",
            name=name,
            make_inputs=backward,
            relative=1e-6,
            reason=reason,
            bytes=4 * (4 * tokens * width + entries * channels),
            flops=30 * tokens * width,
        ),
    ]


def matrix_gradient_cases() -> list[GradCase]:
    """Every case of this file's backward ops."""
    cases = [
        linear_case(*shape) for shape in ((300, 96, 128), (530, 51, 300), (7, 5, 3), (1, 40, 33), (0, 8, 16))
    ]
    cases += [grouped_case(*shape) for shape in ((200, 4, 32, 64), (5, 3, 7, 9), (0, 2, 8, 16))]
    cases += [
        experts_case(300, Moe(8, 2, 128, 128, 128)),
        experts_case(300, Moe(8, 2, 64, 96, 40), gain=5.0),
        experts_case(33, Moe(5, 3, 37, 21)),  # tails of lanes
        experts_case(9, Moe(6, 1, 20, 12, 30, used=2)),
        experts_case(0, Moe(4, 2, 16, 16, 16)),
    ]
    cases += [route_case(300, 8, 2, 1.0), route_case(500, 256, 6, 4.0), route_case(40, 24, 20, 2.0)]
    cases += [route_case(300, 8, 2, 50.0), route_case(0, 8, 2, 1.0)]
    cases += pool_cases((1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129, 0, 131), 64, CSA_RATIO)
    cases += pool_cases((40, 3, 8), 21, CSA_RATIO) + pool_cases((), 16, CSA_RATIO)
    cases += pool_cases((127, 128, 129, 0, 300, 5), 64, HCA_RATIO)
    return cases + pool_cases((260, 3), 21, HCA_RATIO) + pool_cases((3,), 16, HCA_RATIO)
