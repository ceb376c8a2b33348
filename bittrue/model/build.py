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
from bittrue.model.mtp import MtpParameters
from bittrue.ops.contracts import CompressorWeights, ExpertBank, LayerKind, Weight


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Access to a checkpoint by official name: a plain tensor, or a matrix with its scale."""

    tensor: Callable[[str], Tensor]
    weight: Callable[[str], Weight]


def build_parameters(config: ModelConfig, source: TensorSource) -> Parameters:
    """All parameters of the main model (not the draft layers)."""
    return Parameters(
        embed=source.tensor("embed.weight"),
        blocks=tuple(_main_block(config, source, i) for i in range(config.num_layers)),
        hc_head=_hyper(source, "hc_head"),
        norm=source.tensor("norm.weight"),
        head=source.weight("head.weight"),
    )


def build_mtp(config: ModelConfig, source: TensorSource) -> MtpParameters:
    """The parameters of the classic draft module, ``mtp.0``: a window layer with a learned router, beside the
    main model's embedding and head."""
    name = "mtp.0"
    return MtpParameters(
        enorm=source.tensor(f"{name}.enorm.weight"),
        hnorm=source.tensor(f"{name}.hnorm.weight"),
        e_proj=source.weight(f"{name}.e_proj.weight"),
        h_proj=source.weight(f"{name}.h_proj.weight"),
        block=_block(
            source,
            name,
            _attention(source, f"{name}.attn"),
            _feed_forward(config, source, f"{name}.ffn", is_hash=False),
            kind="window",
        ),
        hc_head=_hyper(source, f"{name}.hc_head"),
        norm=source.tensor(f"{name}.norm.weight"),
    )


def _hyper(source: TensorSource, prefix: str) -> HyperConnection:
    return HyperConnection(
        fn=source.tensor(f"{prefix}_fn"),
        base=source.tensor(f"{prefix}_base"),
        scale=source.tensor(f"{prefix}_scale"),
    )


def _main_block(config: ModelConfig, source: TensorSource, layer: int) -> Block:
    name, kind = f"layers.{layer}", config.layer_kind(layer)
    attn = f"{name}.attn"
    inv_freq = torch.tensor(config.layer_inv_freq(layer), dtype=torch.float32)
    compressor = indexer = None
    if kind != "window":
        compressor = _compressor(config, source, f"{attn}.compressor", inv_freq)
    if kind == "csa":
        indexer = Indexer(
            wq_b=source.weight(f"{attn}.indexer.wq_b.weight"),
            weights_proj=source.weight(f"{attn}.indexer.weights_proj.weight"),
            compressor=_compressor(config, source, f"{attn}.indexer.compressor", inv_freq),
        )
    return _block(
        source,
        name,
        _attention(source, attn, compressor, indexer),
        _feed_forward(config, source, f"{name}.ffn", is_hash=layer < config.num_hash_layers),
        kind=kind,
    )


def _block(source: TensorSource, name: str, attn: Attention, ffn: FeedForward, *, kind: LayerKind) -> Block:
    """The block of that name: its two sub-layers, and the hyper-connections and norms around them."""
    return Block(
        kind=kind,
        hc_attn=_hyper(source, f"{name}.hc_attn"),
        attn_norm=source.tensor(f"{name}.attn_norm.weight"),
        attn=attn,
        hc_ffn=_hyper(source, f"{name}.hc_ffn"),
        ffn_norm=source.tensor(f"{name}.ffn_norm.weight"),
        ffn=ffn,
    )


def _attention(
    source: TensorSource, name: str, compressor: Compressor | None = None, indexer: Indexer | None = None
) -> Attention:
    return Attention(
        wq_a=source.weight(f"{name}.wq_a.weight"),
        q_norm=source.tensor(f"{name}.q_norm.weight"),
        wq_b=source.weight(f"{name}.wq_b.weight"),
        wkv=source.weight(f"{name}.wkv.weight"),
        kv_norm=source.tensor(f"{name}.kv_norm.weight"),
        wo_a=source.weight(f"{name}.wo_a.weight"),
        wo_b=source.weight(f"{name}.wo_b.weight"),
        sink=source.tensor(f"{name}.attn_sink"),
        compressor=compressor,
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


def _feed_forward(config: ModelConfig, source: TensorSource, name: str, *, is_hash: bool) -> FeedForward:
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
