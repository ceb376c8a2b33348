"""The whole integer side of the cache, called in any order: what is read stands, and all end as if alone."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kv.symbolic import Fault, SymbolicCache
from support.symbolic_run import VOCAB, Setup, SymbolicRun

from bittrue.errors import InvalidRequest, PromptTooLong, QueueFull
from bittrue.kv.manager import NO_CACHE, CachePolicy, KVManager
from bittrue.kv.moves import ClearSlot, CopyPage, CopySlot
from bittrue.kv.pages import PagePool
from bittrue.kv.prefix import PrefixTree

# Few layers and small windows: a replay takes 20 to 140 tokens, so that short prompts are replayed too.
policies = st.one_of(
    st.builds(
        CachePolicy,
        snapshot_every=st.sampled_from([128, 0, 64, 200, 37]),
        num_layers=st.integers(1, 3),
        window=st.sampled_from([9, 5, 1]),
        max_draft=st.integers(0, 4),
    ),
    st.builds(CachePolicy, is_on=st.just(False), max_draft=st.sampled_from([0, 2])),
)
setups = st.builds(
    Setup,
    policy=policies,
    budget=st.sampled_from([200, 64, 7, 1]),
    running=st.integers(1, 4),
    pages=st.sampled_from([4, 6, 10, 3, 2]),
    slots=st.sampled_from([5, 3, 8, 1]),
    has_tiers=st.booleans(),
    most_polls=st.sampled_from([0, 1, 4]),
    loss=st.sampled_from([0.0, 0.3]),
    cut=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)


def new_tokens(count: int, start: int) -> list[int]:
    return [(i * i + start) % VOCAB for i in range(count)]


def patience(run: SymbolicRun) -> int:
    """Steps in which all that is live has to end: a token of the first by rank takes at most
    max(4, 2 * max_running) steps (the scheduler's docstring), and each live one can be the first once before
    one ends; as many again while fetches are waited for."""
    lives = [life.request for life in run.lives.values()]
    longest = max((len(r.prompt) + r.params.max_tokens for r in lives), default=0)
    return 2 * len(lives) ** 2 * max(4, 2 * run.setup.running) * longest + 20 * len(lives) + 1


class CacheMachine(RuleBasedStateMachine):
    run_class: type[SymbolicRun] = SymbolicRun

    @initialize(setup=setups)
    def start(self, setup: Setup) -> None:
        self.run = self.run_class(setup)

    def add(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> None:
        try:
            self.run.add(prompt, max_tokens, **more)
        except (InvalidRequest, PromptTooLong):
            assert len(prompt) + max_tokens > self.run.kv.capacity_tokens
        except QueueFull:
            assert len(self.run.lives) == self.run.setup.running + self.run.setup.queue

    def texts(self) -> list[tuple[int, ...]]:
        live = [tuple(life.sequence.tokens) for life in self.run.lives.values()]
        return [*live, *self.run.texts[-8:]] or [(1,)]

    @rule(
        count=st.integers(1, 300) | st.sampled_from([1, 127, 128, 129]),
        kind=st.integers(0, 2),
        max_tokens=st.integers(0, 150) | st.sampled_from([0, 1, 3]),
        num_resume=st.sampled_from([0, 0, 3]),
        priority=st.sampled_from([0, 0, 1]),
        salt=st.sampled_from(["", "", "b"]),
        scores=st.sampled_from([False, False, False, True]),
    )
    def add_new(self, count: int, kind: int, max_tokens: int, **more: Any) -> None:
        self.add(new_tokens(count, kind), max_tokens, **more)

    @rule(
        data=st.data(),
        cut=st.floats(0, 1),
        from_end=st.none() | st.integers(0, 5),
        edit=st.booleans(),
        more=st.sampled_from([0, 1, 5, 140]),
        copies=st.sampled_from([1, 1, 3]),
        max_tokens=st.sampled_from([1, 10, 60]),
        salt=st.sampled_from(["", "", "b"]),
    )
    def add_known(
        self,
        data: st.DataObject,
        cut: float,
        from_end: int | None,
        edit: bool,
        more: int,
        copies: int,
        **rest: Any,
    ) -> None:
        """The same again, the next turn, a branch from the middle, an edit in the middle."""
        text = data.draw(st.sampled_from(self.texts()))
        at = len(text) - from_end if from_end is not None else int(cut * len(text))
        at = min(len(text), max(1, at))
        after = ((text[at] + 1) % VOCAB, *text[at + 1 :]) if edit and at < len(text) else ()
        for _ in range(copies):
            self.add((*text[:at], *after, *new_tokens(more, 3)), **rest)

    @rule(count=st.integers(1, 40))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.run.step()

    @precondition(lambda self: self.run.plan is None)
    @rule()
    def schedule(self) -> None:
        self.run.schedule()

    @precondition(lambda self: self.run.lives)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.run.abort(data.draw(st.sampled_from(sorted(self.run.lives))))

    @precondition(lambda self: self.run.plan is None and self.run.lives)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.run.preempt(data.draw(st.sampled_from(sorted(self.run.lives))))

    @precondition(lambda self: self.run.plan is not None)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.run.fails = data.draw(st.sampled_from([part.seq_id for part, _, _ in self.run.planned]))

    @rule()
    def flush(self) -> None:
        self.run.flush()

    @precondition(lambda self: self.run.tiers is not None)
    @rule(share=st.sampled_from([0.0, 0.3, 1.0]))
    def disturb_tiers(self, share: float) -> None:
        assert self.run.tiers is not None
        self.run.tiers.demote()
        self.run.tiers.vanish(share)

    @precondition(lambda self: self.run.plan is None and not self.run.lives)
    @rule()
    def change_weights(self) -> None:
        self.run.change_weights()

    @invariant()
    def memory_is_free_held_or_cached(self) -> None:
        if hasattr(self, "run"):
            self.run.check()

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        run = self.run
        run.finish(patience(run))
        run.flush()
        assert (run.kv.num_free_pages, run.kv.num_free_slots) == (run.setup.pages, run.setup.slots)
        for name, count in coverage(run).items():
            if count:
                event(name)


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase


@pytest.mark.slow
def test_many_more_orders_of_calls() -> None:
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=600, stateful_step_count=60, deadline=None)
    )


# ---- a long run ------------------------------------------------------------------------------------------


def coverage(run: SymbolicRun) -> Counter[str]:
    """What happened in a run, by name."""
    pages, snapshots = run.kv.num_evicted
    found = run.seen + run.cache.moved
    found.update({f"hit {tier}": tokens for tier, tokens in run.kv.hit_tokens.items()})
    found.update({"page evicted": pages, "snapshot evicted": snapshots})
    found.update(
        {f"tiers {event}": count for event, count in (run.tiers.events if run.tiers else {}).items()}
    )
    return found


EVERYTHING = {
    *("hit device", "hit host", "hit disk", "hit replay", "replayed from a snapshot"),
    *("CopyPage", "CopySlot", "ClearSlot", "SavePage", "SaveState", "LoadPage", "LoadState"),
    *("slot taken over", "page evicted", "snapshot evicted", "page exchanged for an equal one"),
    *("preempted", "resumed after preemption", "deferred", "accepted", "rejected"),
    *("aborted in flight", "flushed", "failed", "weights changed", "tiers lost", "tiers cut", "ended"),
}


def long_run(run: SymbolicRun, steps: int) -> None:
    """A crowd that talks, branches, edits and leaves, drawn from the run's own generator."""
    rng = run.rng
    while run.seen["steps"] < steps:
        act = rng.random()
        if act < 0.12:
            _add_one(run, rng)
        elif act < 0.13 and run.lives:
            run.abort(rng.choice(sorted(run.lives)))
        elif act < 0.133:
            run.flush()
        elif act < 0.15 and run.tiers is not None:
            run.tiers.demote()
            run.tiers.vanish(rng.choice((0.0, 0.0, 0.3)))
        elif act < 0.16 and run.plan is None and not run.lives:
            run.change_weights()
        elif act < 0.17 and run.plan is None and run.lives:
            run.preempt(rng.choice(sorted(run.lives)))
        elif act < 0.25 and run.plan is None:
            run.schedule()
        elif act < 0.255 and run.plan is not None:
            run.fails = rng.choice(run.planned)[0].seq_id
        else:
            run.step()


def _add_one(run: SymbolicRun, rng: random.Random) -> None:
    texts = [tuple(life.sequence.tokens) for life in run.lives.values()] + run.texts[-12:]
    base = rng.choice(texts) if texts and rng.random() < 0.8 else ()
    cut = rng.choice((len(base), len(base), rng.randint(0, len(base)), len(base) // 2))
    prompt = (*base[:cut], *new_tokens(rng.choice((0, 1, 1, 3, 30, 150, 300)), rng.randint(0, 2))) or (1,)
    try:
        run.add(
            prompt,
            rng.choice((0, 1, 5, 40, 120)),
            num_resume=rng.choice((0, 0, 3)),
            priority=rng.choice((0, 0, 1)),
            salt=rng.choice(("", "", "", "b")),
            scores=rng.random() < 0.1,
        )
    except (InvalidRequest, PromptTooLong, QueueFull):
        run.seen["refused"] += 1


LONG_SETUPS = [
    Setup(
        CachePolicy(snapshot_every=every, num_layers=3, window=5, max_draft=draft),
        budget=budget,
        running=running,
        pages=pages,
        slots=slots,
        has_tiers=has_tiers,
        most_polls=2,
        loss=0.1,
        cut=0.1,
        seed=seed,
    )
    for seed, (every, draft, budget, running, pages, slots, has_tiers) in enumerate(
        [
            (128, 3, 200, 4, 10, 6, True),  # full
            (37, 1, 64, 3, 6, 4, False),  # periodic
            (0, 4, 64, 4, 12, 3, True),  # recompute
            (200, 0, 7, 3, 8, 8, True),
            (128, 2, 64, 2, 4, 2, True),
        ]
    )
]


def test_a_long_run_meets_everything() -> None:
    found: Counter[str] = Counter()
    for setup in LONG_SETUPS:
        run = SymbolicRun(setup)
        long_run(run, 1200)
        run.finish(patience(run))
        found += coverage(run)
    missing = {name for name in EVERYTHING if found[name] == 0}
    assert not missing, f"never met: {missing}"


# ---- planted faults --------------------------------------------------------------------------------------


class StaleWindow(SymbolicRun):
    """A hit goes on in its slot without the snapshot's state."""

    class cache_class(SymbolicCache):  # noqa: N801
        def apply(self, moves):  # type: ignore[no-untyped-def]
            super().apply([move for move in moves if not isinstance(move, CopySlot)])


class ReplayInAStaleSlot(SymbolicRun):
    """A replay begins in a slot that is not cleared."""

    class cache_class(SymbolicCache):  # noqa: N801
        def apply(self, moves):  # type: ignore[no-untyped-def]
            super().apply([move for move in moves if not isinstance(move, ClearSlot)])


class ReplayTooShort(SymbolicRun):
    """A replay of one window a layer, whatever stands open."""

    class manager_class(KVManager):  # noqa: N801
        def __init__(self, num_pages, num_slots, policy=NO_CACHE, tiers=None):  # type: ignore[no-untyped-def]
            super().__init__(num_pages, num_slots, _Hasty(*(getattr(policy, f) for f in _FIELDS)), tiers)


class _Hasty(CachePolicy):
    def replay_tokens(self, position: int) -> int:
        return self.num_layers * (self.window - 1)


_FIELDS = ("is_on", "snapshot_every", "num_layers", "window", "max_draft")


class WrongPage(SymbolicRun):
    """The page table of a hit has the first sibling's page for the last full one."""

    class manager_class(KVManager):  # noqa: N801
        def _best_hit(self, space, tokens, limit):  # type: ignore[no-untyped-def]
            hit = super()._best_hit(space, tokens, limit)
            for node in hit.match.path[-1:]:
                assert node.parent is not None
                object.__setattr__(hit.match, "path", (*hit.match.path[:-1], node.parent.children[0]))
            return hit


class FrontierLost(SymbolicRun):
    """A snapshot's copy leaves the compressors' rows behind."""

    class cache_class(SymbolicCache):  # noqa: N801
        def apply(self, moves):  # type: ignore[no-untyped-def]
            for move in moves:
                csa = self.slots[move.target].csa[:] if isinstance(move, CopySlot) else []
                super().apply([move])
                if isinstance(move, CopySlot):
                    self.slots[move.target].csa[:] = csa


class WeightsNotInTheKey(SymbolicRun):
    """The namespace of the cache does not tell the weights."""

    def space_facts(self) -> dict[str, str]:
        return {}


class SaltNotInTheKey(SymbolicRun):
    """One tenant is served what another computed."""

    def space(self, salt: str) -> bytes:
        self._roots.setdefault(super().space(""), self.prefixes.root((self.version, salt)))
        return super().space("")


class DraftNotRolledBack(SymbolicRun):
    """The scheduler believes that the pool stands behind the drafts that were rejected."""

    def commit(self) -> None:
        parts = [(part, life.sequence) for part, life, _ in self.planned]
        super().commit()
        for part, sequence in parts:
            if sequence.status == "running" and part.drafts:
                sequence.fold = sequence.num_computed


class OpenPageShared(SymbolicRun):
    """The open page of a hit is the page of the one who computed it."""

    class cache_class(SymbolicCache):  # noqa: N801
        def apply(self, moves):  # type: ignore[no-untyped-def]
            for move in moves:
                super().apply([move])
                if isinstance(move, CopyPage):
                    self.pages[move.target] = self.pages[move.source]


class OpenPageNotCopied(SymbolicRun):
    """The open page of a hit is a page of its own, without the rows."""

    class cache_class(SymbolicCache):  # noqa: N801
        def apply(self, moves):  # type: ignore[no-untyped-def]
            super().apply([move for move in moves if not isinstance(move, CopyPage)])


class SnapshotOutlivesItsRows(SymbolicRun):
    """A page that is evicted goes to whoever asks, and the tree believes that its rows still stand there."""

    class manager_class(KVManager):  # noqa: N801
        def __init__(self, *args, **more):  # type: ignore[no-untyped-def]
            super().__init__(*args, **more)
            self._tree.__class__, self._pages.__class__ = _Remembers, _GivesAnyPage

    def check(self) -> None:
        """The tree's own check would see it at once."""


class _Remembers(PrefixTree):
    def _remove(self, node):  # type: ignore[no-untyped-def]
        if self._pages.is_kept(node.page):
            self._pages.drop(node.page)


class _GivesAnyPage(PagePool):
    def retain(self, page):  # type: ignore[no-untyped-def]
        if page in self._free:
            self._free = sorted(set(self._free) - {page})
            self._owners[page] = 1
        else:
            super().retain(page)


FAULTS = [
    StaleWindow,
    ReplayInAStaleSlot,
    ReplayTooShort,
    WrongPage,
    FrontierLost,
    WeightsNotInTheKey,
    SaltNotInTheKey,
    DraftNotRolledBack,
    OpenPageShared,
    OpenPageNotCopied,
    SnapshotOutlivesItsRows,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught_by_what_is_read(fault: type[SymbolicRun]) -> None:
    """Without a look at what is cached or saved: a sequence reads it, as a kernel would."""
    with pytest.raises(Fault):
        for setup in LONG_SETUPS:
            run = fault(replace(setup, has_tiers=False))
            run.audits = False
            long_run(run, 1200)
