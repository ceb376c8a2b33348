"""Binds the matrix kernels: linear, grouped_linear, swiglu, experts and the routers."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from bittrue.ops.contracts import ExpertBank, Weight
from bittrue.ops.cpu.library import ACT_DTYPES, F32, I64, PTR, Kernels, check, dtype_code, pointer

FORMAT_CODES: Final = {"f32": 0, "bf16": 1, "fp8": 2, "fp4": 3}
DATA_DTYPES: Final = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp4": torch.int8,
}


def check_weight(op: str, name: str, weight: Weight, inputs: int) -> None:
    """ValueError unless the weight's data and scale are as its format says and it takes ``inputs``."""
    check(op, f"{name}.data", weight.data, (None, None), DATA_DTYPES[weight.format])
    rows, cols = weight.shape
    if cols != inputs:
        raise ValueError(f"{op}: {name} takes {cols} features, but the input has {inputs}")
    if weight.format in ("f32", "bf16"):
        return
    if weight.scale is None:
        raise ValueError(f"{op}: {name}.scale is missing; {weight.format} weights have one")
    shape = (rows, -(-cols // 32)) if weight.format == "fp4" else (-(-rows // 128), -(-cols // 128))
    check(op, f"{name}.scale", weight.scale, shape, torch.float8_e8m0fnu)


def _product_ops(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    run = kernels.bind("linear", PTR, I64, I64, I64, I64, I64, PTR, PTR, I64, PTR, I64)

    def product(x: Tensor, groups: int, inputs: int, outputs: int, weight: Weight, out: Tensor) -> Tensor:
        run(
            x.data_ptr(), dtype_code(x.dtype), x.shape[0], groups, inputs, outputs,
            weight.data.data_ptr(), pointer(weight.scale), FORMAT_CODES[weight.format],
            out.data_ptr(), dtype_code(out.dtype),
        )  # fmt: skip
        return out

    def linear(x: Tensor, weight: Weight, *, out_dtype: torch.dtype | None = None) -> Tensor:
        check("linear", "x", x, (None, None), *ACT_DTYPES)
        check_weight("linear", "weight", weight, x.shape[1])
        outputs = weight.shape[0]
        out = torch.empty(x.shape[0], outputs, dtype=out_dtype or x.dtype)
        return product(x, 1, x.shape[1], outputs, weight, out)

    def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
        check("grouped_linear", "x", x, (None, None, None), *ACT_DTYPES)
        num_tokens, groups, inputs = x.shape
        check_weight("grouped_linear", "weight", weight, inputs)
        outputs, rest = divmod(weight.shape[0], groups)
        if rest:
            raise ValueError(
                f"grouped_linear: {weight.shape[0]} weight rows do not divide into {groups} groups"
            )
        out = torch.empty(num_tokens, groups, outputs, dtype=x.dtype)
        return product(x, groups, inputs, outputs, weight, out)

    return {"linear": linear, "grouped_linear": grouped_linear}


def dequantizer(kernels: Kernels) -> Callable[[Weight], Tensor]:
    """Weight -> f32 [O, K] by the decoders that linear uses."""
    run = kernels.bind("dequantize", PTR, PTR, I64, I64, I64, PTR)

    def dequantize(weight: Weight) -> Tensor:
        check_weight("dequantize", "weight", weight, weight.shape[1])
        out = torch.empty(weight.shape, dtype=torch.float32)
        run(
            weight.data.data_ptr(),
            pointer(weight.scale),
            FORMAT_CODES[weight.format],
            *weight.shape,
            out.data_ptr(),
        )
        return out

    return dequantize


def _expert_pointers(bank: ExpertBank, active: list[int], width: int, hidden: int) -> tuple[Tensor, int]:
    """Addresses [A, 6] of data and scale of w1, w3, w2 of the active experts, and the format they share."""
    form = bank.w1[active[0]].format
    addresses = []
    for e in active:
        row = []
        for name, weight, inputs in (
            ("w1", bank.w1[e], width),
            ("w3", bank.w3[e], width),
            ("w2", bank.w2[e], hidden),
        ):
            check_weight("experts", f"{name}[{e}]", weight, inputs)
            if weight.format != form:
                raise ValueError(f"experts: {name}[{e}] is {weight.format}, but w1[{active[0]}] is {form}")
            row += [weight.data.data_ptr(), pointer(weight.scale)]
        addresses.append(row)
    return torch.tensor(addresses, dtype=torch.int64), FORMAT_CODES[form]


def _expert_ops(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    run_swiglu = kernels.bind("swiglu", PTR, PTR, PTR, PTR, I64, I64, I64, F32)
    run_experts = kernels.bind(
        "experts", PTR, I64, I64, I64, I64, I64, PTR, PTR, I64, PTR, I64, F32, I64, PTR
    )

    def swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None) -> Tensor:
        check("swiglu", "gate", gate, (None, None), *ACT_DTYPES)
        check("swiglu", "up", up, tuple(gate.shape), gate.dtype)
        if weight is not None:
            check("swiglu", "weight", weight, (gate.shape[0],), torch.float32)
        out = torch.empty_like(gate)
        run_swiglu(
            gate.data_ptr(),
            up.data_ptr(),
            pointer(weight),
            out.data_ptr(),
            dtype_code(gate.dtype),
            *gate.shape,
            limit,
        )
        return out

    def experts(
        x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertBank, *, limit: float, quantize: bool
    ) -> Tensor:
        check("experts", "x", x, (None, None), *ACT_DTYPES)
        num_tokens, width = x.shape
        check("experts", "ids", ids, (num_tokens, None), torch.int32)
        slots = ids.shape[1]
        check("experts", "weights", weights, (num_tokens, slots), torch.float32)
        if ids.numel() == 0:
            return torch.zeros(num_tokens, width)
        unique, segment = torch.unique(ids, return_inverse=True)
        active = unique.tolist()
        if active[0] < 0 or active[-1] >= len(bank.w1):
            raise ValueError(f"experts: ids must lie in 0..{len(bank.w1) - 1}, not {active[0]}..{active[-1]}")
        hidden = bank.w1[active[0]].shape[0]
        addresses, form = _expert_pointers(bank, active, width, hidden)
        segment = segment.int()
        out = torch.empty(num_tokens, width)
        run_experts(
            x.data_ptr(), dtype_code(x.dtype), num_tokens, slots, width, hidden, segment.data_ptr(),
            weights.data_ptr(), len(active), addresses.data_ptr(), form, limit, int(quantize), out.data_ptr(),
        )  # fmt: skip
        return out

    return {"swiglu": swiglu, "experts": experts}


def _router_ops(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    run_topk = kernels.bind("route_topk", PTR, PTR, I64, I64, I64, F32, PTR, PTR)
    run_hash = kernels.bind("route_hash", PTR, PTR, PTR, I64, I64, I64, I64, F32, PTR, PTR)

    def route_topk(logits: Tensor, bias: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
        check("route_topk", "logits", logits, (None, None), torch.float32)
        num_tokens, num_experts = logits.shape
        if bias is not None:
            check("route_topk", "bias", bias, (num_experts,), torch.float32)
        if not 1 <= k <= num_experts:
            raise ValueError(f"route_topk: k must lie in 1..{num_experts}, not {k}")
        ids = torch.empty(num_tokens, k, dtype=torch.int32)
        weights = torch.empty(num_tokens, k)
        run_topk(
            logits.data_ptr(),
            pointer(bias),
            num_tokens,
            num_experts,
            k,
            scale,
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return ids, weights

    def route_hash(logits: Tensor, token_ids: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        check("route_hash", "logits", logits, (None, None), torch.float32)
        num_tokens, num_experts = logits.shape
        check("route_hash", "token_ids", token_ids, (num_tokens,), torch.int64)
        check("route_hash", "table", table, (None, None), torch.int64)
        vocab, k = table.shape
        ids = torch.empty(num_tokens, k, dtype=torch.int32)
        weights = torch.empty(num_tokens, k)
        run_hash(
            logits.data_ptr(), token_ids.data_ptr(), table.data_ptr(), vocab, num_tokens, num_experts,
            k, scale, ids.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        return ids, weights

    return {"route_topk": route_topk, "route_hash": route_hash}


def matrix_ops(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    """The ops of this file, by name."""
    return {**_product_ops(kernels), **_expert_ops(kernels), **_router_ops(kernels)}
