"""The least a decode step must do: bytes read and operations made, from weights and cache formats alone.

What is left out is small beside them: activations, rows written, tables of angles.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from bittrue.engine.engine import Engine
from bittrue.kv.layout import CSA_RATIO, HCA_RATIO, LayerLayout
from bittrue.model.deepseek_v4 import FeedForward, HyperConnection, Parameters
from bittrue.ops.contracts import ExpertBank, Weight

Work = tuple[int, int]  # bytes read, operations
_LOOKED_UP: dict[type, str] = {Parameters: "embed", FeedForward: "table"}  # a token reads one row of these


def decode_floor(engine: Engine, context: int, batch: int) -> Work:
    """Of a step in which ``batch`` sequences decode at ``context`` tokens.

    Weights are read once a step, an expert's when a token chooses it: at most one reading per token and slot,
    at most all. Cache rows are read once per sequence, index keys only where the index has to choose.
    """
    parts = engine.parts
    weights = _weights(parts.runner.model.parameters, engine.config.experts_per_token, batch)
    num_bytes, operations = weights
    for layer in parts.layout.layers:
        cache = _cache(layer, engine, context)
        num_bytes, operations = num_bytes + batch * cache[0], operations + batch * cache[1]
    return num_bytes, operations


def _weights(value: Any, chosen: int, batch: int) -> Work:
    """What the weights under ``value`` cost a step; ``chosen`` experts a token."""
    if isinstance(value, Weight):
        scales = 0 if value.scale is None else value.scale.nbytes
        return value.data.nbytes + scales, 2 * value.data.numel() * (
            2 if value.format == "fp4" else 1
        ) * batch
    if isinstance(value, ExpertBank):
        return _experts(value, chosen, batch)
    if isinstance(value, HyperConnection):
        small = value.base.nbytes + value.scale.nbytes
        return value.fn.nbytes + small, 2 * value.fn.numel() * batch
    if isinstance(value, Tensor):
        return value.nbytes, 0
    if isinstance(value, tuple):
        return _sum(_weights(each, chosen, batch) for each in value)
    if not is_dataclass(value):
        return 0, 0
    names = [f.name for f in fields(value) if f.name != _LOOKED_UP.get(type(value))]
    return _sum(_weights(getattr(value, name), chosen, batch) for name in names)


def _experts(bank: ExpertBank, chosen: int, batch: int) -> Work:
    one = _weights((bank.w1[0], bank.w3[0], bank.w2[0]), chosen, 1)
    shared = _weights(bank.shared, chosen, batch)
    read = min(len(bank.w1), chosen * batch)
    return read * one[0] + shared[0], chosen * batch * one[1] + shared[1]


def _cache(layer: LayerLayout, engine: Engine, context: int) -> Work:
    """What one token reads of one layer's cache."""
    config = engine.config
    rows = min(context, config.window)
    num_bytes = operations = 0
    if layer.kind == "hca":
        rows += context // HCA_RATIO
    elif layer.kind == "csa":
        entries = context // CSA_RATIO
        rows += min(entries, config.index_topk)
        if entries > config.index_topk:
            assert layer.key_format is not None
            num_bytes += entries * layer.key_format.bytes
            operations += 2 * entries * config.index_num_heads * config.index_head_dim
    # Every row is key and value of every head.
    return (
        num_bytes + rows * layer.row_format.bytes,
        operations + 4 * rows * config.num_heads * config.head_dim,
    )


def _sum(works: Iterable[Work]) -> Work:
    num_bytes = operations = 0
    for more_bytes, more_operations in works:
        num_bytes, operations = num_bytes + more_bytes, operations + more_operations
    return num_bytes, operations
