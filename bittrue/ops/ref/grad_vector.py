"""Reference derivatives of embed, rms_norm and the hyper-connections."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bittrue.ops.ref.vjp import vjp


def smooth_embed(table: Tensor, token_ids: Tensor, streams: int) -> Tensor:
    """(table [V, D], token_ids [T] i64, M) -> [T, M, D]; the row of an id outside the table is zero."""
    is_known = (token_ids >= 0) & (token_ids < table.shape[0])
    rows = table[torch.where(is_known, token_ids, 0)] * is_known[:, None]
    return rows[:, None, :].expand(-1, streams, -1)


def smooth_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """(x [..., D], weight [D] or None) -> [..., D]."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def smooth_sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[T, M, M] -> nearly doubly stochastic, as hc_pre makes comb of its logits."""
    c = logits.softmax(-1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


def smooth_hc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    *,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """hc_pre of the contract: x [T, D], post [T, M], comb [T, M, M]."""
    m = streams.shape[1]
    mixes = smooth_rms_norm(streams.flatten(1), None, norm_eps) @ fn.T
    pre = torch.sigmoid(mixes[:, :m] * scale[0] + base[:m]) + eps
    post = 2.0 * torch.sigmoid(mixes[:, m : 2 * m] * scale[1] + base[m : 2 * m])
    logits = torch.unflatten(mixes[:, 2 * m :] * scale[2] + base[2 * m :], -1, (m, m))
    x = smooth_rms_norm((pre[:, :, None] * streams).sum(1), norm, norm_eps)
    return x, post, smooth_sinkhorn(logits, iters, eps)


def smooth_hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """hc_post of the contract: [T, M, D]."""
    return post[:, :, None] * y[:, None, :] + comb.transpose(1, 2) @ streams


def smooth_hc_head(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """hc_head of the contract: [T, D]."""
    mixes = smooth_rms_norm(streams.flatten(1), None, norm_eps) @ fn.T
    factors = torch.sigmoid(mixes * scale[0] + base) + eps
    return smooth_rms_norm((factors[:, :, None] * streams).sum(1), norm, norm_eps)


def embed(d_out: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    table = d_out.new_zeros(vocab_size, d_out.shape[2])
    (d_table,) = vjp(lambda t: smooth_embed(t, token_ids, d_out.shape[1]), (table,), (d_out,))
    return d_table


def rms_norm(d_out: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    if weight is None:
        (d_x,) = vjp(lambda x: smooth_rms_norm(x, None, eps), (x,), (d_out,))
        return d_x, None
    d_x, d_weight = vjp(lambda x, w: smooth_rms_norm(x, w, eps), (x, weight), (d_out,))
    return d_x, d_weight


def hc_pre(
    d_x: Tensor,
    d_post: Tensor,
    d_comb: Tensor,
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    **options: Any,
) -> tuple[Tensor, ...]:
    return vjp(
        lambda *inputs: smooth_hc_pre(*inputs, **options),
        (streams, fn, base, scale, norm),
        (d_x, d_post, d_comb),
    )


def hc_post(d_out: Tensor, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> tuple[Tensor, ...]:
    return vjp(smooth_hc_post, (y, streams, post, comb), (d_out,))


def hc_head(
    d_out: Tensor, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    return vjp(lambda *inputs: smooth_hc_head(*inputs, **options), (streams, fn, base, scale, norm), (d_out,))


def vector_gradients() -> dict[str, Callable[..., Any]]:
    """The backward ops of this file by name."""
    return {
        "embed": embed,
        "rms_norm": rms_norm,
        "hc_pre": hc_pre,
        "hc_post": hc_post,
        "hc_head": hc_head,
    }
