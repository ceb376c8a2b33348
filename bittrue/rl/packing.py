"""Which packed tokens belong to which sequence, and sums over them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# What a token's loss is divided by: all trainable tokens of the step (DAPO); those of its sequence, and the
# number of sequences (GRPO); a constant length and the number of sequences (Dr. GRPO).
Reduction = Literal["token_mean", "sequence_mean", "constant_length"]

# exp of more says nothing a bound would not cut, and of much more is no number in f32.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Tokens of whole sequences side by side: ``sequence_ids`` [N] i64 below ``num_sequences``; ``mask`` [N]
    bool: the policy sampled the token and learns from it.

    Whatever a token outside the mask holds, NaN too, it influences no sum and no gradient. Sums are in f64:
    N numbers cost nothing beside the forward pass that made them, and on the CPU they are in token order,
    whatever other sequences there are.
    """

    sequence_ids: Tensor
    mask: Tensor
    num_sequences: int

    def __post_init__(self) -> None:
        assert self.mask.dtype == torch.bool and self.mask.shape == self.sequence_ids.shape
        assert self.mask.dim() == 1

    def keep(self, values: Tensor) -> Tensor:
        """``values`` [N] as f64, 0 outside the mask."""
        return torch.where(self.mask, values, 0.0).double()

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each sequence's trainable tokens, [S] f64."""
        zeros = torch.zeros(self.num_sequences, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.sequence_ids, self.keep(values))

    def lengths(self) -> Tensor:
        """Trainable tokens of each sequence, [S] f64."""
        return self.sums(torch.ones_like(self.mask, dtype=torch.float64))

    def means(self, values: Tensor) -> Tensor:
        """Mean over each sequence's trainable tokens, [S] f64; 0 where there are none."""
        return self.sums(values) / self.lengths().clamp(min=1.0)

    def mean(self, values: Tensor) -> float:
        """Mean over all trainable tokens; 0 if there are none."""
        chosen = values[self.mask].double()
        return float(chosen.mean()) if len(chosen) else 0.0

    def log_ratio(self, logprobs: Tensor, behaviour: Tensor) -> Tensor:
        """log of new over old probability, [N] f64, 0 outside the mask."""
        return self.keep(logprobs) - self.keep(behaviour)


@dataclass(frozen=True, slots=True)
class Totals:
    """What a whole step's losses are divided by, when it is computed in parts: its trainable tokens, and its
    sequences that have any. ``length``: the constant of Dr. GRPO, usually the longest answer allowed."""

    num_tokens: int
    num_sequences: int
    length: int = 1

    @classmethod
    def of(cls, packing: Packing, *, length: int = 1) -> "Totals":
        """For a step that is this one packing."""
        lengths = packing.lengths()
        return cls(int(lengths.sum()), int((lengths > 0).sum()), length)


def reduce(values: Tensor, packing: Packing, reduction: Reduction, totals: Totals) -> Tensor:
    """The step's loss from its tokens' losses [N], a scalar f64; parts of a step add up.

    DAPO (arXiv 2503.14476) eq. 8: token_mean; DeepSeekMath (arXiv 2402.03300) eq. 3: sequence_mean; Dr. GRPO
    (arXiv 2503.20783): constant_length, in which no sequence's weight depends on any length.
    """
    if reduction == "token_mean":
        return packing.sums(values).sum() / max(totals.num_tokens, 1)
    if reduction == "sequence_mean":
        return packing.means(values).sum() / max(totals.num_sequences, 1)
    return packing.sums(values).sum() / (max(totals.num_sequences, 1) * totals.length)
