"""Which rows of a packed batch are asked for which token: the targets of the two losses on tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bittrue.train.document import Document


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How much each loss counts beside the next token's (spec 5.5). ``mtp`` is shared by the draft module's
    ``mtp_depth`` passes over the tokens, one for each draft in a row it is trained for."""

    mtp: float = 0.3
    mtp_depth: int = 1
    index: float = 1.0
    balance: float = 1e-4


@dataclass(frozen=True, slots=True)
class Targets:
    """Rows of a packed batch [R] i64, the tokens they are asked for [R] i64, and the document of each [R]."""

    rows: Tensor
    token_ids: Tensor
    documents: Tensor


def targets(documents: Sequence[Document], *, ahead: int) -> Targets:
    """The rows whose token ``ahead`` places later is a target of its document: 1 for the model, 2 for its
    draft module, which reads the token between."""
    rows, token_ids, owners = [], [], []
    offset = 0
    for i, document in enumerate(documents):
        at = np.flatnonzero(document.is_target)
        at = at[at >= ahead]
        rows.append(at + (offset - ahead))
        token_ids.append(document.token_ids[at])
        owners.append(np.full(len(at), i))
        offset += len(document)
    if not rows:
        empty = torch.zeros(0, dtype=torch.int64)
        return Targets(empty, empty, empty)
    joined = (np.concatenate(parts).astype(np.int64) for parts in (rows, token_ids, owners))
    return Targets(*(torch.from_numpy(part) for part in joined))


def count(documents: Sequence[Document], *, ahead: int) -> int:
    """How many targets ``targets`` finds."""
    return sum(int(np.count_nonzero(document.is_target[ahead:])) for document in documents)
