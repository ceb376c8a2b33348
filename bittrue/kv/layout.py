"""The ledger: from a model's shape to the bytes of every cache pool, for planner, pools and metrics alike.

A *page* holds what 128 tokens leave behind for good, in every layer at once; a *state slot* holds the fixed
part of one live sequence. The parts and their shapes are those of ``ops.contracts.LayerCache``.
"""

import hashlib
from dataclasses import dataclass
from math import inf, prod
from typing import Literal, Protocol

from bittrue.config.formats import ActDtype, Level, RowFormat, ceil_div, index_key_format, kv_row_format
from bittrue.errors import ConfigError

LayerKind = Literal["window", "csa", "hca"]
PartName = Literal["window", "rows", "keys", "csa", "csa_index", "hca_fold", "hca_pending"]
CSA_RATIO = 4
HCA_RATIO = 128
PAGE_TOKENS = 128  # the least common multiple of the two ratios: a page ends with a whole row in every layer

# Layers begin at multiples of this in the offload file: a page fault maps what lies around it in the layer.
OFFLOAD_ALIGN = 1 << 16

# An entry of a CSA layer pools 8 tokens, so the raw rows of the last 8 must be at hand.
CSA_FRONTIER = 8


class CacheShape(Protocol):
    """What the ledger needs to know of a model (ModelConfig has it)."""

    @property
    def num_layers(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope_dim(self) -> int: ...
    @property
    def index_head_dim(self) -> int: ...
    @property
    def window(self) -> int: ...
    def layer_kind(self, layer: int, /) -> LayerKind: ...


@dataclass(frozen=True, slots=True)
class CachePart:
    """One tensor of ``LayerCache``, [pages or slots, *shape]: ``shape`` is that of one page or slot.

    ``offloaded``: it lies in a file (kv/offload.py), and its bytes are no memory.
    """

    name: PartName
    per: Literal["page", "slot"]
    dtype: Literal["u8", "f32"]
    shape: tuple[int, ...]
    offloaded: bool = False

    @property
    def bytes(self) -> int:
        return prod(self.shape) * (4 if self.dtype == "f32" else 1)


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The parts of one layer. ``key_format`` is None where there are no index keys."""

    kind: LayerKind
    row_format: RowFormat
    key_format: RowFormat | None
    parts: tuple[CachePart, ...]

    @property
    def page_bytes(self) -> int:
        """Of a page, the bytes in memory."""
        return sum(part.bytes for part in self.parts if part.per == "page" and not part.offloaded)

    @property
    def offloaded_page_bytes(self) -> int:
        """Of a page, the bytes in the offload file."""
        return sum(part.bytes for part in self.parts if part.offloaded)

    @property
    def slot_bytes(self) -> int:
        return sum(part.bytes for part in self.parts if part.per == "slot")


def pages_for(num_tokens: int) -> int:
    """Pages that hold ``num_tokens`` tokens."""
    return ceil_div(num_tokens, PAGE_TOKENS)


def layer_layout(
    kind: LayerKind, config: CacheShape, *, level: Level, act: ActDtype, max_draft: int, offload: bool = False
) -> LayerLayout:
    """The parts of a layer of ``kind``. Rings hold what a rejected draft must not lose; ``offload`` puts CSA
    rows into the offload file."""
    c, index_dim = config.head_dim, config.index_head_dim
    row = kv_row_format(level, act, c, config.rope_dim)
    window = CachePart("window", "slot", "u8", (config.window + max_draft, row.bytes))
    if kind == "window":
        return LayerLayout(kind, row, None, (window,))
    if kind == "csa":
        key = index_key_format(level, act, index_dim)
        rows_per_page = PAGE_TOKENS // CSA_RATIO
        frontier = CSA_FRONTIER + max_draft
        parts = (
            window,
            CachePart("rows", "page", "u8", (rows_per_page, row.bytes), offloaded=offload),
            CachePart("keys", "page", "u8", (rows_per_page, key.bytes)),
            CachePart("csa", "slot", "f32", (frontier, 2, 2 * c)),
            CachePart("csa_index", "slot", "f32", (frontier, 2, 2 * index_dim)),
        )
        return LayerLayout(kind, row, key, parts)
    pooled = (
        window,
        CachePart("rows", "page", "u8", (PAGE_TOKENS // HCA_RATIO, row.bytes)),
        CachePart("hca_fold", "slot", "f32", (3, c)),
        CachePart("hca_pending", "slot", "f32", (max_draft, 2, c)),
    )
    return LayerLayout(kind, row, None, pooled)


@dataclass(frozen=True, slots=True)
class KVBudget:
    """How a number of bytes becomes pages and state slots, and back. ``max_snapshots``: slots of use beside
    those of running sequences."""

    page_bytes: int
    slot_bytes: int
    max_sequences: int
    max_snapshots: int = 0

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise ConfigError(
                f"max_sequences is {self.max_sequences}; it must be 1 or more", field="max_sequences"
            )

    def fit(self, budget_bytes: int, *, max_context: int) -> tuple[int, int]:
        """How many (pages, slots) to make of ``budget_bytes``: never more than ``max_sequences`` could use.

        One slot and one page always; further slots, each with a page, out of at most a quarter of the
        budget; slots for snapshots out of another; the rest is pages. So a budget short of one full context
        still serves many short sequences at once, and a long one has half of it at least.
        Raises ConfigError when not even one slot and one page fit.
        """
        if max_context < 1:
            raise ConfigError(f"max_context is {max_context}; it must be 1 or more", field="max_context")
        smallest = self.slot_bytes + self.page_bytes
        if budget_bytes < smallest:
            raise ConfigError(
                f"the KV memory is {budget_bytes} bytes, but one sequence of one page needs {smallest} "
                f"({self.slot_bytes} for its state, {self.page_bytes} for {PAGE_TOKENS} tokens); "
                "raise --kv-memory",
                field="kv_memory",
            )
        share = max(0, budget_bytes // 4 - smallest)
        pages = running = 1 + affordable(share, smallest, self.max_sequences - 1)
        snapshots = affordable(share, self.slot_bytes, self.max_snapshots)
        left = budget_bytes - running * smallest - snapshots * self.slot_bytes
        pages += affordable(left, self.page_bytes, self.max_sequences * pages_for(max_context) - pages)
        return pages, running + snapshots

    def needed_for(self, num_tokens: int) -> int:
        """The budget from which on ``fit`` gives one sequence of ``num_tokens`` tokens its pages.

        No smaller one does *and* keeps doing so: a budget that just reaches one more slot has fewer pages
        left, so the answer is the largest of the bounds that the numbers of slots set.
        """
        smallest = self.slot_bytes + self.page_bytes
        pages = pages_for(num_tokens)
        needed = begin = smallest
        running, snapshots = 1, 0
        while True:
            # Of the budgets that give this many slots, those below ``enough`` have too few pages.
            enough = max(pages, running) * self.page_bytes + (running + snapshots) * self.slot_bytes
            more_running = 4 * (running + 1) * smallest if running < self.max_sequences else inf
            more_snapshots = inf
            if snapshots < self.max_snapshots and self.slot_bytes:
                more_snapshots = 4 * (smallest + (snapshots + 1) * self.slot_bytes)
            end = min(more_running, more_snapshots)
            if enough > begin:
                needed = max(needed, int(min(enough, end)))
            # Half of a budget is pages: once that is enough, it stays so.
            if end == inf or begin // 2 > enough:
                return needed
            running += end == more_running
            snapshots += end == more_snapshots
            begin = int(end)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The cache of a whole model. ``layers[i]`` describes layer i."""

    layers: tuple[LayerLayout, ...]
    window: int
    max_draft: int
    num_draft_layers: int = 0  # the last ones of ``layers``: window layers of a draft module

    @classmethod
    def of(
        cls,
        config: CacheShape,
        *,
        level: Level,
        act: ActDtype,
        max_draft: int = 0,
        num_draft_layers: int = 0,
        offload: bool = False,
    ) -> "KVLayout":
        """The layout of ``config`` at a numeric level, with room to undo ``max_draft`` tokens, and of
        ``num_draft_layers`` window layers behind it; with ``offload``, CSA rows lie in a file."""
        if max_draft < 0:
            raise ConfigError(f"max_draft is {max_draft}; it must be 0 or more", field="max_draft")
        layers = tuple(
            layer_layout(
                config.layer_kind(i), config, level=level, act=act, max_draft=max_draft, offload=offload
            )
            for i in range(config.num_layers)
        )
        draft = layer_layout("window", config, level=level, act=act, max_draft=max_draft)
        return cls(layers + (draft,) * num_draft_layers, config.window, max_draft, num_draft_layers)

    @property
    def page_bytes(self) -> int:
        """Bytes in memory of one page, all layers."""
        return sum(layer.page_bytes for layer in self.layers)

    @property
    def offloaded_page_bytes(self) -> int:
        """Bytes of one page in the offload file, all layers."""
        return sum(layer.offloaded_page_bytes for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one state slot, all layers."""
        return sum(layer.slot_bytes for layer in self.layers)

    def digest(self) -> bytes:
        """What the bytes of a page or a state mean: kinds, formats and widths of the layers, not the sizes of
        rings."""
        facts = [
            (x.kind, repr(x.row_format), repr(x.key_format), part.name, part.dtype, part.shape[1:])
            for x in self.layers
            for part in x.parts
        ]
        document = repr((facts, self.window, self.num_draft_layers)).encode()
        return hashlib.blake2b(document, digest_size=20).digest()

    def part_bytes(self, name: PartName) -> int:
        """Bytes in memory of one part in one page or slot, all layers: the lines of the ledger."""
        parts = (part for layer in self.layers for part in layer.parts)
        return sum(part.bytes for part in parts if part.name == name and not part.offloaded)

    def offload_offsets(self, pages: int) -> tuple[int, ...]:
        """Where the offloaded part of each layer that has one begins in the file, and where the file ends."""
        offsets = [0]
        for layer in self.layers:
            if layer.offloaded_page_bytes:
                size = pages * layer.offloaded_page_bytes
                offsets.append(offsets[-1] + ceil_div(size, OFFLOAD_ALIGN) * OFFLOAD_ALIGN)
        return tuple(offsets)

    def offload_file_bytes(self, pages: int) -> int:
        """Bytes of the offload file for ``pages`` pages; 0 where nothing is offloaded."""
        return self.offload_offsets(pages)[-1]

    def pool_bytes(self, pages: int, slots: int) -> int:
        """Bytes in memory of ``pages`` pages and ``slots`` state slots."""
        return pages * self.page_bytes + slots * self.slot_bytes

    def budget(self, max_sequences: int, max_snapshots: int = 0) -> KVBudget:
        """The same layout seen from the bytes."""
        return KVBudget(self.page_bytes, self.slot_bytes, max_sequences, max_snapshots)

    def fit(
        self, budget_bytes: int, *, max_sequences: int, max_context: int, max_snapshots: int = 0
    ) -> tuple[int, int]:
        """``KVBudget.fit``: how many (pages, slots) to make of ``budget_bytes``."""
        return self.budget(max_sequences, max_snapshots).fit(budget_bytes, max_context=max_context)


def affordable(budget_bytes: int, unit_bytes: int, wanted: int) -> int:
    """How many of ``wanted`` units the budget buys; units without bytes (window-only models) are free."""
    return max(0, wanted if unit_bytes == 0 else min(wanted, budget_bytes // unit_bytes))
