"""Decides who computes what in each step: continuous batching of decodes and chunked prefills, integers only.

Every sequence has a rank (its arrival, later by AGING for each step of priority), the smaller first: nobody
is overtaken by more than a fixed number of later requests. Plans are a function of the calls made, and of
when the tiers answer. With B = ``max_step_tokens``, a step is decided in three parts:

Memory. In rank order every running sequence secures the page of its next token. Where no page is free, the
*youngest* (last by rank) running sequence is preempted: as a rule it has computed least, so least is lost.
The youngest itself, when it asks in vain, keeps what it has and sits out the step. A preempted sequence hands
its pages and state to the prefix cache, which gives up what was used longest ago, and returns to its place by
rank; admitted again, it goes on from what the cache still has of it, like any prompt.
  The first by rank is never preempted, always gets its page, and fits the pool alone (``add`` checks it):
  it runs to its end, and then the next is first. So there is no livelock, and every request ends.

Admission, by rank and in turn, while a slot is free and the pages of the first slice (at most B tokens). One
that was preempted waits for the pages of all its known tokens: with fewer it would take back memory that
older ones are growing into, and lose it again. Passed over, without holding up others: who waits for the
tiers, and who shares a prefix that a running sequence is computing just now (a fixed number of them: a step
looks at no more, however long the queue).

Tokens. Decodes (one known token left) take one token each; prefills share the rest, P = B - decodes. When
the two want more than B, prefills keep a floor of B // 8 (at least 1; for B = 1 the two kinds take turns).
Where decodes do not all have room, those served longest ago go first: of D decodes with room for C, each is
served at least once in ceil(D / C) of the steps that serve decodes. Half of P (rounded up and down in turn)
goes to prefills by rank, the rest to those with fewest tokens left, and what one cannot use falls to the
next. What is left of B after that goes to drafts, by rank. A slice ends where a snapshot is to be taken.
  While D <= B - floor no decode waits for a prefill.
  The first prefill by rank gets floor(P / 2) tokens a step or more: short prompts do not starve a long one.
  The one with fewest tokens left, n, gets as much: done in about 2 n / P steps, however long the others are.
  So whoever is first by rank advances at least once in max(4, 2 * max_running) steps.
"""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from bittrue.engine.plan import ScheduledSequence, SequenceOutput, StepPlan
from bittrue.engine.sequence import Sequence
from bittrue.engine.types import (
    CacheCounters,
    DraftCounters,
    EngineStats,
    FinishReason,
    PrefillProgress,
    Request,
)
from bittrue.errors import ConfigError, InvalidRequest, PromptTooLong, QueueFull
from bittrue.kv.layout import KVBudget
from bittrue.kv.manager import Admission, KVManager
from bittrue.kv.prefix import Beginning, common_length

_MAX_PASSED = 64


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The bounds the scheduler keeps. Of live requests there are at most ``max_running + max_queue``."""

    max_step_tokens: int
    max_running: int
    max_queue: int
    max_context: int  # tokens, prompt and output together
    max_draft: int = 0

    def __post_init__(self) -> None:
        for name in ("max_step_tokens", "max_running", "max_context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more", field=name)
        for name in ("max_queue", "max_draft"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more", field=name)


class Scheduler:
    """Owns every live sequence. ``schedule`` and ``commit`` alternate; ``add`` and ``abort`` between."""

    def __init__(
        self,
        limits: SchedulerLimits,
        kv: KVManager,
        budget: KVBudget | None = None,
        space: Callable[[str], bytes] = str.encode,
    ) -> None:
        """``budget`` says how large a KV memory must be for what ``add`` refuses (in its message);
        ``space``: the namespace of the prefix cache for a salt."""
        self.limits = limits
        self.kv = kv
        self._budget = budget
        self._space = space
        self._drafted_at = [0] * limits.max_draft
        self._accepted_at = [0] * limits.max_draft
        self._max_running = min(limits.max_running, kv.num_slots)
        self._live: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []  # by rank
        self._planned: StepPlan | None = None
        self._in_flight: dict[str, Sequence] = {}
        self._num_prefill_steps = 0
        self._num_steps = 0
        self._num_added = 0
        self._num_preempted = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_prefill_tokens = 0

    # Requests in and out.

    def add(self, request: Request, now: float) -> Sequence:
        """Accept a request; ``now`` in seconds is kept for the metrics.

        The sequence returned is already finished ("length") when nothing is left to run: its ``resume`` holds
        max_tokens tokens. With max_tokens 0 and prompt_logprobs the prompt is computed and nothing sampled.
        Raises InvalidRequest or PromptTooLong for what can never run here, QueueFull.
        """
        self._check_fits(request)
        sequence = Sequence.of(request, arrival=self._num_added, now=now)
        wants_prompt_scores = request.params.prompt_logprobs is not None and not request.resume
        if sequence.is_exhausted and not wants_prompt_scores:
            sequence.status, sequence.finish_reason = "finished", "length"
            return sequence
        most = self.limits.max_running + self.limits.max_queue
        if len(self._live) >= most:
            raise QueueFull(
                f"{len(self._live)} requests are live, and this server takes {most}; try again later"
            )
        self._num_added += 1
        self._num_prompt_tokens += sequence.num_prompt
        self._live[sequence.seq_id] = sequence
        insort(self._waiting, sequence, key=_rank)
        return sequence

    def _check_fits(self, request: Request) -> None:
        if request.request_id in self._live:
            raise InvalidRequest(f"a request with id {request.request_id!r} already runs", param="request_id")
        num_prompt = len(request.prompt)
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt")
        if num_prompt > self.limits.max_context:
            raise PromptTooLong(num_tokens=num_prompt, limit=self.limits.max_context)
        num_output = max(request.params.max_tokens, len(request.resume))
        total = num_prompt + num_output
        if total > self.limits.max_context:
            limit, remedy = f"context of this server is {self.limits.max_context}", ""
        elif not self.kv.can_ever_fit(total):
            limit = f"KV memory of this server holds {self.kv.capacity_tokens}"
            needed = "" if self._budget is None else f" ({self._budget.needed_for(total)} bytes)"
            remedy = f", or start the server with a larger --kv-memory{needed}"
        else:
            return
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens and max_tokens is {num_output}, {total} together, but the "
            f"{limit} tokens; lower max_tokens or shorten the prompt{remedy}",
            param="max_tokens",
            code=PromptTooLong.code,
        )

    def abort(self, seq_id: str, reason: FinishReason = "abort") -> Sequence | None:
        """End a sequence now and free its memory: the sequence, or None for an unknown or ended one.

        Allowed between ``schedule`` and ``commit``: the memory is not given to anybody before the next
        ``schedule``.
        """
        sequence = self._live.get(seq_id)
        if sequence is not None:
            # A step under way goes on writing to its state: what it would leave in the cache is not known.
            self._finish(sequence, reason, is_state_known=seq_id not in self._in_flight)
        return sequence

    def preempt(self, seq_id: str) -> bool:
        """Take the memory of a running sequence, between two steps; it goes on when it is its turn. False,
        and nothing changed, for one that does not run."""
        assert self._planned is None, "a step is under way"
        sequence = self._live.get(seq_id)
        if sequence is None or sequence.status != "running":
            return False
        self._preempt(sequence)
        return True

    def forget_weights(self, *, keeps_running: bool) -> None:
        """The weights change, between two steps. Running sequences wait and are computed again, or with
        ``keeps_running`` go on over rows of the old weights, which no other sequence will get."""
        assert self._planned is None, "a step is under way"
        for sequence in () if keeps_running else tuple(self._running):
            self._preempt(sequence)
        self.kv.keep_private()
        for sequence in self._waiting:  # what is being fetched for them is of the old weights
            self.kv.forget_fetch(sequence.seq_id)

    def set_drafts(self, seq_id: str, drafts: tuple[int, ...]) -> None:
        """Guesses at a sequence's next tokens: as many as there is room for are computed in the next step."""
        self._live[seq_id].drafts = drafts[: self.limits.max_draft]

    def sequence(self, seq_id: str) -> Sequence:
        """A live sequence. KeyError when there is none."""
        return self._live[seq_id]

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    # One step.

    def schedule(self) -> StepPlan | None:
        """The next step; commit it before asking for another. None when no sequence is live, or when all wait
        for the tiers (``kv.wait_for_fetches``)."""
        assert self._planned is None, "a step is planned but not committed"
        if not self._live:
            return None
        ready, preempted = self._secure_memory()
        admitted = [] if preempted else self._admit()
        ready += admitted
        parts = tuple(self._part(*share) for share in self._share_tokens(ready))
        if not parts:
            assert self.kv.is_fetching and not self._running, "sequences are live, but none can advance"
            return None
        plan = StepPlan(
            self._num_steps,
            parts,
            self.kv.take_moves(),
            tuple(s.seq_id for s in admitted),
            tuple(s.seq_id for s in preempted),
        )
        self._num_steps += 1
        self._planned = plan
        self._in_flight = {part.seq_id: self._live[part.seq_id] for part in parts}
        return plan

    def commit(self, plan: StepPlan, outputs: tuple[SequenceOutput, ...]) -> tuple[Sequence, ...]:
        """Take in what the step computed: one output per sequence that samples; any may end with an error.

        Sequences aborted meanwhile are passed over. Returns the sequences that ended with this step, in
        plan order.
        """
        assert plan is self._planned, "the step committed is not the one planned"
        by_id = {output.seq_id: output for output in outputs}
        finished = []
        for part in plan.sequences:
            sequence = self._in_flight[part.seq_id]
            if sequence.is_finished:
                continue
            end = part.end - len(part.drafts)
            is_decode = end == len(sequence.tokens) and end > sequence.num_prompt
            self._num_prefill_tokens += end - part.start - is_decode
            sequence.num_computed = end
            sequence.num_scored = max(sequence.num_scored, end)
            sequence.fold = max(sequence.fold, part.end - self.limits.max_draft)
            sequence.last_step = plan.step
            reason = self._take_output(sequence, part, by_id.get(part.seq_id))
            if reason is not None:
                self._finish(sequence, reason)
                finished.append(sequence)
                continue
            if part.drafts:
                self.kv.shrink(sequence.seq_id, max(sequence.num_computed, sequence.kept))
            if self.kv.is_stop(sequence.num_computed, sequence.num_prompt - 1):
                self.kv.snapshot(sequence.seq_id, _computed(sequence), sequence.fold)
        self._planned = None
        self._in_flight = {}
        return tuple(finished)

    def _take_output(
        self, sequence: Sequence, part: ScheduledSequence, output: SequenceOutput | None
    ) -> FinishReason | None:
        """Append the sampled tokens; the reason when the sequence ends here."""
        tokens = output.token_ids if output is not None else ()
        reason = output.finish_reason if output is not None else None
        if tokens:
            assert part.samples, f"{part.seq_id} got a token in a step that does not sample it"
            accepted = len(tokens) - 1
            assert tokens[:accepted] == part.drafts[:accepted], f"{part.seq_id} accepted what was no draft"
            sequence.tokens += tokens
            sequence.num_computed += accepted
            self._num_generated_tokens += len(tokens)
            self._count_drafts(len(part.drafts), accepted)
        sequence.drafts = ()
        assert not part.samples or tokens or reason is not None, f"{part.seq_id} samples but got no token"
        if reason is None and sequence.num_computed >= sequence.num_prompt and sequence.is_exhausted:
            return "length"
        return reason

    def _count_drafts(self, drafted: int, accepted: int) -> None:
        for place in range(drafted):
            self._drafted_at[place] += 1
            self._accepted_at[place] += place < accepted

    def _part(self, sequence: Sequence, num_tokens: int, num_drafts: int) -> ScheduledSequence:
        assert sequence.slot is not None
        is_last = num_tokens == sequence.num_remaining
        return ScheduledSequence(
            seq_id=sequence.seq_id,
            slot=sequence.slot,
            start=sequence.num_computed,
            num_tokens=num_tokens + num_drafts,
            fold=sequence.fold,
            page_ids=self.kv.page_ids(sequence.seq_id),
            samples=is_last and not sequence.is_exhausted,
            kept=sequence.kept,
            drafts=sequence.drafts[:num_drafts],
        )

    # Memory.

    def _secure_memory(self) -> tuple[list[Sequence], list[Sequence]]:
        """(running sequences that hold the page of their next token, by rank; sequences preempted for it)."""
        ready: list[Sequence] = []
        preempted: list[Sequence] = []
        for sequence in tuple(self._running):
            if sequence.status != "running":
                break  # preempted for an older one, and so are all after it
            while not (secured := self.kv.extend(sequence.seq_id, sequence.num_computed + 1)):
                youngest = self._running[-1]
                if youngest is sequence:
                    break
                self._preempt(youngest)
                preempted.append(youngest)
            if secured:
                ready.append(sequence)
        return ready, preempted

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.kv.release(sequence.seq_id, _computed(sequence), sequence.fold)
        sequence.status, sequence.slot, sequence.drafts = "waiting", None, ()
        sequence.num_computed = sequence.fold = sequence.kept = 0
        sequence.num_preemptions += 1
        self._num_preempted += 1
        insort(self._waiting, sequence, key=_rank)

    def _admit(self) -> list[Sequence]:
        """Admit waiting sequences in turn, each with a slot and the page of its next token."""
        admitted: list[Sequence] = []
        promised = 0  # pages of the first slices of those admitted now, beyond the pages they hold
        num_passed = 0
        for sequence in self._waiting[: self._max_running + _MAX_PASSED]:
            if len(self._running) >= self._max_running or num_passed == _MAX_PASSED:
                break
            limit = self._cache_limit(sequence)
            space = self._space(sequence.request.cache_salt)
            if not self.kv.is_ready(sequence.seq_id, sequence.tokens, space, limit) or (
                limit and self._is_computed_elsewhere(sequence, space, limit)
            ):
                num_passed += 1
                continue
            ahead = len(sequence.tokens) + 1 if sequence.num_preemptions else self.limits.max_step_tokens
            admission = self.kv.admit(
                sequence.seq_id, sequence.tokens, space, limit=limit, ahead=ahead, promised=promised
            )
            if admission is None:
                break
            promised += admission.promised
            self._start(sequence, admission)
            admitted.append(sequence)
        return admitted

    def _start(self, sequence: Sequence, admission: Admission) -> None:
        self._waiting.remove(sequence)
        sequence.status, sequence.slot, sequence.follows = "running", admission.slot, None
        sequence.num_computed, sequence.kept = admission.start, admission.kept
        sequence.fold = admission.fold
        if sequence.num_preemptions == 0:
            sequence.num_cached = min(admission.start, sequence.num_prompt)
        # As if just served: newcomers do not overtake decodes that wait for their turn.
        sequence.last_step = self._num_steps
        insort(self._running, sequence, key=_rank)

    def _cache_limit(self, sequence: Sequence) -> int:
        """How many of its tokens a sequence may take from the cache: its last known token has to be computed
        for the next one, and every token whose logits are still to be told."""
        most = len(sequence.tokens) - 1
        wants_scores = sequence.request.params.prompt_logprobs is not None
        return min(most, sequence.num_scored) if wants_scores else most

    def _is_computed_elsewhere(self, sequence: Sequence, space: bytes, limit: int) -> bool:
        """Whether a running sequence is about to leave more of this one's prefix in the cache than it has."""
        if not self.kv.policy.is_on:
            return False
        if sequence.follows is None:
            for leader in self._running:
                start, follows_to = self._gain_from(leader, sequence, limit)
                if start > leader.num_computed and start > self.kv.best_start(space, sequence.tokens, limit):
                    sequence.follows, sequence.follows_to = leader, follows_to
                    break
        ahead = sequence.follows
        if ahead is None or ahead.status != "running" or ahead.num_computed >= sequence.follows_to:
            sequence.follows = None
        return sequence.follows is not None

    def _gain_from(self, leader: Sequence, sequence: Sequence, limit: int) -> tuple[int, int]:
        """The position from which ``sequence`` could start once the prefill of ``leader`` has come to the
        second one."""
        ours, theirs, place = sequence.tokens, leader.tokens, leader.num_computed
        is_same_space = leader.request.cache_salt == sequence.request.cache_salt
        # A glance first: a whole comparison of long prompts is not for every pair in every step.
        if (
            leader.num_remaining == 1
            or not is_same_space
            or ours[place : place + 32] != theirs[place : place + 32]
        ):
            return 0, 0
        shared = common_length(ours, theirs, min(limit, len(theirs) - 1))
        return self.kv.gain(shared, leader.num_prompt - 1)

    # Tokens.

    def _share_tokens(self, ready: list[Sequence]) -> list[tuple[Sequence, int, int]]:
        """(sequence, known tokens, drafts of this step) of those that get any: decodes, then prefills, each
        by rank."""
        ready = sorted(ready, key=_rank)
        decodes = [s for s in ready if s.num_remaining == 1]
        prefills = [s for s in ready if s.num_remaining > 1]
        budget = self.limits.max_step_tokens
        room = budget - self._prefill_floor(decodes, prefills)
        if len(decodes) > room:
            chosen = sorted(decodes, key=lambda s: (s.last_step, s.rank))[:room]
            decodes = sorted(chosen, key=_rank)
        prefill = self._share_prefill(prefills, budget - len(decodes))
        left = budget - len(decodes) - sum(count for _, count in prefill)
        shares = []
        for sequence in decodes:
            num_drafts = self._grant_drafts(sequence, left)
            left -= num_drafts
            shares.append((sequence, 1, num_drafts))
        return shares + [(sequence, count, 0) for sequence, count in prefill]

    def _grant_drafts(self, sequence: Sequence, most: int) -> int:
        """How many of its drafts a decode computes: none takes a page from the cache, a token that could not
        be kept, or a step across the place of a snapshot."""
        if not sequence.drafts or sequence.is_exhausted:
            return 0
        start = sequence.num_computed
        stop = self._stop(sequence)
        count = min(
            len(sequence.drafts),
            most,
            sequence.request.params.max_tokens - sequence.num_generated - 1,
            self.kv.free_reach(sequence.seq_id) - start - 1,
            (stop if stop is not None else start + 1 + most) - start - 1,
        )
        count = max(0, count)
        assert self.kv.extend(sequence.seq_id, start + 1 + count)
        return count

    def _stop(self, sequence: Sequence) -> int | None:
        return self.kv.next_stop(sequence.seq_id, sequence.num_computed, sequence.num_prompt - 1)

    def _prefill_floor(self, decodes: list[Sequence], prefills: list[Sequence]) -> int:
        """Tokens that decodes leave to prefills."""
        budget = self.limits.max_step_tokens
        if not prefills or not decodes:
            return 0
        floor = max(1, budget // 8) if budget > 1 else self._num_steps % 2
        return min(floor, sum(s.num_remaining for s in prefills))

    def _share_prefill(self, prefills: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """Half of the budget by rank, the rest shortest first. Takes free pages, never another sequence's."""
        if not prefills or budget == 0:
            return []
        given = {s.seq_id: 0 for s in prefills}

        def give(sequence: Sequence, most: int) -> int:
            start = sequence.num_computed + given[sequence.seq_id]
            stop = self._stop(sequence)
            end = min(start + most, len(sequence.tokens), self.kv.reach(sequence.seq_id))
            end = end if stop is None else min(end, stop)
            assert self.kv.extend(sequence.seq_id, end)
            given[sequence.seq_id] += end - start
            return end - start

        by_rank = (budget + self._num_prefill_steps % 2) // 2
        left = budget - by_rank
        for sequence in prefills:
            by_rank -= give(sequence, by_rank)
        left += by_rank
        for sequence in sorted(prefills, key=lambda s: (s.num_remaining, s.rank)):
            left -= give(sequence, left)
        self._num_prefill_steps += 1
        return [(s, given[s.seq_id]) for s in prefills if given[s.seq_id]]

    # The end.

    def _finish(self, sequence: Sequence, reason: FinishReason, *, is_state_known: bool = True) -> None:
        if sequence.status == "running":
            self._running.remove(sequence)
            computed = _computed(sequence) if is_state_known else ()
            self.kv.release(sequence.seq_id, computed, sequence.fold)
        else:
            self._waiting.remove(sequence)
            self.kv.forget_fetch(sequence.seq_id)
        sequence.status, sequence.finish_reason, sequence.slot = "finished", reason, None
        del self._live[sequence.seq_id]

    def stats(self) -> EngineStats:
        """Counts and gauges now, without the weight version. Prompt tokens count on acceptance."""
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_preempted_total=self._num_preempted,
            num_steps_total=self._num_steps,
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_generated_tokens_total=self._num_generated_tokens,
            num_prefill_tokens_total=self._num_prefill_tokens,
            prefills=tuple(
                PrefillProgress(s.seq_id, s.num_computed, len(s.tokens))
                for s in self._running
                if s.num_remaining > 1
            ),
            pages_total=self.kv.num_pages,
            pages_free=self.kv.num_free_pages,
            pages_held=self.kv.num_held_pages,
            pages_cached=self.kv.num_cached_pages,
            slots_total=self.kv.num_slots,
            slots_free=self.kv.num_free_slots,
            slots_cached=self.kv.num_cached_slots,
            slots_held=self.kv.num_held_slots,
            cache=self._cache_counters(),
            drafts=DraftCounters(drafted_at=tuple(self._drafted_at), accepted_at=tuple(self._accepted_at)),
        )

    def _cache_counters(self) -> CacheCounters:
        pages, snapshots = self.kv.num_evicted
        return CacheCounters(
            lookup_tokens=self.kv.lookup_tokens,
            hit_tokens=dict(self.kv.hit_tokens),
            replayed_tokens=self.kv.replayed_tokens,
            evicted_pages=pages,
            evicted_snapshots=snapshots,
        )

    def check(self) -> None:
        """Assert what must hold between calls (tests and debugging)."""
        self.kv.check()
        assert self.kv.sequence_ids() == {s.seq_id for s in self._running}, (
            "memory is held by who does not run"
        )
        assert {s.seq_id for s in self._running + self._waiting} == set(self._live), "a live sequence is lost"
        for queue, status in ((self._running, "running"), (self._waiting, "waiting")):
            assert all(s.status == status for s in queue), f"a {status} sequence has another status"
            assert [s.rank for s in queue] == sorted(s.rank for s in queue), (
                f"{status} sequences are out of order"
            )
        for s in self._running:
            assert s.slot == self.kv.slot(s.seq_id), "a sequence and its cache disagree about the slot"
            longest = len(s.tokens) + (len(s.drafts) if s.seq_id in self._in_flight else 0)
            assert s.num_computed <= self.kv.length(s.seq_id) <= longest, "pages do not match the tokens"
            assert s.kept <= self.kv.length(s.seq_id), "rows that stand have no pages"
            assert s.num_computed - self.limits.max_draft <= s.fold <= s.num_computed, "the fold is off"


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _computed(sequence: Sequence) -> Beginning:
    return Beginning(sequence.tokens, sequence.num_computed)
