"""What the engine chose, in the form in which the trainer repeats it, and beside what the trainer chooses."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.errors import RolloutInvalid
from bittrue.ops.contracts import CSA_RATIO
from bittrue.rl.parity import Selection, compare_selections
from bittrue.rl.types import Rollout
from bittrue.train.differentiable import UNKNOWN
from bittrue.train.document import Document
from bittrue.train.trainer import Routes, Rows


def document_of(rollout: Rollout) -> Document:
    """Prompt and answer; the answer's tokens are targets."""
    token_ids = np.concatenate([rollout.prompt_ids, rollout.answer_ids])
    return Document(token_ids, np.arange(len(token_ids)) >= len(rollout.prompt_ids), rollout.prompt_key)


def routes_of(config: ModelConfig, rollouts: Sequence[Rollout]) -> Routes:
    """Experts of the learned routers for the documents of ``rollouts``, by the name of the router's bias. A
    token without a record chooses for itself: the last of each, which the engine never computed, is one.
    Raises RolloutInvalid where a record has another shape or names an expert that is not."""
    names, k = _router_names(config), config.experts_per_token
    parts = []
    for rollout in rollouts:
        whole = np.full((rollout.num_tokens, len(names), k), UNKNOWN, np.int16)
        _fill(whole, rollout.experts, np.full(len(whole), config.num_experts), "expert", rollout)
        parts.append(whole)
    joined = np.concatenate(parts)
    return {name: torch.from_numpy(np.ascontiguousarray(joined[:, i])) for i, name in enumerate(names)}


def rows_of(config: ModelConfig, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Rows of the CSA layers for the documents of ``rollouts``. Where every visible row is read none is
    recorded; a token further on without a record chooses for itself. Raises RolloutInvalid where a record
    has another shape or names a row that its token does not see: nothing behind it would look again."""
    num_layers = config.layer_kinds[: config.num_layers].count("csa")
    k = config.index_topk
    parts = []
    for rollout in rollouts:
        whole = np.full((rollout.num_tokens, num_layers, k), UNKNOWN, np.int32)
        visible = _visible(rollout)
        _fill(whole, rollout.index_rows, visible, "row", rollout)
        few = np.flatnonzero(visible <= k)
        ids = np.arange(k)
        whole[few] = np.where(ids < visible[few, None], ids, -1)[:, None]
        parts.append(whole)
    joined = np.concatenate(parts)
    return [torch.from_numpy(np.ascontiguousarray(joined[:, i])) for i in range(num_layers)]


def selections_of(
    config: ModelConfig, rollouts: Sequence[Rollout], routes: Routes, rows: Rows
) -> tuple[Selection, Selection]:
    """Recorded against recomputed experts and rows; ``routes`` and ``rows`` are what ``Trainer.chosen`` gives
    for the documents of ``rollouts``. Compared are the tokens with a record, of rows those that could not
    read all; ``first_token`` counts all tokens of the documents, as packed."""
    names = _router_names(config)
    recorded_routes = routes_of(config, rollouts)
    routing = _compared([recorded_routes[name] for name in names], [routes[name] for name in names])
    visible = np.concatenate([_visible(rollout) for rollout in rollouts])
    has_choice = torch.from_numpy(visible > config.index_topk)
    return routing, _compared(rows_of(config, rollouts), rows, has_choice)


def _compared(recorded: Rows, recomputed: Rows, among: Tensor | None = None) -> Selection:
    """Layers of ids [T, k]: those with a record, and ``among`` [T] bool."""
    if not recorded:
        nothing = np.zeros((0, 0, 0), np.int32)
        return compare_selections(nothing, nothing)
    known = recorded[0][:, 0] != UNKNOWN
    places = torch.nonzero(known if among is None else known & among).flatten()
    # Where no document is long the trainer's ids are as many as it saw rows: fewer than k.
    width = recorded[0].shape[1]
    own = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in recomputed]
    left, right = (torch.stack([ids[places] for ids in side], 1).numpy() for side in (recorded, own))
    found = compare_selections(left, right)
    first = int(places[found.first_token]) if found.first_token >= 0 else -1
    return replace(found, first_token=first)


def _visible(rollout: Rollout) -> NDArray[np.int64]:
    """Compressed rows each token may read, [P + A]."""
    return (np.arange(rollout.num_tokens) + 1) // CSA_RATIO


def _router_names(config: ModelConfig) -> list[str]:
    """Of the learned routers' biases, in the order of the layers."""
    return [f"layers.{layer}.ffn.gate.bias" for layer in range(config.num_hash_layers, config.num_layers)]


def _fill(
    whole: NDArray[np.signedinteger],
    record: NDArray[np.unsignedinteger] | None,
    limits: NDArray[np.int64],
    what: str,
    rollout: Rollout,
) -> None:
    """The record ends before the last token; ids of a token are below its one of ``limits`` [P + A]."""
    if record is None or not len(record):
        return
    if record.shape[1:] != whole.shape[1:]:
        fact = f"a token has {what}s {list(record.shape[1:])} (layers, ids), not {list(whole.shape[1:])}"
        raise _foreign(rollout, fact)
    first = len(whole) - 1 - len(record)
    wrong = np.flatnonzero((record >= limits[first:-1, None, None]).any(axis=(1, 2)))
    if len(wrong):
        token = first + int(wrong[0])
        raise _foreign(rollout, f"token {token} has {what} {record[wrong[0]].max()} of {limits[token]}")
    whole[first:-1] = record


def _foreign(rollout: Rollout, fact: str) -> RolloutInvalid:
    return RolloutInvalid(
        f"the record of a rollout of prompt {rollout.prompt_key} is not of its tokens and this model: {fact};"
        " keep a record with the tokens it was made for",
        prompt_key=rollout.prompt_key,
    )
