"""Binds the backward kernels of embed, rms_norm and the hyper-connections."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from bittrue.ops.cpu.library import F32, I64, PTR, Kernels, check, pointer
from bittrue.ops.cpu.vector import MAX_STREAMS

Op = Callable[..., Any]

EMBED: Final = "embed backward"
NORM: Final = "rms_norm backward"
PRE: Final = "hc_pre backward"
POST: Final = "hc_post backward"
HEAD: Final = "hc_head backward"


def vector_gradients(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    """The backward ops of this file by name. Raises BackendUnavailable when the library lacks one."""
    return {
        "embed": _embed(kernels),
        "rms_norm": _rms_norm(kernels),
        "hc_pre": _hc_pre(kernels),
        "hc_post": _hc_post(kernels),
        "hc_head": _hc_head(kernels),
    }


def _check(op: str, name: str, tensor: Tensor, *shape: int) -> None:
    check(op, name, tensor, shape, torch.float32)


def _check_streams(op: str, name: str, streams: Tensor) -> tuple[int, int, int]:
    check(op, name, streams, (None, None, None), torch.float32)
    tokens, m, dim = streams.shape
    if not 1 <= m <= MAX_STREAMS:
        raise ValueError(f"{op}: 1 to {MAX_STREAMS} streams, not {m}")
    return tokens, m, dim


def _embed(kernels: Kernels) -> Op:
    kernel = kernels.bind("embed_backward", PTR, PTR, PTR, I64, I64, I64, I64)

    def embed(d_out: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
        tokens, m, dim = _check_streams(EMBED, "d_out", d_out)
        check(EMBED, "token_ids", token_ids, (tokens,), torch.int64)
        d_table = torch.zeros(vocab_size, dim)
        kernel(d_out.data_ptr(), token_ids.data_ptr(), d_table.data_ptr(), vocab_size, tokens, m, dim)
        return d_table

    return embed


def _rms_norm(kernels: Kernels) -> Op:
    kernel = kernels.bind("rms_norm_backward", PTR, PTR, PTR, PTR, PTR, I64, I64, F32)

    def rms_norm(d_out: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
        check(NORM, "x", x, None, torch.float32)
        if x.dim() == 0:
            raise ValueError(f"{NORM}: x must have at least one axis")
        _check(NORM, "d_out", d_out, *x.shape)
        if weight is not None:
            _check(NORM, "weight", weight, x.shape[-1])
        d_x, d_weight = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
        kernel(
            d_out.data_ptr(), x.data_ptr(), pointer(weight), d_x.data_ptr(), pointer(d_weight),
            x.shape[:-1].numel(), x.shape[-1], eps,
        )  # fmt: skip
        return d_x, d_weight

    return rms_norm


def _hc_pre(kernels: Kernels) -> Op:
    kernel = kernels.bind("hc_pre_backward", *[PTR] * 13, I64, I64, I64, I64, F32, F32)

    def hc_pre(
        d_x: Tensor,
        d_post: Tensor,
        d_comb: Tensor,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm: Tensor,
        *,
        iters: int,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        tokens, m, dim = _check_streams(PRE, "streams", streams)
        _check(PRE, "d_x", d_x, tokens, dim)
        _check(PRE, "d_post", d_post, tokens, m)
        _check(PRE, "d_comb", d_comb, tokens, m, m)
        _check_mixing(PRE, fn, base, scale, norm, ((2 + m) * m, m, dim))
        d_streams, d_fn, d_base, d_scale, d_norm = map(torch.empty_like, (streams, fn, base, scale, norm))
        kernel(
            d_x.data_ptr(), d_post.data_ptr(), d_comb.data_ptr(), streams.data_ptr(), fn.data_ptr(),
            base.data_ptr(), scale.data_ptr(), norm.data_ptr(), d_streams.data_ptr(), d_fn.data_ptr(),
            d_base.data_ptr(), d_scale.data_ptr(), d_norm.data_ptr(), tokens, m, dim, iters, eps, norm_eps,
        )  # fmt: skip
        return d_streams, d_fn, d_base, d_scale, d_norm

    return hc_pre


def _hc_post(kernels: Kernels) -> Op:
    kernel = kernels.bind("hc_post_backward", *[PTR] * 9, I64, I64, I64)

    def hc_post(
        d_out: Tensor, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, m, dim = _check_streams(POST, "streams", streams)
        _check(POST, "d_out", d_out, tokens, m, dim)
        _check(POST, "y", y, tokens, dim)
        _check(POST, "post", post, tokens, m)
        _check(POST, "comb", comb, tokens, m, m)
        d_y, d_streams, d_post, d_comb = map(torch.empty_like, (y, streams, post, comb))
        kernel(
            d_out.data_ptr(), y.data_ptr(), streams.data_ptr(), post.data_ptr(), comb.data_ptr(),
            d_y.data_ptr(), d_streams.data_ptr(), d_post.data_ptr(), d_comb.data_ptr(), tokens, m, dim,
        )  # fmt: skip
        return d_y, d_streams, d_post, d_comb

    return hc_post


def _hc_head(kernels: Kernels) -> Op:
    kernel = kernels.bind("hc_head_backward", *[PTR] * 11, I64, I64, I64, F32, F32)

    def hc_head(
        d_out: Tensor,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm: Tensor,
        *,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        tokens, m, dim = _check_streams(HEAD, "streams", streams)
        _check(HEAD, "d_out", d_out, tokens, dim)
        _check_mixing(HEAD, fn, base, scale, norm, (m, m, dim))
        d_streams, d_fn, d_base, d_scale, d_norm = map(torch.empty_like, (streams, fn, base, scale, norm))
        kernel(
            d_out.data_ptr(), streams.data_ptr(), fn.data_ptr(), base.data_ptr(), scale.data_ptr(),
            norm.data_ptr(), d_streams.data_ptr(), d_fn.data_ptr(), d_base.data_ptr(), d_scale.data_ptr(),
            d_norm.data_ptr(), tokens, m, dim, eps, norm_eps,
        )  # fmt: skip
        return d_streams, d_fn, d_base, d_scale, d_norm

    return hc_head


def _check_mixing(
    op: str, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, sizes: tuple[int, int, int]
) -> None:
    """``sizes``: outputs of fn, streams, features of a stream."""
    outputs, m, dim = sizes
    _check(op, "fn", fn, outputs, m * dim)
    _check(op, "base", base, outputs)
    _check(op, "scale", scale, 1 if outputs == m else 3)
    _check(op, "norm", norm, dim)
