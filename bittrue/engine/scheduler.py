"""Decides who computes what in each step: continuous batching of decodes and chunked prefills, integers only.

Every sequence has a rank: (priority number, arrival), the smaller first. Plans are a function of the calls
made. With B = ``max_step_tokens``, a step is decided in three parts:

Memory. In rank order every running sequence secures the page of its next token. Where no page is free, the
*youngest* (last by rank) running sequence is preempted: as a rule it has computed least, so least is lost.
The youngest itself, when it asks in vain, keeps what it has and sits out the step. A preempted sequence
returns to its place by rank, before all that came after it, and is computed again from position 0 with the
tokens it has.
  The first by rank is never preempted, always gets its page, and fits the pool alone (``add`` checks it):
  it runs to its end, and then the next is first. So there is no livelock, and every request ends.

Admission, by rank and strictly in turn, while a slot is free and the pages of the first slice (at most B
tokens). One that was preempted waits for the pages of all its known tokens: with fewer it would take back
memory that older ones are growing into, and lose it again.
  Among equal priorities whoever runs is older than whoever waits, and nobody is overtaken.

Tokens. Decodes (one known token left) take one token each; prefills share the rest, P = B - decodes. When
the two want more than B, prefills keep a floor of B // 8 (at least 1; for B = 1 the two kinds take turns).
Where decodes do not all have room, those served longest ago go first: of D decodes with room for C, each is
served at least once in ceil(D / C) of the steps that serve decodes. Half of P (rounded up and down in turn)
goes to prefills by rank, the rest to those with fewest tokens left, and what one cannot use falls to the
next.
  While D <= B - floor no decode waits for a prefill.
  The first prefill by rank gets floor(P / 2) tokens a step or more: short prompts do not starve a long one.
  The one with fewest tokens left, n, gets as much: done in about 2 n / P steps, however long the others are.
  So whoever is first by rank advances at least once in max(4, 2 * max_running) steps.
"""

from bisect import insort
from dataclasses import dataclass

from bittrue.engine.plan import ScheduledSequence, SequenceOutput, StepPlan
from bittrue.engine.sequence import Sequence
from bittrue.engine.types import EngineStats, FinishReason, PrefillProgress, Request
from bittrue.errors import ConfigError, InvalidRequest, PromptTooLong, QueueFull
from bittrue.kv.layout import KVBudget, pages_for
from bittrue.kv.manager import KVManager


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

    def __init__(self, limits: SchedulerLimits, kv: KVManager, budget: KVBudget | None = None) -> None:
        """``budget`` says how large a KV memory must be for what ``add`` refuses (in its message)."""
        self.limits = limits
        self.kv = kv
        self._budget = budget
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
            self._finish(sequence, reason)
        return sequence

    def sequence(self, seq_id: str) -> Sequence:
        """A live sequence. KeyError when there is none."""
        return self._live[seq_id]

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    # One step.

    def schedule(self) -> StepPlan | None:
        """The next step, or None when no sequence is live. Commit it before asking for another."""
        assert self._planned is None, "a step is planned but not committed"
        if not self._live:
            return None
        ready, preempted = self._secure_memory()
        admitted = [] if preempted else self._admit()
        ready += admitted
        counts = self._share_tokens(ready)
        parts = tuple(self._part(sequence, num_tokens) for sequence, num_tokens in counts)
        assert parts, "sequences are live, but none can advance"
        plan = StepPlan(
            self._num_steps, parts, tuple(s.seq_id for s in admitted), tuple(s.seq_id for s in preempted)
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
            is_decode = part.end == len(sequence.tokens) and part.end > sequence.num_prompt
            self._num_prefill_tokens += part.num_tokens - is_decode
            sequence.num_computed = part.end
            sequence.fold = max(sequence.fold, part.end - self.limits.max_draft)
            sequence.last_step = plan.step
            reason = self._take_output(sequence, part, by_id.get(part.seq_id))
            if reason is not None:
                self._finish(sequence, reason)
                finished.append(sequence)
        self._planned = None
        self._in_flight = {}
        return tuple(finished)

    def _take_output(
        self, sequence: Sequence, part: ScheduledSequence, output: SequenceOutput | None
    ) -> FinishReason | None:
        """Append the sampled token; the reason when the sequence ends here."""
        token = output.token_id if output is not None else None
        reason = output.finish_reason if output is not None else None
        if token is not None:
            assert part.samples, f"{part.seq_id} got a token in a step that does not sample it"
            sequence.tokens.append(token)
            self._num_generated_tokens += 1
        assert not part.samples or token is not None or reason is not None, (
            f"{part.seq_id} samples but got no token"
        )
        if reason is None and sequence.num_computed >= sequence.num_prompt and sequence.is_exhausted:
            return "length"
        return reason

    def _part(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        assert sequence.slot is not None
        is_last = num_tokens == sequence.num_remaining
        return ScheduledSequence(
            seq_id=sequence.seq_id,
            slot=sequence.slot,
            start=sequence.num_computed,
            num_tokens=num_tokens,
            fold=sequence.fold,
            page_ids=self.kv.page_ids(sequence.seq_id),
            samples=is_last and not sequence.is_exhausted,
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
        self.kv.release(sequence.seq_id)
        sequence.status, sequence.slot = "waiting", None
        sequence.num_computed = sequence.fold = 0
        sequence.num_preemptions += 1
        self._num_preempted += 1
        insort(self._waiting, sequence, key=_rank)

    def _admit(self) -> list[Sequence]:
        """Admit waiting sequences in turn, each with a slot and its first page."""
        admitted: list[Sequence] = []
        promised = 0  # pages of the first slices of those admitted now, beyond the page they hold
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            needed = self._pages_to_start(sequence)
            if self.kv.num_free_pages - promised < needed:
                break
            slot = self.kv.admit(sequence.seq_id)
            assert slot is not None and self.kv.extend(sequence.seq_id, 1), "a free slot or page is missing"
            promised += needed - 1
            self._waiting.pop(0)
            sequence.status, sequence.slot = "running", slot
            # As if just served: newcomers do not overtake decodes that wait for their turn.
            sequence.last_step = self._num_steps
            insort(self._running, sequence, key=_rank)
            admitted.append(sequence)
        return admitted

    def _pages_to_start(self, sequence: Sequence) -> int:
        if sequence.num_preemptions:
            return min(pages_for(len(sequence.tokens) + 1), self.kv.num_pages)
        return pages_for(min(len(sequence.tokens), self.limits.max_step_tokens))

    # Tokens.

    def _share_tokens(self, ready: list[Sequence]) -> list[tuple[Sequence, int]]:
        """(sequence, tokens of this step) of those that get any: decodes, then prefills, each by rank."""
        ready = sorted(ready, key=_rank)
        decodes = [s for s in ready if s.num_remaining == 1]
        prefills = [s for s in ready if s.num_remaining > 1]
        budget = self.limits.max_step_tokens
        room = budget - self._prefill_floor(decodes, prefills)
        if len(decodes) > room:
            chosen = sorted(decodes, key=lambda s: (s.last_step, s.rank))[:room]
            decodes = sorted(chosen, key=_rank)
        shares = self._share_prefill(prefills, budget - len(decodes))
        return [(s, 1) for s in decodes] + shares

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
            end = min(start + most, len(sequence.tokens), self.kv.reach(sequence.seq_id))
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

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status == "running":
            self._running.remove(sequence)
            self.kv.release(sequence.seq_id)
        else:
            self._waiting.remove(sequence)
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
            slots_total=self.kv.num_slots,
            slots_free=self.kv.num_free_slots,
            slots_held=self.kv.num_held_slots,
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
            assert s.num_computed <= self.kv.length(s.seq_id) <= len(s.tokens), (
                "pages do not match the tokens"
            )
            assert s.num_computed - self.limits.max_draft <= s.fold <= s.num_computed, "the fold is off"


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
