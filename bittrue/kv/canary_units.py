"""Units of the cache under watch: what each is (a tag) and what its bytes were (a checksum)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from bittrue.kv.layout import PartName

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]
Depths = npt.NDArray[np.int16]

# Tags that are no prefix's: nothing was written, zeros from which a replay starts, loaded and not yet read.
NOTHING, BLANK, LOADED = np.uint64(0), np.uint64(1), np.uint64(2)
_BLOCK_BYTES = 1 << 20  # rows whose checksums are computed at a time


@dataclass(frozen=True, slots=True)
class Fault:
    """One place that is not what its reader may expect.

    ``content``: bytes of one layer are not those that were stored. ``identity``: what is stored there, in all
    layers (``layer`` -1), belongs to another position or sequence. ``replay``: the token at ``position``
    depends on rows that a replay from a cleared state did not reach. ``position``: the first one of the page
    or slot.
    """

    kind: Literal["content", "identity", "replay"]
    part: str
    layer: int
    place: str
    position: int
    expected: str
    found: str

    def __str__(self) -> str:
        layer = "all layers" if self.layer < 0 else f"layer {self.layer}"
        return (
            f"{self.kind} of {self.part} in {self.place} ({layer}) at position {self.position}: expected "
            f"{self.expected}, found {self.found}"
        )


class Part:
    """One cache tensor of one layer, seen as units (rows), with the checksum of each as it was stored."""

    def __init__(self, name: PartName, layer: int, tensor: torch.Tensor, per_place: int) -> None:
        assert tensor.device.type == "cpu" and tensor.is_contiguous(), "the canary reads plain memory"
        self.name = name
        self.layer = layer
        self.num_units = tensor.shape[0] * per_place
        data = tensor.view(torch.uint8).numpy().reshape(self.num_units, -1)
        word = next(size for size in (8, 4, 2, 1) if data.shape[1] % size == 0)
        self._words = data.view(f"<u{word}")
        # Odd multipliers: a change of any one word changes the sum modulo 2^64.
        draw = np.random.default_rng(layer).integers(0, 1 << 63, self._words.shape[1], dtype=np.uint64)
        self._multipliers = draw * np.uint64(2) + np.uint64(1)
        self.sums = np.zeros(self.num_units, dtype=np.uint64)

    def compute(self, units: Indices) -> Hashes:
        """The checksum of what is there now."""
        sums = np.empty(len(units), dtype=np.uint64)
        block = max(1, _BLOCK_BYTES // (8 * len(self._multipliers)))
        for start in range(0, len(units), block):
            words = self._words[units[start : start + block]].astype(np.uint64, copy=False)
            np.einsum("ij,j->i", words, self._multipliers, out=sums[start : start + block])
        return sums


class Units:
    """Units that are written together in several layers and parts: one tag serves all, checksums are each
    part's own. ``per_place``: units of a page or a slot; unit u lies in place u // per_place."""

    def __init__(self, per: Literal["page", "slot"], per_place: int, parts: Sequence[Part]) -> None:
        self.per = per
        self.per_place = per_place
        self.parts = parts
        self.title = "+".join(sorted({part.name for part in parts}))
        count = parts[0].num_units
        self.tags = np.full(count, NOTHING)
        self.positions = np.full(count, -1, dtype=np.int64)
        self.depths = np.zeros(count, dtype=np.int16)  # see _depths

    def at(self, place: int, positions: Indices) -> Indices:
        """Units of a ring, by position."""
        return place * self.per_place + positions % self.per_place

    def place(self, place: int) -> slice:
        return slice(place * self.per_place, (place + 1) * self.per_place)

    def name(self, unit: int) -> str:
        return f"{self.per} {unit // self.per_place}"

    def record(self, units: Indices, tags: Hashes, positions: Indices, depths: Depths) -> None:
        """What was just written there."""
        self.mark(units, tags, positions, depths)
        for part in self.parts:
            part.sums[units] = part.compute(units)

    def mark(self, units: Indices, tags: Hashes, positions: Indices, depths: Depths) -> None:
        self.tags[units] = tags
        self.positions[units] = positions
        self.depths[units] = depths

    def copy(self, source: int, target: int) -> None:
        """As a move does: the checksums are those of what was to be copied."""
        one, other = self.place(source), self.place(target)
        self.tags[other], self.positions[other] = self.tags[one], self.positions[one]
        self.depths[other] = self.depths[one]
        for part in self.parts:
            part.sums[other] = part.sums[one]

    def fill(self, place: int, tag: np.uint64) -> None:
        where = self.place(place)
        self.tags[where], self.positions[where], self.depths[where] = tag, -1, 0

    def sum_place(self, place: int) -> None:
        """Checksums of whatever lies in a page or slot now."""
        units = np.arange(place * self.per_place, (place + 1) * self.per_place)
        for part in self.parts:
            part.sums[units] = part.compute(units)


@dataclass(frozen=True, slots=True)
class Reads:
    """Units of one kind that a segment can see, and what they must be. ``is_replay``: a cleared state will
    do."""

    units: Indices
    tags: Hashes
    positions: Indices
    is_replay: bool


def verify(units: Units, reads: Sequence[Reads]) -> Iterator[Fault]:
    """Tags against what the readers expect; then, where these are right, bytes against checksums."""
    if not reads:
        return
    where = np.concatenate([read.units for read in reads])
    tags = np.concatenate([read.tags for read in reads])
    positions = np.concatenate([read.positions for read in reads])
    will_do = np.repeat([read.is_replay for read in reads], [len(read.units) for read in reads])
    found = units.tags[where]
    right = (found == tags) | (will_do & (found == BLANK))
    for i in _first_of_places(units, where, np.flatnonzero(~right)):
        yield Fault(
            "identity",
            units.title,
            -1,
            units.name(where[i]),
            int(positions[i]),
            f"tag {tags[i]:016x}",
            _said(found[i], int(units.positions[where[i]])),
        )
    where, first = np.unique(where[right], return_index=True)
    positions = positions[right][first]
    for part in units.parts:
        sums, stored = part.compute(where), part.sums[where]
        for i in _first_of_places(units, where, np.flatnonzero(sums != stored)):
            yield Fault(
                "content",
                part.name,
                part.layer,
                units.name(where[i]),
                int(positions[i]),
                f"checksum {stored[i]:016x}",
                f"{sums[i]:016x}",
            )


def _first_of_places(units: Units, where: Indices, bad: Indices) -> list[int]:
    """Of the ``bad`` ones, the first of every page or slot."""
    _, first = np.unique(where[bad] // units.per_place, return_index=True)
    chosen: list[int] = np.sort(bad[first]).tolist()
    return chosen


def _said(tag: np.uint64, position: int) -> str:
    match tag:
        case 0:
            return "nothing written"
        case 1:
            return "a cleared state"
        case 2:
            return "a loaded blob of other tokens"
    return f"{tag:016x} of position {position}"


def prefix_hashes(tokens: Indices) -> Hashes:
    """[n + 1] u64: entry k tells the first k of ``tokens`` from all other sequences and lengths.

    A sum of well-mixed (position, token) pairs: order counts, and all prefixes come from one pass.
    """
    x = tokens.astype(np.uint64) + np.arange(1, len(tokens) + 1, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    hashes = np.full(len(tokens) + 1, 0x243F6A8885A308D3, dtype=np.uint64)
    hashes[1:] += np.cumsum(x, dtype=np.uint64)
    return hashes
