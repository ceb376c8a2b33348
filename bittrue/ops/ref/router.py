"""Reference of expert routing: scores, the choice with its tie rule, and the weights of the chosen."""

import torch
from torch import Tensor


def scores_of(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits)) of one row [E] f32, stable for large magnitudes."""
    return torch.sqrt(logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs())))


def weights_of(scores: Tensor, ids: Tensor, scale: float) -> Tensor:
    """scores [E], ids [k] -> [k]: each chosen score over their sum (in the order of ids), times scale."""
    chosen = scores[ids.long()]
    # No NaN where every chosen score is zero; it changes no bit of any other sum.
    total = torch.tensor(1e-20, dtype=torch.float32)
    for score in chosen:
        total = total + score
    return chosen / total * scale


def route_topk(logits: Tensor, bias: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
    num_tokens = logits.shape[0]
    ids = torch.empty(num_tokens, k, dtype=torch.int32)
    weights = torch.empty(num_tokens, k, dtype=torch.float32)
    for t in range(num_tokens):
        scores = scores_of(logits[t])
        ranked = scores if bias is None else scores + bias
        # A stable sort keeps equal values in id order: ties go to the smaller id.
        chosen = torch.sort(ranked, descending=True, stable=True).indices[:k].sort().values
        ids[t] = chosen.int()
        weights[t] = weights_of(scores, chosen, scale)
    return ids, weights


def route_hash(logits: Tensor, token_ids: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(logits.shape[0], table.shape[1], dtype=torch.int32)
    weights = torch.full(ids.shape, torch.nan)
    for t, token in enumerate(token_ids.tolist()):
        if 0 <= token < table.shape[0] and bool(
            ((table[token] >= 0) & (table[token] < logits.shape[1])).all()
        ):
            ids[t] = table[token].int()
            weights[t] = weights_of(scores_of(logits[t]), ids[t], scale)
    return ids, weights
