"""The values training starts from: the same for the same seed on every machine."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.model.inventory import DraftKind, TensorSpec, inventory
from bittrue.model.presets import noise, random_table

# A stream mostly stays itself from layer to layer; each sub-layer first reads one stream, in turn.
_KEEP = 3.0
_READ = 1.0
_MIX_SCALE = 0.1


def initial_tensors(
    config: ModelConfig, seed: int, *, draft: DraftKind = "none"
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, matrices as plain values f32. Projections have variance 1 / inputs, those
    that write to the streams a quarter of it; norms are one, sinks and biases zero."""
    for spec in inventory(config, draft=draft):
        if spec.dtype == "F8_E8M0":
            continue  # comes with its matrix
        yield spec.name, _initial(spec, seed, config)


def _initial(spec: TensorSpec, seed: int, config: ModelConfig) -> Tensor:
    name = spec.name
    shape = (*spec.shape[:-1], spec.shape[-1] * 2) if spec.dtype == "I8" else spec.shape
    if spec.dtype == "I64":
        return random_table(spec, seed, config.num_experts)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(("attn_sink", "gate.bias", ".ape", "hc_head_base")):
        return torch.zeros(shape)
    if name.endswith("_scale"):
        return torch.full(shape, _MIX_SCALE)
    if name.endswith("_base"):
        return _mixing_base(name, config)
    if name == "embed.weight":
        return noise(seed, name, *shape, std=1.0)
    std = float(shape[-1]) ** -0.5
    if name.endswith(("wo_b.weight", "w2.weight", "head.weight")):
        std *= 0.5
    return noise(seed, name, *shape, std=std)


def _mixing_base(name: str, config: ModelConfig) -> Tensor:
    """Static part of a hyper-connection: [pre, post, comb]."""
    m = config.hc_mult
    layer = 0 if name.startswith("mtp.") else int(name.split(".")[1])
    read = (2 * layer + ("hc_ffn" in name)) % m
    pre = torch.full((m,), -_READ)
    pre[read] = _READ
    return torch.cat((pre, torch.zeros(m), (_KEEP * torch.eye(m)).flatten()))
