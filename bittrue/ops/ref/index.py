"""Reference of index_topk: score all visible keys, take the best by (score descending, id ascending)."""

import torch
from torch import Tensor

from bittrue.config.formats import FP4_GROUP, RowFormat
from bittrue.ops.contracts import CSA_RATIO, Batch
from bittrue.ops.ref.norm import row_sum
from bittrue.ops.ref.pages import entry_rows
from bittrue.ops.ref.quant import hadamard, quant_fp4, unpack_rows
from bittrue.ops.ref.rope import rope


def index_topk(
    q: Tensor,
    head_weights: Tensor,
    batch: Batch,
    keys: Tensor,
    fmt: RowFormat,
    cos: Tensor,
    sin: Tensor,
    *,
    k: int,
    weight_scale: float,
) -> Tensor:
    q = rope(q, cos, sin, False)
    if fmt.kind == "fp4":
        q = quant_fp4(hadamard(q), FP4_GROUP)
    weights = head_weights * weight_scale
    ids = torch.full((q.shape[0], k), -1, dtype=torch.int32, device=q.device)
    positions, seqs = batch.positions.tolist(), batch.seq_ids.tolist()
    for t in range(q.shape[0]):
        visible = (positions[t] + 1) // CSA_RATIO
        if visible <= k:
            ids[t, :visible] = torch.arange(visible, dtype=torch.int32, device=q.device)
            continue
        at = torch.arange(visible, device=q.device)
        rows = unpack_rows(entry_rows(keys, batch.page_table, seqs[t], at), fmt)
        scores = _scores(q[t].float(), weights[t], rows)
        order = torch.sort(scores, descending=True, stable=True).indices
        ids[t] = order[:k].sort().values.to(torch.int32)
    return ids


def _scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """q [Hi, ci], weights [Hi], keys [n, ci], all f32 -> [n] f32.

    The dot product adds groups of 32 features in ascending order. Between FP4 values a group's sum is
    exact, so all backends that add the heads in ascending order, rounding once per head, find the same score.
    """
    dots = torch.zeros(q.shape[0], keys.shape[0], device=q.device)
    for g in range(0, q.shape[1], FP4_GROUP):
        dots = dots + row_sum(q[:, None, g : g + FP4_GROUP] * keys[None, :, g : g + FP4_GROUP])
    dots = torch.relu(dots)
    scores = torch.zeros(keys.shape[0], device=q.device)
    for h in range(q.shape[0]):
        # A fused multiply-add: in float64 the product is exact.
        scores = (scores.double() + weights[h].double() * dots[h].double()).float()
    return scores
