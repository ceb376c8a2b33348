"""Document: one training example, the unit of packing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A token sequence that begins at position 0, and which of its tokens the model learns to predict.

    ``token_ids`` [n] i32; ``is_target`` [n] bool: the loss counts the log-probability of token i given those
    before it where ``is_target[i]``. Token 0 is never a target. ``task`` names where it came from, for
    metrics.
    """

    token_ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]
    task: str = ""

    def __len__(self) -> int:
        return len(self.token_ids)
