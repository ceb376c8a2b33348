"""Resumes a token sequence from the prefix cache at chosen positions and compares whole logit rows and stored
bytes with the cold run: the cache without scheduler and sampler."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bittrue.engine.assembly import Assembly
from bittrue.engine.runner import Runner
from bittrue.kv.layout import CSA_RATIO, HCA_RATIO, PAGE_TOKENS
from bittrue.kv.manager import Admission, CachePolicy, KVManager
from bittrue.kv.pool import KVPool
from bittrue.model.batch import Segment
from bittrue.ops.numeric import first_difference

STRATEGIES = ("full", "periodic", "recompute")
SPACE = b"probe"
_SCRIBBLE = 0x41  # finite in every format

# (layer and part) -> its rows that are live, by position.
State = Mapping[str, Tensor]


def strategy_of(name: str, length: int) -> int:
    """``snapshot_every`` of a strategy; periodic ones are sparse, yet a sequence of ``length`` has one."""
    sparse = max(2, length // PAGE_TOKENS // 2) * PAGE_TOKENS
    return {"full": PAGE_TOKENS, "periodic": sparse, "recompute": 0}[name]


@dataclass(frozen=True, slots=True)
class Cold:
    """A run from the first token: logits [n, V] and the stored rows of every layer, [entries, bytes] each;
    with ``states``, of every position what of the state a later token can read."""

    tokens: tuple[int, ...]
    logits: Tensor
    stored: tuple[Tensor, ...]
    states: tuple[State, ...] = ()


@dataclass(frozen=True, slots=True)
class Resumed:
    """One resumption: from ``start``, against rows that stand up to ``kept``; ``tier`` as in Admission."""

    start: int
    kept: int
    tier: str | None
    num_positions: int
    difference: str | None


class ResumeProbe:
    """One KV manager over the pool of ``parts``, whose engine must be idle. Sequences run one at a time."""

    def __init__(self, parts: Assembly, policy: CachePolicy, *, seed: int = 0) -> None:
        self.runner: Runner = parts.runner
        self.pool: KVPool = parts.pool
        self.kv = KVManager(parts.num_pages, parts.num_slots, policy)
        self.policy = policy
        self.draw = random.Random(seed)
        self._count = 0

    # ---- runs --------------------------------------------------------------------------------------------

    def cold(self, tokens: Sequence[int], *, every_state: bool = False, is_kept: bool = True) -> Cold:
        """Computes ``tokens`` from nothing, as an engine would, and leaves them in the cache if ``is_kept``.
        With ``every_state`` token by token."""
        name, admission = self._admit(tokens, 0)
        states: list[State] = []
        logits, start, fold = [], 0, 0
        while start < len(tokens):
            end = start + 1 if every_state else self._chunk_end(name, start, len(tokens))
            rows, fold = self._step(name, tokens, (start, end), (admission, fold))
            logits.append(rows)
            start = end
            if every_state:
                states.append(self._state(name, start, fold))
            if is_kept and self.kv.is_stop(start, len(tokens) - 1):
                self.kv.snapshot(name, tokens[:start], fold)
        cold = Cold(tuple(tokens), torch.cat(logits), self._stored(name, len(tokens)), tuple(states))
        self.kv.release(name, tokens if is_kept else (), fold)
        self.kv.check()
        return cold

    def resume(self, cold: Cold, position: int, tail: int, *, is_kept: bool = False) -> Resumed:
        """Resumes ``cold.tokens`` at ``position`` and computes ``tail`` tokens more, in random chunks.

        Compared are the logits of every position whose state was exact, and the stored bytes; with the
        states of ``cold``, the state at ``position``. Unless ``is_kept`` nothing of it stays in the cache.
        """
        end = min(position + tail, len(cold.tokens))
        name, admission = self._admit(cold.tokens[:end], position)
        start, fold = admission.start, admission.fold
        exact = admission.kept if admission.tier == "replay" else start
        found = None
        count = 0
        if start == position:
            found = self._state_difference(cold, name, position, fold)
        while start < end:
            stops = [stop for stop in (exact, position, end) if stop > start]
            stop = min(stops[0], start + self.draw.choice((1, 2, 3, 5, 40, 200, 1000)))
            rows, fold = self._step(name, cold.tokens, (start, stop), (admission, fold))
            if start >= exact:
                count += len(rows)
                found = found or _named("logits", start, first_difference(cold.logits[start:stop], rows))
            start = stop
            if start == position:
                found = found or self._state_difference(cold, name, position, fold)
        found = found or self._stored_difference(cold, name, end)
        self.kv.release(name, cold.tokens[:end] if is_kept else (), fold)
        self.kv.check()
        return Resumed(admission.start, admission.kept, admission.tier, count, found)

    def _admit(self, tokens: Sequence[int], limit: int) -> tuple[str, Admission]:
        self._count += 1
        name, evicted = f"probe-{self._count}", self.kv.num_evicted
        admission = self.kv.admit(name, tokens, SPACE, limit=limit, ahead=len(tokens))
        assert admission is not None, "the KV memory is too small for the probe"
        if self.kv.num_evicted == evicted:  # else what was evicted is perhaps to be copied from there
            self._scribble(name, admission)
        return name, admission

    def _scribble(self, name: str, admission: Admission) -> None:
        """Writes over the memory a sequence gets: nobody is to find there, left by another, what should
        have been copied."""
        fresh = list(self.kv.page_ids(name)[admission.kept // PAGE_TOKENS :])
        for cache in self.runner.caches:
            for part in (cache.window, cache.csa, cache.csa_index, cache.hca_fold, cache.hca_pending):
                if part is not None:
                    part[admission.slot].view(torch.uint8).fill_(_SCRIBBLE)
            for paged in (cache.rows, cache.keys):
                if paged is not None:
                    paged[fresh] = _SCRIBBLE

    def _chunk_end(self, name: str, start: int, end: int) -> int:
        stop = self.kv.next_stop(name, start, end - 1)
        return min(end, start + 512, end if stop is None else stop)

    def _step(
        self, name: str, tokens: Sequence[int], span: tuple[int, int], at: tuple[Admission, int]
    ) -> tuple[Tensor, int]:
        """Computes the tokens of ``span``: their logits, and where the fold stands then."""
        (start, end), (admission, fold) = span, at
        assert self.kv.extend(name, end), "the KV memory is too small for the probe"
        self.pool.apply(self.kv.take_moves())
        segment = Segment(
            tokens[start:end], start, fold, admission.slot, self.kv.page_ids(name), admission.kept
        )
        streams = self.runner.forward([segment])
        rows = [x.clone() for _, x in self.runner.logits_by_block(streams, range(end - start))]
        return torch.cat(rows), max(fold, end - self.policy.max_draft)

    # ---- what is compared --------------------------------------------------------------------------------

    def _stored(self, name: str, length: int) -> tuple[Tensor, ...]:
        """Of every paged tensor the entries that closed within ``length`` tokens, in order."""
        pages = list(self.kv.page_ids(name))
        found = []
        for cache in self.runner.caches:
            for tensor in (cache.rows, cache.keys):
                if tensor is not None:
                    entries = length * tensor.shape[1] // PAGE_TOKENS
                    found.append(tensor[pages].flatten(0, 1)[:entries])
        return tuple(found)

    def _stored_difference(self, cold: Cold, name: str, length: int) -> str | None:
        for want, got in zip(cold.stored, self._stored(name, length), strict=True):
            found = first_difference(want[: len(got)], got)
            if found is not None:
                return f"stored rows: {found}"
        return None

    def _state(self, name: str, position: int, fold: int) -> State:
        slot, live = self.kv.slot(name), {}
        first_open = max(0, (position // CSA_RATIO - 1) * CSA_RATIO)
        for layer, cache in enumerate(self.runner.caches):
            rings = (
                ("window", cache.window, max(0, position - self.policy.window + 1)),
                ("csa", cache.csa, first_open),
                ("csa_index", cache.csa_index, first_open),
                ("hca_pending", cache.hca_pending, fold),
            )
            for part, ring, first in rings:
                if ring is not None and ring.shape[1]:
                    places = torch.arange(first, position) % ring.shape[1]
                    live[f"{part} of layer {layer}"] = ring[slot, places]
            # A pool that stands in a row that has closed since is folded to its end and never read.
            if cache.hca_fold is not None and fold % HCA_RATIO and fold // HCA_RATIO == position // HCA_RATIO:
                live[f"hca_fold of layer {layer}"] = cache.hca_fold[slot].clone()
        return live

    def _state_difference(self, cold: Cold, name: str, position: int, fold: int) -> str | None:
        if not cold.states or position == 0:
            return None
        self.pool.apply(self.kv.take_moves())
        want, got = cold.states[position - 1], self._state(name, position, fold)
        if want.keys() != got.keys():
            return f"state at {position}: the fold is at {fold}"
        for part in want:
            found = first_difference(want[part], got[part])
            if found is not None:
                return f"state at {position}, {part}: {found}"
        return None


def _named(what: str, start: int, found: object | None) -> str | None:
    return None if found is None else f"{what} from position {start} on: {found}"


def policy_of(parts: Assembly, snapshot_every: int) -> CachePolicy:
    return replace(parts.policy, is_on=True, snapshot_every=snapshot_every)


def edges(policy: CachePolicy, length: int) -> Iterator[int]:
    """Positions at which something begins or ends: CSA groups, the window, pages, the reach of a replay."""
    window = policy.window
    first = next((p for p in range(1, length) if policy.replay_tokens(p) < p), length)
    for edge in (3, 7, window, PAGE_TOKENS, 2 * PAGE_TOKENS, first, length // PAGE_TOKENS * PAGE_TOKENS):
        yield from (p for p in (edge - 1, edge, edge + 1) if 1 <= p < length)
    yield length - 1
