"""What the engine chose, in the form in which the trainer repeats it."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.ops.contracts import CSA_RATIO
from bittrue.rl.types import Rollout
from bittrue.train.differentiable import UNKNOWN
from bittrue.train.document import Document
from bittrue.train.trainer import Routes


def document_of(rollout: Rollout) -> Document:
    """Prompt and answer; the answer's tokens are targets."""
    token_ids = np.concatenate([rollout.prompt_ids, rollout.answer_ids])
    return Document(token_ids, np.arange(len(token_ids)) >= len(rollout.prompt_ids), rollout.prompt_key)


def routes_of(config: ModelConfig, rollouts: Sequence[Rollout]) -> Routes:
    """Experts of the learned routers for the documents of ``rollouts``, by the name of the router's bias. A
    token without a record chooses for itself: the last of each, which the engine never computed, is one."""
    layers = range(config.num_hash_layers, config.num_layers)
    k = config.experts_per_token
    parts = []
    for rollout in rollouts:
        whole = np.full((rollout.num_tokens, len(layers), k), UNKNOWN, np.int16)
        _fill(whole, rollout.experts)
        parts.append(whole)
    joined = np.concatenate(parts)
    return {
        f"layers.{layer}.ffn.gate.bias": torch.from_numpy(np.ascontiguousarray(joined[:, i]))
        for i, layer in enumerate(layers)
    }


def rows_of(config: ModelConfig, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Rows of the CSA layers for the documents of ``rollouts``. Where every visible row is read none is
    recorded; a token further on without a record chooses for itself."""
    num_layers = config.layer_kinds[: config.num_layers].count("csa")
    k = config.index_topk
    parts = []
    for rollout in rollouts:
        whole = np.full((rollout.num_tokens, num_layers, k), UNKNOWN, np.int32)
        _fill(whole, rollout.index_rows)
        visible = (np.arange(rollout.num_tokens) + 1) // CSA_RATIO
        few = np.flatnonzero(visible <= k)
        ids = np.arange(k)
        whole[few] = np.where(ids < visible[few, None], ids, -1)[:, None]
        parts.append(whole)
    joined = np.concatenate(parts)
    return [torch.from_numpy(np.ascontiguousarray(joined[:, i])) for i in range(num_layers)]


def _fill(whole: NDArray[np.signedinteger], record: NDArray[np.unsignedinteger] | None) -> None:
    """The record ends before the last token."""
    if record is not None and len(record):
        whole[len(whole) - 1 - len(record) : -1] = record
