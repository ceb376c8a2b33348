"""The cache ops as autograd functions: rows, compressors, the index and attention.

What the ops pass on as bytes has differentiable values here: those of the rows and entries just packed.
Arguments after ``step`` are not differentiated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from bittrue.config.formats import FP4_GROUP, RowFormat
from bittrue.ops.contracts import CSA_RATIO, Batch, CompressorWeights, LayerCache
from bittrue.train.autograd import Ctx, Step


@dataclass(frozen=True, slots=True)
class RowsCall:
    """How rows are packed; ``made`` receives their bytes."""

    norm: Tensor
    angles: tuple[Tensor, Tensor]
    eps: float
    fmt: RowFormat
    made: list[Tensor]


class KvRows(Function):
    """kv_rows: the values of the packed rows."""

    @staticmethod
    def forward(
        ctx: Ctx,
        kv: Tensor,
        master: Tensor,
        step: Step,
        call: RowsCall,
    ) -> Tensor:
        ctx.save_for_backward(kv)
        ctx.step, ctx.call = step, call
        rows = step.ops.kv_rows(step.narrow(kv), call.norm, *call.angles, call.eps, call.fmt)
        call.made.append(rows)
        return step.ops.unpack_rows(rows, call.fmt)

    @staticmethod
    def backward(ctx: Ctx, d_rows: Tensor) -> Any:
        (kv,) = ctx.saved_tensors
        step, call = ctx.step, ctx.call
        d_rope = step.ops.rope(d_rows.contiguous()[:, None, :], *call.angles, True)[:, 0]
        d_kv, d_norm = step.grads.rms_norm(d_rope.contiguous(), kv.contiguous(), call.norm.float(), call.eps)
        return d_kv, d_norm, None, None


@dataclass(frozen=True, slots=True)
class CompressCall:
    """A compressor's stored tensors and where its entries go: ``state`` are the tensors the op keeps rows of
    open windows in, ``at`` [N] the places of the step's entries in the flattened ``pages``."""

    weights: CompressorWeights
    batch: Batch
    state: tuple[Tensor, ...]
    pages: Tensor
    fmt: RowFormat
    ratio: int
    hadamard: bool
    at: Tensor
    positions: Tensor  # [N] i32, where each entry is rotated


class Compress(Function):
    """csa_compress and hca_compress: the values of the entries written."""

    @staticmethod
    def forward(
        ctx: Ctx, u: Tensor, gate: Tensor, ape: Tensor, norm: Tensor, step: Step, call: CompressCall
    ) -> Tensor:
        ctx.save_for_backward(u, gate)
        ctx.step, ctx.call = step, call
        given = (
            u.contiguous(),
            gate.contiguous(),
            call.weights,
            call.batch,
            *call.state,
            call.pages,
            call.fmt,
        )
        if call.ratio == CSA_RATIO:
            step.ops.csa_compress(*given, act=step.act, hadamard=call.hadamard)
        else:
            step.ops.hca_compress(*given, act=step.act)
        return step.ops.unpack_rows(call.pages.flatten(0, 1)[call.at], call.fmt)

    @staticmethod
    def backward(ctx: Ctx, d_entries: Tensor) -> Any:
        u, gate = ctx.saved_tensors
        step, call = ctx.step, ctx.call
        weights, ratio = call.weights, call.ratio
        phase = call.batch.positions.long() % ratio
        u, gate = u.contiguous(), gate + weights.ape[phase]
        pooled = step.grads.pool(u, gate, call.batch, ratio)
        d = d_entries.contiguous()
        d = step.ops.hadamard(d) if call.hadamard else d
        angles = step.ops.rope_angles(call.positions, weights.inv_freq)
        d = step.ops.rope(d[:, None, :], *angles, True)[:, 0].contiguous()
        d_pooled, d_norm = step.grads.rms_norm(d, pooled, weights.norm.float(), weights.eps)
        d_u, d_gate = step.grads.pool_backward(d_pooled, u, gate, call.batch, ratio)
        d_ape = torch.zeros_like(weights.ape).index_add_(0, phase, d_gate)
        return d_u, d_gate, d_ape, d_norm, None, None


@dataclass(frozen=True, slots=True)
class IndexCall:
    """How the index compares: its angles, the ids it chose, and the format of the keys."""

    ids: Tensor
    batch: Batch
    angles: tuple[Tensor, Tensor]
    fmt: RowFormat
    weight_scale: float


class IndexScores(Function):
    """The scores of the entries the index chose, [T, k]: what its loss compares with attention."""

    @staticmethod
    def forward(
        ctx: Ctx, q: Tensor, head_weights: Tensor, keys: Tensor, step: Step, call: IndexCall
    ) -> Tensor:
        turned = step.ops.rope(step.narrow(q), *call.angles, False)
        if call.fmt.kind == "fp4":
            turned = step.ops.quant_fp4(step.ops.hadamard(turned), FP4_GROUP)
        turned, weights = turned.float(), head_weights * call.weight_scale
        ctx.save_for_backward(turned, weights, keys)
        ctx.step, ctx.call = step, call
        return step.grads.index_scores(turned, weights, keys.contiguous(), call.ids, call.batch)

    @staticmethod
    def backward(ctx: Ctx, d_scores: Tensor) -> Any:
        q, weights, keys = ctx.saved_tensors
        step, call = ctx.step, ctx.call
        d_q, d_weights, d_keys = step.grads.index_scores_backward(
            d_scores.contiguous(), q, weights, keys.contiguous(), call.ids, call.batch
        )
        d_q = step.ops.hadamard(d_q) if call.fmt.kind == "fp4" else d_q
        d_q = step.ops.rope(d_q, *call.angles, True)
        return d_q, d_weights * call.weight_scale, d_keys, None, None


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What attention reads beside its differentiable inputs; ``rows`` are the packed rows of the step."""

    rows: Tensor
    batch: Batch
    cache: LayerCache
    ids: Tensor | None
    sink: Tensor
    angles: tuple[Tensor, Tensor]
    window: int
    scale: float
    norm_eps: float
    round_probs: bool


class AttendRows(Function):
    """attention over the values of window rows and entries.

    ``scores`` [T, k], the index's for the same entries, do not change the result: the gradient of the index
    loss, KL(what attention gives each entry || softmax of the scores), is made here, where the probabilities
    are recomputed (spec 5.7).
    """

    @staticmethod
    def forward(
        ctx: Ctx,
        q: Tensor,
        rows: Tensor,
        entries: Tensor | None,
        sink: Tensor,
        scores: Tensor | None,
        step: Step,
        call: AttentionCall,
    ) -> Tensor:
        ctx.save_for_backward(q, rows, entries, scores)
        ctx.step, ctx.call = step, call
        out = step.ops.attention(
            step.narrow(q),
            call.rows,
            call.batch,
            call.cache,
            call.ids,
            call.sink,
            *call.angles,
            window=call.window,
            scale=call.scale,
            norm_eps=call.norm_eps,
            round_probs=call.round_probs,
        )
        return step.widen(out)

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        q, rows, entries, scores = ctx.saved_tensors
        step, call = ctx.step, ctx.call
        q = q.contiguous()
        turned = step.ops.rope(step.ops.rms_norm(q, None, call.norm_eps), *call.angles, False)
        d_turned, d_rows, d_entries, d_sink, mass = step.grads.attention(
            step.ops.rope(d_out.contiguous(), *call.angles, False),
            turned,
            rows.contiguous(),
            None if entries is None else entries.contiguous(),
            call.ids,
            call.sink,
            call.batch,
            window=call.window,
            scale=call.scale,
        )
        d_q, _ = step.grads.rms_norm(step.ops.rope(d_turned, *call.angles, True), q, None, call.norm_eps)
        d_scores = None
        if scores is not None and mass is not None and call.ids is not None:
            loss, d_scores = _index_loss(scores, mass, call.ids)
            step.index_loss += loss
            d_scores.mul_(step.index_scale)
        return d_q, d_rows, d_entries, d_sink, d_scores, None, None


def _index_loss(scores: Tensor, mass: Tensor, ids: Tensor) -> tuple[float, Tensor]:
    """Sum over queries of KL(mass / its sum || softmax(scores)) over the chosen entries, and its gradient."""
    is_chosen = ids >= 0
    total = mass.sum(-1, keepdim=True)
    target = mass / total.clamp(min=1e-20)
    log_index = torch.log_softmax(scores.masked_fill(~is_chosen, -torch.inf), -1)
    log_index = torch.where(is_chosen & (total > 0), log_index, 0.0)
    loss = (torch.xlogy(target, target) - target * log_index).sum()
    d_scores = torch.where(is_chosen & (total > 0), log_index.exp() - target, 0.0)
    return float(loss), d_scores
