"""Reference of the experts: one token and one chosen expert at a time, added in slot order."""

import torch
from torch import Tensor

from bittrue.ops.contracts import ExpertBank, Weight
from bittrue.ops.ref.linear import linear


def swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor) -> Tensor:
    """weight * silu(min(gate, limit)) * clip(up, -limit, limit): gate, up [T, I], weight [T] -> [T, I] of
    gate's dtype."""
    out = torch.empty_like(gate)
    for t in range(gate.shape[0]):
        g = gate[t].float().clamp(max=limit)
        silu = weight[t] * (g / (1 + torch.exp(-g)))
        out[t] = silu * up[t].float().clamp(-limit, limit)
    return out


def expert(
    row: Tensor, matrices: tuple[Weight, Weight, Weight], weight: Tensor, limit: float, quantize: bool
) -> Tensor:
    """One expert (w1, w3, w2) on one row [1, D] with a routing weight [1]: [1, D] f32."""
    w1, w3, w2 = matrices
    hidden = swiglu(linear(row, w1, quantize=quantize), linear(row, w3, quantize=quantize), limit, weight)
    return linear(hidden, w2, quantize=quantize).float()


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertBank, *, limit: float, quantize: bool
) -> Tensor:
    out = torch.empty_like(x)
    for t in range(x.shape[0]):
        row, total = x[t : t + 1], torch.zeros(1, x.shape[1])
        for slot in range(ids.shape[1]):
            e = int(ids[t, slot])
            if not 0 <= e < len(bank.w1):
                raise ValueError(f"experts: ids must lie in 0..{len(bank.w1) - 1}, not {e}")
            matrices = (bank.w1[e], bank.w3[e], bank.w2[e])
            total += expert(row, matrices, weights[t, slot : slot + 1], limit, quantize)
        if bank.shared is not None:
            total += expert(row, bank.shared, torch.ones(1), limit, quantize)
        out[t] = total[0]
    return out
