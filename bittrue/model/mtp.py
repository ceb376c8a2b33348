"""The classic draft module (2.8): one layer that guesses the token after the next from the main model's last
streams.

At position t it reads the streams that the last block left there and the embedding of token t + 1, and its
logits are about token t + 2. Its own streams can stand in for those of a position not computed yet: that is
how it guesses further. It is a window layer, so its cache is one ring of rows per sequence.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from bittrue.model.deepseek_v4 import Block, DeepseekV4, HyperConnection
from bittrue.ops.contracts import Batch, LayerCache, OpTable, Weight


@dataclass(frozen=True, slots=True)
class MtpParameters:
    """Every tensor of ``mtp.0``, as the checkpoint stores it."""

    enorm: Tensor  # [D]
    hnorm: Tensor  # [D]
    e_proj: Weight  # [D, D]
    h_proj: Weight  # [D, D]
    block: Block
    hc_head: HyperConnection  # fn [M, M*D], base [M], scale [1]
    norm: Tensor  # [D]


@dataclass(frozen=True, slots=True)
class MtpInput:
    """What one call reads: the tokens of ``batch`` are those *after* its positions; ``streams`` [T, M, D] act
    are the last block's at the positions, or the module's own; ``once`` is made by ``once_each``."""

    batch: Batch
    streams: Tensor
    once: tuple[Tensor, Tensor]


def once_each(num_tokens: int, num_streams: int) -> tuple[Tensor, Tensor]:
    """Factors with which ``hc_post`` adds its input to every stream as it is: ones [T, M] and identities
    [T, M, M]."""
    ones = torch.ones(num_tokens, num_streams)
    return ones, torch.eye(num_streams).repeat(num_tokens, 1, 1)


class Mtp:
    """The module beside the model whose embedding, head and numeric level it shares."""

    def __init__(self, model: DeepseekV4, parameters: MtpParameters) -> None:
        self.model = model
        self.parameters = parameters

    def on(self, ops: OpTable) -> "Mtp":
        """The same module computed by other ops."""
        other = copy.copy(self)
        other.model = self.model.on(ops)
        return other

    def forward(self, given: MtpInput, cache: LayerCache) -> Tensor:
        """Streams [T, M, D] act of the module at the positions of ``given``, whose rows enter the ring."""
        batch = given.batch
        angles = self.model.window_angles(batch.positions)
        return self.model.block(self._mix(given), batch, self.parameters.block, cache, angles)

    def store_rows(self, given: MtpInput, cache: LayerCache) -> None:
        """Puts the same rows in the ring, where nothing is to be guessed: a fraction of the work, and nothing
        is read from the cache."""
        batch = given.batch
        angles = self.model.window_angles(batch.positions)
        self.model.store_rows(self._mix(given), batch, self.parameters.block, cache, angles)

    def logits(self, streams: Tensor) -> Tensor:
        """Logits [T, V] f32 of the token two after each position, from the module's streams [T, M, D]."""
        hidden = self.model.collapse(streams, self.parameters.hc_head, self.parameters.norm)
        return self.model.project(hidden)

    def _mix(self, given: MtpInput) -> Tensor:
        """W_e RMS(E[next token]) + W_h RMS(H_k) for each stream H_k, [T, M, D] act."""
        model, p = self.model, self.parameters
        ops, eps, quantize = model.ops, model.config.norm_eps, model.is_published
        num_tokens, num_streams, width = given.streams.shape
        embedded = ops.embed(given.batch.token_ids, model.parameters.embed, 1, model.act)
        e = ops.rms_norm(embedded.view(num_tokens, width), p.enorm, eps)
        h = ops.rms_norm(given.streams, p.hnorm, eps).view(num_tokens * num_streams, width)
        e, h = (ops.linear(x, weight, quantize=quantize) for x, weight in ((e, p.e_proj), (h, p.h_proj)))
        return ops.hc_post(e, h.view(num_tokens, num_streams, width), *given.once)
