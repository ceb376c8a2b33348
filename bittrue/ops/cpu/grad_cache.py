"""Binds the backward kernels of attention and the index scores."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, Batch
from bittrue.ops.cpu.library import I64, PTR, Kernels, check, pointer

Op = Callable[..., Any]
LANES = 16  # kernels take features in whole vectors


class AttentionGradArgs(ctypes.Structure):
    """AttentionGrad of csrc/grad_attention.cpp."""

    _fields_ = (
        *((name, PTR) for name in ("d_out", "q", "rows", "entries", "sink", "ids", "offsets")),
        *((name, I64) for name in ("num_sequences", "heads", "c", "k", "window", "ratio")),
        *((name, PTR) for name in ("d_q", "d_rows", "d_entries", "d_sink", "mass", "is_bad")),
        ("scale", ctypes.c_double),
    )


class IndexGradArgs(ctypes.Structure):
    """IndexGrad of csrc/grad_index.cpp."""

    _fields_ = (
        *((name, PTR) for name in ("q", "weights", "keys", "d_scores", "ids", "offsets")),
        *((name, I64) for name in ("num_sequences", "heads", "c", "k", "ratio")),
        *((name, PTR) for name in ("scores", "d_q", "d_weights", "d_keys", "is_bad")),
    )


def cache_gradients(kernels: Kernels) -> dict[str, Op]:
    """The backward ops of this file by name."""
    return {
        "attention": _attention(kernels),
        "index_scores": _index_scores(kernels),
        "index_scores_backward": _index_scores_backward(kernels),
    }


def _whole(x: Tensor) -> Tensor:
    """x with zeros after its features, to whole vectors."""
    missing = -x.shape[-1] % LANES
    return pad(x, (0, missing)) if missing else x


def _cut(x: Tensor, width: int) -> Tensor:
    return x[..., :width].contiguous()


def _check_batch(op: str, batch: Batch, num_tokens: int) -> None:
    check(op, "offsets", batch.offsets, (batch.num_sequences + 1,), torch.int32)
    if batch.num_tokens != num_tokens or int(batch.offsets[-1]) != num_tokens or bool(batch.starts.any()):
        raise ValueError(f"{op}: the batch must hold whole documents of {num_tokens} tokens in all")


def _check_entries(op: str, batch: Batch, num: int, ratio: int) -> None:
    wanted = int(((batch.offsets[1:] - batch.offsets[:-1]) // ratio).sum())
    if num != wanted:
        raise ValueError(f"{op}: the documents of this batch have {wanted} entries, not {num}")


def _refuse_bad(op: str, is_bad: ctypes.c_int64) -> None:
    if is_bad.value:
        raise ValueError(f"{op}: an id names no entry of its sequence")


def _attention(kernels: Kernels) -> Op:
    kernel = kernels.bind("attention_backward", PTR)

    def attention(
        d_out: Tensor,
        q: Tensor,
        rows: Tensor,
        entries: Tensor | None,
        ids: Tensor | None,
        sink: Tensor,
        batch: Batch,
        *,
        window: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        num_tokens, heads, c = q.shape
        ratio = HCA_RATIO if ids is None else CSA_RATIO
        check("attention", "q", q, (num_tokens, heads, c), torch.float32)
        check("attention", "d_out", d_out, (num_tokens, heads, c), torch.float32)
        check("attention", "rows", rows, (num_tokens, c), torch.float32)
        check("attention", "sink", sink, (heads,), torch.float32)
        _check_batch("attention", batch, num_tokens)
        if entries is not None:
            check("attention", "entries", entries, (None, c), torch.float32)
            _check_entries("attention", batch, entries.shape[0], ratio)
        if ids is not None:
            check("attention", "ids", ids, (num_tokens, None), torch.int32)
        if window < 1:
            raise ValueError(f"attention: a window of {window} rows")
        d_out, q, rows = _whole(d_out), _whole(q), _whole(rows)
        entries = None if entries is None else _whole(entries)
        d_q, d_rows, d_sink = torch.empty_like(q), torch.empty_like(rows), torch.empty_like(sink)
        d_entries = None if entries is None else torch.empty_like(entries)
        mass = None if ids is None else torch.empty(ids.shape)
        is_bad = ctypes.c_int64(0)
        args = AttentionGradArgs(
            d_out.data_ptr(), q.data_ptr(), rows.data_ptr(), pointer(entries), sink.data_ptr(),
            pointer(ids), batch.offsets.data_ptr(), batch.num_sequences, heads, q.shape[2],
            0 if ids is None else ids.shape[1], window, ratio, d_q.data_ptr(), d_rows.data_ptr(),
            pointer(d_entries), d_sink.data_ptr(), pointer(mass), ctypes.addressof(is_bad), scale,
        )  # fmt: skip
        kernel(ctypes.byref(args))
        _refuse_bad("attention", is_bad)
        return _cut(d_q, c), _cut(d_rows, c), None if d_entries is None else _cut(d_entries, c), d_sink, mass

    return attention


def _checked_index(op: str, q: Tensor, head_weights: Tensor, keys: Tensor, ids: Tensor, batch: Batch) -> None:
    num_tokens, heads, c = q.shape
    check(op, "q", q, (num_tokens, heads, c), torch.float32)
    check(op, "head_weights", head_weights, (num_tokens, heads), torch.float32)
    check(op, "keys", keys, (None, c), torch.float32)
    check(op, "ids", ids, (num_tokens, None), torch.int32)
    _check_batch(op, batch, num_tokens)
    _check_entries(op, batch, keys.shape[0], CSA_RATIO)


def _index_scores(kernels: Kernels) -> Op:
    kernel = kernels.bind("index_scores", PTR)

    def index_scores(q: Tensor, head_weights: Tensor, keys: Tensor, ids: Tensor, batch: Batch) -> Tensor:
        _checked_index("index_scores", q, head_weights, keys, ids, batch)
        q, keys, scores, is_bad = _whole(q), _whole(keys), torch.empty(ids.shape), ctypes.c_int64(0)
        args = IndexGradArgs(
            q.data_ptr(), head_weights.data_ptr(), keys.data_ptr(), 0, ids.data_ptr(),
            batch.offsets.data_ptr(), batch.num_sequences, q.shape[1], q.shape[2], ids.shape[1], CSA_RATIO,
            scores.data_ptr(), 0, 0, 0, ctypes.addressof(is_bad),
        )  # fmt: skip
        kernel(ctypes.byref(args))
        _refuse_bad("index_scores", is_bad)
        return scores

    return index_scores


def _index_scores_backward(kernels: Kernels) -> Op:
    kernel = kernels.bind("index_scores", PTR)

    def index_scores_backward(
        d_scores: Tensor, q: Tensor, head_weights: Tensor, keys: Tensor, ids: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        _checked_index("index_scores_backward", q, head_weights, keys, ids, batch)
        check("index_scores_backward", "d_scores", d_scores, tuple(ids.shape), torch.float32)
        c = q.shape[2]
        q, keys, is_bad = _whole(q), _whole(keys), ctypes.c_int64(0)
        d_q, d_keys, d_weights = torch.empty_like(q), torch.empty_like(keys), torch.empty_like(head_weights)
        if ids.numel() == 0:
            return _cut(d_q.zero_(), c), d_weights.zero_(), _cut(d_keys.zero_(), c)
        args = IndexGradArgs(
            q.data_ptr(), head_weights.data_ptr(), keys.data_ptr(), d_scores.data_ptr(), ids.data_ptr(),
            batch.offsets.data_ptr(), batch.num_sequences, q.shape[1], q.shape[2], ids.shape[1], CSA_RATIO,
            0, d_q.data_ptr(), d_weights.data_ptr(), d_keys.data_ptr(), ctypes.addressof(is_bad),
        )  # fmt: skip
        kernel(ctypes.byref(args))
        _refuse_bad("index_scores_backward", is_bad)
        return _cut(d_q, c), d_weights, _cut(d_keys, c)

    return index_scores_backward
