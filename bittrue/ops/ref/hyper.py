"""Reference of the residual streams: from the embedding, into a sub-layer, out of it, and at the head."""

import torch
from torch import Tensor

from bittrue.ops.ref.norm import inverse_rms, rms_norm, row_sum


def embed(token_ids: Tensor, table: Tensor, streams: int, act: torch.dtype) -> Tensor:
    is_known = (token_ids >= 0) & (token_ids < table.shape[0])
    rows = table[torch.where(is_known, token_ids, 0)].to(act)
    rows = torch.where(is_known[:, None], rows, torch.nan)
    return rows[:, None, :].repeat(1, streams, 1)


def _exp(x: Tensor) -> Tensor:
    """exp correctly rounded to f32: torch's own f32 exp gives other bits at the end of a buffer."""
    return torch.exp(x.double()).float()


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + _exp(-x))


def _mixes(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """(streams [T, M, D] act, fn [O, M * D] f32) -> [T, O] f32: fn . v / rms(v), v stream-major."""
    v = streams.flatten(1).float()
    products = torch.stack([row_sum(v * row) for row in fn], dim=-1)
    return products * inverse_rms(v, norm_eps)


def _sum_ascending(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim``, first to last, the axis kept."""
    total = x.narrow(dim, 0, 1)
    for i in range(1, x.shape[dim]):
        total = total + x.narrow(dim, i, 1)
    return total


def _sinkhorn(c: Tensor, iters: int, eps: float) -> Tensor:
    """[T, M, M] f32 -> nearly doubly stochastic; the last step normalises the columns."""
    c = _exp(c - c.amax(-1, keepdim=True))
    c = c / _sum_ascending(c, -1) + eps
    c = c / (_sum_ascending(c, -2) + eps)
    for _ in range(iters - 1):
        c = c / (_sum_ascending(c, -1) + eps)
        c = c / (_sum_ascending(c, -2) + eps)
    return c


def _mix_streams(factors: Tensor, streams: Tensor) -> Tensor:
    """(factors [T, M] f32, streams [T, M, D] act) -> [T, D] f32: sum of factor * stream, ascending."""
    return _sum_ascending(factors[:, :, None] * streams.float(), 1)[:, 0]


def hc_pre(
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
    m = streams.shape[1]
    mixes = _mixes(streams, fn, norm_eps)
    pre = _sigmoid(mixes[:, :m] * scale[0] + base[:m]) + eps
    post = 2.0 * _sigmoid(mixes[:, m : 2 * m] * scale[1] + base[m : 2 * m])
    comb = torch.unflatten(mixes[:, 2 * m :] * scale[2] + base[2 * m :], -1, (m, m))
    x = _mix_streams(pre, streams).to(streams.dtype)
    return rms_norm(x, norm, norm_eps), post, _sinkhorn(comb, iters, eps)


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    total = post[:, :, None] * y.float()[:, None, :]
    for j in range(streams.shape[1]):
        total = total + comb[:, j, :, None] * streams[:, j, None, :].float()
    return total.to(streams.dtype)


def hc_head(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    factors = _sigmoid(_mixes(streams, fn, norm_eps) * scale[0] + base) + eps
    return rms_norm(_mix_streams(factors, streams).to(streams.dtype), norm, norm_eps)
