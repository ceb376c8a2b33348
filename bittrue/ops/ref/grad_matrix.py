"""Reference derivatives of matrix products, experts, routing and pooling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, Batch
from bittrue.ops.gradients import BankValues
from bittrue.ops.ref.vjp import vjp

FAR_BELOW = -40.0  # softplus(x) = e^x (1 - e^x / 2 + ..): below, e^x is less than half a unit of float64


def smooth_linear(x: Tensor, matrix: Tensor) -> Tensor:
    """linear without a rounding: x [T, K], matrix [O, K] -> [T, O]."""
    return x @ matrix.t()


def smooth_grouped_linear(x: Tensor, matrix: Tensor) -> Tensor:
    """grouped_linear without a rounding: x [T, G, K], matrix [G * O, K] -> [T, G, O]."""
    return torch.einsum("tgk,gok->tgo", x, matrix.view(x.shape[1], -1, x.shape[2]))


def smooth_experts(x: Tensor, ids: Tensor, weights: Tensor, bank: BankValues, limit: float) -> Tensor:
    """experts without a rounding: x [T, D], ids and weights [T, k] -> [T, D]. A clamp passes its limit."""
    num_experts = bank.w1.shape[0]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise ValueError(f"experts: ids must lie in 0..{num_experts - 1}")
    out = torch.zeros_like(x)
    for e in range(num_experts):
        tokens, slots = torch.nonzero(ids == e, as_tuple=True)
        matrices = (bank.w1[e], bank.w3[e], bank.w2[e])
        out = out.index_add(0, tokens, _expert(x[tokens], weights[tokens, slots], matrices, limit))
    if bank.shared is not None:
        out = out + _expert(x, torch.ones_like(x[:, 0]), bank.shared, limit)
    return out


def _expert(x: Tensor, weight: Tensor, matrices: tuple[Tensor, Tensor, Tensor], limit: float) -> Tensor:
    w1, w3, w2 = matrices
    gate, up = (x @ w1.t()).clamp(max=limit), (x @ w3.t()).clamp(-limit, limit)
    return (weight[:, None] * gate * torch.sigmoid(gate) * up) @ w2.t()


def smooth_route(logits: Tensor, ids: Tensor, scale: float) -> Tensor:
    """The weights of the chosen experts: logits [T, E], ids [T, k] -> [T, k]."""
    chosen = logits.gather(1, ids.long())
    # sqrt(softplus) in two parts: of the root of a number that vanishes autograd makes 0 / 0.
    near = torch.logaddexp(chosen.clamp(min=FAR_BELOW), torch.zeros_like(chosen)).sqrt()
    scores = torch.where(chosen < FAR_BELOW, torch.exp(chosen.clamp(max=0) / 2), near)
    return scores / (1e-20 + scores.sum(-1, keepdim=True)) * scale


def pool(u: Tensor, gate: Tensor, batch: Batch, ratio: int) -> Tensor:
    """The pooled entries [N, c] of whole documents, see GradTable.pool."""
    if ratio not in (CSA_RATIO, HCA_RATIO):
        raise ValueError(f"pool: the ratio is {CSA_RATIO} or {HCA_RATIO}, not {ratio}")
    if bool(batch.starts.any()):
        raise ValueError("pool: every document must start at position 0")
    offsets = batch.offsets.tolist()
    documents = [slice(first, end) for first, end in zip(offsets[:-1], offsets[1:], strict=True)]
    whole = [rows for rows in documents if rows.stop - rows.start >= ratio]
    channels = u.shape[1] // 2 if ratio == CSA_RATIO else u.shape[1]
    return torch.cat([u.new_empty(0, channels), *(_pool_document(u[r], gate[r], ratio) for r in whole)])


def _pool_document(u: Tensor, gate: Tensor, ratio: int) -> Tensor:
    num = u.shape[0] // ratio
    values, gates = (x[: num * ratio].view(num, ratio, u.shape[1]) for x in (u, gate))
    if ratio == CSA_RATIO:
        values, gates = _with_the_four_before(values, 0.0), _with_the_four_before(gates, -torch.inf)
    return (torch.softmax(gates, 1) * values).sum(1)


def _with_the_four_before(rows: Tensor, absent: float) -> Tensor:
    """[n, 4, 2c] -> [n, 8, c]: half A of the four before (``absent`` before the first), then half B."""
    half_a, half_b = rows.chunk(2, 2)
    return torch.cat((torch.cat((torch.full_like(half_a[:1], absent), half_a[:-1])), half_b), 1)


def _linear(
    d_out: Tensor, x: Tensor, matrix: Tensor, *, wants_x: bool = True, add_to: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    d_x, d_matrix = vjp(smooth_linear, (x, matrix), (d_out,))
    if not wants_x:
        return None, d_matrix
    return d_x if add_to is None else add_to.add_(d_x), d_matrix


def _grouped_linear(d_out: Tensor, x: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
    return vjp(smooth_grouped_linear, (x, matrix), (d_out,))


def _experts(
    d_out: Tensor, x: Tensor, ids: Tensor, weights: Tensor, bank: BankValues, *, limit: float
) -> tuple[Tensor, Tensor, BankValues]:
    def function(x: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, *shared: Tensor) -> Tensor:
        three = (shared[0], shared[1], shared[2]) if shared else None
        return smooth_experts(x, ids, weights, BankValues(w1, w3, w2, three), limit)

    inputs = (x, weights, bank.w1, bank.w3, bank.w2, *(bank.shared or ()))
    d_x, d_weights, d_w1, d_w3, d_w2, *d_shared = vjp(function, inputs, (d_out,))
    three = (d_shared[0], d_shared[1], d_shared[2]) if d_shared else None
    return d_x, d_weights, BankValues(d_w1, d_w3, d_w2, three)


def _route(d_weights: Tensor, logits: Tensor, ids: Tensor, scale: float) -> Tensor:
    return vjp(lambda logits: smooth_route(logits, ids, scale), (logits,), (d_weights,))[0]


def _pool_backward(d_pooled: Tensor, u: Tensor, gate: Tensor, batch: Batch, ratio: int) -> tuple[Tensor, ...]:
    return vjp(lambda u, gate: pool(u, gate, batch, ratio), (u, gate), (d_pooled,))


def matrix_gradients() -> dict[str, Callable[..., Any]]:
    """The backward ops of this file by name."""
    return {
        "linear": _linear,
        "grouped_linear": _grouped_linear,
        "experts": _experts,
        "route": _route,
        "pool": pool,
        "pool_backward": _pool_backward,
    }
