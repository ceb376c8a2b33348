"""Checks, on every read, that what is cached is what was stored, and of the sequence that reads it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from bittrue.errors import KVCorrupted
from bittrue.kv.canary_units import (
    BLANK,
    LOADED,
    Depths,
    Fault,
    Hashes,
    Indices,
    Part,
    Reads,
    Units,
    prefix_hashes,
    verify,
)
from bittrue.kv.identity import STATE_HEAD, BlobName, page_digest, state_digest
from bittrue.kv.layout import CSA_FRONTIER, CSA_RATIO, HCA_RATIO, PAGE_TOKENS, KVLayout
from bittrue.kv.moves import ClearSlot, CopyPage, CopySlot, LoadPage, LoadState, Move, SavePage
from bittrue.obs.log import Log
from bittrue.ops.contracts import LayerCache


class StepSegment(Protocol):
    """What the canary reads of a ``model.batch.Segment``."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def fold(self) -> int: ...
    @property
    def slot(self) -> int: ...
    @property
    def page_ids(self) -> Sequence[int]: ...
    @property
    def kept(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What ``after`` needs to know of a segment that ``before`` saw: the hash of each prefix, and per token
    and for the running pool how exact they are."""

    hashes: Hashes
    depths: Depths
    fold_depth: int


@dataclass(slots=True)
class Canary:
    """Keeps, beside every stored row and state, a tag (the hash of the tokens up to it, and its position) and
    a checksum of its bytes; records both after a step has written, compares both before a step reads.

    It watches window rows, CSA rows, index keys, HCA rows, both CSA frontiers, and the running pool of HCA
    with its pending rows, in all layers of the model; not those of a draft module, which cannot change an
    output. ``mode`` log: a line for every fault; raise: KVCorrupted before the step uses what it found.

    Every step reads all that its sequences can see, at some 5 GB/s, and hashes their tokens: decoding at
    long contexts becomes several times slower. Tags and checksums take about 3 % of the cache's bytes.

    Between ``before`` and ``after`` of a step nothing else may write; moves are told in the order in which
    they were carried out, after they were, and before the next step.
    """

    layout: KVLayout
    caches: Sequence[LayerCache]
    mode: Literal["log", "raise"]
    log: Log
    num_faults: int = 0
    _units: dict[str, Units] = field(default_factory=dict)
    _known: set[Fault] = field(default_factory=set)
    _steps: list[Step] = field(default_factory=list)
    # Names of blobs: of what was loaded and no sequence has read yet, and of pages known by one.
    _loaded_pages: dict[int, BlobName] = field(default_factory=dict)
    _loaded_states: dict[int, LoadState] = field(default_factory=dict)
    _names: dict[int, BlobName] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, kind, parts in (
            ("csa_rows", "csa", ("rows", "keys")),
            ("hca_rows", "hca", ("rows",)),
            ("window", None, ("window",)),
            ("frontier", "csa", ("csa", "csa_index")),
            ("fold", "hca", ("hca_fold",)),
            ("pending", "hca", ("hca_pending",)),
        ):
            found = list(self._parts(kind, parts))
            if found:
                per, per_place = found[0][1], found[0][2]
                self._units[key] = Units(per, per_place, [part for part, _, _ in found])

    def _parts(
        self, kind: str | None, names: Sequence[str]
    ) -> Iterator[tuple[Part, Literal["page", "slot"], int]]:
        """The parts of these names, of the layers of ``kind`` (None = all), that have any rows."""
        for i, layer in enumerate(self.layout.layers[: self.num_layers]):
            for part in layer.parts:
                if part.name in names and kind in (None, layer.kind) and part.bytes:
                    per_place = 1 if part.name == "hca_fold" else part.shape[0]
                    tensor = getattr(self.caches[i], part.name)
                    yield Part(part.name, i, tensor, per_place), part.per, per_place

    @property
    def num_layers(self) -> int:
        return len(self.layout.layers) - self.layout.num_draft_layers

    # ---- a step ------------------------------------------------------------------------------------------

    def before(self, segments: Sequence[StepSegment], histories: Sequence[Sequence[int]]) -> None:
        """Verifies everything that the step can read. ``histories[i]``: the known tokens of the sequence of
        segment i, at least those before its ``start`` and before its ``kept``.

        Raises KVCorrupted in mode raise; the step must not run then.
        """
        self._steps = []
        reads: dict[str, list[Reads]] = {key: [] for key in self._units}
        faults: list[Fault] = []
        shallow: list[Fault] = []
        for segment, history in zip(segments, histories, strict=True):
            known = np.array(history[: max(segment.start, segment.kept)], dtype=np.int64)
            assert len(known) == max(segment.start, segment.kept), "the history is too short"
            assert segment.fold <= segment.start, "the running pool stands after the segment's start"
            self._claim(segment, known)
            step_tokens = np.array(segment.token_ids, dtype=np.int64)
            hashes = prefix_hashes(np.concatenate((known[: segment.start], step_tokens)))
            for key, read in self._reads(segment, hashes):
                reads[key].append(read)
            step, late = self._exactness(segment, hashes)
            self._steps.append(step)
            shallow += late
        for key, parts in reads.items():
            faults += verify(self._units[key], parts)
        self._report(faults + shallow)

    def after(self, segments: Sequence[StepSegment]) -> None:
        """Records what the step has written: the same segments as in ``before``."""
        writes: dict[str, list[tuple[Indices, Hashes, Indices, Depths]]] = {key: [] for key in self._units}
        for segment, step in zip(segments, self._steps, strict=True):
            for key, units, lengths, positions in self._writes(segment):
                if key == "fold":
                    depths = np.full(1, step.fold_depth, dtype=np.int16)
                elif self._units[key].per == "page":
                    depths = np.full(len(units), self.num_layers + 1, dtype=np.int16)
                else:
                    depths = step.depths[positions - segment.start]
                writes[key].append((units, step.hashes[lengths], positions, depths))
                if self._units[key].per == "page":
                    self._forget(np.unique(units // self._units[key].per_place).tolist())
        for key, parts in writes.items():
            if parts:
                self._units[key].record(*(np.concatenate(values) for values in zip(*parts, strict=True)))
        self._steps = []

    def _reads(self, segment: StepSegment, hashes: Hashes) -> Iterator[tuple[str, Reads]]:
        start, end = segment.start, len(hashes) - 1
        is_replay = start < segment.kept
        # Entries that replayed tokens close stand already.
        closed = max(start, min(segment.kept, end))
        pages = np.array(segment.page_ids, dtype=np.int64)
        for key, ratio in (("csa_rows", CSA_RATIO), ("hca_rows", HCA_RATIO)):
            if key in self._units:
                entries = np.arange(closed // ratio)
                units = _entry_units(pages, entries, ratio)
                yield key, Reads(units, hashes[ratio * (entries + 1)], ratio * entries + ratio - 1, False)
        oldest = max(0, CSA_RATIO * (start // CSA_RATIO) - CSA_RATIO)
        for key, first in (
            ("window", max(0, start - self.layout.window + 1)),
            ("frontier", oldest),
            ("pending", segment.fold),
        ):
            if key in self._units:
                positions = np.arange(first, start)
                units = self._units[key].at(segment.slot, positions)
                yield key, Reads(units, hashes[positions + 1], positions, is_replay)
        # At a multiple of 128 the running pool begins anew and is not read.
        if "fold" in self._units and segment.fold % HCA_RATIO:
            at = np.array([segment.fold])
            yield "fold", Reads(np.array([segment.slot]), hashes[at], at, is_replay)

    def _writes(self, segment: StepSegment) -> Iterator[tuple[str, Indices, Indices, Indices]]:
        """(kind, units, lengths of the prefixes that tag them, positions) of what a step writes."""
        start, end = segment.start, segment.start + len(segment.token_ids)
        if end == start:
            return
        pages = np.array(segment.page_ids, dtype=np.int64)
        written = max(start, segment.kept)
        for key, ratio in (("csa_rows", CSA_RATIO), ("hca_rows", HCA_RATIO)):
            if key in self._units:
                entries = np.arange(written // ratio, max(written, end) // ratio)
                last = ratio * entries + ratio - 1
                yield key, _entry_units(pages, entries, ratio), last + 1, last
        folded = max(segment.fold, end - self.layout.max_draft)
        for key, first in (("window", start), ("frontier", start), ("pending", max(start, folded))):
            if key in self._units:
                units = self._units[key]
                positions = np.arange(max(first, end - units.per_place), end)
                yield key, units.at(segment.slot, positions), positions + 1, positions
        if "fold" in self._units:
            at = np.array([folded])
            yield "fold", np.array([segment.slot]), at, at

    # ---- replay ------------------------------------------------------------------------------------------

    def _exactness(self, segment: StepSegment, hashes: Hashes) -> tuple[Step, list[Fault]]:
        """How exact the step's tokens are, and a fault where one that is not replayed is not.

        The *depth* of a token counts the layers whose rows of it are exact; all of them and the logits are at
        depth layers + 1. A row of layer l + 1 needs the rows of layer l that the token sees, so a token is
        one deeper than the shallowest that it sees. Cleared rows have depth 0, so after them depth never
        falls from one position to the next, and the oldest visible token decides.
        """
        full = self.num_layers + 1
        start, end, window = segment.start, len(hashes) - 1, self.layout.window
        depths = np.full(end - start, full, dtype=np.int16)
        seen = np.arange(max(0, start - window + 1), start)
        before = self._units["window"].depths[self._units["window"].at(segment.slot, seen)]
        if before.min(initial=full) < full:
            line = np.concatenate((before, depths))
            for p in range(len(before), len(line), max(1, window - 1)):
                block = np.arange(p, min(p + window - 1, len(line)))
                line[block] = np.minimum(full, line[np.maximum(0, block - window + 1)] + 1)
            depths = line[len(before) :]
        exact = max(start, segment.kept)
        lacking = []
        if exact < end and depths[exact - start] < full:
            lacking.append(("window", exact, int(depths[exact - start])))
        lacking += self._shallow_entries(segment, depths, exact)
        folded = max(segment.fold, end - self.layout.max_draft)
        fold_depth = self._depth_at(segment, depths, "pending", HCA_RATIO * (folded // HCA_RATIO), folded)
        faults = [
            Fault(
                "replay",
                part,
                -1,
                f"slot {segment.slot}",
                position,
                "rows that are exact in every layer",
                f"{depth} such layers: the replay began too late",
            )
            for part, position, depth in lacking
        ]
        return Step(hashes, depths, fold_depth), faults

    def _shallow_entries(
        self, segment: StepSegment, depths: Depths, exact: int
    ) -> Iterator[tuple[str, int, int]]:
        """The first compressed entries that the step writes, where a layer of theirs pools tokens whose rows
        are not exact there."""
        end = segment.start + len(segment.token_ids)
        for key, ratio, ring, pooled in (
            ("csa_rows", CSA_RATIO, "frontier", CSA_FRONTIER),
            ("hca_rows", HCA_RATIO, "pending", HCA_RATIO),
        ):
            last = ratio * (exact // ratio) + ratio - 1
            if key in self._units and last < end:
                depth = self._depth_at(segment, depths, ring, max(0, last - pooled + 1), last)
                if depth <= self._units[key].parts[-1].layer:
                    yield self._units[key].title, last, depth

    def _depth_at(self, segment: StepSegment, depths: Depths, ring: str, position: int, until: int) -> int:
        """Depth of the token at ``position``: one of the step, of a ring, or pooled already. Full where it is
        ``until``: nothing was pooled yet."""
        if position >= until or position >= segment.start + len(depths):
            return self.num_layers + 1
        if position >= segment.start:
            return int(depths[position - segment.start])
        if ring == "pending":
            if "fold" not in self._units:
                return self.num_layers + 1
            if position < segment.fold:
                return int(self._units["fold"].depths[segment.slot])
        units = self._units[ring]
        return int(units.depths[units.at(segment.slot, np.array([position]))[0]])

    # ---- moves -------------------------------------------------------------------------------------------

    def moves(self, moves: Iterable[Move]) -> None:
        """Takes note of moves that have been carried out, in their order."""
        pages: set[int] = set()
        slots: set[int] = set()
        for move in moves:
            match move:
                case CopyPage():
                    self._copy("page", move.source, move.target, pages)
                    _carry(self._loaded_pages, move.source, move.target)
                    self._names.pop(move.target, None)
                case CopySlot():
                    self._copy("slot", move.source, move.target, slots)
                    _carry(self._loaded_states, move.source, move.target)
                case ClearSlot():
                    self._fill("slot", move.slot, BLANK, slots)
                    self._loaded_states.pop(move.slot, None)
                case SavePage():
                    self._names[move.page] = move.name
                case LoadPage() | LoadState():
                    self._load(move, pages, slots)
        # What was brought in is summed where it lies at last: a place may be filled twice in one list.
        for per, places in (("page", pages), ("slot", slots)):
            for units in self._units.values():
                if units.per == per:
                    for place in places:
                        units.sum_place(place)

    def _load(self, move: LoadPage | LoadState, pages: set[int], slots: set[int]) -> None:
        if isinstance(move, LoadState):
            self._fill("slot", move.slot, LOADED, slots)
            self._loaded_states[move.slot] = move
        if move.page is not None:
            self._fill("page", move.page, LOADED, pages)
            self._loaded_pages[move.page] = move.name
            self._names.pop(move.page, None)
            if isinstance(move, LoadPage):
                self._names[move.page] = move.name

    def _copy(self, per: str, source: int, target: int, unsummed: set[int]) -> None:
        if source == target:
            return
        for units in self._units.values():
            if units.per == per:
                units.copy(source, target)
        unsummed.discard(target)
        if source in unsummed:
            unsummed.add(target)

    def _fill(self, per: str, place: int, tag: np.uint64, unsummed: set[int]) -> None:
        unsummed.add(place)
        for units in self._units.values():
            if units.per == per:
                units.fill(place, tag)

    def _forget(self, pages: Iterable[int]) -> None:
        """Pages that were written: what they were loaded or saved as, they are no more."""
        for page in pages:
            self._names.pop(page, None)
            self._loaded_pages.pop(page, None)

    def _claim(self, segment: StepSegment, tokens: Indices) -> None:
        """Tags what was loaded for this sequence, if the names of the blobs are those of its ``tokens``: all
        that it can find stored."""
        if not self._loaded_pages and segment.slot not in self._loaded_states:
            return
        hashes = prefix_hashes(tokens)
        full = np.int16(self.num_layers + 1)
        if self._loaded_pages:
            for index, page in enumerate(segment.page_ids):
                name = self._loaded_pages.get(page)
                if name is None or not self._is_of(name, segment, tokens, index):
                    continue
                del self._loaded_pages[page]
                for key, ratio in (("csa_rows", CSA_RATIO), ("hca_rows", HCA_RATIO)):
                    if key in self._units:
                        first = index * PAGE_TOKENS // ratio
                        entries = np.arange(first, min(first + name.offset // ratio, len(tokens) // ratio))
                        units = page * (PAGE_TOKENS // ratio) + entries - first
                        last = ratio * entries + ratio - 1
                        self._units[key].mark(units, hashes[last + 1], last, np.full(len(last), full))
        state = self._loaded_states.pop(segment.slot, None)
        if state is None or state.position != segment.start:
            return
        if not self._is_of(state.name, segment, tokens[: segment.start], state.position // PAGE_TOKENS):
            return
        fold = STATE_HEAD.unpack_from(state.data)[1]
        for key, first in (
            ("window", state.position - self.layout.window + 1),
            ("frontier", state.position - CSA_FRONTIER + 1),
            ("pending", fold),
        ):
            if key in self._units:
                positions = np.arange(max(0, first), state.position)
                units = self._units[key].at(segment.slot, positions)
                self._units[key].mark(units, hashes[positions + 1], positions, np.full(len(units), full))
        if "fold" in self._units:
            self._units["fold"].mark(
                np.array([segment.slot]), hashes[[fold]], np.array([fold]), np.array([full])
            )

    def _is_of(self, name: BlobName, segment: StepSegment, tokens: Indices, index: int) -> bool:
        """Whether a blob of this name belongs at page ``index`` of the sequence: by its own tokens, and by
        the name of the page before it where that has one.

        Of a copied page the sequence may share the beginning only; what it shares is then judged by the pages
        before it, for a digest tells no beginning.
        """
        before = self._names.get(segment.page_ids[index - 1]) if index else None
        if before is not None and before.digest != name.parent:
            return False
        own = tokens[index * PAGE_TOKENS : index * PAGE_TOKENS + name.offset].tolist()
        digest = page_digest if name.kind == "page" else state_digest
        return len(own) < name.offset or name.digest == digest(name.parent, own)

    # ---- faults ------------------------------------------------------------------------------------------

    def _report(self, faults: Iterable[Fault]) -> None:
        found = [fault for fault in faults if fault not in self._known]
        self.num_faults += len(found)
        if not found:
            return
        if self.mode == "raise":
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            raise KVCorrupted(
                f"the cache is not what was stored: {found[0]}{more}; nothing computed from it was used; "
                "restart the engine, and check the memory of this machine"
            )
        self._known.update(found)  # a place that is read at every step is one line
        for fault in found:
            self.log.error(
                "kv_canary",
                kind=fault.kind,
                part=fault.part,
                layer=fault.layer,
                place=fault.place,
                position=fault.position,
                expected=fault.expected,
                found=fault.found,
            )


def _entry_units(pages: Indices, entries: Indices, ratio: int) -> Indices:
    per_page = PAGE_TOKENS // ratio
    return pages[entries // per_page] * per_page + entries % per_page


def _carry(table: dict[int, Any], source: int, target: int) -> None:
    """Of a copy is true what is true of its source."""
    if source in table:
        table[target] = table[source]
    else:
        table.pop(target, None)
