"""A scheduler that runs over symbolic tensors, beside a naive run that stores nothing."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kv.symbolic import Prefixes, Reader, SymbolicCache
from kv.symbolic_tiers import SymbolicTiers

from bittrue.engine.plan import ScheduledSequence, SequenceOutput, StepPlan
from bittrue.engine.scheduler import Scheduler, SchedulerLimits
from bittrue.engine.sequence import Sequence as EngineSequence
from bittrue.engine.types import FinishReason, Request, SamplingParams
from bittrue.kv.identity import namespace_digest
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.kv.manager import NO_CACHE, CachePolicy, KVManager
from bittrue.kv.moves import ClearSlot, CopySlot

VOCAB = 7


def next_token(tokens: Sequence[int], version: int = 0) -> int:
    """Stands for the model: the token after ``tokens``."""
    return (sum(tokens[-5:]) * 31 + len(tokens) * 17 + tokens[0] + 3 * version) % VOCAB


def is_stop(tokens: Sequence[int]) -> bool:
    """Whether the last of ``tokens``, just generated, ends its sequence."""
    return (len(tokens) * 5 + tokens[-1]) % 83 == 0


def naive_run(prompt: Sequence[int], max_tokens: int, version: int) -> list[int]:
    """What a sequence ends with that has a machine for itself and keeps nothing."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens, version))
        if is_stop(tokens):
            break
    return tokens


@dataclass(frozen=True, slots=True)
class Setup:
    """The sizes of a run. ``policy`` None: no cache."""

    policy: CachePolicy = NO_CACHE
    budget: int = 64
    running: int = 3
    queue: int = 5
    pages: int = 8
    slots: int = 5
    has_tiers: bool = False
    most_polls: int = 0
    loss: float = 0.0
    cut: float = 0.0
    seed: int = 0

    @property
    def limits(self) -> SchedulerLimits:
        context = self.pages * PAGE_TOKENS
        return SchedulerLimits(self.budget, self.running, self.queue, context, self.policy.max_draft)


@dataclass(slots=True, eq=False)
class Life:
    """A request that was accepted. ``ids[i]`` names its first i tokens."""

    request: Request
    sequence: EngineSequence
    version: int
    ids: list[int]
    scored: set[int] = field(default_factory=set)
    was_preempted: bool = False


class SymbolicRun:
    """Drives ``scheduler`` as the engine does. Every call that finds wrong bits raises AssertionError.

    ``audits``: all that is cached is looked at after each step, not only what happens to be read.
    """

    scheduler_class: type[Scheduler] = Scheduler
    manager_class: type[KVManager] = KVManager
    cache_class: type[SymbolicCache] = SymbolicCache
    audits = True

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.rng = random.Random(setup.seed)
        self.version = 0
        self.tiers: SymbolicTiers | None = None
        if setup.has_tiers:
            self.tiers = SymbolicTiers(
                setup.seed, most_polls=setup.most_polls, loss=setup.loss, cut=setup.cut
            )
        self.kv = self.manager_class(setup.pages, setup.slots, setup.policy, self.tiers)
        self.scheduler = self.scheduler_class(setup.limits, self.kv, space=self.space)
        self.prefixes = Prefixes()
        self.cache = self.cache_class(setup.policy, setup.pages, setup.slots, self.prefixes, self.tiers)
        self.lives: dict[str, Life] = {}
        self.plan: StepPlan | None = None
        self.planned: list[tuple[ScheduledSequence, Life, list[int]]] = []
        self.fails = ""  # the sequence that the step under way ends with an error
        self.seen: Counter[str] = Counter()
        self.texts: list[tuple[int, ...]] = []  # of sequences that ended
        self._roots: dict[bytes, int] = {}
        self._num_added = 0
        self._counted = Counter[str]()

    def space(self, salt: str) -> bytes:
        digest = namespace_digest(self.space_facts(), salt)
        self._roots.setdefault(digest, self.prefixes.root((self.version, salt)))
        return digest

    def space_facts(self) -> dict[str, str]:
        return {"weights": str(self.version)}

    # ---- requests ----------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        num_resume: int = 0,
        priority: int = 0,
        salt: str = "",
        scores: bool = False,
    ) -> Life | None:
        """Raises as the scheduler does. None when nothing is left to run."""
        whole = naive_run(prompt, min(max_tokens, num_resume), self.version)
        if len(whole) > len(prompt) and is_stop(whole):
            whole.pop()  # a resume that ended would not come back
        request = Request(
            request_id=f"r{self._num_added}",
            prompt=tuple(prompt),
            resume=tuple(whole[len(prompt) :]),
            priority=priority,
            cache_salt=salt,
            params=SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scores else None),
        )
        sequence = self.scheduler.add(request, 0.0)
        self._num_added += 1
        if sequence.is_finished:
            return None
        life = Life(request, sequence, self.version, [self.prefixes.root((self.version, salt))])
        self.lives[request.request_id] = life
        return life

    def abort(self, name: str) -> None:
        life = self.lives.pop(name)
        self.seen["aborted in flight"] += any(part.seq_id == name for part, _, _ in self.planned)
        assert self.scheduler.abort(name) is life.sequence
        assert life.sequence.is_finished and life.sequence.finish_reason == "abort"
        self.texts.append(tuple(life.sequence.tokens))

    def preempt(self, name: str) -> None:
        life = self.lives[name]
        was_running = life.sequence.status == "running"
        assert self.scheduler.preempt(name) == was_running
        life.was_preempted |= was_running
        self.seen["preempted"] += was_running

    def flush(self) -> None:
        self.kv.flush()
        assert self.kv.num_cached_pages == self.kv.num_cached_slots == 0, "something is cached after a flush"
        self.seen["flushed"] += 1

    def change_weights(self) -> None:
        """Only between requests: what is live was begun with the old ones."""
        assert not self.lives and self.plan is None
        self.version += 1
        self.seen["weights changed"] += 1

    # ---- steps -------------------------------------------------------------------------------------------

    def schedule(self) -> bool:
        """Plans a step. False where there is none: no work, or all wait for the tiers."""
        before = {s.seq_id: s.num_preemptions for s in (life.sequence for life in self.lives.values())}
        plan = self.scheduler.schedule()
        if plan is None:
            assert not self.lives or self.setup.has_tiers, "work is left, and nothing runs"
            return False
        self.plan = plan
        self.seen["steps"] += 1
        for name in plan.preempted:
            assert self.lives[name].sequence.num_preemptions == before[name] + 1
            self.lives[name].was_preempted = True
            self.seen["preempted"] += 1
        self.seen["deferred"] += any(
            life.sequence.status == "waiting" and life.sequence.follows is not None
            for life in self.lives.values()
        )
        self._count_admitted(plan)
        assert 0 < plan.num_tokens <= self.setup.budget
        for part in plan.sequences:
            life = self.lives[part.seq_id]
            tokens = [*life.sequence.tokens[: part.end - len(part.drafts)], *part.drafts]
            assert part.start == life.sequence.num_computed and part.end == len(tokens)
            self.planned.append((part, life, self._ids(life, part)))
        return True

    def _ids(self, life: Life, part: ScheduledSequence) -> list[int]:
        tokens = life.sequence.tokens
        self.prefixes.extend(life.ids, tokens[len(life.ids) - 1 :])
        known = part.end - len(part.drafts)
        return self.prefixes.extend(life.ids[: known + 1], part.drafts) if part.drafts else life.ids

    def _count_admitted(self, plan: StepPlan) -> None:
        copied = {move.target for move in plan.moves if isinstance(move, CopySlot)}
        cleared = {move.slot for move in plan.moves if isinstance(move, ClearSlot)}
        for name in plan.admitted:
            life, sequence = self.lives[name], self.lives[name].sequence
            self._counted["lookup"] += len(sequence.tokens)
            self._counted["replayed"] += max(0, sequence.kept - sequence.num_computed)
            self._counted["hit"] += sequence.num_computed
            self.seen["resumed after preemption"] += life.was_preempted and sequence.num_computed > 0
            is_hit = sequence.num_computed > 0
            self.seen["slot taken over"] += is_hit and sequence.slot not in copied | cleared
            self.seen["replayed from a snapshot"] += sequence.kept > sequence.num_computed and (
                sequence.slot not in cleared
            )
        assert self.kv.lookup_tokens == self._counted["lookup"]
        assert self.kv.replayed_tokens == self._counted["replayed"]
        assert sum(self.kv.hit_tokens.values()) == self._counted["hit"]

    def commit(self) -> None:
        """Executes the step that is planned, and tells the scheduler."""
        plan = self.plan
        assert plan is not None
        self.cache.apply(plan.moves)
        depths = self.cache.run([(part, ids) for part, _, ids in self.planned])
        outputs = []
        for (part, life, _), depth in zip(self.planned, depths, strict=True):
            if life.sequence.is_finished:
                continue
            self._score(part, life, depth)
            if part.seq_id == self.fails:
                outputs.append(SequenceOutput(part.seq_id, (), "error"))
            elif part.samples:
                outputs.append(self._draw(part, life, depth))
        for sequence in self.scheduler.commit(plan, tuple(outputs)):
            self._end(self.lives.pop(sequence.seq_id))
        for part, life, _ in self.planned:
            if not life.sequence.is_finished:
                pages = self.kv.page_ids(part.seq_id)
                is_same = all(a == b for a, b in zip(pages, part.page_ids, strict=False))
                self.seen["page exchanged for an equal one"] += not is_same
        self.plan, self.planned, self.fails = None, [], ""
        self._set_drafts()
        self.cache.apply(self.kv.take_moves())

    def _score(self, part: ScheduledSequence, life: Life, depth: list[int]) -> None:
        if life.request.params.prompt_logprobs is None or life.request.resume:
            return
        for p in range(part.start, min(part.end, len(life.request.prompt))):
            if p not in life.scored:
                assert depth[p - part.start] >= self.setup.policy.num_layers, "a score from a replay"
                life.scored.add(p)

    def _draw(self, part: ScheduledSequence, life: Life, depth: list[int]) -> SequenceOutput:
        tokens, drawn = list(life.sequence.tokens), []
        reason: FinishReason | None = None
        for place in range(len(part.drafts) + 1):
            row = part.num_tokens - 1 - len(part.drafts) + place
            assert depth[row] >= self.setup.policy.num_layers, f"{part.seq_id} samples from a replay"
            tokens.append(next_token(tokens, life.version))
            drawn.append(tokens[-1])
            if is_stop(tokens):
                reason = "stop"
                break
            if part.drafts[place : place + 1] != (tokens[-1],):
                break
        self.seen["accepted"] += len(drawn) - 1
        self.seen["rejected"] += len(part.drafts) - len(drawn) + 1
        return SequenceOutput(part.seq_id, tuple(drawn), reason)

    def _end(self, life: Life) -> None:
        sequence, request = life.sequence, life.request
        self.texts.append(tuple(sequence.tokens))
        self.seen["ended"] += 1
        if sequence.finish_reason == "error":
            self.seen["failed"] += 1
            return
        assert sequence.tokens == naive_run(request.prompt, request.params.max_tokens, life.version)
        is_stopped = sequence.num_generated > 0 and is_stop(sequence.tokens)
        assert sequence.finish_reason == ("stop" if is_stopped else "length")
        if request.params.prompt_logprobs is not None and not request.resume:
            assert life.scored >= set(range(len(request.prompt) - 1)), "a prompt score is missing"

    def _set_drafts(self) -> None:
        """For every sequence that decodes: right ones, wrong ones, or right up to a place."""
        for life in self.lives.values():
            sequence = life.sequence
            if sequence.status != "running" or sequence.num_remaining != 1 or not self.setup.policy.max_draft:
                continue
            drafts, tokens = [], list(sequence.tokens)
            chance = self.rng.choice((0.0, 0.5, 0.9, 1.0))
            for _ in range(self.rng.randint(0, self.setup.policy.max_draft)):
                tokens.append(next_token(tokens, life.version))
                if self.rng.random() >= chance:
                    tokens[-1] = (tokens[-1] + 1) % VOCAB
                drafts.append(tokens[-1])
            self.scheduler.set_drafts(sequence.seq_id, tuple(drafts))

    def step(self) -> bool:
        """One whole step; False where there was none."""
        if self.plan is None and not self.schedule():
            self.kv.wait_for_fetches(0.0)
            return False
        self.commit()
        self.check()
        return True

    def finish(self, most_steps: int) -> None:
        """Steps until nothing is live, at most ``most_steps``; then only the cache holds memory."""
        for _ in range(most_steps):
            if not self.lives and self.plan is None:
                break
            self.step()
        assert not self.lives, f"{len(self.lives)} sequences starve"
        assert self.kv.num_held_pages == self.kv.num_held_slots == 0
        self.cache.apply(self.kv.take_moves())
        self.check()

    # ---- what must hold ----------------------------------------------------------------------------------

    def check(self) -> None:
        self.scheduler.check()
        stats = self.scheduler.stats()
        assert stats.pages_free + stats.pages_held + stats.pages_cached == self.setup.pages
        assert stats.slots_free + stats.slots_held + stats.slots_cached == self.setup.slots
        assert stats.num_running + stats.num_waiting == len(self.lives)
        if self.audits and self.plan is None:
            self.cache.apply(self.kv.take_moves())
            self.audit()

    def audit(self) -> None:
        """Every live sequence, every cached page and every snapshot has the bits it should have."""
        for name, life in self.lives.items():
            sequence = life.sequence
            if sequence.status == "running":
                self.prefixes.extend(life.ids, sequence.tokens[len(life.ids) - 1 :])
                at, kept = sequence.num_computed, sequence.kept
                self.cache.check_rows(self.kv.page_ids(name), life.ids, max(at, kept), name)
                if at:
                    assert sequence.slot is not None
                    reader = Reader(name, life.ids, at, sequence.fold)
                    self.cache.check_state(reader, sequence.slot, exact=at >= kept)
        for ids, pages, stands in self._cached_paths():
            self.cache.check_rows(pages, ids, stands, "the cache")

    def _cached_paths(self) -> Iterator[tuple[list[int], list[int], int]]:
        """(prefixes, pages, tokens) down to every leaf; the snapshots on the way are checked."""
        for space, root in self.kv._tree._roots.items():
            stack = [(root, [self._roots[space]], list[int]())]
            while stack:
                node, ids, pages = stack.pop()
                for tokens, snapshot in node.snapshots.items():
                    behind = self.prefixes.extend(list(ids), tokens)
                    reader = Reader("a snapshot", behind, snapshot.position, snapshot.fold)
                    self.cache.check_state(reader, snapshot.slot)
                for child in node.children:
                    below = self.prefixes.extend(list(ids), child.tokens)
                    stack.append((child, below, [*pages, child.page]))
                if not node.children:
                    yield ids, pages, node.end
