"""The contract of every derivative: one typed attribute per backward op, and the forward pieces only a backward needs.

Conventions. Names and sizes as in contracts.py; every tensor is float32 and contiguous unless said otherwise (the reference
also takes float64 throughout). ``d_x`` is the gradient of the loss with respect to x. Roundings and quantisations of the forward
op are passed straight through: the derivative is that of the smooth function, taken at the values given. A step holds whole
documents: sequence s is rows ``offsets[s]:offsets[s+1]`` of the batch at positions 0, 1, .., and *entries* [N, c] are the
compressed rows of all of them, sequence after sequence, ``length // ratio`` each. Ids are those of entries within their own
sequence, -1 for none. Results never depend on the number of threads: sums over tokens run over blocks of fixed size, added in
order. T = 0 is accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from bittrue.ops.contracts import Batch


@dataclass(frozen=True, slots=True)
class BankValues:
    """The experts of one layer as plain values, or the gradients of the same: w1, w3 [E, I, D], w2 [E, D, I], and the shared
    expert's (w1, w3, w2) with a hidden size of its own."""

    w1: Tensor
    w3: Tensor
    w2: Tensor
    shared: tuple[Tensor, Tensor, Tensor] | None


@dataclass(frozen=True, slots=True)
class GradTable:
    """One implementation per backward op. Built once by ops.dispatch.select_gradients."""

    name: str

    embed: Callable[[Tensor, Tensor, int], Tensor]
    """(d_out [T, M, D], token_ids [T] i64, V) -> d_table [V, D]: the rows of each id added in token order, over all M."""

    rms_norm: Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor | None]]
    """(d_out [..., D], x [..., D], weight [D] or None, eps) -> d_x, d_weight (None without a weight)."""

    linear: Callable[..., tuple[Tensor | None, Tensor]]
    """(d_out [T, O], x [T, K], matrix [O, K], *, wants_x=True, add_to=None) -> d_x = d_out @ matrix, d_matrix = d_out^T @ x. With ``add_to`` [T, K] d_x is
    added to it in place, and it is returned; without ``wants_x`` d_x is None."""

    grouped_linear: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(d_out [T, G, O], x [T, G, K], matrix [G * O, K]) -> d_x [T, G, K], d_matrix [G * O, K]."""

    experts: Callable[..., tuple[Tensor, Tensor, BankValues]]
    """(d_out [T, D], x [T, D], ids [T, k] i32, weights [T, k], bank: BankValues, *, limit) -> d_x, d_weights [T, k], the bank's gradients.
    The derivative at a clamp is 1 inside and at the limit, 0 beyond. An expert nobody chose has gradient zero."""

    route: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """(d_weights [T, k], logits [T, E], ids [T, k] i32, scale) -> d_logits [T, E], of route_topk and route_hash alike: the choice is taken as it is."""

    hc_pre: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    """(d_x [T, D], d_post [T, M], d_comb [T, M, M], streams [T, M, D], fn, base, scale, norm [D], *, iters, eps, norm_eps)
    -> d_streams, d_fn, d_base, d_scale, d_norm: through the rms_norm at its end and all Sinkhorn rounds."""

    hc_post: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
    """(d_out [T, M, D], y [T, D], streams [T, M, D], post [T, M], comb [T, M, M]) -> d_y, d_streams, d_post, d_comb."""

    hc_head: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    """(d_out [T, D], streams [T, M, D], fn [M, M*D], base [M], scale [1], norm [D], *, eps, norm_eps) -> d_streams, d_fn, d_base, d_scale, d_norm."""

    pool: Callable[[Tensor, Tensor, Batch, int], Tensor]
    """Forward piece. (u [T, w], gate [T, w] with ape added, batch, ratio) -> pooled entries [N, c] before the norm. ratio 4: w = 2c, an entry pools
    half A of the four tokens before its own and half B of its own four; ratio 128: w = c, its own 128 tokens. Softmax per channel."""

    pool_backward: Callable[[Tensor, Tensor, Tensor, Batch, int], tuple[Tensor, Tensor]]
    """(d_pooled [N, c], u [T, w], gate [T, w] with ape added, batch, ratio) -> d_u, d_gate [T, w]. Tokens of no entry get zeros."""

    index_scores: Callable[[Tensor, Tensor, Tensor, Tensor, Batch], Tensor]
    """Forward piece. (q [T, Hi, ci], head_weights [T, Hi], keys [N, ci], ids [T, k] i32, batch) -> scores [T, k] = sum_h head_weight * relu(q_h . key),
    0 where the id is -1. q and keys as index_topk compares them: rotated, transformed and quantised already; head_weights scaled."""

    index_scores_backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Batch], tuple[Tensor, Tensor, Tensor]
    ]
    """(d_scores [T, k], q, head_weights, keys, ids, batch) -> d_q [T, Hi, ci], d_head_weights [T, Hi], d_keys [N, ci]."""

    attention: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]]
    """(d_out [T, N, c], q [T, N, c], rows [T, c], entries [E, c] or None, ids [T, k] i32 or None, sink [N], batch, *, window, scale)
    -> d_q, d_rows [T, c], d_entries [E, c] or None, d_sink [N], mass [T, k] or None. q is normalised and rotated already, ``out`` is not rotated back yet. A query
    reads rows of positions max(0, t-window+1)..t of its sequence, then entries: those of ``ids``, or without ids (HCA) all with id < (t+1) // 128. ``mass``: with ids, the
    probability that all heads together give each entry, sum over heads (0 where the id is -1)."""

    @classmethod
    def op_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls) if f.name != "name")
