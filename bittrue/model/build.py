"""Groups the tensors of a checkpoint, by their official names, into the parameters the model reads. Copies
nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.model.deepseek_v4 import (
    Attention,
    Block,
    Compressor,
    FeedForward,
    HyperConnection,
    Indexer,
    Parameters,
)
from bittrue.ops.contracts import CompressorWeights, ExpertBank, Weight


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Access to a checkpoint by official name: a plain tensor, or a matrix with its scale."""

    tensor: Callable[[str], Tensor]
    weight: Callable[[str], Weight]


def build_parameters(config: ModelConfig, source: TensorSource) -> Parameters:
    """All parameters of the main model (not the draft layers)."""
    return Parameters(
        embed=source.tensor("embed.weight"),
        blocks=tuple(_block(config, source, i) for i in range(config.num_layers)),
        hc_head=_hyper(source, "hc_head"),
        norm=source.tensor("norm.weight"),
        head=source.weight("head.weight"),
    )


def _hyper(source: TensorSource, prefix: str) -> HyperConnection:
    return HyperConnection(
        fn=source.tensor(f"{prefix}_fn"),
        base=source.tensor(f"{prefix}_base"),
        scale=source.tensor(f"{prefix}_scale"),
    )


def _block(config: ModelConfig, source: TensorSource, layer: int) -> Block:
    name = f"layers.{layer}"
    return Block(
        kind=config.layer_kind(layer),
        hc_attn=_hyper(source, f"{name}.hc_attn"),
        attn_norm=source.tensor(f"{name}.attn_norm.weight"),
        attn=_attention(config, source, layer),
        hc_ffn=_hyper(source, f"{name}.hc_ffn"),
        ffn_norm=source.tensor(f"{name}.ffn_norm.weight"),
        ffn=_feed_forward(config, source, layer),
    )


def _attention(config: ModelConfig, source: TensorSource, layer: int) -> Attention:
    name = f"layers.{layer}.attn"
    kind = config.layer_kind(layer)
    inv_freq = torch.tensor(config.layer_inv_freq(layer), dtype=torch.float32)
    indexer = None
    if kind == "csa":
        indexer = Indexer(
            wq_b=source.weight(f"{name}.indexer.wq_b.weight"),
            weights_proj=source.weight(f"{name}.indexer.weights_proj.weight"),
            compressor=_compressor(config, source, f"{name}.indexer.compressor", inv_freq),
        )
    return Attention(
        wq_a=source.weight(f"{name}.wq_a.weight"),
        q_norm=source.tensor(f"{name}.q_norm.weight"),
        wq_b=source.weight(f"{name}.wq_b.weight"),
        wkv=source.weight(f"{name}.wkv.weight"),
        kv_norm=source.tensor(f"{name}.kv_norm.weight"),
        wo_a=source.weight(f"{name}.wo_a.weight"),
        wo_b=source.weight(f"{name}.wo_b.weight"),
        sink=source.tensor(f"{name}.attn_sink"),
        compressor=None if kind == "window" else _compressor(config, source, f"{name}.compressor", inv_freq),
        indexer=indexer,
    )


def _compressor(config: ModelConfig, source: TensorSource, name: str, inv_freq: Tensor) -> Compressor:
    return Compressor(
        wkv=source.weight(f"{name}.wkv.weight"),
        wgate=source.weight(f"{name}.wgate.weight"),
        pool=CompressorWeights(
            ape=source.tensor(f"{name}.ape"),
            norm=source.tensor(f"{name}.norm.weight"),
            inv_freq=inv_freq,
            rope_dim=config.rope_dim,
            eps=config.norm_eps,
        ),
    )


def _feed_forward(config: ModelConfig, source: TensorSource, layer: int) -> FeedForward:
    name = f"layers.{layer}.ffn"
    is_hash = layer < config.num_hash_layers

    def bank(part: str) -> tuple[Weight, ...]:
        return tuple(source.weight(f"{name}.experts.{e}.{part}.weight") for e in range(config.num_experts))

    def shared(part: str) -> Weight:
        return source.weight(f"{name}.shared_experts.{part}.weight")

    return FeedForward(
        gate=source.weight(f"{name}.gate.weight"),
        bias=None if is_hash else source.tensor(f"{name}.gate.bias"),
        table=source.tensor(f"{name}.gate.tid2eid") if is_hash else None,
        experts=ExpertBank(
            w1=bank("w1"), w3=bank("w3"), w2=bank("w2"), shared=(shared("w1"), shared("w3"), shared("w2"))
        ),
    )
