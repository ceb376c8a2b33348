"""The cache tensors that a KVLayout describes, and the moves that copy pages and states between them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bittrue.kv.identity import STATE_HEAD, BlobName
from bittrue.kv.layout import CSA_FRONTIER, CSA_RATIO, PAGE_TOKENS, CachePart, KVLayout, LayerLayout
from bittrue.kv.moves import (
    ClearSlot,
    CopyPage,
    CopySlot,
    LoadPage,
    LoadState,
    Move,
    SavePage,
    SaveState,
)
from bittrue.ops.contracts import LayerCache

DTYPES = {"u8": torch.uint8, "f32": torch.float32}

# Where a part's memory comes from: ordinary memory, or a file for what is offloaded.
Allocator = Callable[[LayerLayout, CachePart, tuple[int, ...]], Tensor]


def plain_memory(layer: LayerLayout, part: CachePart, shape: tuple[int, ...]) -> Tensor:
    """Not cleared: every row is addressed by position, so nothing is read that its sequence did not write."""
    return torch.empty(shape, dtype=DTYPES[part.dtype])


def allocate(
    layout: KVLayout, *, pages: int, slots: int, allocator: Allocator = plain_memory
) -> list[LayerCache]:
    """One LayerCache per layer with room for ``pages`` pages and ``slots`` state slots:
    ``layout.pool_bytes`` bytes."""
    return [_layer_cache(layer, pages, slots, allocator) for layer in layout.layers]


def _layer_cache(layer: LayerLayout, pages: int, slots: int, allocator: Allocator) -> LayerCache:
    parts = {
        part.name: allocator(layer, part, (pages if part.per == "page" else slots, *part.shape))
        for part in layer.parts
    }
    return LayerCache(kind=layer.kind, row_format=layer.row_format, key_format=layer.key_format, **parts)


@dataclass(frozen=True, slots=True)
class KVPool:
    """The caches of all layers, and what moves do to them.

    ``save`` takes a blob to the tiers. What of its bytes an answer can depend on depends on the tokens before
    its position alone: not on ring sizes, so that runs with other draft lengths read each other's. (The last
    row of a draft layer's ring was computed with the token after it, which only acceptance may notice.)
    """

    layout: KVLayout
    caches: Sequence[LayerCache]
    save: Callable[[bytes, BlobName, bytes], None] = lambda space, name, data: None

    def apply(self, moves: Iterable[Move]) -> None:
        """Carries out ``moves`` in order."""
        for move in moves:
            match move:
                case CopyPage(source, target):
                    self._copy("page", source, target)
                case CopySlot(source, target):
                    self._copy("slot", source, target)
                case ClearSlot(slot):
                    for _, tensor in self._parts("slot"):
                        tensor[slot].zero_()
                case SavePage(page, space, name):
                    self.save(space, name, self.page_bytes(page))
                case SaveState(slot, page, position, fold, space, name):
                    self.save(space, name, self.state_bytes(slot, page, position, fold))
                case LoadPage(_, data, page):
                    self.load_page(page, data)
                case LoadState(_, data, slot, page, position):
                    self.load_state(slot, page, position, data)

    # ---- blobs -------------------------------------------------------------------------------------------

    def page_bytes(self, page: int) -> bytes:
        """The rows of a full page: layer by layer, rows then keys."""
        return b"".join(_bytes(tensor[page]) for _, tensor in self._parts("page"))

    def load_page(self, page: int, data: bytes) -> None:
        reader = _Reader(data)
        for _, tensor in self._parts("page"):
            reader.into(tensor[page])
        reader.end()

    def state_bytes(self, slot: int, page: int | None, position: int, fold: int) -> bytes:
        """The state before the token at ``position``: head, then per layer its parts by ascending position,
        then the rows of the open page."""
        pieces = [STATE_HEAD.pack(position, fold)]
        for part, tensor in self._parts("slot"):
            pieces += [_bytes(rows) for rows in _state_rows(self.layout, part, tensor, slot, position, fold)]
        if page is not None:
            pieces += [_bytes(rows) for rows in self._open_rows(page, position)]
        return b"".join(pieces)

    def load_state(self, slot: int, page: int | None, position: int, data: bytes) -> None:
        """Raises ValueError, nothing half done that matters: the slot is not used before the move is."""
        reader = _Reader(data)
        at, fold = STATE_HEAD.unpack(reader.take(STATE_HEAD.size))
        assert at == position, f"a state of position {at} where {position} was asked for"
        for part, tensor in self._parts("slot"):
            if part.name == "hca_fold":
                reader.into(tensor[slot])
                continue
            positions = _ring_positions(self.layout, part, position, fold)
            rows = torch.empty((len(positions), *tensor.shape[2:]), dtype=tensor.dtype)
            reader.into(rows)
            tensor[slot, _places(positions, tensor.shape[1])] = rows
        if page is not None:
            for rows in self._open_rows(page, position):
                reader.into(rows)
        reader.end()

    # ---- the parts ---------------------------------------------------------------------------------------

    def _parts(self, per: str) -> Iterator[tuple[CachePart, Tensor]]:
        """Layers in order, draft layers too: a draft after a hit is as good as before it."""
        for layer, cache in zip(self.layout.layers, self.caches, strict=True):
            for part in layer.parts:
                if part.per == per:
                    yield part, getattr(cache, part.name)

    def _copy(self, per: str, source: int, target: int) -> None:
        if source != target:
            for _, tensor in self._parts(per):
                tensor[target].copy_(tensor[source])

    def _open_rows(self, page: int, position: int) -> Iterator[Tensor]:
        """The entries of the open page that have closed: those of CSA rows and index keys."""
        closed = position % PAGE_TOKENS // CSA_RATIO
        for _, tensor in self._parts("page"):
            if tensor.shape[1] > 1 and closed:
                yield tensor[page, :closed]


def _state_rows(
    layout: KVLayout, part: CachePart, tensor: Tensor, slot: int, position: int, fold: int
) -> Iterator[Tensor]:
    if part.name == "hca_fold":
        yield tensor[slot]
    else:
        positions = _ring_positions(layout, part, position, fold)
        yield tensor[slot, _places(positions, tensor.shape[1])]


def _ring_positions(layout: KVLayout, part: CachePart, position: int, fold: int) -> range:
    """The positions whose rows a token at ``position`` or later can ask of a ring."""
    if part.name == "window":
        return range(max(0, position - layout.window + 1), position)
    if part.name == "hca_pending":
        return range(fold, position)
    return range(max(0, position - CSA_FRONTIER + 1), position)


def _places(positions: range, ring: int) -> Tensor:
    return torch.arange(positions.start, positions.stop) % max(ring, 1)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


class _Reader:
    """Takes a blob apart from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        assert len(piece) == count, "a blob that was verified is too short for this layout"
        self._at += count
        return piece

    def into(self, tensor: Tensor) -> None:
        piece = bytearray(self.take(tensor.nbytes))
        if piece:
            tensor.copy_(torch.frombuffer(piece, dtype=tensor.dtype).view(tensor.shape))

    def end(self) -> None:
        assert self._at == len(self._data), "a blob that was verified is too long for this layout"
