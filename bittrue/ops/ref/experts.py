"""Reference of the experts: one token and one chosen expert at a time, added in slot order."""

import torch
from torch import Tensor

from bittrue.config.formats import ACT_GROUP
from bittrue.ops.contracts import ExpertBank
from bittrue.ops.ref.linear import linear
from bittrue.ops.ref.quant import quant_fp8


def swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None) -> Tensor:
    out = torch.empty_like(gate)
    for t in range(gate.shape[0]):
        g = gate[t].float().clamp(max=limit)
        silu = g / (1 + torch.exp(-g))
        if weight is not None:
            silu = weight[t] * silu
        out[t] = silu * up[t].float().clamp(-limit, limit)
    return out


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertBank, *, limit: float, quantize: bool
) -> Tensor:
    def quantized(row: Tensor) -> Tensor:
        return quant_fp8(row, ACT_GROUP) if quantize else row

    out = torch.zeros(x.shape, dtype=torch.float32)
    for t in range(x.shape[0]):
        row = quantized(x[t : t + 1])
        for slot in range(ids.shape[1]):
            e = int(ids[t, slot])
            weight = weights[t, slot : slot + 1]
            hidden = swiglu(linear(row, bank.w1[e]), linear(row, bank.w3[e]), limit, weight)
            out[t] += linear(quantized(hidden), bank.w2[e])[0].float()
    return out
