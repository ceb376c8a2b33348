"""Allocates the cache tensors that a KVLayout describes."""

import torch

from bittrue.kv.layout import KVLayout, LayerLayout
from bittrue.ops.contracts import LayerCache

DTYPES = {"u8": torch.uint8, "f32": torch.float32}


def allocate(layout: KVLayout, *, pages: int, slots: int, device: str = "cpu") -> list[LayerCache]:
    """One LayerCache per layer with room for ``pages`` pages and ``slots`` state slots:
    ``layout.pool_bytes`` bytes.

    The memory is not cleared: every row is addressed by position, so nothing is read that its sequence did
    not write.
    """
    return [_layer_cache(layer, pages, slots, device) for layer in layout.layers]


def _layer_cache(layer: LayerLayout, pages: int, slots: int, device: str) -> LayerCache:
    parts = {
        part.name: torch.empty(
            (pages if part.per == "page" else slots, *part.shape), dtype=DTYPES[part.dtype], device=device
        )
        for part in layer.parts
    }
    return LayerCache(kind=layer.kind, row_format=layer.row_format, key_format=layer.key_format, **parts)
