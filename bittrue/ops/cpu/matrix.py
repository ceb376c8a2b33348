"""Binds the matrix kernels: linear, linears, grouped_linear, experts and the routers."""

import ctypes
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


def _stored(weight: Weight) -> tuple[int, int, int]:
    """What a kernel knows of a matrix: the addresses of data and scale, and the format."""
    return weight.data.data_ptr(), pointer(weight.scale), FORMAT_CODES[weight.format]


def _product_ops(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    run = kernels.bind("linear", PTR, I64, I64, I64, I64, I64, PTR, PTR, I64, I64, PTR, I64)
    run_many = kernels.bind("linears", PTR, I64, I64, I64, PTR, I64)

    def linear(
        x: Tensor, weight: Weight, *, quantize: bool = False, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        check("linear", "x", x, (None, None), *ACT_DTYPES)
        num_tokens, inputs = x.shape
        check_weight("linear", "weight", weight, inputs)
        outputs = weight.shape[0]
        out = torch.empty(num_tokens, outputs, dtype=out_dtype or x.dtype)
        run(
            x.data_ptr(), dtype_code(x.dtype), num_tokens, 1, inputs, outputs, *_stored(weight),
            quantize, out.data_ptr(), dtype_code(out.dtype),
        )  # fmt: skip
        return out

    def linears(
        x: Tensor,
        weights: tuple[Weight, ...],
        *,
        quantize: tuple[bool, ...],
        out_dtypes: tuple[torch.dtype | None, ...],
    ) -> tuple[Tensor, ...]:
        check("linears", "x", x, (None, None), *ACT_DTYPES)
        num_tokens, inputs = x.shape
        results, records = [], []  # records: struct Product of csrc/linear.cpp
        for i, (weight, is_quantized, dtype) in enumerate(zip(weights, quantize, out_dtypes, strict=True)):
            check_weight("linears", f"weights[{i}]", weight, inputs)
            outputs = weight.shape[0]
            out = torch.empty(num_tokens, outputs, dtype=dtype or x.dtype)
            records += [*_stored(weight), outputs, is_quantized, out.data_ptr(), dtype_code(out.dtype)]
            results.append(out)
        products = (I64 * len(records))(*records)
        run_many(x.data_ptr(), dtype_code(x.dtype), num_tokens, inputs, ctypes.byref(products), len(weights))
        return tuple(results)

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
        code = dtype_code(x.dtype)
        run(
            x.data_ptr(), code, num_tokens, groups, inputs, outputs, *_stored(weight),
            False, out.data_ptr(), code,
        )  # fmt: skip
        return out

    return {"linear": linear, "linears": linears, "grouped_linear": grouped_linear}


def dequantizer(kernels: Kernels) -> Callable[[Weight], Tensor]:
    """Weight -> f32 [O, K] by the decoders that linear uses."""
    run = kernels.bind("dequantize", PTR, PTR, I64, I64, I64, PTR)

    def dequantize(weight: Weight) -> Tensor:
        check_weight("dequantize", "weight", weight, weight.shape[1])
        out = torch.empty(weight.shape, dtype=torch.float32)
        run(*_stored(weight), *weight.shape, out.data_ptr())
        return out

    return dequantize


def _expert_records(bank: ExpertBank) -> ctypes.Array[ctypes.c_int64]:
    """The checked matrices of a bank, nine words an expert (struct Expert of csrc/experts.cpp), the shared
    one last."""
    if not len(bank.w1) == len(bank.w3) == len(bank.w2) > 0:
        counts = f"{len(bank.w1)}, {len(bank.w3)}, {len(bank.w2)}"
        raise ValueError(f"experts: w1, w3 and w2 must be of the same experts, not {counts}")
    hidden, width = bank.w1[0].shape
    experts = [
        (f"[{e}]", hidden, group) for e, group in enumerate(zip(bank.w1, bank.w3, bank.w2, strict=True))
    ]
    if bank.shared is not None:
        experts.append((" of the shared expert", bank.shared[0].shape[0], bank.shared))
    records: list[int] = []
    for which, size, (w1, w3, w2) in experts:
        for name, weight, rows, cols in (
            ("w1", w1, size, width),
            ("w3", w3, size, width),
            ("w2", w2, width, size),
        ):
            check_weight("experts", name + which, weight, cols)
            if weight.shape[0] != rows:
                raise ValueError(f"experts: {name}{which} must have {rows} rows, not {weight.shape[0]}")
            records += _stored(weight)
    packed: ctypes.Array[ctypes.c_int64] = (I64 * len(records))(*records)
    return packed


def _expert_ops(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    run = kernels.bind("experts", PTR, I64, I64, I64, I64, I64, I64, I64, PTR, PTR, PTR, F32, I64, PTR, PTR)
    fault = (I64 * 2)()  # (1, the id) once a call met an id that is no expert's

    def experts(
        x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertBank, *, limit: float, quantize: bool
    ) -> Tensor:
        records = bank.derived.get("cpu")
        if records is None:
            records = bank.derived["cpu"] = _expert_records(bank)
        hidden, width = bank.w1[0].shape
        check("experts", "x", x, (None, width), *ACT_DTYPES)
        num_tokens = x.shape[0]
        check("experts", "ids", ids, (num_tokens, None), torch.int32)
        slots = ids.shape[1]
        check("experts", "weights", weights, (num_tokens, slots), torch.float32)
        shared_hidden = 0 if bank.shared is None else bank.shared[0].shape[0]
        out = torch.empty(num_tokens, width, dtype=x.dtype)
        run(
            x.data_ptr(), dtype_code(x.dtype), num_tokens, slots, width, hidden, shared_hidden, len(bank.w1),
            ids.data_ptr(), weights.data_ptr(), ctypes.byref(records), limit, quantize, out.data_ptr(),
            ctypes.byref(fault),
        )  # fmt: skip
        if fault[0]:
            wrong_id, fault[0] = fault[1], 0
            raise ValueError(f"experts: ids must lie in 0..{len(bank.w1) - 1}, not {wrong_id}")
        return out

    return {"experts": experts}


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
