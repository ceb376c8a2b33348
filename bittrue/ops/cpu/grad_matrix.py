"""Binds the backward kernels of matrix products, experts, routing and pooling."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, Batch
from bittrue.ops.cpu.library import F32, I64, PTR, Kernels, check
from bittrue.ops.gradients import BankValues

Op = Callable[..., Any]
ACT = torch.float32


def _product(kernels: Kernels) -> Callable[..., Tensor]:
    """product(a [.., R, P], b [.., P, C], out [.., R, C]) -> out: a @ b, or with ``is_added`` out + a @ b.
    ``a`` may have any strides, rows of b and out are contiguous. The same bits for any number of threads."""
    run = kernels.bind(
        "grad_product", PTR, I64, I64, I64, PTR, I64, I64, PTR, I64, I64, I64, I64, I64, I64, I64
    )

    def product(a: Tensor, b: Tensor, out: Tensor, *, is_added: bool = False) -> Tensor:
        *groups, rows, columns = out.shape
        a_group, b_group, out_group = (t.stride(0) if groups else 0 for t in (a, b, out))
        run(
            a.data_ptr(), a.stride(-2), a.stride(-1), a_group, b.data_ptr(), b.stride(-2), b_group,
            out.data_ptr(), out.stride(-2), out_group, groups[0] if groups else 1, rows, a.shape[-1],
            columns, is_added,
        )  # fmt: skip
        return out

    return product


def _product_ops(product: Callable[..., Tensor]) -> dict[str, Op]:
    def linear(
        d_out: Tensor, x: Tensor, matrix: Tensor, *, wants_x: bool = True, add_to: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        check("linear", "x", x, (None, None), ACT)
        num_tokens, inputs = x.shape
        check("linear", "matrix", matrix, (None, inputs), ACT)
        check("linear", "d_out", d_out, (num_tokens, matrix.shape[0]), ACT)
        d_matrix = product(d_out.t(), x, torch.empty_like(matrix))
        if not wants_x:
            return None, d_matrix
        if add_to is None:
            return product(d_out, matrix, torch.empty_like(x)), d_matrix
        check("linear", "add_to", add_to, (num_tokens, inputs), ACT)
        return product(d_out, matrix, add_to, is_added=True), d_matrix

    def grouped_linear(d_out: Tensor, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        check("grouped_linear", "x", x, (None, None, None), ACT)
        num_tokens, groups, inputs = x.shape
        check("grouped_linear", "d_out", d_out, (num_tokens, groups, None), ACT)
        check("grouped_linear", "matrix", matrix, (groups * d_out.shape[2], inputs), ACT)
        d_x, d_matrix = torch.empty_like(x), torch.empty_like(matrix)
        by_group = matrix.view(groups, -1, inputs)
        product(d_out.transpose(0, 1), by_group, d_x.transpose(0, 1))
        product(d_out.permute(1, 2, 0), x.transpose(0, 1), d_matrix.view_as(by_group))
        return d_x, d_matrix

    return {"linear": linear, "grouped_linear": grouped_linear}


class _Experts:
    """The backward of experts: the kernels of csrc/grad_experts.cpp around the products, an expert at a time
    so that what its rows make stays in the caches."""

    def __init__(self, kernels: Kernels, product: Callable[..., Tensor]) -> None:
        self._product = product
        self._sort = kernels.bind("grad_experts_sort", PTR, I64, I64, PTR, PTR, PTR, PTR)
        self._gather = kernels.bind("grad_experts_gather", PTR, PTR, PTR, I64, I64, I64, PTR, PTR)
        self._swiglu = kernels.bind("grad_experts_swiglu", PTR, PTR, PTR, PTR, I64, I64, F32, PTR)
        self._scatter = kernels.bind("grad_experts_scatter", PTR, PTR, I64, I64, I64, PTR)

    def __call__(
        self, d_out: Tensor, x: Tensor, ids: Tensor, weights: Tensor, bank: BankValues, *, limit: float
    ) -> tuple[Tensor, Tensor, BankValues]:
        check("experts", "x", x, (None, None), ACT)
        num_tokens, width = x.shape
        check("experts", "d_out", d_out, (num_tokens, width), ACT)
        check("experts", "ids", ids, (num_tokens, None), torch.int32)
        check("experts", "weights", weights, tuple(ids.shape), ACT)
        check("experts", "w1", bank.w1, (None, None, width), ACT)
        check("experts", "w3", bank.w3, tuple(bank.w1.shape), ACT)
        check("experts", "w2", bank.w2, (bank.w1.shape[0], width, bank.w1.shape[1]), ACT)
        d_w1, d_w3, d_w2 = (torch.empty_like(w) for w in (bank.w1, bank.w3, bank.w2))
        d_bank = BankValues(d_w1, d_w3, d_w2, None)
        d_weights = torch.empty_like(weights)
        d_x = self._routed(d_out, x, ids, weights, bank, limit, d_weights, d_bank)
        if bank.shared is None:
            return d_x, d_weights, d_bank
        d_shared = self._shared(d_out, x, bank.shared, limit, d_x)
        return d_x, d_weights, BankValues(d_w1, d_w3, d_w2, d_shared)

    def _routed(
        self,
        d_out: Tensor,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        bank: BankValues,
        limit: float,
        d_weights: Tensor,
        d_bank: BankValues,
    ) -> Tensor:
        """The chosen experts' d_x [T, D]; d_weights and d_bank are written."""
        (num_tokens, slots), width = ids.shape, x.shape[1]
        num_experts, hidden, _ = bank.w1.shape
        pairs = ids.numel()
        pair_at, place, offsets = self._sorted(ids, num_experts)
        bounds = offsets.tolist()
        most = max((end - begin for begin, end in zip(bounds[:-1], bounds[1:], strict=True)), default=0)
        x_rows, d_rows, d_both = torch.empty(most, width), torch.empty(most, width), torch.empty(pairs, width)
        gate_up, z_rows = torch.empty(most, 2 * hidden), torch.empty(most, hidden)
        for e in range(num_experts):
            begin, end = bounds[e], bounds[e + 1]
            count = end - begin
            if count == 0:
                for gradient in (d_bank.w1, d_bank.w3, d_bank.w2):
                    gradient[e].zero_()
                continue
            at = pair_at.data_ptr() + 8 * begin
            xs, ds = x_rows[:count], d_rows[:count]
            self._gather(
                x.data_ptr(), d_out.data_ptr(), at, count, slots, width, xs.data_ptr(), ds.data_ptr()
            )
            self._expert(
                ds, xs, (bank.w1[e], bank.w3[e], bank.w2[e]), (at, weights.data_ptr(), d_weights.data_ptr()),
                limit, (gate_up[:count], z_rows[:count]), (d_bank.w1[e], d_bank.w3[e], d_bank.w2[e]),
                d_both[begin:end], False,
            )  # fmt: skip
        d_x = torch.empty_like(x)
        self._scatter(d_both.data_ptr(), place.data_ptr(), num_tokens, slots, width, d_x.data_ptr())
        return d_x

    def _sorted(self, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        pairs = ids.numel()
        pair_at, place = (torch.empty(pairs, dtype=torch.int64) for _ in range(2))
        offsets = torch.empty(num_experts + 1, dtype=torch.int64)
        fault = torch.zeros(2, dtype=torch.int64)
        self._sort(
            ids.data_ptr(), pairs, num_experts, pair_at.data_ptr(), place.data_ptr(), offsets.data_ptr(),
            fault.data_ptr(),
        )  # fmt: skip
        _refuse_fault("experts", fault, num_experts)
        return pair_at, place, offsets

    def _shared(
        self, d_out: Tensor, x: Tensor, matrices: tuple[Tensor, Tensor, Tensor], limit: float, d_x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The shared expert's gradients; its part is added to d_x [T, D]."""
        w1, w3, w2 = matrices
        num_tokens, width = x.shape
        check("experts", "w1 of the shared expert", w1, (None, width), ACT)
        hidden = w1.shape[0]
        check("experts", "w3 of the shared expert", w3, (hidden, width), ACT)
        check("experts", "w2 of the shared expert", w2, (width, hidden), ACT)
        gate_up, z = torch.empty(num_tokens, 2 * hidden), torch.empty(num_tokens, hidden)
        gradients = (torch.empty_like(w1), torch.empty_like(w3), torch.empty_like(w2))
        self._expert(d_out, x, matrices, (0, 0, 0), limit, (gate_up, z), gradients, d_x, True)
        return gradients

    def _expert(
        self,
        d_out: Tensor,
        x: Tensor,
        matrices: tuple[Tensor, Tensor, Tensor],
        weights: tuple[int, int, int],
        limit: float,
        scratch: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor, Tensor],
        d_x: Tensor,
        is_added: bool,
    ) -> None:
        """One expert on rows [n, D]. ``weights``: addresses of its pairs, the weights and their gradients.
        ``scratch`` [n, 2 * I] and [n, I]; ``gradients`` and d_x are written, d_x added to if so asked."""
        (w1, w3, w2), (d_w1, d_w3, d_w2), (gate_up, z) = matrices, gradients, scratch
        hidden = w1.shape[0]
        self._product(x, torch.cat((w1.t(), w3.t()), 1), gate_up)
        self._product(d_out, w2, z)
        pair_at, weights_at, d_weights_at = weights
        self._swiglu(
            gate_up.data_ptr(), z.data_ptr(), pair_at, weights_at, x.shape[0], hidden, limit, d_weights_at
        )
        d_gate, d_up = gate_up[:, :hidden], gate_up[:, hidden:]
        self._product(d_out.t(), z, d_w2)
        self._product(d_gate.t(), x, d_w1)
        self._product(d_up.t(), x, d_w3)
        self._product(d_gate, w1, d_x, is_added=is_added)
        self._product(d_up, w3, d_x, is_added=True)


def _refuse_fault(op: str, fault: Tensor, num_experts: int) -> None:
    is_wrong, wrong_id = fault.tolist()
    if is_wrong:
        raise ValueError(f"{op}: ids must lie in 0..{num_experts - 1}, not {wrong_id}")


def _route(kernels: Kernels) -> Op:
    run = kernels.bind("grad_route", PTR, PTR, PTR, I64, I64, I64, F32, PTR, PTR)

    def route(d_weights: Tensor, logits: Tensor, ids: Tensor, scale: float) -> Tensor:
        check("route", "logits", logits, (None, None), ACT)
        num_tokens, num_experts = logits.shape
        check("route", "ids", ids, (num_tokens, None), torch.int32)
        check("route", "d_weights", d_weights, tuple(ids.shape), ACT)
        d_logits, fault = torch.empty_like(logits), torch.zeros(2, dtype=torch.int64)
        run(
            d_weights.data_ptr(), logits.data_ptr(), ids.data_ptr(), num_tokens, num_experts, ids.shape[1],
            scale, d_logits.data_ptr(), fault.data_ptr(),
        )  # fmt: skip
        _refuse_fault("route", fault, num_experts)
        return d_logits

    return route


def _check_pool(u: Tensor, gate: Tensor, batch: Batch, ratio: int) -> tuple[int, int]:
    """ValueError unless the rows are whole documents. Returns the shape of the entries, [N, c]."""
    if ratio not in (CSA_RATIO, HCA_RATIO):
        raise ValueError(f"pool: the ratio is {CSA_RATIO} or {HCA_RATIO}, not {ratio}")
    check("pool", "u", u, (batch.num_tokens, None), ACT)
    check("pool", "gate", gate, tuple(u.shape), ACT)
    check("pool", "offsets", batch.offsets, (batch.num_sequences + 1,), torch.int32)
    if any(batch.starts.tolist()):
        raise ValueError("pool: every document must start at position 0")
    offsets = batch.offsets.tolist()
    if offsets[-1] != batch.num_tokens:
        raise ValueError(f"pool: the documents have {offsets[-1]} tokens, the rows are {batch.num_tokens}")
    num_entries = sum((end - first) // ratio for first, end in zip(offsets[:-1], offsets[1:], strict=True))
    if ratio == HCA_RATIO:
        return num_entries, u.shape[1]
    if u.shape[1] % 2:
        raise ValueError(f"pool: rows of two halves have an even width, not {u.shape[1]}")
    return num_entries, u.shape[1] // 2


def _pool_ops(kernels: Kernels) -> dict[str, Op]:
    run = kernels.bind("grad_pool", PTR, PTR, PTR, I64, I64, I64, PTR)
    run_backward = kernels.bind("grad_pool_backward", PTR, PTR, PTR, PTR, I64, I64, I64, PTR, PTR)

    def pool(u: Tensor, gate: Tensor, batch: Batch, ratio: int) -> Tensor:
        pooled = torch.empty(_check_pool(u, gate, batch, ratio))
        run(
            u.data_ptr(), gate.data_ptr(), batch.offsets.data_ptr(), batch.num_sequences, u.shape[1], ratio,
            pooled.data_ptr(),
        )  # fmt: skip
        return pooled

    def pool_backward(
        d_pooled: Tensor, u: Tensor, gate: Tensor, batch: Batch, ratio: int
    ) -> tuple[Tensor, Tensor]:
        check("pool_backward", "d_pooled", d_pooled, _check_pool(u, gate, batch, ratio), ACT)
        d_u, d_gate = torch.empty_like(u), torch.empty_like(gate)
        run_backward(
            d_pooled.data_ptr(), u.data_ptr(), gate.data_ptr(), batch.offsets.data_ptr(),
            batch.num_sequences, u.shape[1], ratio, d_u.data_ptr(), d_gate.data_ptr(),
        )  # fmt: skip
        return d_u, d_gate

    return {"pool": pool, "pool_backward": pool_backward}


def matrix_gradients(kernels: Kernels) -> dict[str, Op]:
    """The backward ops of this file by name."""
    product = _product(kernels)
    return {
        **_product_ops(product),
        "experts": _Experts(kernels, product),
        "route": _route(kernels),
        **_pool_ops(kernels),
    }
