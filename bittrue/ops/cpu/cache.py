"""Binds the CPU kernels that read or write the cache: window, compressors, index top-k, attention."""

import ctypes
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, Batch, CompressorWeights, LayerCache
from bittrue.ops.cpu.library import ACT_DTYPES, I64, PTR, Kernels, check, dtype_code, pointer
from bittrue.ops.cpu.vector import ROW_KINDS

Op = Callable[..., Any]


class StepArgs(ctypes.Structure):
    """Step of csrc/step.h."""

    _fields_ = (
        ("num_tokens", I64),
        ("num_sequences", I64),
        ("table_width", I64),
        ("positions", PTR),
        ("seq_ids", PTR),
        ("offsets", PTR),
        ("starts", PTR),
        ("folds", PTR),
        ("slots", PTR),
        ("page_table", PTR),
        ("kept", PTR),
    )


class RowArgs(ctypes.Structure):
    """RowSpec of csrc/rowops.h."""

    _fields_ = (("kind", I64), ("dim", I64), ("rope_dim", I64))


class FinishArgs(ctypes.Structure):
    """Finish of csrc/compress.cpp."""

    _fields_ = (
        ("ape", PTR),
        ("norm", PTR),
        ("norm_dtype", I64),
        ("inv_freq", PTR),
        ("rope_dim", I64),
        ("act_dtype", I64),
        ("hadamard", I64),
        ("row", RowArgs),
        ("eps", ctypes.c_double),
    )


class IndexArgs(ctypes.Structure):
    """Index of csrc/index.cpp."""

    _fields_ = (
        ("q", PTR),
        ("act", I64),
        ("head_weights", PTR),
        ("cos", PTR),
        ("sin", PTR),
        ("rope_dim", I64),
        ("num_heads", I64),
        ("keys", PTR),
        ("per_page", I64),
        ("row", RowArgs),
        ("k", I64),
        ("ids", PTR),
        ("weight_scale", ctypes.c_double),
    )


class AttentionArgs(ctypes.Structure):
    """Attention of csrc/attention.cpp."""

    _fields_ = (
        ("q", PTR),
        ("act", I64),
        ("out", PTR),
        ("cos", PTR),
        ("sin", PTR),
        ("rope_dim", I64),
        ("num_heads", I64),
        ("row", RowArgs),
        ("step_rows", PTR),
        ("window_rows", PTR),
        ("ring", I64),
        ("window", I64),
        ("pages", PTR),
        ("per_page", I64),
        ("ids", PTR),
        ("num_ids", I64),
        ("sink", PTR),
        ("scale", ctypes.c_double),
        ("norm_eps", ctypes.c_double),
        ("round_probs", I64),
    )


def cache_ops(kernels: Kernels) -> dict[str, Op]:
    """The cache ops by name. Raises BackendUnavailable when the library lacks one."""
    return {
        "store_window": _store_window(kernels),
        "csa_compress": _csa_compress(kernels),
        "hca_compress": _hca_compress(kernels),
        "index_topk": _index_topk(kernels),
        "attention": _attention(kernels),
    }


def _step_args(op: str, batch: Batch) -> StepArgs:
    """The native form of a batch, made once: every op of a step is given the same."""
    made = batch.memo.get("cpu")
    if made is None:
        made = batch.memo["cpu"] = _make_step_args(op, batch)
    return cast(StepArgs, made)


def _make_step_args(op: str, batch: Batch) -> StepArgs:
    num_tokens, num_sequences = batch.num_tokens, batch.num_sequences
    check(op, "positions", batch.positions, (num_tokens,), torch.int32)
    check(op, "seq_ids", batch.seq_ids, (num_tokens,), torch.int32)
    check(op, "offsets", batch.offsets, (num_sequences + 1,), torch.int32)
    check(op, "starts", batch.starts, (num_sequences,), torch.int32)
    check(op, "folds", batch.folds, (num_sequences,), torch.int32)
    check(op, "slots", batch.slots, (num_sequences,), torch.int32)
    check(op, "page_table", batch.page_table, (num_sequences, None), torch.int32)
    check(op, "kept", batch.kept, (num_sequences,), torch.int32)
    return StepArgs(
        num_tokens,
        num_sequences,
        batch.page_table.shape[1],
        batch.positions.data_ptr(),
        batch.seq_ids.data_ptr(),
        batch.offsets.data_ptr(),
        batch.starts.data_ptr(),
        batch.folds.data_ptr(),
        batch.slots.data_ptr(),
        batch.page_table.data_ptr(),
        batch.kept.data_ptr(),
    )


def _row_args(fmt: RowFormat) -> RowArgs:
    return RowArgs(ROW_KINDS[fmt.kind], fmt.dim, fmt.rope_dim)


def _finish_args(
    op: str,
    weights: CompressorWeights,
    ratio: int,
    width: int,
    fmt: RowFormat,
    act: torch.dtype,
    hadamard: bool,
) -> FinishArgs:
    check(op, "ape", weights.ape, (ratio, width), torch.float32)
    check(op, "norm", weights.norm, (fmt.dim,), *ACT_DTYPES)
    check(op, "inv_freq", weights.inv_freq, (weights.rope_dim // 2,), torch.float32)
    if hadamard and fmt.dim.bit_count() != 1:
        raise ValueError(f"{op}: a Hadamard transform needs a power of two, not {fmt.dim} features")
    return FinishArgs(
        weights.ape.data_ptr(),
        weights.norm.data_ptr(),
        dtype_code(weights.norm.dtype),
        weights.inv_freq.data_ptr(),
        weights.rope_dim,
        dtype_code(act),
        int(hadamard),
        _row_args(fmt),
        weights.eps,
    )


def _store_window(kernels: Kernels) -> Op:
    kernel = kernels.bind("store_window", PTR, PTR, I64, PTR, I64)

    def store_window(rows: Tensor, batch: Batch, window: Tensor) -> None:
        step = _step_args("store_window", batch)
        check("store_window", "rows", rows, (batch.num_tokens, None), torch.uint8)
        check("store_window", "window", window, (None, None, rows.shape[1]), torch.uint8)
        kernel(ctypes.byref(step), rows.data_ptr(), rows.shape[1], window.data_ptr(), window.shape[1])

    return store_window


def _csa_compress(kernels: Kernels) -> Op:
    kernel = kernels.bind("csa_compress", PTR, PTR, PTR, PTR, PTR, I64, PTR, I64)

    def csa_compress(
        u: Tensor,
        gate: Tensor,
        weights: CompressorWeights,
        batch: Batch,
        state: Tensor,
        pages: Tensor,
        fmt: RowFormat,
        *,
        act: torch.dtype,
        hadamard: bool,
    ) -> None:
        width = 2 * fmt.dim
        step = _step_args("csa_compress", batch)
        finish = _finish_args("csa_compress", weights, CSA_RATIO, width, fmt, act, hadamard)
        check("csa_compress", "u", u, (batch.num_tokens, width), torch.float32)
        check("csa_compress", "gate", gate, (batch.num_tokens, width), torch.float32)
        check("csa_compress", "state", state, (None, None, 2, width), torch.float32)
        check("csa_compress", "pages", pages, (None, None, fmt.bytes), torch.uint8)
        kernel(
            ctypes.byref(step), ctypes.byref(finish), u.data_ptr(), gate.data_ptr(),
            state.data_ptr(), state.shape[1], pages.data_ptr(), pages.shape[1],
        )  # fmt: skip

    return csa_compress


def _hca_compress(kernels: Kernels) -> Op:
    kernel = kernels.bind("hca_compress", PTR, PTR, PTR, PTR, PTR, PTR, I64, PTR, I64)

    def hca_compress(
        u: Tensor,
        gate: Tensor,
        weights: CompressorWeights,
        batch: Batch,
        fold: Tensor,
        pending: Tensor,
        pages: Tensor,
        fmt: RowFormat,
        *,
        act: torch.dtype,
    ) -> None:
        c = fmt.dim
        step = _step_args("hca_compress", batch)
        finish = _finish_args("hca_compress", weights, HCA_RATIO, c, fmt, act, False)
        check("hca_compress", "u", u, (batch.num_tokens, c), torch.float32)
        check("hca_compress", "gate", gate, (batch.num_tokens, c), torch.float32)
        check("hca_compress", "fold", fold, (None, 3, c), torch.float32)
        check("hca_compress", "pending", pending, (fold.shape[0], None, 2, c), torch.float32)
        check("hca_compress", "pages", pages, (None, None, fmt.bytes), torch.uint8)
        kernel(
            ctypes.byref(step), ctypes.byref(finish), u.data_ptr(), gate.data_ptr(), fold.data_ptr(),
            pending.data_ptr(), pending.shape[1], pages.data_ptr(), pages.shape[1],
        )  # fmt: skip

    return hca_compress


def _check_angles(op: str, cos: Tensor, sin: Tensor, num_tokens: int, dim: int) -> int:
    """The width R of the rotary features."""
    check(op, "cos", cos, (num_tokens, None), torch.float32)
    check(op, "sin", sin, tuple(cos.shape), torch.float32)
    rope_dim = 2 * cos.shape[1]
    if rope_dim > dim:
        raise ValueError(f"{op}: {rope_dim} rotary features of {dim}")
    return rope_dim


def _index_topk(kernels: Kernels) -> Op:
    kernel = kernels.bind("index_topk", PTR, PTR)

    def index_topk(
        q: Tensor,
        head_weights: Tensor,
        batch: Batch,
        keys: Tensor,
        fmt: RowFormat,
        cos: Tensor,
        sin: Tensor,
        *,
        k: int,
        weight_scale: float,
    ) -> Tensor:
        step = _step_args("index_topk", batch)
        check("index_topk", "q", q, (batch.num_tokens, None, fmt.dim), *ACT_DTYPES)
        check("index_topk", "head_weights", head_weights, tuple(q.shape[:2]), torch.float32)
        check("index_topk", "keys", keys, (None, None, fmt.bytes), torch.uint8)
        rope_dim = _check_angles("index_topk", cos, sin, batch.num_tokens, fmt.dim)
        if k < 1:
            raise ValueError(f"index_topk: k must be at least 1, not {k}")
        if fmt.kind == "fp4" and fmt.dim.bit_count() != 1:
            raise ValueError(f"index_topk: a Hadamard transform needs a power of two, not {fmt.dim} features")
        ids = torch.empty(batch.num_tokens, k, dtype=torch.int32)
        args = IndexArgs(
            q.data_ptr(), dtype_code(q.dtype), head_weights.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), rope_dim, q.shape[1],
            keys.data_ptr(), keys.shape[1], _row_args(fmt), k, ids.data_ptr(), weight_scale,
        )  # fmt: skip
        kernel(ctypes.byref(step), ctypes.byref(args))
        return ids

    return index_topk


def _attention(kernels: Kernels) -> Op:
    kernel = kernels.bind("attention", PTR, PTR)

    def attention(
        q: Tensor,
        step_rows: Tensor,
        batch: Batch,
        cache: LayerCache,
        ids: Tensor | None,
        sink: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        window: int,
        scale: float,
        norm_eps: float,
        round_probs: bool,
    ) -> Tensor:
        fmt, rows = cache.row_format, cache.rows
        step = _step_args("attention", batch)
        check("attention", "q", q, (batch.num_tokens, None, fmt.dim), *ACT_DTYPES)
        check("attention", "step_rows", step_rows, (batch.num_tokens, fmt.bytes), torch.uint8)
        check("attention", "window", cache.window, (None, None, fmt.bytes), torch.uint8)
        check("attention", "sink", sink, (q.shape[1],), torch.float32)
        rope_dim = _check_angles("attention", cos, sin, batch.num_tokens, fmt.dim)
        if rows is not None:
            check("attention", "rows", rows, (None, None, fmt.bytes), torch.uint8)
        if ids is not None:
            check("attention", "ids", ids, (batch.num_tokens, None), torch.int32)
        if not 1 <= window <= cache.window.shape[1]:
            raise ValueError(f"attention: a window of {window} rows in a ring of {cache.window.shape[1]}")
        out = torch.empty_like(q)
        args = AttentionArgs(
            q.data_ptr(), dtype_code(q.dtype), out.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), rope_dim, q.shape[1], _row_args(fmt),
            step_rows.data_ptr(), cache.window.data_ptr(), cache.window.shape[1], window,
            pointer(rows), 1 if rows is None else rows.shape[1],
            pointer(ids), 0 if ids is None else ids.shape[1],
            sink.data_ptr(), scale, norm_eps, int(round_probs),
        )  # fmt: skip
        kernel(ctypes.byref(step), ctypes.byref(args))
        return out

    return attention
