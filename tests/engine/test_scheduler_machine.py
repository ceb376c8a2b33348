"""The scheduler without a cache, called in any order: nothing is lost, shared, starved, or done twice."""

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bittrue.engine.plan import ScheduledSequence, SequenceOutput, StepPlan
from bittrue.engine.scheduler import Scheduler, SchedulerLimits
from bittrue.engine.sequence import Sequence
from bittrue.engine.types import Request, SamplingParams
from bittrue.errors import InvalidRequest, PromptTooLong, QueueFull
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.kv.manager import KVManager


def next_token(tokens: list[int]) -> int:
    """Stands for the model: depends on every token before and on the position."""
    return (sum(tokens[-7:]) * 31 + len(tokens) * 17 + tokens[0]) % 997


def is_stop(token: int) -> bool:
    return token % 199 == 0


class SchedulerMachine(RuleBasedStateMachine):
    """``computed``: what each running sequence's cache holds. ``idle``: steps since the first moved."""

    scheduler_class: type[Scheduler] = Scheduler

    @initialize(
        budget=st.sampled_from([1, 2, 3, 7, 64, 200]),
        running=st.sampled_from([4, 3, 2, 1]),
        slots=st.sampled_from([4, 3, 1]),
        pages=st.sampled_from([3, 4, 2, 5, 1]),
        max_draft=st.sampled_from([0, 0, 2]),
    )
    def start(self, budget: int, running: int, slots: int, pages: int, max_draft: int) -> None:
        self.limits = SchedulerLimits(budget, running, 3, pages * PAGE_TOKENS, max_draft)
        self.scheduler = self.scheduler_class(self.limits, KVManager(pages, slots))
        self.live: dict[str, Sequence] = {}
        self.computed: dict[str, int] = {}
        self.num_added = 0
        self.plan: StepPlan | None = None
        self.leader: str | None = None
        self.idle = 0

    @property
    def patience(self) -> int:
        """Steps within which the first by rank advances."""
        return max(4, 2 * self.limits.max_running)

    @rule(
        num_prompt=st.integers(1, 280) | st.integers(100, 128),
        max_tokens=st.integers(0, 150) | st.just(100),
        num_resume=st.integers(0, 3),
        priority=st.sampled_from([0, 0, 0, 1]),
        scores=st.booleans(),
    )
    def add_one(self, num_prompt: int, max_tokens: int, num_resume: int, priority: int, scores: bool) -> None:
        self.add(num_prompt, max_tokens, num_resume, priority, scores)

    def add(self, num_prompt: int, max_tokens: int, num_resume: int, priority: int, scores: bool) -> None:
        name = f"s{self.num_added}"
        prompt = [self.num_added, *range(1, num_prompt)]
        tokens = list(prompt)
        for _ in range(min(num_resume, max_tokens)):
            tokens.append(next_token(tokens))
        request = Request(
            request_id=name,
            prompt=tuple(prompt),
            resume=tuple(tokens[num_prompt:]),
            priority=priority,
            params=SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scores else None),
        )
        fits = num_prompt + max_tokens <= self.scheduler.kv.capacity_tokens
        try:
            sequence = self.scheduler.add(request, float(self.num_added))
        except (InvalidRequest, PromptTooLong):
            assert not fits
            return
        except QueueFull:
            assert len(self.live) >= self.limits.max_running + self.limits.max_queue
            return
        assert fits
        self.num_added += 1
        if sequence.is_finished:
            assert len(request.resume) == max_tokens and sequence.finish_reason == "length"
        else:
            self.live[name] = sequence

    @rule(count=st.integers(2, 6), num_prompt=st.integers(60, 127), max_tokens=st.integers(60, 200))
    def add_several(self, count: int, num_prompt: int, max_tokens: int) -> None:
        """A crowd that grows beyond its first pages at about the same time."""
        for _ in range(count):
            self.add(num_prompt, max_tokens, 0, 0, False)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(name) is self.live[name]
        self.forget(name, "abort")

    @precondition(lambda self: self.plan is None)
    @rule()
    def schedule(self) -> None:
        running = {name for name, s in self.live.items() if s.status == "running"}
        oldest = min((self.live[name].rank for name in running), default=None)
        plan = self.scheduler.schedule()
        assert (plan is None) == (not self.live)
        if plan is None:
            return
        self.plan = plan
        assert oldest not in {self.live[name].rank for name in plan.preempted}, (
            "the first by rank was preempted"
        )
        assert set(plan.preempted) <= running
        for name in plan.preempted:
            del self.computed[name]
        for name in plan.admitted:
            assert name not in self.computed
            self.computed[name] = 0
        self.check_plan(plan)

    @precondition(lambda self: self.plan is not None)
    @rule()
    def commit(self) -> None:
        plan = self.plan
        assert plan is not None
        first = min((s.rank for s in self.live.values() if s.status == "running"), default=None)
        outputs = tuple(
            self.output(part) for part in plan.sequences if part.samples and part.seq_id in self.live
        )
        ended = self.scheduler.commit(plan, outputs)
        self.plan = None
        advanced = {part.seq_id for part in plan.sequences}
        for part in plan.sequences:
            if part.seq_id in self.live:
                self.computed[part.seq_id] = part.end
        self.check_first_advances(first, advanced)
        for sequence in ended:
            reason = "stop" if is_stop(sequence.tokens[-1]) and sequence.num_generated else "length"
            self.forget(sequence.seq_id, reason)

    @precondition(lambda self: self.live)
    @rule(count=st.integers(2, 80))
    def run(self, count: int) -> None:
        """Several whole steps, so that what comes next meets sequences in the middle of their lives."""
        for _ in range(count):
            if self.plan is not None:
                self.commit()
            self.schedule()
            self.nothing_is_lost_or_shared()

    def output(self, part: ScheduledSequence) -> SequenceOutput:
        token = next_token(self.live[part.seq_id].tokens)
        return SequenceOutput(part.seq_id, (token,), "stop" if is_stop(token) else None)

    def forget(self, name: str, reason: str) -> None:
        """A sequence ended: all its tokens follow from its prompt, and it ended where it should."""
        sequence = self.live.pop(name)
        self.computed.pop(name, None)
        assert sequence.is_finished and sequence.finish_reason == reason and sequence.slot is None
        tokens = list(sequence.request.prompt)
        for token in sequence.generated:
            assert token == next_token(tokens)
            tokens.append(token)
        if reason == "length":
            assert sequence.num_generated == sequence.request.params.max_tokens

    def check_plan(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.limits.max_step_tokens
        parts = plan.sequences
        pages = [page for part in parts for page in part.page_ids]
        assert len(pages) == len(set(pages)), "two sequences share a page"
        assert len({part.slot for part in parts}) == len(parts), "two sequences share a slot"
        for part in parts:
            sequence = self.live[part.seq_id]
            assert part.num_tokens > 0
            assert part.start == self.computed[part.seq_id], "tokens are skipped or computed twice"
            assert part.end <= len(sequence.tokens) and part.end <= len(part.page_ids) * PAGE_TOKENS
            reaches_the_end = part.end == len(sequence.tokens)
            wants_more = sequence.num_generated < sequence.request.params.max_tokens
            assert part.samples == (reaches_the_end and wants_more)
            assert max(0, part.start - self.limits.max_draft) <= part.fold <= part.start
        self.check_shares(plan)

    def check_shares(self, plan: StepPlan) -> None:
        """Decodes come first while the floor of prefills allows, and no budget is left that one could use."""
        budget, kv = self.limits.max_step_tokens, self.scheduler.kv
        given = {part.seq_id: part.num_tokens for part in plan.sequences}
        ready = [
            s for s in self.live.values() if s.status == "running" and kv.length(s.seq_id) > s.num_computed
        ]
        decodes = [s for s in ready if s.num_remaining == 1]
        if len(decodes) <= budget - max(1, budget // 8):
            assert all(s.seq_id in given for s in decodes), "a decode waits though there is room"
        if plan.num_tokens < budget:
            for s in ready:
                assert given.get(s.seq_id, 0) == s.num_remaining or kv.num_free_pages == 0, (
                    "budget is left over"
                )

    def check_first_advances(self, first: tuple[int, int] | None, advanced: set[str]) -> None:
        names = [name for name, s in self.live.items() if s.rank == first]
        leader = names[0] if names else None
        self.idle = 0 if leader != self.leader or leader in advanced else self.idle + 1
        self.leader = leader
        assert self.idle < self.patience, "the first by rank stands still"

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        stats = self.scheduler.stats()
        assert stats.pages_free + stats.pages_held == stats.pages_total
        assert stats.slots_free + stats.slots_held == stats.slots_total
        assert stats.num_running + stats.num_waiting == len(self.live)
        assert stats.num_running <= self.limits.max_running
        assert set(self.computed) == {name for name, s in self.live.items() if s.status == "running"}
        for priority in (0, 1):
            mine = [s for s in self.live.values() if s.request.priority == priority]
            last_running = max((s.rank for s in mine if s.status == "running"), default=(0, -1))
            assert all(s.rank > last_running for s in mine if s.status == "waiting"), "somebody was overtaken"

    def teardown(self) -> None:
        """No more requests come: all that are live end, within a bound.

        The first by rank that runs needs at most ``patience`` steps a token. Each live one can replace it
        at most once before one ends, so one ends at least every live * patience * longest steps.
        """
        if not hasattr(self, "scheduler"):
            return
        num_live = len(self.live)
        longest = max((s.num_prompt + s.request.params.max_tokens for s in self.live.values()), default=0)
        for _ in range(num_live * num_live * self.patience * longest + 1):
            if self.plan is not None:
                self.commit()
            if not self.live:
                break
            self.schedule()
            self.nothing_is_lost_or_shared()
        assert not self.live, f"{len(self.live)} sequences starve"
        stats = self.scheduler.stats()
        assert (stats.pages_held, stats.slots_held) == (0, 0)


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


class ForgetsToRecompute(Scheduler):
    """A planted fault: a preempted sequence believes that its first token is still there."""

    def _start(self, sequence, admission):  # type: ignore[no-untyped-def]
        super()._start(sequence, admission)
        sequence.num_computed = min(1, sequence.num_preemptions)


class FreesTwice(Scheduler):
    """A planted fault: a preempted sequence that ends gives its pages back a second time."""

    def _finish(self, sequence, reason, **more):  # type: ignore[no-untyped-def]
        held = self.kv.page_ids(sequence.seq_id) if sequence.status == "running" else ()
        super()._finish(sequence, reason, **more)
        for page in held[:1]:
            self.kv._pages._free.append(page)


class PrefersTheNewest(Scheduler):
    """A planted fault: whoever came last is served first, and older ones starve."""

    def _share_tokens(self, ready):  # type: ignore[no-untyped-def]
        return super()._share_tokens(sorted(ready, key=lambda s: s.rank)[-1:])


@pytest.mark.parametrize("fault", [ForgetsToRecompute, FreesTwice, PrefersTheNewest])
def test_the_machine_catches_a_planted_fault(fault: type[Scheduler]) -> None:
    machine = type("Faulty", (SchedulerMachine,), {"scheduler_class": fault})
    hunt = settings(
        max_examples=300, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate]
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=hunt)
