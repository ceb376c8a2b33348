"""Lets two implementations share the index selection where their scores are tied to within rounding."""

from typing import Any

import torch
from oracles.hf import ordered_topk
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Two float32 evaluations of one index score differ by a few units in the last place of its largest term.
ROUNDING = 4e-6


class SharedSelection(TorchFunctionMode):
    """Answers the oracle's index top-k (3-D scores) with ``picks``, one [T, k] tensor (-1 padded) per call
    in order.

    A row may differ from the oracle's own picks only where the scores of the swapped entries are equal to
    within ROUNDING: a tie that two correct evaluations break differently. Anything further apart raises
    AssertionError. Every other top-k is answered by (value descending, id ascending).
    """

    def __init__(self, picks: list[Tensor]) -> None:
        super().__init__()
        self.picks = picks
        self.num_calls = 0
        self.num_swapped_rows = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.topk, torch.Tensor.topk):
            return func(*args, **(kwargs or {}))
        own = ordered_topk(*args, **(kwargs or {}))
        scores = args[0]
        if scores.dim() != 3:
            return own
        picks = self.picks[self.num_calls]
        self.num_calls += 1
        return torch.return_types.topk((own.values, self._shared(scores[0], own.indices[0], picks)[None]))

    def _shared(self, scores: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
        shared = theirs.clone()
        k = ours.shape[1]
        for row in torch.nonzero((ours >= 0).all(1)).squeeze(1).tolist():
            a, b = ours[row].long(), theirs[row].sort().values
            if torch.equal(a, b):
                continue
            swapped = torch.cat((a[~torch.isin(a, b)], b[~torch.isin(b, a)]))
            values = scores[row, swapped]
            spread = float(values.max() - values.min())
            bound = ROUNDING * float(scores[row][torch.isfinite(scores[row])].abs().max())
            assert spread <= bound, (
                f"row {row}: entries {swapped.tolist()} of {k} picks score {values.tolist()}"
            )
            shared[row] = a
            self.num_swapped_rows += 1
        return shared
