"""The ops as autograd functions: forward is the engine's op, backward the derivative of the same backend.

Activations travel as float32 tensors that hold exactly the values of the activation dtype, so that gradients
are float32 everywhere: a function narrows its input, which is exact, calls the op, and widens the result.
Arguments after ``step`` are not differentiated.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from bittrue.config.formats import ACT_GROUP
from bittrue.ops.contracts import ExpertBank, OpTable, Weight
from bittrue.ops.gradients import BankValues, GradTable

Ctx = Any  # torch's context object, a class of its own for every function
_NARROW = "narrow_form"  # attribute of a widened tensor: what it was made of


@dataclass(slots=True)
class Step:
    """What the functions of one forward and backward pass share.

    ``index_scale``, ``balance_scale``: the weight of the two auxiliary losses per token; their gradients join
    in the backward of attention and of the router, where what they need is at hand, also when activations
    are recomputed. The sums of the losses (nats times tokens; balance times tokens) are left here.
    """

    ops: OpTable
    grads: GradTable
    act: torch.dtype
    index_scale: float = 0.0
    balance_scale: float = 0.0
    index_loss: float = 0.0
    balance_loss: float = 0.0
    # How often each expert was chosen, [E] i64 by the router's bias tensor.
    loads: dict[int, Tensor] = field(default_factory=dict)

    def narrow(self, x: Tensor) -> Tensor:
        """``x`` in the activation dtype, exactly; what an op returned is not converted a second time."""
        made: Tensor | None = getattr(x, _NARROW, None)
        return x.contiguous().to(self.act) if made is None else made

    def widen(self, out: Tensor) -> Tensor:
        """What an op returned, as float32."""
        wide = out.float()
        if wide is not out:
            setattr(wide, _NARROW, out)
        return wide


class Embed(Function):
    @staticmethod
    def forward(
        ctx: Ctx, master: Tensor, step: Step, token_ids: Tensor, table: Tensor, streams: int
    ) -> Tensor:
        ctx.step, ctx.token_ids, ctx.num_rows = step, token_ids, table.shape[0]
        return step.widen(step.ops.embed(token_ids, table, streams, step.act))

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        return ctx.step.grads.embed(d_out.contiguous(), ctx.token_ids, ctx.num_rows), None, None, None, None


class RmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Ctx, x: Tensor, master: Tensor | None, step: Step, weight: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.step, ctx.weight, ctx.eps = step, weight, eps
        return step.widen(step.ops.rms_norm(step.narrow(x), weight, eps))

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        weight = None if ctx.weight is None else ctx.weight.float()
        d_x, d_weight = ctx.step.grads.rms_norm(d_out.contiguous(), x.contiguous(), weight, ctx.eps)
        return d_x, d_weight, None, None, None


class Rope(Function):
    @staticmethod
    def forward(ctx: Ctx, x: Tensor, step: Step, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        ctx.step, ctx.cos, ctx.sin, ctx.inverse = step, cos, sin, inverse
        return step.widen(step.ops.rope(step.narrow(x), cos, sin, inverse))

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        d_x = ctx.step.ops.rope(d_out.contiguous(), ctx.cos, ctx.sin, not ctx.inverse)
        return d_x, None, None, None, None


class Hadamard(Function):
    @staticmethod
    def forward(ctx: Ctx, x: Tensor, step: Step) -> Tensor:
        ctx.step = step
        return step.widen(step.ops.hadamard(step.narrow(x)))

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        return ctx.step.ops.hadamard(d_out.contiguous()), None  # its own transpose


class Quantize(Function):
    """quant_fp8 and quant_fp4: the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Ctx, x: Tensor, step: Step, kind: str, group: int) -> Tensor:
        op = step.ops.quant_fp4 if kind == "fp4" else step.ops.quant_fp8
        return step.widen(op(step.narrow(x), group))

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        return d_out, None, None, None


@dataclass(frozen=True, slots=True)
class Product:
    """One of the products a call of linears makes: the matrix as stored, its values, and how it is made.

    ``is_apart``: its gradient does not reach the input, as for the index, which has a loss of its own."""

    weight: Weight
    values: Tensor
    quantize: bool
    out_dtype: torch.dtype | None
    is_apart: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.quantize and self.weight.format in ("fp8", "fp4")


class Linears(Function):
    """linears, and linear as one of them; arguments after ``products`` are the masters."""

    @staticmethod
    def forward(
        ctx: Ctx, x: Tensor, step: Step, products: tuple[Product, ...], *masters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.step, ctx.products = step, products
        ctx.set_materialize_grads(False)
        outs = step.ops.linears(
            step.narrow(x),
            tuple(p.weight for p in products),
            quantize=tuple(p.quantize for p in products),
            out_dtypes=tuple(p.out_dtype for p in products),
        )
        return tuple(step.widen(out) for out in outs)

    @staticmethod
    def backward(ctx: Ctx, *d_outs: Tensor | None) -> Any:
        (x,) = ctx.saved_tensors
        step: Step = ctx.step
        plain = x.contiguous()
        is_any_quantized = any(p.is_quantized for p in ctx.products)
        # What the product really read: the derivative with respect to the matrix needs it.
        rounded = step.ops.quant_fp8(plain, ACT_GROUP) if is_any_quantized else plain
        d_x: Tensor | None = None
        d_masters: list[Tensor | None] = []
        for product, d_out in zip(ctx.products, d_outs, strict=True):
            if d_out is None:
                d_masters.append(None)
                continue
            read = rounded if product.is_quantized else plain
            wants_x = not product.is_apart
            found, d_matrix = step.grads.linear(
                d_out.contiguous(), read, product.values, wants_x=wants_x, add_to=d_x if wants_x else None
            )
            d_masters.append(d_matrix)
            d_x = found if wants_x else d_x
        return d_x, None, None, *d_masters


class GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Ctx, x: Tensor, master: Tensor, step: Step, weight: Weight, values: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.step, ctx.values = step, values
        return step.widen(step.ops.grouped_linear(step.narrow(x), weight))

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        d_x, d_matrix = ctx.step.grads.grouped_linear(d_out.contiguous(), x.contiguous(), ctx.values)
        return d_x, d_matrix, None, None, None


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """What experts reads beside its input: the bank as stored and its values."""

    ids: Tensor
    bank: ExpertBank
    values: BankValues
    limit: float
    quantize: bool


class Experts(Function):
    """Arguments after ``call`` are the masters: w1, w3, w2 stacked, then the shared expert's."""

    @staticmethod
    def forward(
        ctx: Ctx, x: Tensor, weights: Tensor, step: Step, call: ExpertCall, *masters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.step, ctx.call = step, call
        out = step.ops.experts(
            step.narrow(x),
            call.ids,
            weights.contiguous(),
            call.bank,
            limit=call.limit,
            quantize=call.quantize,
        )
        return step.widen(out)

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        x, weights = ctx.saved_tensors
        step, call = ctx.step, ctx.call
        read = x.contiguous()
        if call.quantize and call.bank.w1[0].format in ("fp8", "fp4"):
            read = step.ops.quant_fp8(read, ACT_GROUP)
        d_x, d_weights, d_bank = step.grads.experts(
            d_out.contiguous(), read, call.ids, weights.contiguous(), call.values, limit=call.limit
        )
        return d_x, d_weights, None, None, d_bank.w1, d_bank.w3, d_bank.w2, *d_bank.shared


@dataclass(frozen=True, slots=True)
class RouteCall:
    """How a router chose: ``offsets`` [S+1] are those of the documents, ``key`` names the router. A router
    with a bias is learned: it takes part in the balance loss."""

    ids: Tensor
    weights: Tensor
    scale: float
    offsets: Tensor
    is_learned: bool
    key: int


class Route(Function):
    """The weights of the experts already chosen, as a function of the router's logits."""

    @staticmethod
    def forward(ctx: Ctx, logits: Tensor, step: Step, call: RouteCall) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.step, ctx.call = step, call
        return call.weights

    @staticmethod
    def backward(ctx: Ctx, d_weights: Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        step, call = ctx.step, ctx.call
        logits = logits.contiguous()
        d_logits = step.grads.route(d_weights.contiguous(), logits, call.ids, call.scale)
        if call.is_learned:
            counts = torch.bincount(call.ids.flatten().long(), minlength=logits.shape[1])
            step.loads[call.key] = step.loads.get(call.key, 0) + counts
            loss, d_balance = _balance(logits, call.ids, call.offsets)
            step.balance_loss += loss
            if step.balance_scale:
                d_logits = d_logits.add_(d_balance, alpha=step.balance_scale)
        return d_logits, None, None


def _balance(logits: Tensor, ids: Tensor, offsets: Tensor) -> tuple[float, Tensor]:
    """The sequence balance loss: per document sum_e f_e P_e, f the share of choices times E / k, P the mean
    of the normalised scores, weighted by its tokens. Returns the sum and its gradient [T, E]."""
    num_tokens, num_experts = logits.shape
    lengths = (offsets[1:] - offsets[:-1]).long()
    doc = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    chosen = torch.zeros(num_tokens, num_experts).scatter_(1, ids.long(), 1.0)
    counts = torch.zeros(len(lengths), num_experts).index_add_(0, doc, chosen)
    share = counts * (num_experts / ids.shape[1]) / lengths.clamp(min=1)[:, None]
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        scores = torch.nn.functional.softplus(leaf).clamp(min=1e-30).sqrt()
        loss = (scores / scores.sum(-1, keepdim=True) * share[doc]).sum()
        (d_logits,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), d_logits


@dataclass(frozen=True, slots=True)
class HyperCall:
    """The stored tensors of a hyper-connection and its constants; ``iters`` 0 at the head."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor
    eps: float
    norm_eps: float
    iters: int = 0


class HcPre(Function):
    """Arguments after ``call`` are the masters of fn, base, scale and norm."""

    @staticmethod
    def forward(
        ctx: Ctx, streams: Tensor, step: Step, call: HyperCall, *masters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(streams)
        ctx.step, ctx.call = step, call
        x, post, comb = step.ops.hc_pre(
            step.narrow(streams),
            call.fn,
            call.base,
            call.scale,
            call.norm,
            iters=call.iters,
            eps=call.eps,
            norm_eps=call.norm_eps,
        )
        return step.widen(x), post, comb

    @staticmethod
    def backward(ctx: Ctx, d_x: Tensor, d_post: Tensor, d_comb: Tensor) -> Any:
        (streams,) = ctx.saved_tensors
        call = ctx.call
        d_streams, *d_masters = ctx.step.grads.hc_pre(
            d_x.contiguous(),
            d_post.contiguous(),
            d_comb.contiguous(),
            streams.contiguous(),
            call.fn,
            call.base,
            call.scale,
            call.norm.float(),
            iters=call.iters,
            eps=call.eps,
            norm_eps=call.norm_eps,
        )
        return d_streams, None, None, *d_masters


class HcPost(Function):
    @staticmethod
    def forward(ctx: Ctx, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor, step: Step) -> Tensor:
        ctx.save_for_backward(y, streams, post, comb)
        ctx.step = step
        out = step.ops.hc_post(step.narrow(y), step.narrow(streams), post.contiguous(), comb.contiguous())
        return step.widen(out)

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        saved = (tensor.contiguous() for tensor in ctx.saved_tensors)
        return *ctx.step.grads.hc_post(d_out.contiguous(), *saved), None


class HcHead(Function):
    """Arguments after ``call`` are the masters of fn, base, scale and norm."""

    @staticmethod
    def forward(ctx: Ctx, streams: Tensor, step: Step, call: HyperCall, *masters: Tensor) -> Tensor:
        ctx.save_for_backward(streams)
        ctx.step, ctx.call = step, call
        out = step.ops.hc_head(
            step.narrow(streams),
            call.fn,
            call.base,
            call.scale,
            call.norm,
            eps=call.eps,
            norm_eps=call.norm_eps,
        )
        return step.widen(out)

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        (streams,) = ctx.saved_tensors
        call = ctx.call
        d_streams, *d_masters = ctx.step.grads.hc_head(
            d_out.contiguous(),
            streams.contiguous(),
            call.fn,
            call.base,
            call.scale,
            call.norm.float(),
            eps=call.eps,
            norm_eps=call.norm_eps,
        )
        return d_streams, None, None, *d_masters


class TokenLogprob(Function):
    """Log-probability of one token per row, [R] from logits [R, V] and token_ids [R] i64."""

    @staticmethod
    def forward(ctx: Ctx, logits: Tensor, step: Step, token_ids: Tensor) -> Tensor:
        log_probs = step.ops.log_softmax(logits.contiguous())
        ctx.save_for_backward(log_probs)
        ctx.token_ids = token_ids
        return log_probs.gather(1, token_ids[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Ctx, d_out: Tensor) -> Any:
        (log_probs,) = ctx.saved_tensors
        d_logits = log_probs.exp().mul_(-d_out[:, None])
        d_logits.scatter_add_(1, ctx.token_ids[:, None], d_out[:, None].contiguous())
        return d_logits, None, None
